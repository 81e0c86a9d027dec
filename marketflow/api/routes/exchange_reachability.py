"""/feeds/reachability: whether the exchanges of the live mode accept a connection, whatever mode runs."""

from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from marketflow.api.context import context_of
from marketflow.api.openapi.operation import Exchange, Operation
from marketflow.api.problems import TooManyRequests
from marketflow.api.rendering import JSONAnswer
from marketflow.api.routes.feed_reports import FEEDS

COST = 1000
"""What an attempt is charged, as that many candles are: connections are made for it."""


class ExchangeReachability(msgspec.Struct, frozen=True):
    """Whether one exchange accepts a connection."""

    exchange: Exchange
    address: Annotated[str, Meta(description="Where it was tried, without credentials.")]
    reachable: bool
    error: Annotated[str | None, Meta(description="Why not; null if it is reachable.", examples=["Connection refused"])]


class ReachabilityAnswer(msgspec.Struct, frozen=True):
    """One entry per exchange, in the order of the settings."""

    exchanges: list[ExchangeReachability]


def reachability_operation() -> Operation:
    """The operation of this module."""
    return Operation(
        id="reachability",
        path="/feeds/reachability",
        endpoint=_reachability,
        tag=FEEDS,
        summary="Which exchanges accept a connection",
        description="A connection to each configured exchange is opened and closed, from the process that answers, at "
        "most once in 5 seconds; what would be known in live mode is so known before a switch. Takes up to 3 seconds.",
        answer=ReachabilityAnswer,
        problems=(TooManyRequests,),
    )


async def _reachability(request: Request) -> Response:
    context = context_of(request)
    context.clients.attribute_to(request.scope)
    context.clients.charge(COST)
    found = await context.reachability()
    return JSONAnswer(
        ReachabilityAnswer(
            [ExchangeReachability(each.exchange, each.address, each.error is None, each.error) for each in found]
        )
    )
