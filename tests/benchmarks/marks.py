"""Marked ticks: how long it takes from the sending of a tick until GET /prices/latest shows it, or a later one."""

import itertools
import random
import re
import socket
import time
from collections.abc import Callable
from typing import Self

from tests.benchmarks.feeder import line, price_now
from tests.benchmarks.rawhttp import Client, request_of

GIVEN_UP_SECONDS = 5.0

_PRICE = re.compile(rb'"price":([^,]+)')


class Marks:
    """Sends marked ticks of a series and looks for them, on a connection of its own.

    Args:
        connection: of MarketFlow to the exchange.
        path: of its latest price.
        symbol: whose ticks all have the time of their sending for a price.
        port: where MarketFlow answers.
        encode: makes what is sent of symbol, price and number.
    """

    def __init__(
        self,
        connection: socket.socket,
        path: str,
        symbol: str,
        port: int,
        encode: Callable[[str, int, int], bytes] = line,
    ) -> None:
        self._connection = connection
        self._symbol = symbol
        self._encode = encode
        self._numbers = itertools.count(1)
        self._request = request_of(path)
        self._client = Client(port)
        self._random = random.Random()

    def pause(self, least: float, most: float) -> None:
        """Wait for a time between the two (seconds) that is in step with nothing."""
        time.sleep(self._random.uniform(least, most))

    def sample(self) -> float:
        """Send a tick and ask back to back until it is seen; gives the milliseconds from the one to the other.

        One that is not seen within GIVEN_UP_SECONDS counts as seen then.
        """
        price = price_now()
        self._connection.sendall(self._encode(self._symbol, price, next(self._numbers)))
        given_up = price + GIVEN_UP_SECONDS * 1e6
        while self._shown() < price and price_now() < given_up:
            pass
        return (price_now() - price) / 1000

    def _shown(self) -> float:
        found = _PRICE.search(self._client.get(self._request))
        assert found is not None
        return float(found[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.__exit__()
