"""The holes of this process, and their rows in the archive.

A hole that changes is written as soon as the archive can be written to; until then it waits in memory, which costs
nothing else.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from marketflow.errors import Unavailable
from marketflow.feeds.backfill.steps import Step
from marketflow.logs import RateLimit
from marketflow.model import Hole, HoleState, Series

PAUSE_SECONDS = 1.0

FAILED_PAUSE_SECONDS = 2.0

COUNT_SECONDS = 60.0
"""How often the archive counts its holes, though none has changed."""

MOST_PENDING = 10_000
"""Holes that wait for the archive; beyond, the oldest are dropped."""

LOG_SECONDS = 10.0
"""Interval of the lines of one kind and exchange."""

_LEVELS = {HoleState.OPEN: "WARNING", HoleState.FILLED: "INFO", HoleState.ABSENT: "INFO", HoleState.GIVEN_UP: "WARNING"}

_TEXTS = {
    HoleState.OPEN: "trades are missing, and are fetched",
    HoleState.FILLED: "missing trades were fetched",
    HoleState.ABSENT: "missing trades are not at the venue",
    HoleState.GIVEN_UP: "missing trades cannot be fetched",
}


class HoleStore(Protocol):
    """Where holes are kept for good."""

    def write(self, holes: Iterable[Hole]) -> None:
        """Store holes, each in place of an earlier version of itself, and count all.

        Raises:
            Unavailable: not written, or not confirmed; to be tried again with the same holes.
        """
        ...

    def open_holes(self) -> list[Hole]:
        """The holes that are open, the oldest first.

        Raises:
            Unavailable: the archive cannot be read now.
        """
        ...


class HoleBook:
    """Takes holes from any thread, logs them, and writes them step by step.

    Args:
        store: where they are kept.
        on_open: called with the holes that an earlier run or another process left open; see `take_over`.
        on_put: called with each hole that was found or has changed, from any thread; must not raise.
    """

    def __init__(
        self,
        store: HoleStore,
        on_open: Callable[[list[Hole]], None] = lambda holes: None,
        on_put: Callable[[Hole], None] = lambda hole: None,
    ) -> None:
        self._store = store
        self._on_open = on_open
        self._on_put = on_put
        self._lock = threading.Lock()
        self._pending: dict[tuple[Series, int], Hole] = {}
        self._untaken: set[Series] = set()
        self._idle_seconds = 0.0
        self._limit = RateLimit(LOG_SECONDS)

    def take_over(self, series: Iterable[Series]) -> None:
        """Read soon which holes of these series are open: nothing here fills them yet."""
        with self._lock:
            self._untaken.update(series)

    def put(self, hole: Hole) -> None:
        """Log a hole that was found or has changed, and write it soon."""
        with self._lock:
            self._pending[hole.series, hole.after_id] = hole
            while len(self._pending) > MOST_PENDING:
                self._pending.pop(next(iter(self._pending)))
        text = f"{_TEXTS[hole.state]} symbol={{}} after_id={{}} before_id={{}}"
        if hole.reason:
            text += " reason={!r}"
        text = text.format(hole.series.symbol, hole.after_id, hole.before_id, hole.reason)
        exchange = hole.series.exchange
        self._limit.log((exchange, hole.state), _LEVELS[hole.state], text, exchange=exchange)
        self._on_put(hole)

    @property
    def pending(self) -> int:
        """How many holes wait for the archive."""
        return len(self._pending)

    def note(self, closed: object) -> None:
        """Do nothing."""

    def step(self) -> Step:
        """Read what is to be taken over, and write what has changed."""
        try:
            if self._untaken:
                self._take_over()
            self._write()
        except Unavailable:
            return Step({}, FAILED_PAUSE_SECONDS)
        return Step({}, PAUSE_SECONDS)

    def _take_over(self) -> None:
        with self._lock:
            series = frozenset(self._untaken)
        left = [hole for hole in self._store.open_holes() if hole.series in series]
        with self._lock:
            self._untaken -= series
            left = [self._pending.get((hole.series, hole.after_id), hole) for hole in left]
        self._on_open([hole for hole in left if hole.state is HoleState.OPEN])

    def _write(self) -> None:
        with self._lock:
            changed = dict(self._pending)
        self._idle_seconds += PAUSE_SECONDS
        if not changed and self._idle_seconds < COUNT_SECONDS:
            return
        self._idle_seconds = 0.0
        self._store.write(changed.values())
        with self._lock:
            for key, hole in changed.items():
                if self._pending.get(key) is hole:
                    del self._pending[key]
