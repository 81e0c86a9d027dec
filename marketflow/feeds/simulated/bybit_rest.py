"""Bybit v5 spot by REST: bybit-exchange/docs (2026-07). Only the 60 newest trades; candles open at the last close."""

from dataclasses import replace
from itertools import pairwise

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
from marketflow.model import MINUTE_MS

TRADES_A_CALL = 60

REFUSED_SECONDS = 600.0
"""For how long everything is refused once the limit was broken."""


class BybitRest(VenueRest):
    """See the module."""

    bad_query = 200, {"retCode": 10001, "retMsg": "params error", "result": {}, "time": 0}

    def route(self, path: str) -> Handler | None:
        """All below /v5/market."""
        return {
            "/v5/market/time": self._time,
            "/v5/market/instruments-info": self._instruments,
            "/v5/market/recent-trade": self._trades,
            "/v5/market/kline": self._candles,
        }.get(path)

    def charge(self, request: RestRequest) -> None:
        """600 requests in five seconds; then nothing is answered for ten minutes."""
        refused = self.quota("refused", 1, REFUSED_SECONDS)
        if refused.in_use() or self.quota("requests", 600, 5.0).take():
            refused.take()
            raise RestRefused(RestAnswer(b"<html><body>403, access too frequent</body></html>", 403))

    def unknown_symbol(self) -> RestAnswer:
        """Error 10001 in a 200."""
        return json_answer({"retCode": 10001, "retMsg": "Not supported symbols", "result": {}, "time": 0})

    def _time(self, request: RestRequest) -> RestAnswer:
        seconds, nanoseconds = str(request.now // 1000), str(request.now * 1_000_000)
        return _result({"timeSecond": seconds, "timeNano": nanoseconds}, request)

    def _instruments(self, request: RestRequest) -> RestAnswer:
        rows = [
            {"symbol": each.native, "baseCoin": each.base, "quoteCoin": each.quote, "status": "Trading"}
            for each in self.listed
        ]
        return _result({"category": "spot", "list": rows}, request)

    def _trades(self, request: RestRequest) -> RestAnswer:
        """The newest first, without a cursor."""
        book = self.trades_of(self._symbol(request))
        rows = [
            {"execId": str(trade.id), "symbol": trade.symbol, "price": digits(trade.price)}
            | {"size": digits(trade.quantity), "side": trade.side.capitalize(), "time": str(trade.at)}
            | {"isBlockTrade": False, "isRPITrade": False}
            for trade in book.last(capped(request.number("limit", TRADES_A_CALL), TRADES_A_CALL))[::-1]
        ]
        return _result({"category": "spot", "list": rows}, request)

    def _candles(self, request: RestRequest) -> RestAnswer:
        """Newest first, both ends of the range included; without a flag for what is forming, or a number of trades."""
        symbol = self._symbol(request)
        book, limit = self.trades_of(symbol), capped(request.number("limit", 200), 1000)
        if request.query.get("interval") != "1":
            raise RestRefused(json_answer(self.bad_query[1]))
        until = min(request.number("end", 2**62), request.now) + 1
        since = max(request.number("start", 0), minute_of(until - 1) - (limit - 1) * MINUTE_MS)
        minutes = book.minutes_without_gaps(since - MINUTE_MS, until)
        rows = [_candle(each) for each in _opened_at_last_close(minutes) if each.start >= since]
        return _result({"category": "spot", "symbol": symbol, "list": rows[::-1][:limit]}, request)

    def _symbol(self, request: RestRequest) -> str | None:
        """The symbol of a query for spot; the category is linear where it is left out."""
        return request.query.get("symbol") if request.query.get("category") == "spot" else None


def _opened_at_last_close(minutes: list[MinuteFold]) -> list[MinuteFold]:
    moved = [
        replace(minute, open=before.close, high=max(minute.high, before.close), low=min(minute.low, before.close))
        for before, minute in pairwise(minutes)
    ]
    return minutes[:1] + moved


def _candle(minute: MinuteFold) -> object:
    prices = [digits(price) for price in (minute.open, minute.high, minute.low, minute.close)]
    return [str(minute.start), *prices, digits(minute.volume), digits(minute.turnover)]


def _result(value: object, request: RestRequest) -> RestAnswer:
    return json_answer({"retCode": 0, "retMsg": "OK", "result": value, "retExtInfo": {}, "time": request.now})
