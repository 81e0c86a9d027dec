"""Interfaces of the stores: the pipeline and the API depend on these, not on Redis or PostgreSQL.

The pipeline writes from threads, the API reads from asyncio. They share keys and codecs, never a client.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from marketflow.alerts.alert_model import StoredRule
from marketflow.model import Candle, Candles, Hole, HoleState, Mode, Series, Slot, Tick
from marketflow.stores.unwritten_slices import UnwrittenSlices


class RecoveredCandles(NamedTuple):
    """What an earlier run left in the cache.

    Args:
        slices: those of the last minutes; where they are more than SLICES_HELD, those from `whole_from` on.
        minutes: those before it, folded into minutes.
        whole_from: the cache has further slices from before this time (Unix ms).
        before: of a minute in which this run began, where it is in `minutes`, the part from before its first tick.
    """

    slices: Candles
    minutes: Candles = {}  # noqa: RUF012 - never changed
    whole_from: int = 0
    before: Candles = {}  # noqa: RUF012 - never changed


Wanted = Callable[[Series], bool]
"""Whether a series is wanted."""


def every_series(_: Series) -> bool:
    """Want each."""
    return True


class RecentCandles(NamedTuple):
    """What a cache holds of one series, as candles by their start (Unix ms)."""

    newest: Tick | None
    slices: dict[int, Candle]
    minutes: dict[int, Candle]


class CandleRange(NamedTuple):
    """Which candles to read, of those that begin on a grid from 1970 on.

    Args:
        length_ms: length of a candle, a divisor of a day in whole minutes.
        since: start of the first candle (Unix ms).
        until: end of the last minute, perhaps within a candle.
        limit: number of candles with ticks to stop at.
        newest: whether to read the last ones before `until` instead of the first ones from `since` on.
    """

    length_ms: int
    since: int
    until: int
    limit: int
    newest: bool


class HoleQuery(NamedTuple):
    """Which holes to read; None is any.

    Args:
        mode: of their series.
        limit: how many at most, the newest first.
        exchange, symbol: of their series.
        state: what became of them.
        since: Unix ms; those that end at this time or later.
        unfilled: whether to leave out those that were filled.
    """

    mode: Mode
    limit: int
    exchange: str | None = None
    symbol: str | None = None
    state: HoleState | None = None
    since: int | None = None
    unfilled: bool = False


HoleCounts = dict[Series, dict[HoleState, int]]
"""Number of holes by series and state."""


class CacheReader(Protocol):
    """Reads the newest prices and the sliding window: from Redis, or from the memory of this process."""

    async def newest(self, series: Sequence[Series]) -> list[Tick | None]:
        """The newest tick of each series; None where the cache has none.

        Raises:
            Unavailable: the cache cannot be read now.
        """
        ...

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        """One candle for each series of all that is cached at or after `since` (Unix ms); None without any.

        Exact to the slice as far back as slices are kept, of whole minutes beyond. `until` is the start of the first
        minute that lies further ahead than the allowed clock skew.

        Raises:
            Unavailable: the cache cannot be read now.
        """
        ...

    async def by_minute(self, series: Sequence[Series], since: int, until: int) -> list[dict[int, Candle]]:
        """The cached minutes of each series with `since <= start < until` (Unix ms), by their start.

        Closed ones as far back as they are kept, and the open one with its newest tick. Both bounds are starts of
        minutes.

        Raises:
            Unavailable: the cache cannot be read now.
        """
        ...

    def newest_in_memory(self, series: Sequence[Series]) -> list[Tick | None] | None:
        """What `newest` would return at once, from the memory of this process; None where it would query a store."""
        ...

    def summary_in_memory(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None] | None:
        """What `summary` would return at once, from the memory of this process; None where it would not.

        A list that is returned again has the same query and the same data; it is not to be changed.
        """
        ...


TickListener = Callable[[Sequence[tuple[Series, Tick]]], None]
"""Takes newest ticks as they are published, series of any mode; must not raise."""


SlotListener = Callable[[Sequence[tuple[Slot, Candle | None]]], None]
"""Takes slots that have changed in the cache, series of any mode: minutes with their candle, slices without; must not
raise."""


class SlotAnnouncements(Protocol):
    """Subscription to the slices and minutes that the writer of the cache publishes."""

    @property
    def live(self) -> bool:
        """Whether the subscription stands, so that no announcement is missed."""
        ...

    @property
    def times_live(self) -> int:
        """How often it was established; announcements between two of them were missed."""
        ...

    def announcing_slots(self, take: SlotListener) -> AbstractContextManager[None]:
        """Pass every changed slot to `take` once the cache is read with it, within the context."""
        ...


class Announcements(Protocol):
    """Subscription to what the writer of the cache publishes."""

    @property
    def live(self) -> bool:
        """Whether the subscription stands, so that no announcement is missed."""
        ...

    @property
    def times_live(self) -> int:
        """How often it was established; announcements between two of them were missed."""
        ...

    @property
    def slots(self) -> SlotAnnouncements:
        """Those of slices and minutes."""
        ...

    def announcing(self, take: TickListener) -> AbstractContextManager[None]:
        """Pass every announced newest tick to `take`, within the context."""
        ...


class ArchiveReader(Protocol):
    """Reads minute rows from PostgreSQL."""

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        """One candle for each series of all its minutes with `since <= start < until` (Unix ms); None without any.

        `first_at` is the earliest time on record among them. Extremes of rows without times of their own carry
        the start of their minute.

        Raises:
            Unavailable: PostgreSQL cannot be queried now.
        """
        ...

    async def candles(self, series: Sequence[Series], wanted: CandleRange) -> list[dict[int, Candle]]:
        """The candles of each series in a range, by their start (Unix ms).

        Each has all its minutes within the range, and none is left out between them. There may be more than the limit,
        which counts for each series. Extremes carry the start of their candle as their time.

        Raises:
            Unavailable: PostgreSQL cannot be queried now.
        """
        ...

    async def last(self, series: Sequence[Series]) -> list[Tick | None]:
        """The close of the last minute of each series.

        Raises:
            Unavailable: PostgreSQL cannot be queried now.
        """
        ...


class HoleReader(Protocol):
    """Reads holes from PostgreSQL."""

    async def holes(self, wanted: HoleQuery) -> list[Hole]:
        """The holes that a query asks for, the newest first.

        Raises:
            Unavailable: PostgreSQL cannot be queried now.
        """
        ...


class NumberedEvent(NamedTuple):
    """An event of an alert as it was stored: its number, and the event as JSON."""

    number: int
    event: str


class ListedRule(NamedTuple):
    """A stored alert rule without its webhook: its number, the rule, and the receiver of the webhook."""

    number: int
    rule: StoredRule
    receiver: str


class AlertReader(Protocol):
    """Reads alert rules and events from PostgreSQL; every call raises Unavailable while that cannot be queried."""

    async def alert_rules(self, after: int, limit: int) -> list[ListedRule]:
        """The first rules with a number above `after`."""
        ...

    async def alert_rule(self, id: str) -> ListedRule | None:
        """The rule with this id."""
        ...

    async def alert_events(self, after: int, limit: int) -> list[NumberedEvent]:
        """The first events with a number above `after`, in their order."""
        ...

    async def newest_alert_events(self, limit: int) -> list[NumberedEvent]:
        """The last events, in their order."""
        ...

    async def newest_alert_event(self) -> int:
        """The number of the newest event; 0 without any."""
        ...


class CacheWriter(Protocol):
    """Where the pipeline writes what the API reads. Every write is absolute: repeating it changes nothing."""

    @property
    def complete(self) -> bool:
        """Whether it has everything that was written, as of the last probe, and no write has failed since."""
        ...

    @property
    def unwritten(self) -> UnwrittenSlices:
        """Slices that could not be written."""
        ...

    def put_newest(self, newest: dict[Series, Tick]) -> bool:
        """Store the newest tick of each series; return whether that is confirmed.

        A write that is not confirmed and fails later makes the cache incomplete, as one that raises does.
        """
        ...

    def put_slices(self, slices: Candles) -> None:
        """Store whole slices, each in place of an earlier version of itself."""
        ...

    def put_minutes(self, minutes: Candles) -> bool:
        """Store closed minutes, each in place of an earlier version of itself; return whether that is confirmed."""
        ...

    def recover(self, minute_ms: int, wanted: Wanted = every_series) -> RecoveredCandles:
        """What earlier runs left of the last minutes. Must succeed once before anything is written.

        Args:
            minute_ms: length of a minute.
            wanted: of which series.

        Raises:
            Unavailable: the cache cannot be read now.
        """
        ...

    def unarchived(self, shards: Collection[str], shard_of: Callable[[Series], str]) -> Candles:
        """Closed minutes of these shards that earlier runs may not have written to the archive.

        Args:
            shards: which.
            shard_of: returns the shard of a series.

        Raises:
            Unavailable: the cache cannot be read now.
        """
        ...

    def note_stored(self, minutes: Iterable[Slot]) -> None:
        """Allow the slices of these minutes to be trimmed: the minutes are archived."""
        ...

    def mark_archived(self, until: int, shards: Collection[str]) -> None:
        """Store that all minutes of these shards before the one that starts at `until` (Unix ms) are archived."""
        ...

    def needs_refill(self) -> bool:
        """Probe the cache: True once after each outage or loss of its data, when it lacks what was written."""
        ...

    def lacks(self, series: Series) -> bool:
        """Whether that probe found that it may lack something of a series; the others need no refill."""
        ...


RowsWritten = Callable[[Candles, int], None]
"""Takes the rows of a transaction, and how many of them were rejected and dropped."""


class ArchiveWriter(Protocol):
    """Where closed minutes are kept for good."""

    def recent(self, series: Iterable[Series], since: int) -> Candles:
        """The minutes from `since` (Unix ms) on that earlier runs wrote; to be read before anything is written.

        Raises:
            Unavailable: PostgreSQL cannot be queried now.
        """
        ...

    def write(self, minutes: Candles, on_written: RowsWritten | None = None) -> int:
        """Upsert minute rows, the oldest minutes first, in transactions of a bounded number of rows.

        The more complete version of a row stays. Without rows it only connects and brings the schema up to date.

        Args:
            minutes: the rows.
            on_written: called after each transaction.

        Returns:
            how many rows were rejected.

        Raises:
            Unavailable: not written, or not confirmed; to be tried again with the rows that `on_written` was not given.
        """
        ...


class Rollups(Protocol):
    """Hourly and daily candles, made of the archive's minutes so that long periods are answered quickly."""

    def roll_up(self, now_ms: int) -> bool:
        """Work for a moment on the days that are over at `now_ms` (Unix ms); return whether more is to be done.

        Changes no answer, and may be stopped anywhere. Minutes may be written meanwhile.

        Raises:
            Unavailable: PostgreSQL cannot be used now; to be tried again.
        """
        ...
