"""New events of alerts for all streams of this process: read once from the archive, as soon as they are stored."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable

from marketflow.errors import Unavailable
from marketflow.logs import RateLimit
from marketflow.stores.ports import AlertReader, NumberedEvent
from marketflow.tasks import cancel

LOOK_SECONDS = 0.1
"""How often it is looked whether the process that ingests has stored an event, while there are streams."""

POLL_SECONDS = 2.0
"""How often the archive is asked all the same: the process that ingests may be unreachable, or have ended."""

EVENTS_AT_ONCE = 500
"""Events that one query reads."""

EVENTS_HELD = 5_000
"""Newest events that are held for streams that are behind; those that are further behind read the archive."""


class EventFeed:
    """Reads new events while anybody follows them; for one event loop.

    Args:
        reader: reads the archive.
        newest_event: returns the number of the newest event that is known to be stored, or 0.
    """

    def __init__(self, reader: AlertReader, newest_event: Callable[[], int]) -> None:
        self._reader = reader
        self._newest_known = newest_event
        self._followers = 0
        self._task: asyncio.Task[None] | None = None
        self._held: list[NumberedEvent] = []
        self._read_until: int | None = None  # number of the newest event that was read
        self._news = asyncio.Event()
        self._stored = asyncio.Event()
        self._ended = False
        self._limit = RateLimit(60.0)

    async def follow(self, after: int | None, heartbeat_seconds: float) -> AsyncGenerator[list[NumberedEvent], None]:
        """Yield events as they are stored, the oldest first; an empty list when there was none for some time.

        Ends when the application does.

        Args:
            after: the number after which to begin; None is after the newest one.
            heartbeat_seconds: after which an empty list comes.
        """
        self._followers += 1
        if self._task is None:
            self._held, self._read_until = [], None
            self._task = asyncio.create_task(self._read())
        try:
            while not self._ended:
                news = self._news
                if self._read_until is not None:  # a number above all others is of another database
                    after = self._read_until if after is None else min(after, self._read_until)
                if after is not None and (events := await self._after(after)):
                    after = events[-1].number
                    yield events
                    continue
                try:
                    async with asyncio.timeout(heartbeat_seconds):
                        await news.wait()
                except TimeoutError:
                    yield []
        finally:
            self._followers -= 1
            if not self._followers:
                task, self._task = self._task, None
                if task is not None:
                    task.cancel()

    def wake(self) -> None:
        """Read new events at once, where the process that ingests is this one."""
        self._stored.set()

    def end(self) -> None:
        """End all streams."""
        self._ended = True
        self._announce()

    async def close(self) -> None:
        """End all streams, and wait for the end of reading."""
        self.end()
        if self._task is not None:
            await cancel(self._task)

    async def _after(self, number: int) -> list[NumberedEvent]:
        """Return events after a number, from memory where all of them are held."""
        if self._read_until is None:
            return []
        if number >= self._read_until:
            return []
        if self._held and self._held[0].number <= number + 1:
            return [event for event in self._held if event.number > number]
        try:
            return await self._reader.alert_events(number, EVENTS_AT_ONCE)
        except Unavailable:
            await asyncio.sleep(POLL_SECONDS)
            return []

    async def _read(self) -> None:
        """Read new events until cancelled."""
        poll_at = 0.0
        while True:
            known, read = self._newest_known(), self._read_until
            if read is None or known > read or time.monotonic() >= poll_at:
                poll_at = time.monotonic() + POLL_SECONDS
                try:
                    await self._read_new()
                    if known > (self._read_until or 0):
                        poll_at = 0.0
                except Unavailable:
                    pass
                except Exception as error:  # noqa: BLE001 - else streams would wait for ever
                    self._limit.log_bug("new events cannot be read", error)
            await self._wait()

    async def _wait(self) -> None:
        """Wait for LOOK_SECONDS, or until there is something to read."""
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                await self._stored.wait()
        except TimeoutError:
            return
        self._stored.clear()

    async def _read_new(self) -> None:
        if self._read_until is None:
            self._read_until = await self._reader.newest_alert_event()
            self._announce()
            return
        while events := await self._reader.alert_events(self._read_until, EVENTS_AT_ONCE):
            self._held = [*self._held, *events][-EVENTS_HELD:]
            self._read_until = events[-1].number
            self._announce()

    def _announce(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
