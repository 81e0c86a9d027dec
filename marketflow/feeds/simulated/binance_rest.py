"""Binance spot by REST: rest-api.md of binance-spot-api-docs (2026-07)."""

from itertools import groupby
from math import ceil

import msgspec

from marketflow.feeds.simulated.rest_side import (
    Handler,
    RestAnswer,
    RestRefused,
    RestRequest,
    VenueRest,
    capped,
    json_answer,
)
from marketflow.feeds.simulated.trade_book import KEPT_TRADES, MinuteFold, digits, exact, minute_of
from marketflow.feeds.venues.venue import Trade
from marketflow.model import MINUTE_MS

WEIGHT_A_MINUTE = 6000

REFUSALS_BEFORE_BAN = 10

_WEIGHTS = {"exchangeInfo": 20, "trades": 25, "historicalTrades": 25, "aggTrades": 4, "klines": 2, "time": 1}

AGGREGATE_IDS_ABOVE = 7_000_000
"""Aggregates have ids of their own: here the first trade's and this."""


class BinanceRest(VenueRest):
    """See the module."""

    bad_query = 400, {"code": -1100, "msg": "Illegal characters found in a parameter."}

    def route(self, path: str) -> Handler | None:
        """All below /api/v3."""
        return {
            "/api/v3/time": lambda request: self._answer({"serverTime": request.now}),
            "/api/v3/exchangeInfo": self._instruments,
            "/api/v3/trades": self._newest_trades,
            "/api/v3/historicalTrades": self._trades_from,
            "/api/v3/aggTrades": self._aggregates,
            "/api/v3/klines": self._candles,
        }.get(path)

    def charge(self, request: RestRequest) -> None:
        """By weight; who goes on after ten refusals is banned."""
        wait = self.quota("weight", WEIGHT_A_MINUTE, 60.0).take(_WEIGHTS[request.path.rpartition("/")[2]])
        self.refusals = self.refusals + 1 if wait else 0
        if not wait:
            return
        banned = self.refusals > REFUSALS_BEFORE_BAN
        text = "Way too much request weight used; IP banned." if banned else "Too much request weight used."
        headers = {"Retry-After": str(120 if banned else ceil(wait)), "X-MBX-USED-WEIGHT-1M": str(WEIGHT_A_MINUTE)}
        raise RestRefused(json_answer({"code": -1003, "msg": text}, 418 if banned else 429, headers))

    def unknown_symbol(self) -> RestAnswer:
        """Error -1121."""
        return json_answer({"code": -1121, "msg": "Invalid symbol."}, 400)

    def _answer(self, value: object) -> RestAnswer:
        used = self.quota("weight", WEIGHT_A_MINUTE, 60.0).used
        return json_answer(value, headers={"X-MBX-USED-WEIGHT-1M": str(used)})

    def _instruments(self, request: RestRequest) -> RestAnswer:
        """All, or those named; one unknown name fails the whole call."""
        named = msgspec.json.decode(request.query.get("symbols", "[]"), type=list[str])
        named += [request.query["symbol"]] if "symbol" in request.query else []
        for name in named:
            self.trades_of(name)
        rows = [
            {"symbol": each.native, "status": "TRADING", "baseAsset": each.base, "quoteAsset": each.quote}
            for each in self.listed
            if not named or each.native in named
        ]
        return self._answer({"timezone": "UTC", "serverTime": request.now, "symbols": rows})

    def _newest_trades(self, request: RestRequest) -> RestAnswer:
        trades = self.trades_of(request.query.get("symbol")).last(capped(request.number("limit", 500), 1000))
        return self._answer([_row(trade) for trade in trades])

    def _trades_from(self, request: RestRequest) -> RestAnswer:
        if "fromId" not in request.query:
            return self._newest_trades(request)
        book, limit = self.trades_of(request.query.get("symbol")), capped(request.number("limit", 500), 1000)
        return self._answer([_row(trade) for trade in book.since_id(request.number("fromId", 0), limit)])

    def _aggregates(self, request: RestRequest) -> RestAnswer:
        """Ascending from an id or a time, else the newest: as many orders as fit, each with all its trades."""
        book, limit = self.trades_of(request.query.get("symbol")), capped(request.number("limit", 500), 1000)
        since, until = request.number("startTime", 0), request.number("endTime", 2**62)
        ascending = "fromId" in request.query or "startTime" in request.query
        if "fromId" in request.query:
            first = request.number("fromId", 0) - AGGREGATE_IDS_ABOVE
            trades = book.below(first, 1) + book.since_id(first, KEPT_TRADES)
        else:
            trades = book.between(since, until)
        orders = [[*parts] for _, parts in groupby(trades, lambda trade: (trade.at, trade.price, trade.side))]
        if "fromId" in request.query:  # an order that began before it is not among them
            orders = [order for order in orders if (order[0].id or 0) >= first]
        return self._answer([_aggregate(each) for each in (orders[:limit] if ascending else orders[-limit:])])

    def _candles(self, request: RestRequest) -> RestAnswer:
        """Ascending from a time, else the newest; the last may be forming. Minutes without trades are flat."""
        book, limit = self.trades_of(request.query.get("symbol")), capped(request.number("limit", 500), 1000)
        if request.query.get("interval") != "1m":
            raise RestRefused(json_answer({"code": -1120, "msg": "Invalid interval."}, 400))
        until = min(request.number("endTime", 2**62), request.now) + 1
        since = request.number("startTime", minute_of(until - 1) - (limit - 1) * MINUTE_MS)
        since = max(since, book.first_minute or 0)
        until = min(until, since + limit * MINUTE_MS + MINUTE_MS)
        return self._answer([_candle(each) for each in book.minutes_without_gaps(since, until)[:limit]])


def _row(trade: Trade) -> dict[str, object]:
    worth = f"{exact(trade.price) * exact(trade.quantity):.8f}"
    row: dict[str, object] = {
        "id": trade.id,
        "price": digits(trade.price),
        "qty": digits(trade.quantity),
        "quoteQty": worth,
    }
    return row | {"time": trade.at, "isBuyerMaker": trade.side == "sell", "isBestMatch": True}


def _aggregate(parts: list[Trade]) -> dict[str, object]:
    first, last = parts[0], parts[-1]
    assert first.id is not None
    quantity = sum((exact(part.quantity) for part in parts), exact(0.0))
    row: dict[str, object] = {"a": first.id + AGGREGATE_IDS_ABOVE, "p": digits(first.price), "q": digits(quantity)}
    return row | {"f": first.id, "l": last.id, "T": first.at, "m": first.side == "sell", "M": True}


def _candle(minute: MinuteFold) -> list[object]:
    prices = [digits(price) for price in (minute.open, minute.high, minute.low, minute.close)]
    worth = [f"{minute.turnover:.8f}", minute.count, digits(minute.buy_volume), f"{minute.buy_turnover:.8f}"]
    return [minute.start, *prices, digits(minute.volume), minute.end, *worth, "0"]
