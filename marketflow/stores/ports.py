"""What the rest of MarketFlow may ask of a store: the arrows of api/ and flow/ end here, not at Redis or PostgreSQL.

The flow writes from threads, the API reads from asyncio; the two sides share keys and codecs, never a client.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from marketflow.model import Candle, Candles, Series, Slot, Tick

RECENT_MS = 6 * 60_000
"""How far back slices are kept at least, so that the edge of a period can lie inside a minute."""

MINUTES_KEPT_MS = 24 * 60 * 60_000
"""How long the cache keeps closed minutes."""


SLICES_HELD = 250_000
"""How many slices a process holds, 70 to 100 MB of them; ten a second of fifty series are those of the whole window."""


class RecoveredCandles(NamedTuple):
    """What an earlier run left in the cache.

    Args:
        slices: those of the last minutes, unless they are more than SLICES_HELD.
        minutes: what they add up to, otherwise.
        whole_from: before this time (Unix ms) the cache has slices that are not told.
    """

    slices: Candles
    minutes: Candles = {}  # noqa: RUF012 - never changed
    whole_from: int = 0


class RecentCandles(NamedTuple):
    """What a cache remembers of one series, as candles by the Unix ms of their start."""

    newest: Tick | None
    slices: dict[int, Candle]
    minutes: dict[int, Candle]


class CandleRange(NamedTuple):
    """Which candles are asked for, of those that begin on a grid from 1970 on.

    Args:
        length_ms: length of a candle, a divisor of a day in whole minutes.
        since: start of the first candle that counts (Unix ms).
        until: end of the last minute that counts, perhaps within a candle.
        limit: how many candles with ticks are enough.
        newest: whether the last ones before `until` are wanted, or else the first ones after `since`.
    """

    length_ms: int
    since: int
    until: int
    limit: int
    newest: bool


class CacheReader(Protocol):
    """Reads the newest prices and the sliding window: Redis, or the memory of this process."""

    async def newest(self, series: Sequence[Series]) -> list[Tick | None]:
        """The newest tick of each series, None where the cache has let it go.

        Raises:
            Unavailable: the cache cannot be asked now.
        """
        ...

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        """One candle for each series of what is remembered at or after `since` (Unix ms), None without any.

        Exact to the slice as far back as slices are kept, of whole minutes beyond. `until`, the start of a minute, is
        where the future begins that no clock allows.

        Raises:
            Unavailable: the cache cannot be asked now.
        """
        ...

    async def by_minute(self, series: Sequence[Series], since: int, until: int) -> list[dict[int, Candle]]:
        """The minutes of each series with `since <= start < until` (Unix ms) that are remembered, by their start.

        Closed ones as far back as they are kept, and the one that runs, its newest tick included. Both bounds are
        starts of minutes.

        Raises:
            Unavailable: the cache cannot be asked now.
        """
        ...


TickListener = Callable[[Sequence[tuple[Series, Tick]]], None]
"""Takes newest ticks as they are announced, series of any mode; must not raise."""


class Announcements(Protocol):
    """What the writer of the cache announces as it writes."""

    live: bool
    """Whether nothing that is announced now can be missed."""

    times_live: int
    """How often it has become so: what was announced between two times was missed."""

    def announcing(self, take: TickListener) -> AbstractContextManager[None]:
        """Pass every newest tick that is announced to `take`, within the context."""
        ...


class ArchiveReader(Protocol):
    """Reads minute rows: PostgreSQL."""

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        """One candle for each series of all its minutes with `since <= start < until` (Unix ms), None without any.

        `first_at` is the earliest time on record among them. Extremes of rows without times of their own carry
        the start of their minute.

        Raises:
            Unavailable: PostgreSQL cannot be asked now.
        """
        ...

    async def candles(self, series: Sequence[Series], walk: CandleRange) -> list[dict[int, Candle]]:
        """The candles of each series that a walk finds, by their start (Unix ms).

        None of them lacks a minute of the walk, and none is left out between them. There may be more than the limit,
        which counts for each series. Extremes carry the start of their candle for their time.

        Raises:
            Unavailable: PostgreSQL cannot be asked now.
        """
        ...

    async def last(self, series: Sequence[Series]) -> list[Tick | None]:
        """The close of the last minute of each series.

        Raises:
            Unavailable: PostgreSQL cannot be asked now.
        """
        ...


class CacheWriter(Protocol):
    """Where the flow writes what the API reads. Every write is absolute: doing it twice changes nothing."""

    def put_newest(self, newest: dict[Series, Tick]) -> None:
        """Store the newest tick of each series."""
        ...

    def put_slices(self, slices: Candles) -> None:
        """Store whole slices, each in place of an earlier version of itself."""
        ...

    def put_minutes(self, minutes: Candles) -> None:
        """Store closed minutes, each in place of an earlier version of itself."""
        ...

    def recover(self, minute_ms: int) -> RecoveredCandles:
        """What an earlier run left of the last minutes. Must succeed once before anything is written.

        Args:
            minute_ms: length of a minute.

        Raises:
            Unavailable: the cache cannot be asked now.
        """
        ...

    def unarchived(self) -> Candles:
        """Closed minutes that an earlier run may not have brought to the archive.

        Raises:
            Unavailable: the cache cannot be asked now.
        """
        ...

    def note_stored(self, minutes: Iterable[Slot]) -> None:
        """Take notice of minutes that are archived: nothing else need be kept of them."""
        ...

    def mark_archived(self, until: int) -> None:
        """Remember that all minutes before the one that starts at `until` (Unix ms) are archived."""
        ...

    def needs_refill(self) -> bool:
        """Probe the cache: True once each time it has come back or was emptied, so that it lacks what was written."""
        ...


class ArchiveWriter(Protocol):
    """Where closed minutes are kept for good."""

    def recent(self, series: Iterable[Series], since: int) -> Candles:
        """The minutes from `since` (Unix ms) on that earlier runs wrote; to be asked before anything is written.

        Raises:
            Unavailable: PostgreSQL cannot be asked now.
        """
        ...

    def write(self, minutes: Candles) -> int:
        """Upsert minute rows; the more complete version of a row stays. Without rows it only gets ready.

        Rows that the archive refuses for what is in them are given up; gives how many.

        Raises:
            Unavailable: not written, or not known to be; to be tried again with the same rows.
        """
        ...


class Rollups(Protocol):
    """Daily candles, made of the archive's minutes so that long periods are answered quickly."""

    def roll_up(self, now_ms: int) -> bool:
        """Work for a moment on the days that are over at `now_ms` (Unix ms); gives whether more is to be done.

        Changes no answer, and may be ended anywhere. Minutes may be written meanwhile.

        Raises:
            Unavailable: it cannot be done now; to be tried again.
        """
        ...
