"""/health for people, /livez and /readyz for orchestrators."""

from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from marketflow.api.context import context_of
from marketflow.api.openapi.operation import Operation, Tag
from marketflow.api.problems import ServiceUnavailable
from marketflow.api.rendering import JSONAnswer
from marketflow.health import Health


class Alive(msgspec.Struct, frozen=True):
    """It is."""

    status: Literal["ok"]


_STATUS = Tag("status", "How the application does.")


def status_operations() -> list[Operation]:
    """The operations of this module."""
    health = Operation(
        id="health",
        path="/health",
        endpoint=_health,
        tag=_STATUS,
        summary="How stores and exchanges do, for people",
        description="Always 200: `degraded` is an answer. Prices are given as long as one of the two stores is there.",
        answer=Health,
    )
    livez = Operation(
        id="alive",
        path="/livez",
        endpoint=_livez,
        tag=_STATUS,
        summary="Whether it is alive, for orchestrators",
        description="Without an answer it should be started again.",
        answer=Alive,
    )
    readyz = Operation(
        id="ready",
        path="/readyz",
        endpoint=_readyz,
        tag=_STATUS,
        summary="Whether it can answer queries, for orchestrators",
        description="While this is 503 it should be sent no requests.",
        answer=Alive,
        problems=(ServiceUnavailable,),
    )
    return [health, livez, readyz]


async def _health(request: Request) -> Response:
    # Always 200: degraded is an answer, and only /readyz takes an instance out of service.
    return JSONAnswer(context_of(request).health())


async def _livez(_: Request) -> Response:
    return JSONAnswer(Alive("ok"))


async def _readyz(request: Request) -> Response:
    if not context_of(request).ready():
        raise ServiceUnavailable("The application cannot answer queries yet.")
    return JSONAnswer(Alive("ok"))
