"""/udf: the datafeed of TradingView's charts, as its documentation describes UDF.

Times are Unix seconds. What is wrong with a request is answered with 200 and `s` of `error`, as the charts expect. A
symbol alone is its reference price; `exchange1:BTCUSDT` is that of an exchange.
"""

from collections.abc import Mapping
from itertools import islice
from math import floor, log10
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from marketflow.api.context import Context, context_of
from marketflow.api.openapi.operation import Content, Operation, Parameter, Tag
from marketflow.api.problems import Problem, ServiceUnavailable, TooManyRequests
from marketflow.api.queries.boundaries import INTERVALS, Grid
from marketflow.api.queries.candle_parameters import MOST, InvalidInterval, InvalidLimit, InvalidRange, parse_limit
from marketflow.api.queries.candles import CandleRequest, CandleRows, Combine
from marketflow.api.queries.path_parameters import PathParameters, path_parameters
from marketflow.api.queries.reference import reference_candles
from marketflow.api.rendering import ALWAYS, JSONAnswer
from marketflow.api.routes.charting.candle_values import traded
from marketflow.clock import milliseconds
from marketflow.errors import Unavailable
from marketflow.model import REFERENCE, merge_all

MOST_BARS = 5_000
"""Bars of an answer; a chart asks for the ones before them."""

RESOLUTIONS = {
    **{str(grid.length_ms // 60_000): grid for name, grid in INTERVALS.items() if name[-1] in "mh"},
    **{name.upper(): INTERVALS[name] for name in ("1d", "1w", "1M")},
}
"""Grids of candles by TradingView's names: minutes, or 1D, 1W, 1M."""

_SHORT = {"D": "1D", "W": "1W", "M": "1M"}

_LATEST_SECONDS = 10**10
"""Beyond it a time is not one in seconds."""

_MOST_DECIMALS = 12


class NamedValue(msgspec.Struct, frozen=True):
    """An entry of a list to choose from; an empty value is all."""

    value: str
    name: str
    desc: str


class UdfConfiguration(msgspec.Struct, frozen=True):
    """What the datafeed can do."""

    supported_resolutions: list[str]
    supports_search: bool
    supports_group_request: bool
    supports_marks: bool
    supports_timescale_marks: bool
    supports_time: bool
    exchanges: list[NamedValue]
    symbols_types: list[NamedValue]


class UdfSearchResult(msgspec.Struct, frozen=True):
    """A symbol that was found."""

    symbol: str
    full_name: str
    description: str
    exchange: Annotated[str, Meta(description="Name of an exchange, or `reference`.")]
    ticker: Annotated[str, Meta(description="Its name in requests.", examples=["exchange1:BTCUSDT"])]
    type: str


class _Chosen(NamedTuple):
    """A symbol of a request: its series, how they are combined, and the exchange that it is of."""

    parameters: PathParameters
    combine: Combine
    exchange: str

    @property
    def ticker(self) -> str:
        symbol = self.parameters.symbol
        return symbol if self.exchange == REFERENCE else f"{self.exchange}:{symbol}"


_UDF = Tag("udf", "The datafeed of TradingView's charts, in the mode that runs.")
_TEXT = {"type": "string"}
"""Of whatever is read here: what is wrong with it is not refused, but answered."""


_SYMBOL = Parameter("symbol", "`BTCUSDT`, the reference price, or `exchange1:BTCUSDT`.", _TEXT, ("BTCUSDT",))
_HISTORY = (
    _SYMBOL,
    Parameter("resolution", f"One of {', '.join(RESOLUTIONS)}.", _TEXT, ("1", "60", "1D")),
    Parameter("from", "Unix seconds; bars that open at this time or later.", _TEXT, ("1795219200",)),
    Parameter("to", "Unix seconds; bars that open before this time.", _TEXT, ("1795305600",)),
    Parameter(
        "countback",
        f"Number of bars before `to`, at most {MOST_BARS}; `from` does not count then.",
        _TEXT,
        ("300",),
    ),
)
_SEARCH = (
    Parameter("query", "Part of a symbol, in any case.", _TEXT, ("btc",)),
    Parameter("type", "`crypto`, or nothing for all.", _TEXT, ("crypto",)),
    Parameter("exchange", "One exchange, `reference`, or nothing for all.", _TEXT, ("exchange1",)),
    Parameter("limit", "How many at most; 30 without it.", {"type": "integer", "minimum": 1, "maximum": MOST}, (30,)),
)


def udf_operations() -> list[Operation]:
    """Return the operations of this module."""
    config = Operation(
        id="udfConfig",
        path="/udf/config",
        endpoint=_config,
        tag=_UDF,
        summary="What the datafeed can do",
        answer=UdfConfiguration,
    )
    symbols = Operation(
        id="udfSymbol",
        path="/udf/symbols",
        endpoint=_symbol,
        tag=_UDF,
        summary="One symbol",
        answer=Content(
            ("application/json",),
            "TradingView's LibrarySymbolInfo, or `s` of `error` with `errmsg`.",
            {"type": "object"},
        ),
        query=(_SYMBOL,),
    )
    search = Operation(
        id="udfSearch",
        path="/udf/search",
        endpoint=_search,
        tag=_UDF,
        summary="Symbols whose name contains a text",
        answer=list[UdfSearchResult],
        query=_SEARCH,
        problems=(InvalidLimit,),
    )
    history = Operation(
        id="udfHistory",
        path="/udf/history",
        endpoint=_history,
        tag=_UDF,
        summary="Bars of a symbol",
        answer=Content(
            ("application/json",),
            "`s` of `ok` with `t`, `o`, `h`, `l`, `c` and, where all are known, `v`; `no_data` with `nextTime`, the "
            "bar before the range, if there is one; or `error` with `errmsg`.",
            {"type": "object", "required": ["s"]},
        ),
        query=_HISTORY,
        problems=(ServiceUnavailable, TooManyRequests),
    )
    time = Operation(
        id="udfTime",
        path="/udf/time",
        endpoint=_time,
        tag=_UDF,
        summary="Clock of the server",
        answer=Content(("text/plain",), "Unix seconds.", {"type": "string", "pattern": "^[0-9]+$"}),
    )
    return [config, symbols, search, history, time]


async def _config(request: Request) -> Response:
    exchanges = [REFERENCE, *context_of(request).exchanges]
    configuration = UdfConfiguration(
        supported_resolutions=[*RESOLUTIONS],
        supports_search=True,
        supports_group_request=False,
        supports_marks=False,
        supports_timescale_marks=False,
        supports_time=True,
        exchanges=[NamedValue("", "All exchanges", ""), *(NamedValue(name, name, name) for name in exchanges)],
        symbols_types=[NamedValue("", "All types", ""), NamedValue("crypto", "Crypto", "")],
    )
    return JSONAnswer(configuration)


async def _time(request: Request) -> Response:
    seconds = milliseconds(context_of(request).prices.clock()) // 1000
    return PlainTextResponse(str(seconds), headers=ALWAYS)


async def _symbol(request: Request) -> Response:
    context = context_of(request)
    try:
        chosen = _chosen(context, request.query_params.get("symbol", ""))
    except Problem as problem:
        return _error(problem)
    symbol = chosen.parameters.symbol
    return JSONAnswer(
        {
            "name": symbol,
            "ticker": chosen.ticker,
            "description": f"{symbol} on {chosen.exchange}",
            "type": "crypto",
            "session": "24x7",
            "timezone": "Etc/UTC",
            "exchange": chosen.exchange,
            "listed_exchange": chosen.exchange,
            "format": "price",
            "minmov": 1,
            "pricescale": await _price_scale(context, chosen.parameters),
            "has_intraday": True,
            "has_daily": True,
            "has_weekly_and_monthly": True,
            "intraday_multipliers": [name for name in RESOLUTIONS if name.isdecimal()],
            "visible_plots_set": "ohlcv",
            "supported_resolutions": [*RESOLUTIONS],
            "volume_precision": 8,
            "data_status": "streaming",
        }
    )


async def _search(request: Request) -> Response:
    context, given = context_of(request), request.query_params
    text, exchange = given.get("query", "").lower(), given.get("exchange", "").lower()
    limit = parse_limit(given.get("limit"), 30)
    of_type = given.get("type", "").lower() in ("", "crypto")
    found = (
        UdfSearchResult(
            symbol,
            ticker := symbol if name == REFERENCE else f"{name}:{symbol}",
            f"{symbol} on {name}",
            name,
            ticker,
            "crypto",
        )
        for symbol in context.symbols
        for name in (REFERENCE, *context.exchanges)
        if of_type and text in f"{name}:{symbol}".lower() and exchange in ("", name.lower())
    )
    return JSONAnswer([*islice(found, limit)])  # of tens of thousands


async def _history(request: Request) -> Response:
    context, given = context_of(request), request.query_params
    context.clients.attribute_to(request.scope)
    try:
        chosen = _chosen(context, given.get("symbol", ""))
        wanted, since = _wanted(given)
    except Problem as problem:
        return _error(problem)
    rows = await context.prices.candles(chosen.parameters.series, wanted, chosen.combine)
    starts = [start for start in rows.candles if start >= since]
    if starts:
        return JSONAnswer(_bars(rows, starts))
    if not rows.candles:
        return JSONAnswer({"s": "no_data"})
    return JSONAnswer({"s": "no_data", "nextTime": max(rows.candles) // 1000})


def _wanted(given: QueryParams) -> tuple[CandleRequest, int]:
    """Return the request of the last bars before `to`, and the time (Unix ms) from which they count.

    Raises:
        InvalidInterval, InvalidRange, InvalidLimit: a parameter is wrong.
    """
    name, countback = given.get("resolution", ""), given.get("countback")
    since, until = (_number(given.get(each, "")) for each in ("from", "to"))
    if (grid := RESOLUTIONS.get(_SHORT.get(name, name))) is None:
        raise InvalidInterval(f"The resolution is one of {', '.join(RESOLUTIONS)}.")
    if until is None or (since is None and countback is None) or max(since or 0, until) > _LATEST_SECONDS:
        raise InvalidRange("`from` and `to` are Unix seconds.")
    if countback is None:
        return CandleRequest(grid, None, until * 1000, _bars_between(grid, since or 0, until)), (since or 0) * 1000
    if not (count := _number(countback)):
        raise InvalidLimit("`countback` is a number of bars.")
    return CandleRequest(grid, None, until * 1000, min(count, MOST_BARS)), 0


def _bars_between(grid: Grid, since: int, until: int) -> int:
    """Return the number of bars from one time to another (Unix seconds), at least one, by the shortest ones."""
    shortest = min(grid.length_ms, 28 * 86_400_000) // 1000
    return min(max((until - since) // shortest + 1, 1), MOST_BARS)


def _bars(rows: CandleRows, starts: list[int]) -> dict[str, Any]:
    candles = [rows.candles[start] for start in starts]
    volumes = [traded(rows, start, ()).volume for start in starts]
    bars: dict[str, Any] = {
        "s": "ok",
        "t": [start // 1000 for start in starts],
        "o": [candle.open for candle in candles],
        "h": [candle.high for candle in candles],
        "l": [candle.low for candle in candles],
        "c": [candle.close for candle in candles],
    }
    return bars if None in volumes else bars | {"v": volumes}


def _chosen(context: Context, text: str) -> _Chosen:
    """Return the symbol that a text names.

    Raises:
        UnknownExchange, UnknownSymbol: it is not configured.
    """
    exchange, _, symbol = text.rpartition(":")
    if exchange.lower() in ("", REFERENCE):
        return _Chosen(path_parameters(context, context.mode.current, None, symbol), reference_candles, REFERENCE)
    parameters = path_parameters(context, context.mode.current, exchange, symbol)
    return _Chosen(parameters, merge_all, context.names.exchange(exchange))


async def _price_scale(context: Context, parameters: PathParameters) -> int:
    """Return ten to the number of decimals that prices are shown with: six digits, and two decimals at least."""
    try:
        newest = [tick.price for tick in await context.prices.cache.newest(parameters.series) if tick]
    except Unavailable:
        newest = []
    decimals = 5 - floor(log10(min(newest))) if newest else 2
    return int(10 ** min(max(decimals, 2), _MOST_DECIMALS))


def _number(text: str) -> int | None:
    digits = text.lstrip("0")
    fits = text.isascii() and text.isdecimal() and len(digits) <= len(str(_LATEST_SECONDS))
    return int(digits or "0") if fits else None


def _error(problem: Problem) -> Response:
    answer: Mapping[str, str] = {"s": "error", "errmsg": str(problem)}
    return JSONAnswer(answer)
