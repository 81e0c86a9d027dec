"""Coinbase Exchange by REST: docs.cdp.coinbase.com/exchange/rest-api (2026-09)."""

from datetime import datetime

from marketflow.feeds.simulated.dialects import rfc3339
from marketflow.feeds.simulated.rest_side import (
    Handler,
    RestAnswer,
    RestRefused,
    RestRequest,
    VenueRest,
    capped,
    json_answer,
)
from marketflow.feeds.simulated.trade_book import digits, minute_of
from marketflow.model import MINUTE_MS

CANDLES_A_CALL = 300


class CoinbaseRest(VenueRest):
    """See the module."""

    bad_query = 400, {"message": "Bad Request"}

    def route(self, path: str) -> Handler | None:
        """The products, and below each its trades and candles."""
        if path in ("/products", "/time"):
            return self._products if path == "/products" else self._time
        _, found, rest = path.partition("/products/")
        last = rest.partition("/")[2]
        return {"trades": self._trades, "candles": self._candles}.get(last) if found else None

    def charge(self, request: RestRequest) -> None:
        """Ten requests a second, fifteen in a burst."""
        if self.quota("burst", 15, 1.0).take() or self.quota("long", 100, 10.0).take():
            raise RestRefused(json_answer({"message": "Public rate limit exceeded"}, 429))

    def unknown_symbol(self) -> RestAnswer:
        """404."""
        return json_answer({"message": "NotFound"}, 404)

    def not_found(self) -> RestAnswer:
        """The same."""
        return self.unknown_symbol()

    def _time(self, request: RestRequest) -> RestAnswer:
        return json_answer({"iso": rfc3339(request.now), "epoch": request.now / 1000})

    def _products(self, request: RestRequest) -> RestAnswer:
        rows = [
            {"id": each.native, "base_currency": each.base, "quote_currency": each.quote, "status": "online"}
            | {"trading_disabled": False}
            for each in self.listed
        ]
        return json_answer(rows)

    def _trades(self, request: RestRequest) -> RestAnswer:
        """Newest first: below `after`, or the newest of those above `before`."""
        book, limit = self.trades_of(request.path.split("/")[2]), capped(request.number("limit", 1000), 1000)
        after = request.number("after", 0) or None
        trades = book.below(after, limit, above=request.number("before", -1))[::-1]
        rows = [
            {"trade_id": trade.id, "side": "sell" if trade.side == "buy" else "buy", "size": digits(trade.quantity)}
            | {"price": digits(trade.price), "time": rfc3339(trade.at)}
            for trade in trades
        ]
        ends = {"CB-BEFORE": str(trades[0].id), "CB-AFTER": str(trades[-1].id)} if trades else {}
        return json_answer(rows, headers=ends)

    def _candles(self, request: RestRequest) -> RestAnswer:
        """Newest first, of a range with both ends; minutes without trades are left out."""
        book = self.trades_of(request.path.split("/")[2])
        if request.query.get("granularity", "60") != "60":
            raise RestRefused(json_answer({"message": "Unsupported granularity"}, 400))
        until = _time_ms(request.query.get("end"), request.now)
        since = _time_ms(request.query.get("start"), minute_of(until) - (CANDLES_A_CALL - 1) * MINUTE_MS)
        if until - since > CANDLES_A_CALL * MINUTE_MS:
            text = "granularity too small for the requested time range. Count of aggregations requested exceeds 300"
            raise RestRefused(json_answer({"message": text}, 400))
        rows = [
            [each.start // 1000, *map(float, (each.low, each.high, each.open, each.close, each.volume))]
            for each in book.minutes(since, min(until, request.now) + 1)[-CANDLES_A_CALL:]
        ]
        return json_answer(rows[::-1])


def _time_ms(text: str | None, default: int) -> int:
    """A time in RFC 3339 or Unix seconds, as Unix ms."""
    if not text:
        return default
    return int(text) * 1000 if text.isdigit() else round(datetime.fromisoformat(text).timestamp() * 1000)
