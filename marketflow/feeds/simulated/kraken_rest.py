"""Kraken by REST: docs.kraken.com/api (2026-06). Errors come with 200; pairs answer by their legacy names."""

from decimal import ROUND_DOWN, Decimal
from email.utils import formatdate

from marketflow.feeds.simulated.dialects import kraken_ns, rfc3339
from marketflow.feeds.simulated.listings import Listed
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

CANDLES_A_CALL = 720

TRADES_A_CALL = 1000

_ASSETS = {"BTC": "XBT", "DOGE": "XDG"}
_WITH_X = {"XBT", "ETH", "LTC", "XRP", "XLM", "ETC", "REP", "ZEC", "XMR", "MLN"}
_WITH_Z = {"USD", "EUR", "GBP", "CAD", "JPY"}


def alternative_name(pair: Listed) -> str:
    """The name without a slash: XBTUSDT."""
    return _ASSETS.get(pair.base, pair.base) + _ASSETS.get(pair.quote, pair.quote)


def legacy_name(pair: Listed) -> str:
    """The name by which pairs answer: XXBTZUSD where both assets are of the first years, else the alternative one."""
    base, quote = (_ASSETS.get(part, part) for part in (pair.base, pair.quote))
    if base not in _WITH_X or quote not in _WITH_X | _WITH_Z:
        return base + quote
    return f"X{base}{'Z' if quote in _WITH_Z else 'X'}{quote}"


class KrakenRest(VenueRest):
    """See the module."""

    bad_query = 200, {"error": ["EGeneral:Invalid arguments"]}

    def route(self, path: str) -> Handler | None:
        """All below /0/public."""
        return {
            "/0/public/Time": self._time,
            "/0/public/SystemStatus": self._status,
            "/0/public/AssetPairs": self._pairs,
            "/0/public/Trades": self._trades,
            "/0/public/OHLC": self._candles,
        }.get(path)

    def charge(self, request: RestRequest) -> None:
        """One request a second, ten in a burst."""
        if self.quota("burst", 10, 10.0).take():
            raise RestRefused(json_answer({"error": ["EGeneral:Too many requests"]}))

    def unknown_symbol(self) -> RestAnswer:
        """An error in a 200."""
        return json_answer({"error": ["EQuery:Unknown asset pair"]})

    def not_found(self) -> RestAnswer:
        """The same."""
        return json_answer({"error": ["EGeneral:Unknown method"]})

    def _time(self, request: RestRequest) -> RestAnswer:
        seconds = request.now // 1000
        return _result({"unixtime": seconds, "rfc1123": formatdate(seconds, usegmt=True)})

    def _status(self, request: RestRequest) -> RestAnswer:
        return _result({"status": "online", "timestamp": rfc3339(request.now)[:19] + "Z"})

    def _pairs(self, request: RestRequest) -> RestAnswer:
        rows = {}
        for pair in self.listed:
            base, quote = (_ASSETS.get(part, part) for part in (pair.base, pair.quote))
            row = {"altname": alternative_name(pair), "wsname": f"{base}/{quote}", "status": "online"}
            rows[legacy_name(pair)] = row
        return _result(rows)

    def _trades(self, request: RestRequest) -> RestAnswer:
        """Ascending, from beyond `since` (ns); without it the newest. `last` goes on from there."""
        pair = self._pair(request)
        book, limit = self.trades_of(pair.native), capped(request.number("count", TRADES_A_CALL), TRADES_A_CALL)
        since = request.number("since", 0)
        if "since" in request.query:
            trades = [each for each in book.between(since // 1_000_000, 2**62) if kraken_ns(each.at) > since][:limit]
        else:
            trades = book.last(limit)
        rows = [
            [digits(each.price), digits(each.quantity), kraken_ns(each.at) / 1e9, each.side[0], "l", "", each.id]
            for each in trades
        ]
        last = kraken_ns(trades[-1].at) if trades else since
        return _result({legacy_name(pair): rows, "last": str(last)})

    def _candles(self, request: RestRequest) -> RestAnswer:
        """The newest 720, however old `since` (s) is; the last row is forming. Minutes without trades have count 0."""
        pair = self._pair(request)
        if request.number("interval", 1) != 1:
            raise RestRefused(json_answer({"error": ["EGeneral:Invalid arguments:interval"]}))
        newest = minute_of(request.now)
        book = self.trades_of(pair.native)
        minutes = book.minutes_without_gaps(newest - (CANDLES_A_CALL - 1) * MINUTE_MS, newest + 1)
        since = request.number("since", 0) * 1000
        rows = [_candle(each) for each in minutes if each.start > since]
        return _result({legacy_name(pair): rows, "last": (newest - MINUTE_MS) // 1000})

    def _pair(self, request: RestRequest) -> Listed:
        """The pair of a query, by any of its names."""
        asked = request.query.get("pair", "")
        for pair in self.listed:
            slashed = "/".join(_ASSETS.get(part, part) for part in (pair.base, pair.quote))
            if asked in (alternative_name(pair), legacy_name(pair), pair.native, slashed, pair.base + pair.quote):
                return pair
        raise RestRefused(self.unknown_symbol())


def _result(value: object) -> RestAnswer:
    return json_answer({"error": [], "result": value})


def _candle(minute: MinuteFold) -> list[object]:
    prices = [digits(price) for price in (minute.open, minute.high, minute.low, minute.close)]
    vwap = "0.0"
    if minute.count:  # cut, not rounded
        vwap = digits((minute.turnover / minute.volume).quantize(Decimal("1e-8"), ROUND_DOWN))
    return [minute.start // 1000, *prices, vwap, digits(minute.volume), minute.count]
