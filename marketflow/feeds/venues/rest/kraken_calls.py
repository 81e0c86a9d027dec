"""Kraken by REST: trades since a time in nanoseconds, and the newest 720 candles.

Source: docs.kraken.com, REST `Trades`, `OHLC`, `Time` (2026-06). The key of a reply is the legacy name of the pair,
not the one that was asked for. Errors come with status 200.
"""

import msgspec

from marketflow.feeds.venues.limits import VenueRefusal
from marketflow.feeds.venues.venue import (
    RestCall,
    RestCalls,
    RestReply,
    Side,
    Trade,
    TradesPage,
    VenueCandle,
    VenueError,
    number,
)
from marketflow.model import MINUTE_MS, VenueValues

PAGE_TRADES = 1000
NEWEST_CANDLES = 720
THROTTLED_PAUSE_SECONDS = 30.0
_SIDES: dict[str, Side] = {"b": "buy", "s": "sell"}


class _Trade(msgspec.Struct, array_like=True, gc=False):
    price: str | float
    volume: str | float
    time: float
    side: str
    order_type: str
    misc: str
    trade_id: int


class _Candle(msgspec.Struct, array_like=True, gc=False):
    start_seconds: int
    open: str | float
    high: str | float
    low: str | float
    close: str | float
    vwap: str | float
    volume: str | float
    ticks: int


class _Answer(msgspec.Struct):
    error: list[str] = []
    result: dict[str, msgspec.Raw] = {}


class _Time(msgspec.Struct):
    unixtime: int


_trades = msgspec.json.Decoder(list[_Trade]).decode
_candles = msgspec.json.Decoder(list[_Candle]).decode
_last = msgspec.json.Decoder(int | str).decode


class KrakenCalls(RestCalls):
    """See the module."""

    weight_limit = (2, 3.0)  # of about one a second
    newest_first = False
    candles_a_call = NEWEST_CANDLES
    candles_kept_ms = NEWEST_CANDLES * MINUTE_MS
    gives_newer_candles = True
    time_call = RestCall("/0/public/Time")

    def trades_call(self, symbol: str, since_ms: int, newest_id: int | None, cursor: str | None) -> RestCall:
        """`since` in nanoseconds, itself excluded; the trades of the cursor's own time are asked for again.

        Several trades carry one time, so a page may end between them.
        """
        since = since_ms * 1_000_000 if cursor is None else int(cursor)
        return RestCall("/0/public/Trades", {"pair": symbol, "since": since - 1, "count": PAGE_TRADES})

    def trades(self, symbol: str, reply: RestReply) -> TradesPage:
        """Ascending; `last` is the time of the last one in nanoseconds, which the float of its row has lost."""
        result = _result(reply)
        rows = _trades(_rows(result))
        if not rows or "last" not in result:
            return TradesPage([], None)
        last = int(_last(result["last"]))
        # A page of one time alone would come again.
        next_since = last + 1 if rows[0].time == rows[-1].time else last
        return TradesPage([_trade(symbol, row) for row in rows], str(next_since))

    def candles_call(self, symbol: str, since_ms: int, until_ms: int, now_ms: int) -> RestCall:
        """`since` in seconds, itself excluded; the newest ones come in any case."""
        return RestCall("/0/public/OHLC", {"pair": symbol, "interval": 1, "since": since_ms // 1000 - 1})

    def candles(self, reply: RestReply) -> list[VenueCandle]:
        """The last row is forming; minutes without trades have a count of 0."""
        rows = _candles(_rows(_result(reply)))
        return [
            VenueCandle(row.start_seconds * 1000, _values(row), number_of_row < len(rows), number(row.vwap))
            for number_of_row, row in enumerate(rows, 1)
        ]

    def time(self, reply: RestReply) -> int:
        """Whole seconds, cut: the middle of the one that it says, so that a clock is not taken to be behind."""
        seconds = msgspec.convert({"unixtime": msgspec.json.decode(_result(reply)["unixtime"])}, _Time).unixtime
        return seconds * 1000 + 500


def _result(reply: RestReply) -> dict[str, msgspec.Raw]:
    decoded = msgspec.json.decode(reply.body, type=_Answer)
    if not decoded.error:
        return decoded.result
    text = ", ".join(decoded.error)
    if "Too many requests" in text or "Throttled" in text or "Rate limit" in text:
        raise VenueRefusal(429, text, THROTTLED_PAUSE_SECONDS)
    raise VenueError(text)


def _rows(result: dict[str, msgspec.Raw]) -> msgspec.Raw:
    for key, rows in result.items():
        if key != "last":
            return rows
    raise VenueError("the reply has no rows")


def _trade(symbol: str, row: _Trade) -> Trade:
    if (side := _SIDES.get(row.side)) is None:
        raise ValueError(f"{row.side!r} is no side")
    return Trade(symbol, number(row.price), number(row.volume), int(row.time * 1000), row.trade_id, side)


def _values(row: _Candle) -> VenueValues:
    prices = number(row.open), number(row.high), number(row.low), number(row.close)
    # The turnover is not said: vwap is cut to the price's digits.
    return VenueValues(*prices, number(row.volume), None, row.ticks)
