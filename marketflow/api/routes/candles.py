"""/candles: open, high, low and close by interval, on one exchange, over all, or of the reference."""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, structs
from starlette.requests import Request
from starlette.responses import Response

from marketflow.api.context import context_of
from marketflow.api.openapi.operation import Exchange, Operation, Symbol
from marketflow.api.problems import UnknownExchange
from marketflow.api.queries.boundaries import INTERVALS
from marketflow.api.queries.candle_parameters import (
    CANDLE_QUERY,
    FORMAT,
    InvalidFormat,
    parse_query,
    wants_arrays,
)
from marketflow.api.queries.candles import CandleRows, Combine
from marketflow.api.queries.known_holes import Span, touched
from marketflow.api.queries.path_parameters import path_parameters_of
from marketflow.api.queries.reference import reference_candles
from marketflow.api.rendering import Time, rfc3339
from marketflow.api.routes.charting.candle_values import (
    CANDLE_PROBLEMS,
    CANDLES,
    MAX_AGE_SECONDS,
    UNKNOWN,
    Amount,
    Price,
    cached_answer,
    number_of_ticks,
    traded,
)
from marketflow.api.routes.charting.klines import klines_of
from marketflow.clock import milliseconds
from marketflow.model import REFERENCE, Source, merge_all

Interval = Annotated[str, Meta(description="Length of a candle.", extra_json_schema={"enum": [*INTERVALS]})]


class VenueCandle(msgspec.Struct, frozen=True, rename={"opening": "open"}):
    """A minute as the venue has it; null is what it does not say."""

    opening: Price
    high: Price
    low: Price
    close: Price
    volume: Amount | None
    turnover: Amount | None
    ticks: int | None


class CandleAnswer(msgspec.Struct, frozen=True, rename={"opening": "open"}):
    """The ticks of one interval."""

    time: Annotated[Time, Meta(description="Opening time; identifies the candle.")]
    opening: Annotated[Price, Meta(description="The first price.")]
    high: Annotated[Price, Meta(description="The highest price.")]
    low: Annotated[Price, Meta(description="The lowest price.")]
    close: Annotated[Price, Meta(description="The last price; the newest one in the running candle.")]
    average: Annotated[Price | None, Meta(description=f"The mean of all ticks; {UNKNOWN}")]
    ticks: Annotated[
        Annotated[int, Meta(ge=0)] | None, Meta(description=f"Number of ticks or trades; {UNKNOWN}", examples=[5580])
    ]
    volume: Annotated[Amount | None, Meta(description=f"What was traded, in the base currency; {UNKNOWN}")]
    turnover: Annotated[Amount | None, Meta(description=f"The same in the quote currency; {UNKNOWN}")]
    vwap: Annotated[Price | None, Meta(description="Turnover by volume: the mean price of what was traded, or null.")]
    buy_volume: Annotated[Amount | None, Meta(description=f"The part of the volume that takers bought; {UNKNOWN}")]
    buy_turnover: Annotated[Amount | None, Meta(description=f"The same of the turnover; {UNKNOWN}")]
    closed: Annotated[bool, Meta(description="True once no tick that would be accepted can change it.")]
    version: Annotated[int, Meta(ge=1, description="Raised by each correction of a closed candle.", examples=[1])]
    source: Annotated[Source, Meta(description="Made of ticks, or the venue's own candle (of several, if any is).")]
    complete: Annotated[
        bool | None,
        Meta(
            description="False where trades are known to be missing, see `/holes`; true where the venue's own candles "
            "are the same; else null."
        ),
    ]
    verified: Annotated[
        bool | None, Meta(description="Whether the venue's own candles are the same; null while that is unknown.")
    ]
    venue: Annotated[VenueCandle | None, Meta(description="The venue's own candle of a minute that differs from it.")]
    filled: Annotated[bool, Meta(description="True where there was no tick, and `fill` asked for the close before.")]


class CandlesAnswer(msgspec.Struct, frozen=True):
    """Candles in order of time; those without ticks are absent."""

    symbol: Symbol
    exchange: Annotated[Exchange | None, Meta(description="Null over all exchanges.")]
    interval: Interval
    candles: list[CandleAnswer]


class ReferenceCandlesAnswer(msgspec.Struct, frozen=True):
    """Candles of the reference price in order of time; those without ticks are absent."""

    symbol: Symbol
    exchange: Literal["reference"]
    interval: Interval
    candles: list[CandleAnswer]


def candle_operations() -> list[Operation]:
    """Return the candle operations, over all exchanges, of the reference price, and on one exchange."""
    over_all = Operation(
        id="candles",
        path="/candles/{symbol}",
        endpoint=_candles,
        tag=CANDLES,
        summary="Candles over all exchanges",
        description=(
            "The oldest first. Intervals without ticks are absent, and without any the list is empty. The running "
            "candle has the newest tick, as `/prices/latest` has. A range with `from` and `to` that is over, and has "
            f"been for ten minutes, may be cached for {MAX_AGE_SECONDS} s and has an `ETag`. The mode "
            "is not part of the path: revalidate after switching it. With `format=array`, an alias for older clients, "
            "the answer is that of `/klines`."
        ),
        answer=CandlesAnswer,
        query=CANDLE_QUERY,
        aliases=(FORMAT,),
        problems=(*CANDLE_PROBLEMS, InvalidFormat),
        may_be_kept=True,
    )
    of_reference = replace(
        over_all,
        id="referenceCandles",
        path=f"/candles/{REFERENCE}/{{symbol}}",
        endpoint=_reference_candles,
        summary="Candles of the reference price",
        description=(
            "As those over all exchanges, but open, high, low, close and average are the medians of those of the "
            "exchanges: no candle opens on one exchange and closes on another. All else is that of all exchanges."
        ),
        answer=ReferenceCandlesAnswer,
    )
    on_one = replace(
        over_all,
        id="candlesOnExchange",
        path="/candles/{exchange}/{symbol}",
        summary="Candles on one exchange",
        problems=(UnknownExchange, *over_all.problems),
    )
    return [over_all, of_reference, on_one]


async def _candles(request: Request) -> Response:
    return await _answer(request, merge_all, CandlesAnswer)


async def _reference_candles(request: Request) -> Response:
    return await _answer(request, reference_candles, _of_reference)


def _of_reference(symbol: str, _: str | None, interval: str, candles: list[CandleAnswer]) -> ReferenceCandlesAnswer:
    return ReferenceCandlesAnswer(symbol, REFERENCE, interval, [*map(_with_vwap_of_all, candles)])


def _with_vwap_of_all(candle: CandleAnswer) -> CandleAnswer:
    # A candle keeps its vwap between its low and high, which are medians here: that of all trades may lie outside.
    if candle.turnover is None or not candle.volume:
        return candle
    return structs.replace(candle, vwap=candle.turnover / candle.volume)


async def _answer(
    request: Request,
    combine: Combine,
    answer_of: Callable[[str, str | None, str, list[CandleAnswer]], msgspec.Struct],
) -> Response:
    context = context_of(request)
    parameters = path_parameters_of(request, context)
    context.clients.attribute_to(request.scope)
    given: bytes = request.scope["query_string"]
    interval, wanted = parse_query(given, milliseconds(context.prices.clock()))
    as_arrays = wants_arrays(given)
    rows = await context.prices.candles(parameters.series, wanted, combine)
    if as_arrays:
        return cached_answer(request, await klines_of(rows, context, parameters.series), rows)
    objects = _objects(rows, await context.known_holes.spans(parameters.series))
    return cached_answer(request, answer_of(parameters.symbol, parameters.exchange, interval, objects), rows)


def _objects(rows: CandleRows, holes: list[Span]) -> list[CandleAnswer]:
    incomplete = touched(holes, [*rows.candles], rows.grid.end_of)
    return [
        CandleAnswer(
            rfc3339(start),
            candle.open,
            candle.high,
            candle.low,
            candle.close,
            candle.average,
            number_of_ticks(rows, start),
            *traded(rows, start, incomplete),
            rows.closed(start),
            candle.version,
            candle.source,
            False if start in incomplete else candle.verified or None,
            candle.verified,
            None if candle.venue is None else VenueCandle(*structs.astuple(candle.venue)),
            start in rows.filled,
        )
        for start, candle in rows.candles.items()
    ]
