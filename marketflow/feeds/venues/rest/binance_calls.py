"""Binance spot by REST: aggregated trades, which stand for the trades `f` to `l`, and klines.

Source: binance-spot-api-docs, rest-api.md (2026-07). `aggTrades` costs a weight of 4 where `historicalTrades` costs 25,
and is served by the data-only host too.
"""

import msgspec

from marketflow.feeds.venues.venue import (
    RestCall,
    RestCalls,
    RestReply,
    Side,
    Trade,
    TradesPage,
    VenueCandle,
    number,
)
from marketflow.model import VenueValues

PAGE_TRADES = 1000


class _Aggregate(msgspec.Struct, gc=False):
    a: int
    p: str | float
    q: str | float
    f: int
    l: int  # noqa: E741 - the venue's name
    at: int = msgspec.field(name="T")
    m: bool


class _Kline(msgspec.Struct, array_like=True, gc=False):
    start: int
    open: str | float
    high: str | float
    low: str | float
    close: str | float
    volume: str | float
    close_at: int
    turnover: str | float
    ticks: int
    buy_volume: str | float
    buy_turnover: str | float


class _Time(msgspec.Struct):
    server_time: int = msgspec.field(name="serverTime")


_aggregates = msgspec.json.Decoder(list[_Aggregate]).decode
_klines = msgspec.json.Decoder(list[_Kline]).decode


class BinanceCalls(RestCalls):
    """See the module."""

    weight_limit = (3000, 60.0)  # of 6,000 a minute
    newest_first = False
    trades_span_ms = 3_600_000  # startTime alone has been refused, and so has more than an hour
    candles_a_call = 1000
    instruments_weight = 20
    used_weight = ("X-MBX-USED-WEIGHT-1M", 6000)
    time_call = RestCall("/api/v3/time")

    def trades_call(self, symbol: str, since_ms: int, newest_id: int | None, cursor: str | None) -> RestCall:
        """The first page by time, the next ones by the id of the aggregate."""
        begin: dict[str, str | int] = {"fromId": cursor or 0}
        if cursor is None:
            begin = {"startTime": since_ms, "endTime": since_ms + self.trades_span_ms - 1}
        return RestCall("/api/v3/aggTrades", {"symbol": symbol, **begin, "limit": PAGE_TRADES}, 4)

    def trades(self, symbol: str, reply: RestReply) -> TradesPage:
        """One a taker order and price; rows that the venue has repaired away (ids of -1) are none."""
        rows = _aggregates(reply.body)
        trades = [_trade(symbol, row) for row in rows if row.f >= 0]
        return TradesPage(trades, str(rows[-1].a + 1) if rows else None)

    def candles_call(self, symbol: str, since_ms: int, until_ms: int, now_ms: int) -> RestCall:
        """Klines of a minute; endTime is inclusive."""
        times: dict[str, str | int] = {"startTime": since_ms, "endTime": until_ms - 1}
        query = {"symbol": symbol, "interval": "1m", **times, "limit": self.candles_a_call}
        return RestCall("/api/v3/klines", query, 2)

    def candles(self, reply: RestReply) -> list[VenueCandle]:
        """Klines; the last may be forming, which only the clock tells."""
        return [_candle(row) for row in _klines(reply.body)]

    def time(self, reply: RestReply) -> int:
        """To the millisecond."""
        return msgspec.json.decode(reply.body, type=_Time).server_time


def _trade(symbol: str, row: _Aggregate) -> Trade:
    side: Side = "sell" if row.m else "buy"  # m: the buyer was the maker
    return Trade(symbol, number(row.p), number(row.q), row.at, row.l, side, row.l - row.f + 1)


def _candle(row: _Kline) -> VenueCandle:
    prices = number(row.open), number(row.high), number(row.low), number(row.close)
    values = VenueValues(*prices, number(row.volume), number(row.turnover), row.ticks)
    bought = number(row.buy_volume), number(row.buy_turnover)
    return VenueCandle(row.start, values, None, None, *bought)
