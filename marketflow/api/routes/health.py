"""/health, and the probes /livez and /readyz."""

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
    """The process is alive or ready."""

    status: Literal["ok"]


_STATUS = Tag("status", "Health of the application.")


def status_operations() -> list[Operation]:
    """The operations of this module."""
    health = Operation(
        id="health",
        path="/health",
        endpoint=_health,
        tag=_STATUS,
        summary="Health of stores and exchanges",
        description="Always 200, also while `degraded`. Prices are served while one store is available.",
        answer=Health,
    )
    livez = Operation(
        id="alive",
        path="/livez",
        endpoint=_livez,
        tag=_STATUS,
        summary="Liveness probe",
        description="A process that does not answer should be restarted.",
        answer=Alive,
    )
    readyz = Operation(
        id="ready",
        path="/readyz",
        endpoint=_readyz,
        tag=_STATUS,
        summary="Readiness probe",
        description="While this is 503, no requests should be routed here.",
        answer=Alive,
        problems=(ServiceUnavailable,),
    )
    return [health, livez, readyz]


async def _health(request: Request) -> Response:
    # Always 200: only /readyz takes an instance out of service.
    return JSONAnswer(context_of(request).health())


async def _livez(_: Request) -> Response:
    return JSONAnswer(Alive("ok"))


async def _readyz(request: Request) -> Response:
    if not context_of(request).ready():
        raise ServiceUnavailable("The application cannot answer queries yet.")
    return JSONAnswer(Alive("ok"))
