"""Coinbase Exchange by REST: trades by id, newest first, and candles without count and turnover.

Source: docs.cdp.coinbase.com/exchange, REST (2026-09). Trades cannot be asked for by time, and `before` gives the
newest page, not the one next to the id: pages therefore go back with `after`.
"""

from datetime import UTC, datetime

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
    unix_ms,
)
from marketflow.model import VenueValues

PAGE_TRADES = 1000


class _Trade(msgspec.Struct, gc=False):
    trade_id: int | str
    side: Side
    size: str | float
    price: str | float
    time: str


class _Candle(msgspec.Struct, array_like=True, gc=False):
    start_seconds: int
    low: float | str
    high: float | str
    open: float | str
    close: float | str
    volume: float | str


class _Time(msgspec.Struct):
    epoch: float


_trades = msgspec.json.Decoder(list[_Trade]).decode
_candles = msgspec.json.Decoder(list[_Candle]).decode


class CoinbaseCalls(RestCalls):
    """See the module."""

    weight_limit = (5, 1.0)  # of about 10 a second
    newest_first = True
    candles_a_call = 300
    gives_older_candles = True
    time_call = RestCall("/time")

    def trades_call(self, symbol: str, since_ms: int, newest_id: int | None, cursor: str | None) -> RestCall:
        """`after` means older than an id."""
        query: dict[str, str | int] = {"limit": PAGE_TRADES}
        if cursor is not None:
            query["after"] = cursor
        elif newest_id is not None:
            query["after"] = newest_id + 1
        return RestCall(f"/products/{symbol}/trades", query)

    def trades(self, symbol: str, reply: RestReply) -> TradesPage:
        """Newest first; the header CB-AFTER says the oldest id once more."""
        trades = [_trade(symbol, row) for row in _trades(reply.body)]
        oldest = min((trade.id or 0 for trade in trades), default=0)
        return TradesPage(trades, str(oldest) if oldest > 1 else None)

    def candles_call(self, symbol: str, since_ms: int, until_ms: int, now_ms: int) -> RestCall:
        """At most 300 rows, of which some may precede `start`; `end` is inclusive."""
        times: dict[str, str | int] = {"start": _rfc3339(since_ms), "end": _rfc3339(until_ms - 1000)}
        return RestCall(f"/products/{symbol}/candles", {"granularity": 60, **times})

    def candles(self, reply: RestReply) -> list[VenueCandle]:
        """[seconds, LOW, HIGH, open, close, volume]; minutes without trades are left out."""
        return [VenueCandle(row.start_seconds * 1000, _values(row)) for row in _candles(reply.body)]

    def time(self, reply: RestReply) -> int:
        """To the millisecond."""
        return round(msgspec.json.decode(reply.body, type=_Time).epoch * 1000)


def _trade(symbol: str, row: _Trade) -> Trade:
    taker: Side = "sell" if row.side == "buy" else "buy"  # `side` is the maker's
    return Trade(symbol, number(row.price), number(row.size), unix_ms(row.time), int(row.trade_id), taker)


def _rfc3339(at: int) -> str:
    return datetime.fromtimestamp(at / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _values(row: _Candle) -> VenueValues:
    prices = number(row.open), number(row.high), number(row.low), number(row.close)
    return VenueValues(*prices, number(row.volume), None, None)
