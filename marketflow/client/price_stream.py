"""The stream of prices, as both clients follow it: which prices of its messages are new, and when to connect again."""

from datetime import datetime
from typing import Any

import msgspec
from websockets.exceptions import InvalidStatus, WebSocketException

from marketflow.client.api_queries import RequestFailed, failure, pause_before_retry
from marketflow.client.market_data import Price
from marketflow.tasks import Backoff

SILENCE_SECONDS = 20.0
"""Time without any message after which a connection is taken to be lost: the server beats every 5 s."""

LOST = (WebSocketException, OSError, TimeoutError, EOFError)
"""What a lost connection, or one that cannot be made, raises."""


class _Message(msgspec.Struct):
    event: str
    data: msgspec.Raw


class _Prices(msgspec.Struct):
    prices: list[Price]


class PriceFollower:
    """Finds the prices that are new in the messages of one connection after the other.

    Each connection begins with all newest prices: those that were had already are left out.
    """

    def __init__(self) -> None:
        self._newest: dict[tuple[str, str], tuple[datetime, float]] = {}
        self._backoff = Backoff()
        self._failures = 0

    def new_prices(self, text: str | bytes) -> list[Price]:
        """Return the prices of a message that were not had before."""
        self._failures = 0
        message = _decode(text)
        if message.event == "mode":  # prices of the other mode may be older
            self._newest.clear()
        if message.event not in ("snapshot", "prices"):
            return []
        return [price for price in msgspec.json.decode(message.data, type=_Prices).prices if self._is_new(price)]

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

    def _is_new(self, price: Price) -> bool:
        series, now = (price.exchange, price.symbol), (price.timestamp, price.price)
        if self._newest.get(series) == now:
            return False
        self._newest[series] = now
        return True


def _refusal(error: InvalidStatus) -> RequestFailed:
    response = error.response
    headers: dict[str, Any] = {name.lower(): value for name, value in response.headers.raw_items()}
    return failure(response.status_code, bytes(response.body or b""), headers)


_decode = msgspec.json.Decoder(_Message).decode
