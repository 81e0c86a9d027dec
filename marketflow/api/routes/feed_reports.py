"""/feeds: state, delay and rate of each feed and series; /holes: trades that are missing."""

from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from marketflow.api.context import context_of
from marketflow.api.openapi.operation import Exchange, Operation, Symbol, Tag
from marketflow.api.problems import ServiceUnavailable, TooManyRequests, UnknownExchange, UnknownSymbol
from marketflow.api.queries.candle_parameters import InvalidLimit, InvalidRange
from marketflow.api.queries.feed_parameters import (
    FEEDS_QUERY,
    HOLES_QUERY,
    InvalidOffset,
    InvalidState,
    feeds_query,
    holes_query,
)
from marketflow.api.rendering import JSONAnswer, Time, rfc3339
from marketflow.clock import milliseconds
from marketflow.cluster.messages import ExchangeReport, SeriesReport
from marketflow.model import FeedState, Hole, HoleState, Mode

Rate = Annotated[float, Meta(ge=0, description="Ticks a second over the last minute or so.", examples=[42.6])]
Doubles = Annotated[
    int | None,
    Meta(description="Trades that came more than once and counted once, since the start; null without ids."),
]
Holes = Annotated[
    dict[HoleState, int] | None,
    Meta(
        description="Number of holes by state, all open ones and others of the last 24 hours, see `/holes`; null "
        "without ids."
    ),
]
Delay = Annotated[float, Meta(ge=0, description="In ms.", examples=[23.4])]
TradeId = Annotated[str, Meta(pattern="^-?[0-9]+$", examples=["5012345678"])]


class RestWeight(msgspec.Struct, frozen=True):
    """Weight of REST calls in the current interval of a venue: used by this process, and at most."""

    used: int
    limit: int


class DelayPercentiles(msgspec.Struct, frozen=True):
    """Delay from event to receipt over the last minute or so, by the clocks of the exchange and this machine."""

    p50: Delay
    p99: Delay


class ExchangeFeed(msgspec.Struct, frozen=True):
    """The feed of one exchange. What is unknown is null."""

    exchange: Exchange
    state: FeedState
    address: Annotated[str, Meta(description="Where it connects, without credentials.")]
    ticks_per_second: Rate
    doubles: Doubles
    holes: Holes
    reconnects: Annotated[int, Meta(ge=0, description="Connections lost, and failed attempts, since the start.")]
    clock_offset_ms: Annotated[
        int | None, Meta(description="How far the clock of the exchange is ahead of this machine's.")
    ]
    rest_weight: RestWeight | None
    error: Annotated[str | None, Meta(description="The last error, however old.")]
    error_at: Time | None
    next_try_at: Annotated[Time | None, Meta(description="When the next attempt begins, or has begun.")]
    absent: Annotated[tuple[str, ...], Meta(description="Symbols that the venue does not list, or refuses.")]
    halted: Annotated[tuple[str, ...], Meta(description="Symbols that it lists and does not trade now.")]


class SeriesFeed(msgspec.Struct, frozen=True):
    """One symbol on one exchange. What is unknown is null."""

    exchange: Exchange
    symbol: Symbol
    state: Annotated[
        str,
        Meta(
            description="That of the exchange; `absent`, `halted`, or `unsent`: the venue has trades and sends none.",
            extra_json_schema={"enum": [*(state.value for state in FeedState), "absent", "unsent"]},
        ),
    ]
    price: Annotated[float | None, Meta(description="The newest price.")]
    timestamp: Annotated[Time | None, Meta(description="Event time of the newest price.")]
    delay_ms: DelayPercentiles | None
    ticks_per_second: Rate
    doubles: Doubles
    holes: Holes


class FeedsAnswer(msgspec.Struct, frozen=True):
    """The feeds of the mode that runs."""

    mode: Mode
    exchanges: list[ExchangeFeed]
    series: Annotated[list[SeriesFeed], Meta(description="In the order of the exchanges, then of the symbols.")]
    next_offset: Annotated[int | None, Meta(description="The `offset` of the next page; null on the last one.")]


class HoleAnswer(msgspec.Struct, frozen=True, rename={"since": "from", "until": "to"}):
    """Trades of a series that were not received: those with ids between two that were."""

    exchange: str
    symbol: str
    after_id: Annotated[TradeId, Meta(description="Id of the received trade before it.")]
    before_id: Annotated[TradeId, Meta(description="Id of the received trade after it.")]
    since: Annotated[Time, Meta(description="Event time of the trade before it.")]
    until: Annotated[Time, Meta(description="Event time of the trade after it.")]
    state: Annotated[
        HoleState,
        Meta(
            description="`open`: to be filled; `filled`; `absent`: the venue has no trades with these ids; `given_up`: "
            "they cannot be fetched any more."
        ),
    ]
    reason: Annotated[str, Meta(description="Why, in words.")]
    found_at: Time
    changed_at: Annotated[Time, Meta(description="Since when it is in this state.")]


class HolesAnswer(msgspec.Struct, frozen=True):
    """Holes of the mode that runs, the newest first."""

    mode: Mode
    holes: list[HoleAnswer]


FEEDS = Tag("feeds", "State of the feeds, and trades that are missing.")


def feed_operations() -> list[Operation]:
    """The operations of this module."""
    feeds = Operation(
        id="feeds",
        path="/feeds",
        endpoint=_feeds,
        tag=FEEDS,
        summary="State, delay and rate of every feed",
        description="One entry for each exchange, and one for each of its symbols, by page.",
        answer=FeedsAnswer,
        query=FEEDS_QUERY,
        problems=(UnknownExchange, UnknownSymbol, InvalidLimit, InvalidOffset, ServiceUnavailable, TooManyRequests),
    )
    holes = Operation(
        id="holes",
        path="/holes",
        endpoint=_holes,
        tag=FEEDS,
        summary="Trades that are missing",
        description="Found by the ids of a venue, the newest first; kept as long as minutes.",
        answer=HolesAnswer,
        query=HOLES_QUERY,
        problems=(
            UnknownExchange,
            UnknownSymbol,
            InvalidState,
            InvalidRange,
            InvalidLimit,
            ServiceUnavailable,
            TooManyRequests,
        ),
    )
    return [feeds, holes]


async def _feeds(request: Request) -> Response:
    context = context_of(request)
    query = feeds_query(request.query_params, context.names)
    context.clients.attribute_to(request.scope)
    context.clients.charge(query.limit)
    report = await context.feeds(query)
    seen = query.offset + len(report.series)
    answer = FeedsAnswer(
        report.mode,
        [_exchange(each) for each in report.exchanges],
        [_series(each) for each in report.series],
        seen if report.series and seen < report.total else None,
    )
    return JSONAnswer(answer)


async def _holes(request: Request) -> Response:
    context = context_of(request)
    mode = context.mode.current
    query = holes_query(request.query_params, context.names, mode, milliseconds(context.prices.clock()))
    context.clients.attribute_to(request.scope)
    context.clients.charge(query.limit)
    return JSONAnswer(HolesAnswer(mode, [_hole(hole) for hole in await context.holes.holes(query)]))


def _exchange(report: ExchangeReport) -> ExchangeFeed:
    used, limit = report.rest_weight_used, report.rest_weight_limit
    return ExchangeFeed(
        report.exchange,
        report.state,
        report.address,
        round(report.ticks_per_second, 2),
        report.doubles,
        report.holes,
        report.reconnects,
        report.clock_offset_ms,
        None if used is None or limit is None else RestWeight(used, limit),
        report.error,
        _time(report.error_at),
        _time(report.next_try_at),
        report.absent,
        report.halted,
    )


def _series(report: SeriesReport) -> SeriesFeed:
    p50, p99 = report.delay_p50_ms, report.delay_p99_ms
    return SeriesFeed(
        report.exchange,
        report.symbol,
        report.state,
        report.price,
        _time(report.at),
        None if p50 is None or p99 is None else DelayPercentiles(p50, p99),
        round(report.ticks_per_second, 2),
        report.doubles,
        report.holes,
    )


def _hole(hole: Hole) -> HoleAnswer:
    return HoleAnswer(
        hole.series.exchange,
        hole.series.symbol,
        str(hole.after_id),
        str(hole.before_id),
        rfc3339(hole.from_ms),
        rfc3339(hole.to_ms),
        hole.state,
        hole.reason,
        rfc3339(hole.found_at),
        rfc3339(hole.changed_at),
    )


def _time(at: int | None) -> str | None:
    return None if at is None else rfc3339(at)
