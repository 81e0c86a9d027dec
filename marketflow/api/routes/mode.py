"""/mode: the current mode, and switching it."""

from typing import Annotated

import msgspec
from loguru import logger
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from marketflow.api.authorization import authorize, client_of
from marketflow.api.context import context_of
from marketflow.api.middleware.request_metrics import RequestMetrics
from marketflow.api.openapi.operation import Endpoint, Operation, Tag
from marketflow.api.problems import ServiceUnavailable, TooManyRequests
from marketflow.api.rendering import JSONAnswer
from marketflow.errors import Unavailable
from marketflow.health import ModeUnconfirmed
from marketflow.model import Mode


class RunningMode(msgspec.Struct, frozen=True):
    """The current mode."""

    mode: Mode


class SwitchedMode(msgspec.Struct, frozen=True):
    """The new mode and the previous one; both are the same if nothing changed."""

    mode: Mode
    previous: Annotated[Mode, Meta(description="The previous mode.", examples=["test"])]


_MODE = Tag("mode", "Generated prices (`test`) or those of the exchanges (`live`). Data of the two never mix.")


def mode_operations(times: RequestMetrics) -> list[Operation]:
    """Return the operations; each mode has a path of its own, so that any other name is a 404."""
    running = Operation(
        id="mode",
        path="/mode",
        endpoint=_mode,
        tag=_MODE,
        summary="The current mode",
        answer=RunningMode,
    )
    return [running, *(_switching_to(mode, times) for mode in Mode)]


def _switching_to(mode: Mode, times: RequestMetrics) -> Operation:
    return Operation(
        id=f"switchTo{mode.capitalize()}",
        method="POST",
        path=f"/mode/{mode}",
        endpoint=_switch_to(mode, times),
        tag=_MODE,
        summary=f"Switch to {mode} mode",
        description="Every later answer is about that mode. Switching to the current mode changes nothing. Where "
        "several processes ingest, all confirm it: if one does not, the answer is 503 and names its shards, and it "
        "adopts the mode when it can.",
        answer=SwitchedMode,
        problems=(ServiceUnavailable, TooManyRequests),
        asks_for_token=True,
    )


async def _mode(request: Request) -> Response:
    return JSONAnswer(RunningMode(context_of(request).mode.current))


def _switch_to(mode: Mode, times: RequestMetrics) -> Endpoint:
    async def switch(request: Request) -> Response:
        context = context_of(request)
        authorize(request, times, "mode not switched", "Switching the mode needs the configured bearer token.")
        try:
            previous = await context.mode.switch(mode)
        except ModeUnconfirmed as error:
            text = f"The mode is set to {mode}, but not yet adopted by the owners of {', '.join(error.shards)}."
            logger.warning("mode switch not confirmed mode={} shards={}", mode, ",".join(error.shards))
            raise ServiceUnavailable(text) from None
        except Unavailable:
            raise ServiceUnavailable("The mode cannot be switched now: no ingest process answers.") from None
        if previous is not mode:
            logger.info("mode switched to {} by {}, from {}", mode, client_of(request), previous)
        return JSONAnswer(SwitchedMode(mode, previous))

    return switch
