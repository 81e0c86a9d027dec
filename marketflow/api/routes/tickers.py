"""/tickers and /market: 24 hours of every series and symbol, and all that a program begins with."""

from collections.abc import Sequence
from decimal import Decimal
from itertools import chain
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response

from marketflow import __version__
from marketflow.api.context import Context, context_of
from marketflow.api.openapi.operation import Exchange, Operation, Parameter, Symbol, Tag
from marketflow.api.problems import NoData, ServiceUnavailable, TooManyRequests, UnknownSymbol
from marketflow.api.queries.boundaries import INTERVALS
from marketflow.api.queries.derived.day_statistics import SymbolDay, day_of_symbol
from marketflow.api.queries.prices import PeriodSummary
from marketflow.api.rendering import JSONAnswer, Time, rfc3339
from marketflow.api.routes.charting.candle_values import UNKNOWN, Amount
from marketflow.api.routes.latest_price import Price
from marketflow.clock import milliseconds
from marketflow.errors import Unavailable
from marketflow.model import Candle, Mode, Series, Tick, rounded
from marketflow.text import words

Change = Annotated[float, Meta(description="`last` less `open`.", examples=[-210.5])]
ChangePercent = Annotated[float, Meta(description="The same in percent of `open`.", examples=[-0.31])]
Volume = Annotated[Amount | None, Meta(description=f"What was traded, in the base currency; {UNKNOWN}")]
Turnover = Annotated[Amount | None, Meta(description=f"The same in the quote currency; {UNKNOWN}")]
Ticks = Annotated[int | None, Meta(description=f"Number of ticks or trades; {UNKNOWN}", examples=[120345])]
First = Annotated[Time, Meta(description="Event time of the first tick: later than the beginning where there is less.")]
Last = Annotated[Time, Meta(description="Event time of the last tick.")]
Count = Annotated[int, Meta(ge=1, description="Number of exchanges of which `open` and `last` are the medians.")]


class SymbolTicker(msgspec.Struct, frozen=True, rename={"opening": "open", "first_at": "from", "last_at": "to"}):
    """24 hours of a symbol over all exchanges.

    `open` and `last` are medians of the exchanges with ticks at the beginning and now: `change` is that of the market,
    not the gap between exchanges.
    """

    symbol: Symbol
    exchanges: Count
    opening: Price
    high: Annotated[Price, Meta(description="The highest price on any exchange.")]
    low: Annotated[Price, Meta(description="The lowest price on any exchange.")]
    last: Price
    change: Change
    change_percent: ChangePercent
    volume: Volume
    turnover: Turnover
    ticks: Ticks
    first_at: First
    last_at: Last


class SeriesTicker(msgspec.Struct, frozen=True, rename={"opening": "open", "first_at": "from", "last_at": "to"}):
    """24 hours of a symbol on an exchange."""

    symbol: Symbol
    exchange: Exchange
    opening: Annotated[Price, Meta(description="The first price.")]
    high: Price
    low: Price
    last: Annotated[Price, Meta(description="The newest price.")]
    change: Change
    change_percent: ChangePercent
    volume: Volume
    turnover: Turnover
    ticks: Ticks
    first_at: First
    last_at: Last


class TickersAnswer(msgspec.Struct, frozen=True, rename={"since": "from", "until": "to"}):
    """The last 24 hours, in whole minutes and the running one; what has no tick is absent."""

    mode: Mode
    since: Annotated[Time, Meta(description="Beginning of the period.")]
    until: Annotated[Time, Meta(description="End of the period.")]
    symbols: list[SymbolTicker]
    series: list[SeriesTicker]


class MarketPrice(msgspec.Struct, frozen=True):
    """The newest price of a symbol on an exchange, and its change in 24 hours."""

    symbol: Symbol
    exchange: Exchange
    price: Price
    timestamp: Annotated[Time, Meta(description="Event time, by the clock of the exchange.")]
    change: Annotated[Change | None, Meta(description="Null without a price of 24 hours.")]
    change_percent: ChangePercent | None


class MarketSymbol(msgspec.Struct, frozen=True):
    """A symbol over all exchanges, as in `/tickers`; null while it has no price."""

    symbol: Symbol
    price: Annotated[Price | None, Meta(description="`last` of `/tickers`: the median over the exchanges.")]
    change: Change | None
    change_percent: ChangePercent | None


class MarketAnswer(msgspec.Struct, frozen=True):
    """What there is, and all newest prices of the last 24 hours."""

    version: Annotated[str, Meta(description="Version of MarketFlow.", examples=["1.0.0"])]
    mode: Mode
    time: Annotated[Time, Meta(description="Clock of the server.")]
    exchanges: Annotated[list[Exchange], Meta(description="Configured exchanges.")]
    intervals: Annotated[list[str], Meta(description="Intervals of candles.", examples=[[*INTERVALS]])]
    symbols: Annotated[list[MarketSymbol], Meta(description="Configured symbols.")]
    prices: list[MarketPrice]


class _Difference(NamedTuple):
    change: float
    change_percent: float


class _Amounts(NamedTuple):
    volume: float | None
    turnover: float | None


_SYMBOLS = Parameter("symbols", "Symbols, separated by commas or spaces; all by default.", {"type": "string"})

_STATISTICS = Tag("statistics", "24 hours of every symbol, and what there is, in the mode that runs.")


def ticker_operations() -> list[Operation]:
    """Return the operations of this module."""
    tickers = Operation(
        id="tickers",
        path="/tickers",
        endpoint=_tickers,
        tag=_STATISTICS,
        summary="Statistics of 24 hours",
        description="Of each symbol, and of each symbol on each exchange; at most a second old.",
        answer=TickersAnswer,
        query=(_SYMBOLS,),
        problems=(UnknownSymbol, ServiceUnavailable, TooManyRequests),
    )
    market = Operation(
        id="marketOverview",
        path="/market",
        endpoint=_market,
        tag=_STATISTICS,
        summary="What there is, with all newest prices",
        description="Version, mode, exchanges, symbols, intervals, newest prices, and their change in 24 hours.",
        answer=MarketAnswer,
        problems=(ServiceUnavailable, TooManyRequests),
    )
    return [market, tickers]


async def _tickers(request: Request) -> Response:
    context = context_of(request)
    chosen = {*_chosen(request.query_params, context)} or {*context.symbols}
    mode, now = context.mode.current, milliseconds(context.prices.clock())
    day = await _day(request, context, mode)
    by_symbol = _by_symbol(day, context, now)
    answer = TickersAnswer(
        mode,
        rfc3339(day.since),
        rfc3339(day.until),
        [_symbol_ticker(symbol, found) for symbol, found in by_symbol.items() if symbol in chosen],
        [_series_ticker(series, candle) for series, candle in day.candles.items() if series.symbol in chosen],
    )
    return JSONAnswer(answer)


async def _market(request: Request) -> Response:
    context = context_of(request)
    mode, now = context.mode.current, milliseconds(context.prices.clock())
    day = await _day(request, context, mode)
    by_symbol = _by_symbol(day, context, now)
    answer = MarketAnswer(
        __version__,
        mode,
        rfc3339(now),
        [*context.exchanges],
        [*INTERVALS],
        [_market_symbol(symbol, by_symbol.get(symbol)) for symbol in context.symbols],
        [
            _market_price(series, tick, day.candles.get(series))
            for series, tick in zip(_series(context, mode), await _newest(context, mode, day), strict=True)
            if tick is not None
        ],
    )
    return JSONAnswer(answer)


def _chosen(query: QueryParams, context: Context) -> list[str]:
    return [context.names.symbol(name) for name in chain.from_iterable(map(words, query.getlist("symbols")))]


def _series(context: Context, mode: Mode) -> list[Series]:
    return [Series(mode, exchange, symbol) for symbol in context.symbols for exchange in context.exchanges]


async def _day(request: Request, context: Context, mode: Mode) -> PeriodSummary:
    """Return the last 24 hours of all series; without candles where there is no tick."""
    context.clients.attribute_to(request.scope)
    now = milliseconds(context.prices.clock())
    try:
        return await context.day_statistics.read(_series(context, mode))
    except NoData:
        return PeriodSummary({}, now, now)


async def _newest(context: Context, mode: Mode, day: PeriodSummary) -> Sequence[Tick | None]:
    """Return the newest ticks of all series: the cached ones, or the last ones of the day."""
    series = _series(context, mode)
    try:
        cached = await context.prices.cache.newest(series)
    except Unavailable:
        cached = [None] * len(series)
    of_day = [candle.newest if (candle := day.candles.get(one)) else None for one in series]
    return [tick or last for tick, last in zip(cached, of_day, strict=True)]


def _by_symbol(day: PeriodSummary, context: Context, now: int) -> dict[str, SymbolDay]:
    by_symbol: dict[str, list[Candle]] = {}
    for series, candle in day.candles.items():
        by_symbol.setdefault(series.symbol, []).append(candle)
    return {symbol: day_of_symbol(candles, now) for symbol, candles in by_symbol.items()}


def _difference(opening: float, last: float) -> _Difference:
    change = rounded(float(Decimal(repr(last)) - Decimal(repr(opening))))  # of floats it has digits that neither has
    return _Difference(change, round(change / opening * 100, 4))


def _symbol_ticker(symbol: str, day: SymbolDay) -> SymbolTicker:
    whole, amounts = day.whole, _amounts(day.whole)
    return SymbolTicker(
        symbol,
        day.exchanges,
        day.opening,
        whole.high,
        whole.low,
        day.last,
        *_difference(day.opening, day.last),
        amounts.volume,
        amounts.turnover,
        whole.ticks or None,
        rfc3339(whole.first_at),
        rfc3339(whole.last_at),
    )


def _series_ticker(series: Series, candle: Candle) -> SeriesTicker:
    amounts = _amounts(candle)
    return SeriesTicker(
        series.symbol,
        series.exchange,
        candle.open,
        candle.high,
        candle.low,
        candle.close,
        *_difference(candle.open, candle.close),
        amounts.volume,
        amounts.turnover,
        candle.ticks or None,
        rfc3339(candle.first_at),
        rfc3339(candle.last_at),
    )


def _market_price(series: Series, tick: Tick, day: Candle | None) -> MarketPrice:
    change = (None, None) if day is None else _difference(day.open, tick.price)
    return MarketPrice(series.symbol, series.exchange, tick.price, rfc3339(tick.at), *change)


def _market_symbol(symbol: str, day: SymbolDay | None) -> MarketSymbol:
    if day is None:
        return MarketSymbol(symbol, None, None, None)
    return MarketSymbol(symbol, day.last, *_difference(day.opening, day.last))


def _amounts(candle: Candle) -> _Amounts:
    if (amounts := candle.amounts) is None:
        return _Amounts(None, None)
    return _Amounts(rounded(amounts.volume), None if amounts.turnover is None else rounded(amounts.turnover))
