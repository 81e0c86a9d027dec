"""Pages as venues give them by REST, made of trades and candles after their documents: order, cursors, names."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from marketflow.feeds.venues.venue import Trade
from tests.support.rest_server import Asked, Reply


class Row(NamedTuple):
    """A candle; prices as text, count of trades."""

    start: int
    open: str
    high: str
    low: str
    close: str
    volume: str
    ticks: int
    confirm: bool = True
    turnover: str = ""
    """The volume where it is not given."""
    vwap: str = "0.0"
    bought: tuple[str, str] = ("0", "0")
    """Volume and turnover of the takers who bought."""


def rfc3339(at: int) -> str:
    return datetime.fromtimestamp(at / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def plain(value: float) -> str:
    """A number as venues write it: without an exponent."""
    text = f"{value:.12f}".rstrip("0")
    return text + "0" if text.endswith(".") else text


class VenuePages:
    """Answers one venue's calls for trades, candles and the time.

    Args:
        venue: its name.
        trades: by ascending id.
        candles: by ascending start.
        page: how many trades a page holds, the venue's own limit by default.
    """

    def __init__(self, venue: str, trades: Sequence[Trade] = (), candles: Sequence[Row] = (), page: int = 0) -> None:
        self.venue = venue
        self.trades = list(trades)
        self.candles = list(candles)
        self.page = page or {"okx": 100}.get(venue, 1000)
        self.now = 0
        """The venue's clock in Unix ms."""

    def __call__(self, asked: Asked) -> Reply:
        reply: Reply = getattr(self, f"_{self.venue}")(asked.path, asked.query)
        return reply

    # Trades

    def _older(self, query: dict[str, str]) -> list[Trade]:
        """The newest page before `after`, newest first."""
        upper = int(query.get("after", 10**40))
        limit = min(self.page, int(query["limit"]))
        return [trade for trade in reversed(self.trades) if (trade.id or 0) < upper][:limit]

    def _binance(self, path: str, query: dict[str, str]) -> Reply:
        if path == "/api/v3/time":
            return Reply({"serverTime": self.now})
        if path == "/api/v3/klines":
            begin, end = int(query["startTime"]), int(query["endTime"])
            rows = [row for row in self.candles if begin <= row.start <= end][: int(query["limit"])]
            return Reply([
                [row.start, *row[1:6], row.start + 59_999, row.turnover or row.volume, row.ticks, *row.bought, "0"]
                for row in rows
            ])  # fmt: skip
        assert path == "/api/v3/aggTrades"
        numbered = list(enumerate(self.trades, 500))
        if "fromId" in query:
            found = [(a, trade) for a, trade in numbered if a >= int(query["fromId"])]
        else:
            begin, end = int(query["startTime"]), int(query["endTime"])
            assert end - begin < 3_600_000
            found = [(a, trade) for a, trade in numbered if begin <= trade.at <= end]
        return Reply([
            {"a": a, "p": plain(trade.price), "q": plain(trade.quantity), "f": (trade.id or 0) - trade.count + 1}
            | {"l": trade.id, "T": trade.at, "m": trade.side == "sell", "M": True}
            for a, trade in found[: min(self.page, int(query["limit"]))]
        ])  # fmt: skip

    def _coinbase(self, path: str, query: dict[str, str]) -> Reply:
        if path == "/time":
            return Reply({"iso": rfc3339(self.now), "epoch": self.now / 1000})
        if path.endswith("/candles"):
            begin, end = (datetime.fromisoformat(query[name]).timestamp() * 1000 for name in ("start", "end"))
            rows = [row for row in reversed(self.candles) if begin <= row.start <= end and row.ticks]
            numbers = [[float(row.low), float(row.high), float(row.open), float(row.close)] for row in rows]
            return Reply([[row.start // 1000, *n, float(row.volume)] for row, n in zip(rows, numbers, strict=True)])
        trades = self._older(query)
        rows_of_trades = [
            {"trade_id": trade.id, "side": "sell" if trade.side == "buy" else "buy", "size": plain(trade.quantity)}
            | {"price": plain(trade.price), "time": rfc3339(trade.at)}
            for trade in trades
        ]
        headers = {"CB-BEFORE": str(trades[0].id), "CB-AFTER": str(trades[-1].id)} if trades else {}
        return Reply(rows_of_trades, headers=headers)

    def _kraken(self, path: str, query: dict[str, str]) -> Reply:
        if path == "/0/public/Time":
            return Reply({"error": [], "result": {"unixtime": self.now // 1000, "rfc1123": "-"}})
        key = f"X{query['pair'][:3]}Z{query['pair'][3:]}"
        if path == "/0/public/OHLC":
            newest = self.candles[-720:]
            rows = [row for row in newest if row.start // 1000 > int(query["since"])] or newest
            ohlc = [
                [row.start // 1000, row.open, row.high, row.low, row.close, row.vwap, row.volume, row.ticks]
                for row in rows
            ]
            return Reply({"error": [], "result": {key: ohlc, "last": self.candles[-1].start // 1000}})
        since = int(query["since"])
        assert since > 10**17, "seconds or milliseconds answer something else"
        found = [trade for trade in self.trades if trade.at * 1_000_000 > since]
        page = found[: min(self.page, int(query["count"]))]
        last = page[-1].at * 1_000_000 if page else since
        trades = [
            [plain(trade.price), plain(trade.quantity), trade.at / 1000, trade.side[0], "l", "", trade.id]
            for trade in page
        ]
        return Reply({"error": [], "result": {key: trades, "last": str(last)}})

    def _okx(self, path: str, query: dict[str, str]) -> Reply:
        if path == "/api/v5/public/time":
            return Reply({"code": "0", "msg": "", "data": [{"ts": str(self.now)}]})
        data: list[object]
        if path.endswith("candles"):
            newer, older = int(query["before"]), int(query["after"])
            rows = [row for row in reversed(self.candles) if newer < row.start < older][: int(query["limit"])]
            data = [
                [
                    str(row.start),
                    *row[1:6],
                    row.turnover or row.volume,
                    row.turnover or row.volume,
                    str(int(row.confirm)),
                ]
                for row in rows
            ]
        else:
            assert query["type"] == "1"
            data = [
                {"instId": query["instId"], "side": trade.side, "sz": plain(trade.quantity)}
                | {"px": plain(trade.price), "tradeId": str(trade.id), "ts": str(trade.at)}
                for trade in self._older(query)
            ]
        return Reply({"code": "0", "msg": "", "data": data})

    def _bybit(self, path: str, query: dict[str, str]) -> Reply:
        result: dict[str, object]
        if path == "/v5/market/time":
            result = {"timeSecond": str(self.now // 1000), "timeNano": str(self.now * 1_000_000)}
        elif path == "/v5/market/recent-trade":
            assert query["category"] == "spot"
            rows_of_trades = [
                {"execId": str(trade.id), "symbol": query["symbol"], "price": plain(trade.price)}
                | {"size": plain(trade.quantity), "side": trade.side.capitalize(), "time": str(trade.at)}
                for trade in self.trades[-min(60, int(query["limit"])) :][::-1]
            ]
            result = {"category": "spot", "list": rows_of_trades}
        else:
            assert query["category"] == "spot"
            begin, end = int(query["start"]), int(query["end"])
            rows = [row for row in reversed(self.candles) if begin <= row.start <= end][: int(query["limit"])]
            listed = [[str(r.start), r.open, r.high, r.low, r.close, r.volume, r.turnover or r.volume] for r in rows]
            result = {"category": "spot", "symbol": query["symbol"], "list": listed}
        return Reply({"retCode": 0, "retMsg": "OK", "result": result, "retExtInfo": {}, "time": self.now})
