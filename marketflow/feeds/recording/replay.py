"""`marketflow exchange --replay`: serves recorded frames as the venue would, or as a TCP exchange.

The replay begins when the first client has subscribed. Instruments are the symbols that were traded; trades and candles
by REST are those that were replayed so far.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from loguru import logger

from marketflow.errors import StartError
from marketflow.feeds import simulator
from marketflow.feeds.recording.playback import Playback
from marketflow.feeds.simulated.dialects import DIALECTS
from marketflow.feeds.simulated.listings import Listed, listed
from marketflow.feeds.simulated.simulated_venue import SimulatedVenue, run_source
from marketflow.feeds.simulated.trade_book import TradeBook
from marketflow.feeds.venues.registry import VENUES
from marketflow.feeds.venues.venue import Rejected, Trade

SETTLE_SECONDS = 1.0
"""From the first subscription on, in which the client's others follow."""

FRAMES_A_BATCH = 100


def serve(paths: Sequence[Path], speed: float, host: str, port: int) -> int:
    """Replay files until SIGINT or SIGTERM.

    Args:
        paths: the files, of one venue.
        speed: how many recorded seconds pass in one.
        host: address to listen on.
        port: port to listen on; 0 takes any free one and logs which.

    Raises:
        StartError: a file cannot be replayed, or the port cannot be bound.
    """
    try:
        playback = Playback(paths, speed)
        if playback.venue in VENUES:
            return run_source(playback.venue, host, port, RecordedTrades(playback))
        if playback.venue:
            raise StartError(f"there is no venue {playback.venue!r}")
    except OSError as error:
        raise StartError(f"cannot read {error.filename}: {error.strerror or error}") from error
    return simulator.serve_lines(playback.exchange, host, port, RecordedLines(playback).run)


class RecordedTrades:
    """The trades of a recording of a venue, as the source of a simulated one.

    Args:
        playback: the recording.
        settle_seconds: from the first subscription to the first frame.
    """

    def __init__(self, playback: Playback, settle_seconds: float = SETTLE_SECONDS) -> None:
        self._playback, self._settle_seconds = playback, settle_seconds
        self._venue = VENUES[playback.venue]
        self.listed = self._symbols()

    def book(self) -> TradeBook:
        """Empty."""
        return TradeBook(each.native for each in self.listed)

    def now(self) -> int:
        """The time of the replay."""
        return self._playback.now()

    async def run(self, venue: SimulatedVenue) -> None:
        """Replay once, then go on answering."""
        await venue.first_subscription()
        await _begin(self._playback, self._settle_seconds)
        number = 0
        async for _, frame in self._playback.frames():
            events = self._venue.decode(frame)
            trades = [event for event in events if isinstance(event, Trade)]
            # What the venue said about connection and subscriptions is said by this server itself.
            if trades or any(isinstance(event, Rejected) for event in events):
                venue.publish(trades, [_as_sent(frame)])
            number += 1
            if number % FRAMES_A_BATCH == 0:
                await venue.drained()
                await asyncio.sleep(0)
        logger.bind(exchange=venue.name).info("the replay is over after {} frames", number)

    def _symbols(self) -> list[Listed]:
        separator = DIALECTS[self._playback.venue].separator
        events = (event for _, frame in self._playback.recorded() for event in self._venue.decode(frame))
        symbols = dict.fromkeys(event.symbol for event in events if isinstance(event, Trade))
        return [listed(symbol, separator) for symbol in symbols]


class RecordedLines:
    """The lines of a recording of a TCP exchange.

    Args:
        playback: the recording.
        settle_seconds: from the first client to the first line.
    """

    def __init__(self, playback: Playback, settle_seconds: float = SETTLE_SECONDS) -> None:
        self._playback, self._settle_seconds = playback, settle_seconds

    async def run(self, first_client: asyncio.Event, send: Callable[[bytes], None]) -> None:
        """Replay once."""
        await first_client.wait()
        await _begin(self._playback, self._settle_seconds)
        number = 0
        async for _, line in self._playback.frames():
            send(line + b"\n")
            number += 1
            if number % FRAMES_A_BATCH == 0:
                await asyncio.sleep(0)
        logger.bind(exchange=self._playback.exchange).info("the replay is over after {} lines", number)


async def _begin(playback: Playback, settle_seconds: float) -> None:
    await asyncio.sleep(settle_seconds)
    if pause := playback.pause_seconds:
        logger.bind(exchange=playback.exchange).info(
            "the replay begins in {:.0f} s, at the recorded second of the minute", pause
        )
        await asyncio.sleep(pause)


def _as_sent(frame: bytes) -> str | bytes:
    """Text as text; what is none as binary."""
    try:
        return frame.decode()
    except UnicodeDecodeError:
        return frame
