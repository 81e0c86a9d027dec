"""Announcements of newest ticks within the process that ingests, without Redis between the pipeline and the API."""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from marketflow.model import Series, Tick
from marketflow.stores.ports import SlotAnnouncements, TickListener


class LocalAnnouncements:
    """Passes newest ticks from the threads of the feeds to listeners on the event loop.

    Ticks that arrive before the loop has passed on earlier ones replace those of the same series.

    Args:
        loop: on which the listeners are called.
        slots: announcements of slices and minutes, which are read from Redis here, too.
    """

    live = True
    times_live = 1

    def __init__(self, loop: asyncio.AbstractEventLoop, slots: SlotAnnouncements) -> None:
        self._loop = loop
        self.slots = slots
        self._lock = threading.Lock()
        self._waiting: dict[Series, Tick] = {}
        self._listeners: tuple[TickListener, ...] = ()

    @contextmanager
    def announcing(self, take: TickListener) -> Iterator[None]:
        """Pass every newest tick to `take`, within the context; for the thread of the loop."""
        self._listeners = (*self._listeners, take)
        try:
            yield
        finally:
            # Once: a stream that begins before the last one has ended listens with the same method, which is equal.
            listeners = [*self._listeners]
            listeners.remove(take)
            self._listeners = tuple(listeners)

    def publish(self, newest: Mapping[Series, Tick]) -> None:
        """Announce newest ticks, each newer than the last of its series; from any one thread at a time."""
        if not self._listeners or self._loop.is_closed():
            return
        with self._lock:
            is_due = bool(self._waiting)
            self._waiting.update(newest)
        if not is_due:
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            newest, self._waiting = self._waiting, {}
        announced = list(newest.items())
        for take in self._listeners:
            take(announced)
