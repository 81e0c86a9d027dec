"""OKX v5 by REST: www.okx.com/docs-v5 (2026-06). Rows are single trades; errors carry a code."""

from marketflow.feeds.simulated.rest_side import (
    Handler,
    RestAnswer,
    RestRefused,
    RestRequest,
    VenueRest,
    capped,
    json_answer,
)
from marketflow.feeds.simulated.trade_book import MinuteFold, digits, minute_of
from marketflow.feeds.venues.venue import Trade
from marketflow.model import MINUTE_MS

NEWEST_CANDLES = 1440
"""How far back `candles` goes; `history-candles` goes further."""

_CALLS_IN_2_SECONDS = {"trades": 100, "history-trades": 20, "candles": 40, "history-candles": 20}


class OkxRest(VenueRest):
    """See the module."""

    bad_query = 400, {"code": "51000", "msg": "Parameter error", "data": []}

    def route(self, path: str) -> Handler | None:
        """All below /api/v5."""
        return {
            "/api/v5/public/time": lambda request: _data([{"ts": str(request.now)}]),
            "/api/v5/public/instruments": self._instruments,
            "/api/v5/market/trades": self._newest_trades,
            "/api/v5/market/history-trades": self._trades,
            "/api/v5/market/candles": self._candles,
            "/api/v5/market/history-candles": self._candles,
        }.get(path)

    def charge(self, request: RestRequest) -> None:
        """By path, in two seconds."""
        name = request.path.rpartition("/")[2]
        if self.quota(name, _CALLS_IN_2_SECONDS.get(name, 20), 2.0).take():
            raise RestRefused(json_answer({"code": "50011", "msg": "Too Many Requests", "data": []}, 429))

    def unknown_symbol(self) -> RestAnswer:
        """Error 51001."""
        text = "Instrument ID, Instrument ID code, or Spread ID doesn't exist."
        return json_answer({"code": "51001", "msg": text, "data": []})

    def not_found(self) -> RestAnswer:
        """A JSON body as well."""
        return json_answer({"code": "404", "msg": "Invalid request", "data": []}, 404)

    def _instruments(self, request: RestRequest) -> RestAnswer:
        return _data(
            [
                {"instId": each.native, "instType": "SPOT", "baseCcy": each.base, "quoteCcy": each.quote}
                | {"state": "live"}
                for each in self.listed
            ]
        )

    def _newest_trades(self, request: RestRequest) -> RestAnswer:
        book = self.trades_of(request.query.get("instId"))
        return _data([_row(each) for each in book.last(capped(request.number("limit", 100), 500))[::-1]])

    def _trades(self, request: RestRequest) -> RestAnswer:
        """Newest first: older than `after`, or the newest of those newer than `before`; by id, or by time (type 2)."""
        book, limit = self.trades_of(request.query.get("instId")), capped(request.number("limit", 100), 100)
        after, before = request.number("after", 2**63 - 1), request.number("before", -1)
        if request.query.get("type", "1") == "2":
            trades = book.between(before + 1, after - 1)[-limit:]
        else:
            trades = book.below(after, limit, above=before)
        return _data([_row(each) for each in trades[::-1]])

    def _candles(self, request: RestRequest) -> RestAnswer:
        """Newest first, older than `after`, newer than `before`; minutes without trades are flat."""
        book, limit = self.trades_of(request.query.get("instId")), capped(request.number("limit", 100), 300)
        if request.query.get("bar", "1m") != "1m":
            raise RestRefused(json_answer({"code": "51000", "msg": "Parameter bar error", "data": []}, 400))
        newest = minute_of(request.now)
        history = request.path.endswith("/history-candles")
        until = min(request.number("after", 2**62), newest if history else newest + MINUTE_MS)
        since = max(request.number("before", -1) + 1, minute_of(until - 1) - (limit - 1) * MINUTE_MS)
        if not history:
            since = max(since, newest - (NEWEST_CANDLES - 1) * MINUTE_MS)
        minutes = book.minutes_without_gaps(since, until)[::-1][:limit]
        return _data([_candle(each, closed=each.end < request.now) for each in minutes])


def _data(rows: list[object]) -> RestAnswer:
    return json_answer({"code": "0", "msg": "", "data": rows})


def _row(trade: Trade) -> object:
    row = {"instId": trade.symbol, "side": trade.side, "sz": digits(trade.quantity), "px": digits(trade.price)}
    return row | {"tradeId": str(trade.id), "ts": str(trade.at)}


def _candle(minute: MinuteFold, closed: bool) -> object:
    prices = [digits(price) for price in (minute.open, minute.high, minute.low, minute.close)]
    turnover = digits(minute.turnover)
    return [str(minute.start), *prices, digits(minute.volume), turnover, turnover, "1" if closed else "0"]
