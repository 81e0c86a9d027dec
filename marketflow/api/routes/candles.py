"""/candles: open, high, low and close by interval, on one exchange, over all, or of the reference."""

from collections.abc import Callable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from marketflow.api.context import context_of
from marketflow.api.openapi.operation import Exchange, Operation, Symbol
from marketflow.api.problems import UnknownExchange
from marketflow.api.queries.candle_parameters import (
    CANDLE_QUERY,
    FORMAT,
    InvalidFormat,
    parse_query,
    wants_arrays,
)
from marketflow.api.queries.candles import Combine
from marketflow.api.queries.path_parameters import path_parameters_of
from marketflow.api.queries.reference import reference_candles
from marketflow.api.routes.charting.candle_objects import CandleAnswer, Interval, candle_objects, with_vwap_of_all
from marketflow.api.routes.charting.candle_values import (
    CANDLE_PROBLEMS,
    CANDLES,
    MAX_AGE_SECONDS,
    cached_answer,
)
from marketflow.api.routes.charting.klines import klines_of
from marketflow.clock import milliseconds
from marketflow.model import REFERENCE, merge_all


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
    return ReferenceCandlesAnswer(symbol, REFERENCE, interval, [*map(with_vwap_of_all, candles)])


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
    objects = candle_objects(rows, await context.known_holes.spans(parameters.series))
    return cached_answer(request, answer_of(parameters.symbol, parameters.exchange, interval, objects), rows)
