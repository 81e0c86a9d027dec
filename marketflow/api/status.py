"""/health for people, /livez and /readyz for orchestrators."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from marketflow.api.context import context_of
from marketflow.api.problems import unavailable
from marketflow.api.rendering import JSONAnswer


class Alive(msgspec.Struct, frozen=True):
    """The answer of /livez and /readyz."""

    status: str = "ok"


def status_routes() -> list[Route]:
    """The routes of this module."""
    return [Route("/health", _health), Route("/livez", _livez), Route("/readyz", _readyz)]


async def _health(request: Request) -> Response:
    # Always 200: degraded is an answer, and only /readyz takes an instance out of service.
    return JSONAnswer(context_of(request).health())


async def _livez(_: Request) -> Response:
    return JSONAnswer(Alive())


async def _readyz(request: Request) -> Response:
    if context_of(request).ready():
        return JSONAnswer(Alive())
    return unavailable("The application cannot answer queries yet.")
