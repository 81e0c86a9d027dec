"""The stream as both clients follow it: which prices and candles are new, and when to connect again."""

from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import httpx
import msgspec
from websockets.exceptions import InvalidStatus, WebSocketException

from marketflow.client.api_queries import RequestFailed, failure, pause_before_retry
from marketflow.client.market_data import Candle, LiveCandle, Price
from marketflow.tasks import Backoff

CANDLES_KNOWN = 32
"""Candles of a series that are remembered, so that none is yielded twice."""

SILENCE_SECONDS = 20.0
"""Time without any message after which a connection is taken to be lost: the server beats every 5 s."""

LOST = (WebSocketException, OSError, TimeoutError, EOFError, httpx.TransportError)
"""What a lost connection, or one that cannot be made, raises."""


class _Message(msgspec.Struct):
    event: str
    data: msgspec.Raw


class _Prices(msgspec.Struct):
    prices: list[Price]


class _Candles(msgspec.Struct):
    candles: list[LiveCandle] = []


class Gap(NamedTuple):
    """Candles that closed while there was no connection: those of a series that open between two times."""

    symbol: str
    exchange: str | None
    interval: str
    since: datetime
    until: datetime


class Follower:
    """Follows one connection after the other."""

    def __init__(self) -> None:
        self._backoff = Backoff()
        self._failures = 0

    def pause(self, error: BaseException) -> float:
        """Return the seconds until the next connection, after the end of one.

        Raises:
            RequestFailed: the server refused it for good.
        """
        self._failures += 1
        if isinstance(error, InvalidStatus):
            refused = _refusal(error)
            if (seconds := pause_before_retry(refused)) is None:
                raise refused from None
            return seconds
        return self._backoff.pause(self._failures)

    def _decode(self, text: str | bytes) -> _Message:
        self._failures = 0
        return _decode(text)


class PriceFollower(Follower):
    """Finds the prices that are new in the messages of one connection after the other.

    Each connection begins with all newest prices: those that were had already are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self._newest: dict[tuple[str, str], tuple[datetime, float]] = {}

    def new_prices(self, text: str | bytes) -> list[Price]:
        """Return the prices of a message that were not had before."""
        message = self._decode(text)
        if message.event == "mode":  # prices of the other mode may be older
            self._newest.clear()
        if message.event not in ("snapshot", "prices"):
            return []
        return [price for price in msgspec.json.decode(message.data, type=_Prices).prices if self._is_new(price)]

    def _is_new(self, price: Price) -> bool:
        series, now = (price.exchange, price.symbol), (price.timestamp, price.price)
        if self._newest.get(series) == now:
            return False
        self._newest[series] = now
        return True


class CandleFollower(Follower):
    """Finds the candles that are new, in the messages of one connection after the other.

    Each connection begins with the last closed candle of each series. Those that closed between are gaps to query.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[tuple[str, str | None, str], dict[datetime, LiveCandle]] = {}

    def take(self, text: str | bytes) -> tuple[list[Gap], list[LiveCandle]]:
        """Return the gaps before the candles of a message, and these; what is new of both `fresh` finds."""
        message = self._decode(text)
        if message.event == "mode":
            self._known.clear()
        if message.event not in ("snapshot", "candles"):
            return [], []
        candles = msgspec.json.decode(message.data, type=_Candles).candles
        return self._gaps(candles) if message.event == "snapshot" else [], candles

    def _gaps(self, candles: Iterable[LiveCandle]) -> list[Gap]:
        first: dict[tuple[str, str | None, str], datetime] = {}
        for candle in candles:
            first.setdefault(candle.series, candle.time)
        closed = {
            series: max((time for time, candle in known.items() if candle.closed), default=None)
            for series, known in self._known.items()
        }
        return [
            Gap(*series, last + timedelta(milliseconds=1), first[series])
            for series, last in closed.items()
            if last is not None and series in first and last < first[series]
        ]

    def fresh(self, candles: Iterable[LiveCandle]) -> Iterator[LiveCandle]:
        """Yield the candles that are new: a closed one once, and again when it was corrected."""
        for candle in candles:
            known = self._known.setdefault(candle.series, {})
            held = known.get(candle.time)
            is_same = held == candle or (
                held is not None and held.closed and (held.version, held.ticks) == (candle.version, candle.ticks)
            )
            if not is_same:
                known[candle.time] = candle
                while len(known) > CANDLES_KNOWN:
                    del known[min(known)]
                yield candle

    def filled(self, gap: Gap, candles: Iterable[Candle]) -> Iterator[LiveCandle]:
        """Yield the candles of a gap, as an answer has them."""
        return self.fresh(
            LiveCandle(
                **msgspec.structs.asdict(candle), symbol=gap.symbol, exchange=gap.exchange, interval=gap.interval
            )
            for candle in candles
        )


def _refusal(error: InvalidStatus) -> RequestFailed:
    response = error.response
    headers: dict[str, Any] = {name.lower(): value for name, value in response.headers.raw_items()}
    return failure(response.status_code, bytes(response.body or b""), headers)


_decode = msgspec.json.Decoder(_Message).decode
