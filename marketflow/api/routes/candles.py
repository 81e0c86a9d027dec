"""/candles: open, high, low and close by the minute, hour or day, on one exchange, over all, or of the reference."""

from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from hashlib import blake2b
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta, structs
from starlette.requests import Request
from starlette.responses import Response

from marketflow.api.context import context_of
from marketflow.api.openapi.operation import Exchange, Operation, Symbol, Tag
from marketflow.api.problems import ServiceUnavailable, TooManyRequests, UnknownExchange, UnknownSymbol
from marketflow.api.queries.candle_parameters import (
    CANDLE_QUERY,
    INTERVALS_MS,
    InvalidFormat,
    InvalidInterval,
    InvalidLimit,
    InvalidRange,
    parse_query,
)
from marketflow.api.queries.candles import CandleRows, Combine
from marketflow.api.queries.known_holes import Span, touched
from marketflow.api.queries.path_parameters import path_parameters_of
from marketflow.api.queries.reference import reference_candles
from marketflow.api.rendering import ALWAYS, JSONAnswer, Time, has_etag, rfc3339
from marketflow.clock import milliseconds
from marketflow.model import REFERENCE, Candle, Source, merge_all, rounded

MAX_AGE_SECONDS = 60
"""Time for which a client may cache a settled answer.

Short, because the mode may be switched and a minute in the backlog may still arrive; revalidation costs a 304.
"""

_KEPT = f"max-age={MAX_AGE_SECONDS}"

Price = Annotated[float, Meta(gt=0, examples=[67432.14])]
Decimals = Annotated[str, Meta(pattern=r"^[0-9]+(\.[0-9]+)?$", examples=["67432.14"])]
Amount = Annotated[float, Meta(ge=0, examples=[12.5])]
_UNKNOWN = "null where it is unknown, which is not zero."


Interval = Annotated[str, Meta(description="Length of a candle.", extra_json_schema={"enum": [*INTERVALS_MS]})]


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
    average: Annotated[Price | None, Meta(description=f"The mean of all ticks; {_UNKNOWN}")]
    ticks: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description=f"Number of ticks or trades; {_UNKNOWN}", examples=[5580])
    ]
    volume: Annotated[Amount | None, Meta(description=f"What was traded, in the base currency; {_UNKNOWN}")]
    turnover: Annotated[Amount | None, Meta(description=f"The same in the quote currency; {_UNKNOWN}")]
    vwap: Annotated[Price | None, Meta(description="Turnover by volume: the mean price of what was traded, or null.")]
    buy_volume: Annotated[Amount | None, Meta(description=f"The part of the volume that takers bought; {_UNKNOWN}")]
    buy_turnover: Annotated[Amount | None, Meta(description=f"The same of the turnover; {_UNKNOWN}")]
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


class Kline(msgspec.Struct, frozen=True, array_like=True):
    """A candle in the order of Binance's klines."""

    open_time: Annotated[int, Meta(description="Opening time in Unix ms.")]
    open: Decimals
    high: Decimals
    low: Decimals
    close: Decimals
    volume: Annotated[Decimals | None, Meta(description=f"In the base currency; {_UNKNOWN}")]
    close_time: Annotated[int, Meta(description="Last millisecond in Unix ms.")]
    quote_volume: Annotated[Decimals | None, Meta(description=f"In the quote currency; {_UNKNOWN}")]
    trades: Annotated[int | None, Meta(description=f"Number of ticks or trades; {_UNKNOWN}")]
    taker_volume: Annotated[Decimals | None, Meta(description=f"Bought by takers; {_UNKNOWN}")]
    taker_quote_volume: Annotated[Decimals | None, Meta(description=f"Bought by takers; {_UNKNOWN}")]
    ignored: Literal["0"] = "0"


_CANDLES = Tag("candles", "Open, high, low and close by the minute, hour or day, in the mode that runs.")


def candle_operations() -> list[Operation]:
    """Return the candle operations, over all exchanges, of the reference price, and on one exchange."""
    over_all = Operation(
        id="candles",
        path="/candles/{symbol}",
        endpoint=_candles,
        tag=_CANDLES,
        summary="Candles over all exchanges",
        description=(
            "The oldest first. Intervals without ticks are absent, and without any the list is empty. The running "
            "candle has the newest tick, as `/prices/latest` has. A range with `from` and `to` that is over, and has "
            f"been for ten minutes, may be cached for {MAX_AGE_SECONDS} s and has an `ETag`. The mode "
            "is not part of the path: revalidate after switching it."
        ),
        answer=CandlesAnswer | list[Kline],
        query=CANDLE_QUERY,
        problems=(
            InvalidInterval,
            InvalidRange,
            InvalidLimit,
            InvalidFormat,
            UnknownSymbol,
            ServiceUnavailable,
            TooManyRequests,
        ),
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
        answer=ReferenceCandlesAnswer | list[Kline],
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
    return ReferenceCandlesAnswer(symbol, REFERENCE, interval, candles)


async def _answer(
    request: Request,
    combine: Combine,
    answer_of: Callable[[str, str | None, str, list[CandleAnswer]], msgspec.Struct],
) -> Response:
    context = context_of(request)
    parameters = path_parameters_of(request, context)
    context.clients.attribute_to(request.scope)
    interval, wanted, as_arrays = parse_query(request.scope["query_string"], milliseconds(context.prices.clock()))
    rows = await context.prices.candles(parameters.series, wanted, combine)
    length_ms = wanted.length_ms
    if as_arrays:
        answer = JSONAnswer(_klines(rows, length_ms))
    else:
        objects = _objects(rows, length_ms, await context.known_holes.spans(parameters.series))
        answer = JSONAnswer(answer_of(parameters.symbol, parameters.exchange, interval, objects))
    return _kept(request, answer) if rows.settled else answer


def _objects(rows: CandleRows, length_ms: int, holes: list[Span]) -> list[CandleAnswer]:
    incomplete = touched(holes, [*rows.candles], length_ms)
    return [
        CandleAnswer(
            rfc3339(start),
            candle.open,
            candle.high,
            candle.low,
            candle.close,
            candle.average,
            candle.ticks or None,
            *_traded(candle),
            rows.closed(start, length_ms),
            candle.version,
            candle.source,
            False if start in incomplete else candle.verified or None,
            candle.verified,
            None if candle.venue is None else VenueCandle(*structs.astuple(candle.venue)),
        )
        for start, candle in rows.candles.items()
    ]


class _Traded(NamedTuple):
    """What was traded, as it is answered."""

    volume: float | None = None
    turnover: float | None = None
    vwap: float | None = None
    buy_volume: float | None = None
    buy_turnover: float | None = None


def _traded(candle: Candle) -> _Traded:
    if (amounts := candle.amounts) is None:
        return _Traded()
    volume, turnover, *bought = (each if each is None else rounded(each) for each in structs.astuple(amounts))
    return _Traded(volume, turnover, candle.vwap, *bought)


def _klines(rows: CandleRows, length_ms: int) -> list[Kline]:
    return [_kline(start, candle, length_ms) for start, candle in rows.candles.items()]


def _kline(start: int, candle: Candle, length_ms: int) -> Kline:
    traded = _traded(candle)
    return Kline(
        start,
        _decimals(candle.open),
        _decimals(candle.high),
        _decimals(candle.low),
        _decimals(candle.close),
        _decimals_or_null(traded.volume),
        start + length_ms - 1,
        _decimals_or_null(traded.turnover),
        candle.ticks or None,
        _decimals_or_null(traded.buy_volume),
        _decimals_or_null(traded.buy_turnover),
    )


def _decimals_or_null(amount: float | None) -> str | None:
    return None if amount is None else _decimals(amount)


def _decimals(price: float) -> str:
    """Return a price in the fewest decimals that are exact."""
    text = repr(price)
    return format(Decimal(text), "f") if "e" in text else text


def _kept(request: Request, answer: Response) -> Response:
    """Return the response with its ETag, or 304 if the client has the same one."""
    # Weak, because the compressed response has the same one.
    tag = f'W/"{blake2b(bytes(answer.body), digest_size=16).hexdigest()}"'
    headers = {**ALWAYS, "cache-control": _KEPT, "etag": tag}
    if has_etag(request, tag):
        return Response(status_code=304, headers=headers)
    answer.headers.update(headers)
    return answer
