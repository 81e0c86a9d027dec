"""/mode: the current mode, and switching it."""

import secrets
from typing import Annotated

import msgspec
from loguru import logger
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from marketflow.api.context import Context, context_of
from marketflow.api.middleware.request_metrics import RequestMetrics
from marketflow.api.openapi.operation import Endpoint, Operation, Tag
from marketflow.api.problems import ServiceUnavailable, TooManyRequests, Unauthorized
from marketflow.api.rendering import JSONAnswer
from marketflow.errors import QuotaExceeded, Unavailable
from marketflow.logs import RateLimit
from marketflow.model import Mode


class RunningMode(msgspec.Struct, frozen=True):
    """The current mode."""

    mode: Mode


class SwitchedMode(msgspec.Struct, frozen=True):
    """The new mode and the previous one; both are the same if nothing changed."""

    mode: Mode
    previous: Annotated[Mode, Meta(description="The previous mode.", examples=["test"])]


_limit = RateLimit(10.0)

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
        description="Every later answer is about that mode. Switching to the current mode changes nothing.",
        answer=SwitchedMode,
        problems=(ServiceUnavailable, TooManyRequests),
        asks_for_token=True,
    )


async def _mode(request: Request) -> Response:
    return JSONAnswer(RunningMode(context_of(request).mode.current))


def _switch_to(mode: Mode, times: RequestMetrics) -> Endpoint:
    async def switch(request: Request) -> Response:
        context = context_of(request)
        _authorize(request, context, times)
        try:
            previous = await context.mode.switch(mode)
        except Unavailable:
            raise ServiceUnavailable("The mode cannot be switched now: no ingest process answers.") from None
        if previous is not mode:
            logger.info("mode switched to {} by {}, from {}", mode, client_of(request), previous)
        return JSONAnswer(SwitchedMode(mode, previous))

    return switch


def client_of(request: Request) -> str:
    """Return the address of the client."""
    return context_of(request).clients.of(request.scope)


def _authorize(request: Request, context: Context, times: RequestMetrics) -> None:
    """Check the token of a request, if one is configured.

    Raises:
        Unauthorized: the token is missing or wrong.
        QuotaExceeded: this client has sent too many wrong tokens; this one is not checked.
    """
    token = context.token
    if not token:
        return
    client = client_of(request)
    if wait := context.clients.guesses.wait(client):
        times.unauthorized.inc()
        raise QuotaExceeded(wait)
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Headers are bytes that Starlette shows as latin-1; a token is compared as the bytes of its UTF-8.
    matches = secrets.compare_digest(given.encode("latin-1").strip(b" "), token.encode("utf-8", "surrogateescape"))
    if scheme.lower() != "bearer" or not matches:
        times.unauthorized.inc()
        context.clients.guesses.take(client, 1.0)
        _limit.log("unauthorized", "WARNING", f"mode not switched: no valid token from {client}")
        raise Unauthorized("Switching the mode needs the configured bearer token.")
