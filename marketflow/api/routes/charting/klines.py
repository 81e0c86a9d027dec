"""/klines: candles as the arrays of Binance's klines."""

from collections.abc import Container, Sequence
from decimal import Decimal
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from marketflow.api.context import Context, context_of
from marketflow.api.openapi.operation import EXCHANGE_SCHEMA, SYMBOL_SCHEMA, Operation, Parameter
from marketflow.api.problems import UnknownExchange
from marketflow.api.queries.candle_parameters import (
    BINANCE_QUERY,
    CANDLE_QUERY,
    InvalidFill,
    parse_binance_query,
    parse_query,
)
from marketflow.api.queries.candles import CandleRequest, CandleRows, Combine
from marketflow.api.queries.known_holes import touched
from marketflow.api.queries.path_parameters import PathParameters, path_parameters, path_parameters_of
from marketflow.api.queries.reference import reference_candles
from marketflow.api.routes.charting.candle_values import (
    CANDLE_PROBLEMS,
    CANDLES,
    MAX_AGE_SECONDS,
    UNKNOWN,
    cached_answer,
    number_of_ticks,
    traded,
)
from marketflow.clock import milliseconds
from marketflow.model import REFERENCE, Series, merge_all

_SYMBOL = Parameter("symbol", "A configured symbol.", SYMBOL_SCHEMA, required=True)
_EXCHANGE = Parameter("exchange", "One exchange, or `reference`; without it, all.", EXCHANGE_SCHEMA)

Decimals = Annotated[str, Meta(pattern=r"^[0-9]+(\.[0-9]+)?$", examples=["67432.14"])]


class Kline(msgspec.Struct, frozen=True, array_like=True):
    """A candle in the order of Binance's klines."""

    open_time: Annotated[int, Meta(description="Opening time in Unix ms.")]
    open: Decimals
    high: Decimals
    low: Decimals
    close: Decimals
    volume: Annotated[Decimals | None, Meta(description=f"In the base currency; {UNKNOWN}")]
    close_time: Annotated[int, Meta(description="Last millisecond in Unix ms.")]
    quote_volume: Annotated[Decimals | None, Meta(description=f"In the quote currency; {UNKNOWN}")]
    trades: Annotated[int | None, Meta(description=f"Number of ticks or trades, 0 in a filled one; {UNKNOWN}")]
    taker_volume: Annotated[Decimals | None, Meta(description=f"Bought by takers; {UNKNOWN}")]
    taker_quote_volume: Annotated[Decimals | None, Meta(description=f"Bought by takers; {UNKNOWN}")]
    ignored: Literal["0"] = "0"


def kline_operations() -> list[Operation]:
    """Return the operations of this module, over all exchanges, of the reference price, and on one exchange."""
    over_all = Operation(
        id="klines",
        path="/klines/{symbol}",
        endpoint=_over_exchanges,
        tag=CANDLES,
        summary="Binance's klines over all exchanges",
        description=(
            "The candles of `/candles`, each as an array in the order of Binance's klines; null is an amount that is "
            f"unknown. A range that is over may be cached for {MAX_AGE_SECONDS} s, as there."
        ),
        answer=list[Kline],
        query=CANDLE_QUERY,
        problems=CANDLE_PROBLEMS,
        may_be_kept=True,
    )
    of_reference = replace(
        over_all,
        id="referenceKlines",
        path=f"/klines/{REFERENCE}/{{symbol}}",
        endpoint=_of_reference,
        summary="Binance's klines of the reference price",
    )
    on_one = replace(
        over_all,
        id="klinesOnExchange",
        path="/klines/{exchange}/{symbol}",
        summary="Binance's klines on one exchange",
        problems=(UnknownExchange, *over_all.problems),
    )
    as_binance = replace(
        over_all,
        id="klinesAsBinance",
        path="/klines",
        endpoint=_as_binance,
        summary="Binance's klines by the parameters of Binance",
        description="The same for programs made for Binance's `/api/v3/klines`; `exchange` names one, or `reference`.",
        query=(_SYMBOL, _EXCHANGE, *BINANCE_QUERY),
        problems=(UnknownExchange, *(each for each in over_all.problems if each is not InvalidFill)),
    )
    return [as_binance, over_all, of_reference, on_one]


async def _as_binance(request: Request) -> Response:
    context, given = context_of(request), request.query_params
    exchange = given.get("exchange")
    is_reference = exchange is not None and exchange.lower() == REFERENCE
    parameters = path_parameters(
        context, context.mode.current, None if is_reference else exchange, given.get("symbol", "")
    )
    wanted = parse_binance_query(given, milliseconds(context.prices.clock()))
    return await _answer(request, parameters, wanted, reference_candles if is_reference else merge_all)


async def _over_exchanges(request: Request) -> Response:
    return await _by_path(request, merge_all)


async def _of_reference(request: Request) -> Response:
    return await _by_path(request, reference_candles)


async def _by_path(request: Request, combine: Combine) -> Response:
    context = context_of(request)
    parameters = path_parameters_of(request, context)
    query = parse_query(request.scope["query_string"], milliseconds(context.prices.clock()))
    return await _answer(request, parameters, query.wanted, combine)


async def _answer(request: Request, parameters: PathParameters, wanted: CandleRequest, combine: Combine) -> Response:
    context = context_of(request)
    context.clients.attribute_to(request.scope)
    rows = await context.prices.candles(parameters.series, wanted, combine)
    return cached_answer(request, await klines_of(rows, context, parameters.series), rows)


async def klines_of(rows: CandleRows, context: Context, series: Sequence[Series]) -> list[Kline]:
    """Return candles as arrays."""
    # Only of one that is filled do holes change the values.
    holes = await context.known_holes.spans(series) if rows.filled else []
    incomplete = touched(holes, [*rows.candles], rows.grid.end_of)
    return [_kline(rows, start, incomplete) for start in rows.candles]


def _kline(rows: CandleRows, start: int, incomplete: Container[int]) -> Kline:
    candle, amounts = rows.candles[start], traded(rows, start, incomplete)
    return Kline(
        start,
        _decimals(candle.open),
        _decimals(candle.high),
        _decimals(candle.low),
        _decimals(candle.close),
        _decimals_or_null(amounts.volume),
        rows.grid.end_of(start) - 1,
        _decimals_or_null(amounts.turnover),
        number_of_ticks(rows, start),
        _decimals_or_null(amounts.buy_volume),
        _decimals_or_null(amounts.buy_turnover),
    )


def _decimals_or_null(amount: float | None) -> str | None:
    return None if amount is None else _decimals(amount)


def _decimals(price: float) -> str:
    """Return a price in the fewest decimals that are exact."""
    text = repr(price)
    return format(Decimal(text), "f") if "e" in text else text
