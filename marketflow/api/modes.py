"""/mode: which mode runs, and switching it."""

import secrets
from collections.abc import Awaitable, Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from marketflow.api.context import context_of
from marketflow.api.problems import Unauthorized, unavailable
from marketflow.api.rendering import JSONAnswer
from marketflow.errors import Unavailable
from marketflow.model import Mode


class RunningMode(msgspec.Struct, frozen=True):
    """The answer of GET /mode."""

    mode: Mode


class SwitchedMode(msgspec.Struct, frozen=True):
    """The answer of POST /mode/test and /mode/live; both are the same where that mode ran already."""

    mode: Mode
    previous: Mode


def mode_routes() -> list[Route]:
    """/mode, and a route for each mode to switch to, so that any other name is simply not found."""
    switches = [Route(f"/mode/{mode}", _switch_to(mode), methods=["POST"]) for mode in Mode]
    return [Route("/mode", _mode), *switches]


async def _mode(request: Request) -> Response:
    return JSONAnswer(RunningMode(context_of(request).mode.current))


def _switch_to(mode: Mode) -> Callable[[Request], Awaitable[Response]]:
    async def switch(request: Request) -> Response:
        context = context_of(request)
        _authorize(request, context.token)
        try:
            previous = await context.mode.switch(mode)
        except Unavailable:
            return unavailable("The mode cannot be switched at the moment: nobody is there to do it.")
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
