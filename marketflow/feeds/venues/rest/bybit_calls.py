"""Bybit v5 spot by REST: candles with turnover and without count; of trades only the 60 newest.

Source: bybit-exchange/docs, v5 `recent-trade`, `kline` and `time` (2026-07). The default of `category` is linear, so it
is always said.
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

NEWEST_TRADES = 60

_TOO_OFTEN = 10006

_SIDES: dict[str, Side] = {"Buy": "buy", "Sell": "sell"}


class _Trade(msgspec.Struct, gc=False):
    id: str = msgspec.field(name="execId")
    price: str
    size: str
    side: str
    time: str


class _Candle(msgspec.Struct, array_like=True, gc=False):
    start: str
    open: str
    high: str
    low: str
    close: str
    volume: str
    turnover: str


class _Answer(msgspec.Struct):
    code: int = msgspec.field(name="retCode")
    message: str = msgspec.field(name="retMsg", default="")
    result: msgspec.Raw = msgspec.Raw(b"{}")
    time: int | None = None


class _Trades(msgspec.Struct):
    rows: list[_Trade] = msgspec.field(name="list")


class _Candles(msgspec.Struct):
    rows: list[_Candle] = msgspec.field(name="list")


class _Time(msgspec.Struct):
    nanoseconds: str = msgspec.field(name="timeNano")


class BybitCalls(RestCalls):
    """See the module."""

    weight_limit = (100, 5.0)  # of 600 in 5 seconds
    newest_first = True
    newest_trades = NEWEST_TRADES
    candles_a_call = 1000
    opens_at_last_close = True
    time_call = RestCall("/v5/market/time")

    def trades_call(self, symbol: str, since_ms: int, newest_id: int | None, cursor: str | None) -> RestCall:
        """There is one page alone, the same for all times."""
        query: dict[str, str | int] = {"category": "spot", "symbol": symbol, "limit": NEWEST_TRADES}
        return RestCall("/v5/market/recent-trade", query)

    def trades(self, symbol: str, reply: RestReply) -> TradesPage:
        """Newest first, under the ids of the stream."""
        rows = msgspec.json.decode(_checked(reply).result, type=_Trades).rows
        return TradesPage([_trade(symbol, row) for row in rows], None)

    def candles_call(self, symbol: str, since_ms: int, until_ms: int, now_ms: int) -> RestCall:
        """`start` and `end` are inclusive."""
        query: dict[str, str | int] = {"category": "spot", "symbol": symbol, "interval": 1}
        query |= {"start": since_ms, "end": until_ms - 1, "limit": self.candles_a_call}
        return RestCall("/v5/market/kline", query)

    def candles(self, reply: RestReply) -> list[VenueCandle]:
        """Newest first; whether the newest is closed follows from the time of the answer."""
        decoded = _checked(reply)
        rows = msgspec.json.decode(decoded.result, type=_Candles).rows
        return [VenueCandle(int(row.start), _values(row), _is_closed(row, decoded.time)) for row in rows]

    def time(self, reply: RestReply) -> int:
        """To the nanosecond, cut to the millisecond."""
        return int(msgspec.json.decode(_checked(reply).result, type=_Time).nanoseconds) // 1_000_000


def _checked(reply: RestReply) -> _Answer:
    decoded = msgspec.json.decode(reply.body, type=_Answer)
    if decoded.code == _TOO_OFTEN:
        raise VenueRefusal(429, f"{decoded.code}: {decoded.message}", 5.0)
    if decoded.code:
        raise VenueError(f"{decoded.code}: {decoded.message}")
    return decoded


def _trade(symbol: str, row: _Trade) -> Trade:
    if (side := _SIDES.get(row.side)) is None:
        raise ValueError(f"{row.side!r} is no side")
    return Trade(symbol, number(row.price), number(row.size), int(row.time), int(row.id), side)


def _is_closed(row: _Candle, venue_time: int | None) -> bool | None:
    return None if venue_time is None else int(row.start) + MINUTE_MS <= venue_time


def _values(row: _Candle) -> VenueValues:
    prices = number(row.open), number(row.high), number(row.low), number(row.close)
    return VenueValues(*prices, number(row.volume), number(row.turnover), None)
