"""OKX by REST: single trades by id, newest first, and candles with turnover and a mark of the forming one.

Source: www.okx.com/docs-v5, public REST (2026-06). An error may come with status 200.
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

PAGE_TRADES = 100
TRADES_KEPT_DAYS = 89  # of three months
RECENT_CANDLES = 1400  # of 1,440, which `candles` gives; the others are in `history-candles`
_TOO_OFTEN = ("50011", "50061")


class _Trade(msgspec.Struct, gc=False):
    id: str = msgspec.field(name="tradeId")
    price: str = msgspec.field(name="px")
    size: str = msgspec.field(name="sz")
    side: Side
    ts: str


class _Candle(msgspec.Struct, array_like=True, gc=False):
    ts: str
    open: str
    high: str
    low: str
    close: str
    volume: str
    turnover: str
    turnover_in_quote: str
    confirm: str


class _Answer(msgspec.Struct):
    code: str
    msg: str = ""
    data: msgspec.Raw = msgspec.Raw(b"[]")


class _Time(msgspec.Struct):
    ts: str


_trades = msgspec.json.Decoder(list[_Trade]).decode
_candles = msgspec.json.Decoder(list[_Candle]).decode


class OkxCalls(RestCalls):
    """See the module."""

    weight_limit = (10, 2.0)  # of 20 in 2 seconds
    newest_first = True
    trades_kept_ms = TRADES_KEPT_DAYS * 86_400_000
    candles_a_call = 300
    time_call = RestCall("/api/v5/public/time")

    def trades_call(self, symbol: str, since_ms: int, newest_id: int | None, cursor: str | None) -> RestCall:
        """`after` means older than an id; type 1 pages by id."""
        query: dict[str, str | int] = {"instId": symbol, "type": 1, "limit": PAGE_TRADES}
        if cursor is not None:
            query["after"] = cursor
        elif newest_id is not None:
            query["after"] = newest_id + 1
        return RestCall("/api/v5/market/history-trades", query)

    def trades(self, symbol: str, reply: RestReply) -> TradesPage:
        """Single trades, newest first."""
        trades = [
            Trade(symbol, number(row.price), number(row.size), int(row.ts), int(row.id), row.side)
            for row in _trades(_data(reply))
        ]
        oldest = min((trade.id or 0 for trade in trades), default=0)
        return TradesPage(trades, str(oldest) if oldest > 1 else None)

    def candles_call(self, symbol: str, since_ms: int, until_ms: int, now_ms: int) -> RestCall:
        """`before` and `after` mean newer and older than a start, itself excluded."""
        times: dict[str, str | int] = {"before": since_ms - 1, "after": until_ms}
        query = {"instId": symbol, "bar": "1m", **times, "limit": self.candles_a_call}
        is_recent = since_ms > now_ms - RECENT_CANDLES * MINUTE_MS
        return RestCall(f"/api/v5/market/{'candles' if is_recent else 'history-candles'}", query)

    def candles(self, reply: RestReply) -> list[VenueCandle]:
        """Newest first, without a count of trades; minutes without trades carry the close before."""
        return [VenueCandle(int(row.ts), _values(row), row.confirm == "1") for row in _candles(_data(reply))]

    def time(self, reply: RestReply) -> int:
        """To the millisecond."""
        (row,) = msgspec.json.decode(_data(reply), type=list[_Time])
        return int(row.ts)


def _data(reply: RestReply) -> msgspec.Raw:
    decoded = msgspec.json.decode(reply.body, type=_Answer)
    if decoded.code in _TOO_OFTEN:
        raise VenueRefusal(429, f"{decoded.code}: {decoded.msg}", 2.0)
    if decoded.code != "0":
        raise VenueError(f"{decoded.code}: {decoded.msg}")
    return decoded.data


def _values(row: _Candle) -> VenueValues:
    prices = number(row.open), number(row.high), number(row.low), number(row.close)
    return VenueValues(*prices, number(row.volume), number(row.turnover_in_quote), None)
