"""/mode: which mode runs, and switching it."""

import secrets
from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from marketflow.api.context import context_of
from marketflow.api.operation import Endpoint, Operation, Tag
from marketflow.api.problems import TryAgain, Unauthorized
from marketflow.api.rendering import JSONAnswer
from marketflow.errors import Unavailable
from marketflow.model import Mode


class RunningMode(msgspec.Struct, frozen=True):
    """The mode that runs."""

    mode: Mode


class SwitchedMode(msgspec.Struct, frozen=True):
    """The mode that runs from now on, and the one before; both are the same where nothing had to change."""

    mode: Mode
    previous: Annotated[Mode, Meta(description="The one that ran before.", examples=["test"])]


_MODE = Tag("mode", "Generated prices (`test`) or those of the exchanges (`live`). Data of the two never mix.")


def mode_operations() -> list[Operation]:
    """/mode, and an operation for each mode to switch to, so that any other name is simply not found."""
    running = Operation(
        id="mode",
        path="/mode",
        endpoint=_mode,
        tag=_MODE,
        summary="Which mode runs",
        answer=RunningMode,
    )
    return [running, *map(_switching_to, Mode)]


def _switching_to(mode: Mode) -> Operation:
    return Operation(
        id=f"switchTo{mode.capitalize()}",
        method="POST",
        path=f"/mode/{mode}",
        endpoint=_switch_to(mode),
        tag=_MODE,
        summary=f"Switch to {mode} mode",
        description="Every answer after this one is about that mode. Switching to the mode that runs changes nothing.",
        answer=SwitchedMode,
        problems=(TryAgain,),
        asks_for_token=True,
    )


async def _mode(request: Request) -> Response:
    return JSONAnswer(RunningMode(context_of(request).mode.current))


def _switch_to(mode: Mode) -> Endpoint:
    async def switch(request: Request) -> Response:
        context = context_of(request)
        _authorize(request, context.token)
        try:
            previous = await context.mode.switch(mode)
        except Unavailable:
            raise TryAgain("The mode cannot be switched at the moment: nobody is there to do it.") from None
        return JSONAnswer(SwitchedMode(mode, previous))

    return switch


def _authorize(request: Request, token: str) -> None:
    """Let the request pass if no token is configured or it carries that token.

    Raises:
        Unauthorized: it does not.
    """
    if not token:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Headers are bytes that Starlette shows as latin-1; a token is compared as the bytes of its UTF-8.
    matches = secrets.compare_digest(given.encode("latin-1").strip(b" "), token.encode("utf-8", "surrogateescape"))
    if scheme.lower() != "bearer" or not matches:
        raise Unauthorized("Switching the mode needs the configured bearer token.")
