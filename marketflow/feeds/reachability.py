"""Whether exchanges accept a connection, to be known before a switch to live mode: one to each, closed at once."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from marketflow.settings import ExchangeSettings
from marketflow.tasks import connected_socket
from marketflow.text import without_secrets

CONNECT_SECONDS = 3.0
"""How long an exchange may take to accept a connection."""

KEPT_SECONDS = 5.0
"""How long a result is cached: venues limit the connections of an address."""


class Reachability(NamedTuple):
    """Whether an exchange accepted a connection; `error` is None where it did, else why not."""

    exchange: str
    address: str
    error: str | None


class ReachabilityProbe:
    """Connects to each exchange, at most once in KEPT_SECONDS, however many clients ask.

    Args:
        exchanges: as configured, read at each attempt.
        monotonic: measures the age of a result, in seconds.
    """

    def __init__(
        self, exchanges: Callable[[], Sequence[ExchangeSettings]], monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._exchanges = exchanges
        self._monotonic = monotonic
        self._attempt: asyncio.Task[list[Reachability]] | None = None
        self._began_at = 0.0

    async def results(self) -> list[Reachability]:
        """Return one result per exchange, in the order of the settings."""
        now = self._monotonic()
        if self._attempt is None or now - self._began_at > KEPT_SECONDS:
            self._began_at = now
            self._attempt = asyncio.create_task(self._connect_all())
        # Shielded: others await the same attempt, and it ends by itself.
        return await asyncio.shield(self._attempt)

    async def _connect_all(self) -> list[Reachability]:
        return await asyncio.gather(*map(_reachability, self._exchanges()))


async def _reachability(exchange: ExchangeSettings) -> Reachability:
    address, error = exchange.address, None
    if exchange.venue:
        from marketflow.feeds.venues.registry import VENUES  # lazily: a start without venues needs none of them

        address = exchange.url or VENUES[exchange.venue].url
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            if exchange.venue:
                await _connect_to_venue(address)
            else:
                (await connected_socket(exchange.host, exchange.port)).close()
    except TimeoutError:
        error = f"no answer within {CONNECT_SECONDS:g} s"
    except OSError as failure:
        # asyncio's own text of a refused connection repeats the address.
        code = failure.errno
        error = os.strerror(code) if code is not None and code > 0 else failure.strerror or str(failure)
    return Reachability(exchange.name, without_secrets(address), error)


async def _connect_to_venue(url: str) -> None:
    from marketflow.feeds.venues.websocket.frame_stream import open_stream

    stream = await open_stream(url, lambda messages: None)
    await stream.close()
