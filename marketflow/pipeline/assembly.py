"""The parts that the graph connects: what it is built from, and the operators that need some of it."""

import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import msgspec
import reactivex as rx
from msgspec import field
from reactivex import Observable, abc, compose
from reactivex import operators as ops
from reactivex.subject import Subject

from marketflow.clock import Clock, milliseconds
from marketflow.feeds.corrections import Corrections, NoCorrections
from marketflow.feeds.trade_statistics import TradeStatistics
from marketflow.model import SECOND_MS, Candles, Mode, Series, Slot, Tick
from marketflow.pipeline.backlog import ArchiveSink, Backlog
from marketflow.pipeline.branches import STALLED_SECONDS, Branch, Branches, Refills
from marketflow.pipeline.fan_in import FeedSet
from marketflow.pipeline.instrumentation import Instrumentation, PipelineCounters
from marketflow.pipeline.operators import (
    Operator,
    completion,
    conflate_map,
    conflate_through,
    isolated,
    keep_newer,
    map_or_drop,
    retry_with_backoff,
    split_by_series,
    union,
)
from marketflow.pipeline.recovery import ReadAgain, Recovery, cache_losses
from marketflow.pipeline.schedulers import GridScheduler
from marketflow.pipeline.shard_ownership import Ownership
from marketflow.pipeline.state import WindowState
from marketflow.stores.ports import ArchiveWriter, CacheWriter, RecoveredCandles, Rollups, Wanted
from marketflow.tasks import Backoff

SLICES_A_PARTITION = 20_000
"""Slices up to which a write is not split, those of 50,000 series at a tick a second in 0.4 s: one call for many series
costs a fifth less CPU than one a partition, and a process that lags must not take more."""

PARTITIONS_AT_ONCE = 3
"""Partitions that are written at the same time. Redis runs one write at a time: each of 15 waited for 14 others, and on
a machine short of CPU all of them timed out together, so that a refill of 100,000 slices failed again and again."""

NOTHING_DUE_MS = 5 * SECOND_MS
"""Interval of buffers while no tick arrives and no minute is open: what is held in memory expires so much later."""

ROLLUP_SECONDS = 10.0
"""Interval at which days that are over are looked for."""

ROLLUP_BACKOFF = Backoff(1.0, STALLED_SECONDS * 2 / 3)
"""Pauses before a failed step of the roll-up is repeated, 1 to 20 s: shorter than what counts as a stall."""

CLOCK_SECONDS = 600.0
"""Interval at which the clocks of venues are measured."""

FIRST_CLOCK_SECONDS = 3.0
"""When they are measured first: connections are made by then."""

TAKEOVER_MS = 5_000
"""What is younger may be missing in the cache when a shard is taken over: a dead owner is replaced within 1.5 s."""

LAG_SECONDS = 3.0
"""By how much a feed may lag behind the one of the process that has taken over its shard, and yet no tick is lost."""

LOST_MS = 60_000
"""How long after the loss of a shard its slices are refilled as well: perhaps none of them could be written."""

ROLLUP_PAUSE_SECONDS = 0.1
"""Pause between the steps of a roll-up, as long as a step: other queries need the server meanwhile."""

DRAIN_BACKOFF = Backoff(0.1, 0.2)
"""Pauses between attempts to write what is left when the pipeline ends, for which there are seconds."""

AlertBranch = Callable[["Parts", Observable[Candles], Observable[Any], RecoveredCandles | None], Observable[Any]]
"""Returns the branch, given the parts, candles that contain each new tick once, an Observable that emits after each
write to the archive, and what was recovered."""


class Parts(msgspec.Struct, dict=True, eq=False):
    """Everything that the graph is built from.

    Args:
        modes: the current mode and each that follows; completing it ends the pipeline.
        feeds: the feeds of each mode, which may change.
        state: newest ticks, slices and minutes in memory.
        backlog: minutes that the archive has not confirmed.
        cache: where the API reads.
        archive: where minutes are kept for good.
        rollups: daily candles in the archive.
        workers_per_exchange: number of partitions in which many slices of an exchange are written to the cache.
        loop: scheduler of all timers.
        pool: scheduler of all blocking calls.
        clock: the processing time by which minutes close.
        reconnect: pauses before a lost feed is connected again.
        read_again: see Recovery.
        corrections: minutes made again from the records of venues.
        announce_newest: called with newest ticks as they arrive, on the thread of their feed.
        alerts: returns the branch of the alerts.
        ownership: which series are written.
        series: returns all series that have rows; those of the feeds if it is None.
        pause_newest: blocks for a moment after each write of newest ticks; those that arrive meanwhile are one write.
    """

    modes: Observable[Mode]
    feeds: FeedSet
    state: WindowState
    backlog: Backlog
    cache: CacheWriter
    archive: ArchiveWriter
    rollups: Rollups
    workers_per_exchange: int
    loop: abc.SchedulerBase
    pool: abc.SchedulerBase
    clock: Clock
    reconnect: Backoff = field(default_factory=Backoff)
    read_again: ReadAgain | None = None
    corrections: Corrections = field(default_factory=NoCorrections)
    announce_newest: Callable[[Mapping[Series, Tick]], None] | None = None
    pause_newest: Callable[[], None] | None = None
    alerts: AlertBranch | None = None
    ownership: Ownership = field(default_factory=Ownership)
    series: Callable[[], Iterable[Series]] | None = None

    def __post_init__(self) -> None:
        self.log = Instrumentation()
        self.statistics = TradeStatistics()
        self.branches = Branches()
        """Progress of each branch; the owner of the pipeline checks them for stalls."""
        self.begun = threading.Event()
        """Set when the feeds begin."""
        self.ended = completion(self.modes)
        self._drain_given_up: Subject[None] = Subject()
        self.drain_given_up = completion(self._drain_given_up)
        self._cache_branches: list[Branch] = []
        self._lost_at: dict[str, int] = {}  # by shard
        self._refills = Refills(self._cache_branches)
        self.archive_sink = ArchiveSink(
            self.state,
            self.backlog,
            self.cache,
            self.archive,
            self.rollups,
            self.series or (lambda: self.feeds.series),
            self.clock,
            self.log,
            self.ownership,
        )
        self.grid = GridScheduler(
            self.loop, self.now_ms, lambda: SECOND_MS if self.state.has_unwritten else NOTHING_DUE_MS
        )
        self._probe_grid = GridScheduler(self.loop, self.now_ms, lambda: SECOND_MS)
        schedulers = self.loop, self.pool
        self.recovery = Recovery(
            self.cache,
            self.state.minute_ms,
            *schedulers,
            self.ended,
            self.clock,
            self.log,
            self.ownership,
            self.read_again,
            self.state.begun,
        )
        self._cache_losses = cache_losses(
            self.cache, self._refills, self.branch("probe"), *schedulers, self.ended, self.log, self._probe_grid
        )

    def give_up_drain(self) -> None:
        """Stop repeating writes that fail, once the pipeline is ending. It completes when running writes return."""
        self._drain_given_up.on_completed()

    @property
    def counters(self) -> PipelineCounters:
        """The counters since the start."""
        return self.log.counters

    @property
    def cache_confirmed(self) -> bool:
        """Whether the cache has confirmed every refill: none is due or under way."""
        return self._refills.confirmed

    # Steps on the thread of a feed or of the loop

    def step(self, work: Callable[[Any], dict[Any, Any]]) -> Operator[Any, Any]:
        """Like map, but a batch on which `work` raises is dropped, counted and logged."""
        return map_or_drop(work, self.log.step_failed)

    def wake_timers(self, _: Candles) -> None:
        """Set the timers to their normal interval, which is longer while no tick arrives."""
        self.grid.wake()
        self._probe_grid.wake()

    def observe(self, ticks: Candles) -> dict[Series, Tick]:
        """Update the newest ticks, and announce those that are newer than before; return these."""
        newer = self.state.observe(ticks)
        if newer and self.announce_newest is not None:
            self.announce_newest(newer)
        return newer

    def absorb(self, ticks: Candles) -> Candles:
        """Merge new ticks into the window state; return the slices they are part of, whole."""
        now_ms = self.now_ms()
        self.statistics.observe(ticks, now_ms)
        return self.state.absorb(ticks, now_ms)

    def close_minutes(self, _: Candles) -> Candles:
        """Return the minutes that are due by now, and expire those that no query needs any more.

        The slices are ignored: the window state has merged their ticks into minutes already. A whole slice is emitted
        again with each late tick, so adding them up here would count ticks twice.
        """
        now_ms = self.now_ms()
        closed = self.state.take_closed(now_ms)
        self.state.expire(now_ms)
        self.cache.unwritten.expire(self.state.needs_slices_from(now_ms))
        self.log.late_ticks(self.state.late_ticks)
        return closed

    def corrected(self, closed: Observable[Candles]) -> Observable[Candles]:
        """Emit the authoritative minutes that are older than the window state, which emits the others as closed."""

        def failed(error: Exception, _: Observable[Candles]) -> Observable[Candles]:
            self.log.step_failed(error)
            return rx.empty()

        def replace(minutes: Candles) -> Candles:
            return self.state.replace(minutes, self.now_ms())

        minutes: Observable[Candles] = self.corrections.minutes(closed, self.ended).pipe(ops.catch(failed))
        # The timers close the minutes of the window state, and run rarely while none is open.
        older: Observable[Candles] = minutes.pipe(
            ops.observe_on(self.loop),
            ops.take_until(self.ended),
            ops.do_action(self.wake_timers),
            self.step(replace),
        )
        return older.pipe(ops.filter(bool))

    def add_to_backlog(self, minutes: Candles) -> None:
        """Make minutes pending for the archive."""
        self.log.rows_dropped(self.backlog.add(minutes))

    def now_ms(self) -> int:
        """Processing time (Unix ms)."""
        return milliseconds(self.clock())

    # Writes to the cache

    def conflated(self, name: str, *stages: Operator[Any, Any]) -> Operator[dict[Any, Any], Any]:
        """Pass one dict at a time through the stages; of pending values the latest of each key stays."""
        return conflate_through(compose(*stages), union, self._cache_branch(name))

    def conflated_partitions(self, name: str, *stages: Operator[Any, Any]) -> Operator[Candles, Any]:
        """Like `conflated`, but many slots pass through the stages in partitions of their series, a few at a time.

        While writes keep up with the ticks, what arrives in 100 ms is one partition.
        """

        def written(item: Candles) -> Observable[Any]:
            parts = split_by_series(item, lambda slot: slot.series, self.workers_per_exchange, SLICES_A_PARTITION)
            # Taken out, not captured: subscriptions are cycles, and what they hold stays until a garbage collection,
            # which at thousands of series is as much as all slices.
            return rx.from_iterable([rx.from_callable(parts.pop).pipe(*stages) for _ in parts]).pipe(
                ops.merge(max_concurrent=PARTITIONS_AT_ONCE), ops.ignore_elements()
            )

        return conflate_map(written, union, self._cache_branch(name))

    def _cache_branch(self, name: str) -> Callable[[], Branch]:
        def branch() -> Branch:
            added = self.branches.add(name)
            self._cache_branches.append(added)
            return added

        return branch

    def written(self, write: Callable[[Any], object]) -> Operator[Any, Any]:
        """Write each item; a write that raises is counted and logged, and its item is dropped."""
        return ops.map(isolated(write, self.log.cache_failed))

    def write_latest(self, arrived: Mapping[Series, Tick | None]) -> None:
        """Write the newest tick of each series of an item: of ticks that arrived, or None for one that is refilled."""
        # The newest at the time of the write: newer ones arrive while an item is pending, and a refill, on another
        # thread, may overtake them with older ones.
        newest = self.state.newest_of(arrived)
        if self.cache.put_newest(newest):
            self.log.latest_written(arrived, newest, self.clock())
        if self.pause_newest is not None:
            self.pause_newest()

    def minutes_cached(self, archived: Observable[Any]) -> Observable[Any]:
        """Write pending rows that the cache lacks, repeatedly until the archive has them or the drain is given up.

        Args:
            archived: completes when the archive has them.
        """
        return rx.from_callable(self.archive_sink.cache_rest, scheduler=self.pool).pipe(
            retry_with_backoff(
                DRAIN_BACKOFF,
                self.loop,
                rx.merge(self.drain_given_up, completion(archived)),
                lambda error, _: self.log.cache_failed(error),
            )
        )

    def refill(self, contents: Callable[[Wanted], dict[Any, Any]]) -> Observable[dict[Any, Any]]:
        """Emit the part of `contents` that the cache lacks, each time it lacks something.

        Args:
            contents: returns what the cache should have, at least of the given series.
        """

        def lacking(_: bool) -> dict[Any, Any]:
            lacks = self.cache.lacks
            found = contents(lacks).items()
            return {key: value for key, value in found if lacks(key.series if isinstance(key, Slot) else key)}

        return self._cache_losses.pipe(ops.map(lacking), ops.filter(bool))

    # Ownership

    def owned(self, items_in: Callable[[Collection[str], dict[Any, Any]], dict[Any, Any]]) -> Operator[Any, Any]:
        """Remove from each item what other processes write; pass it on unchanged where there can be no other."""
        if self.ownership.everything:
            return lambda source: source
        return ops.map(lambda items: items_in(self.ownership.owned, items))

    def newest_of(self, shards: frozenset[str]) -> dict[Series, None]:
        """Return the series of shards that have a newest tick."""
        return self.ownership.series_in(shards, dict.fromkeys(self.state.all_newest()))

    def slices_of(self, shards: frozenset[str]) -> Candles:
        """Return every slice of shards."""
        return self.state.all_slices(self.ownership.within(shards))

    def recent_slices_of(self, shards: frozenset[str]) -> Candles:
        """Return the slices of shards that the previous owner may not have written: those of the last TAKEOVER_MS."""
        since = self.now_ms() - TAKEOVER_MS
        return {slot: candle for slot, candle in self.slices_of(shards).items() if slot.start >= since}

    def now_and_soon(self, shards: frozenset[str]) -> Observable[frozenset[str]]:
        """Emit the shards at once, and after LAG_SECONDS or at the end of the pipeline again."""
        later = rx.timer(LAG_SECONDS, scheduler=self.loop).pipe(ops.take_until(self.ended), ops.default_if_empty(0))
        return later.pipe(ops.map(lambda _: shards), ops.start_with(shards))

    def note_lost(self, shards: frozenset[str]) -> None:
        """Note when shards are lost."""
        self._lost_at |= dict.fromkeys(shards, self.now_ms())

    def slices_of_lost(self, _: Wanted) -> Candles:
        """Return the slices of shards lost within LOST_MS that only this process may have: those from before."""
        now_ms = self.now_ms()
        lost = {shard: at for shard, at in self._lost_at.items() if abs(now_ms - at) < LOST_MS}
        if not lost:
            return {}
        until = max(lost.values()) + round(1000 * LAG_SECONDS)
        return {slot: candle for slot, candle in self.slices_of(frozenset(lost)).items() if slot.start < until}

    def closed_of(self, shards: frozenset[str]) -> Candles:
        """Return every closed minute of shards."""
        return self.state.all_closed(self.ownership.within(shards))

    def taken_over(self, shards: frozenset[str]) -> Observable[Candles]:
        """Merge what the previous owner left of shards; emit the slices that the cache lacks."""

        def lacking(left: RecoveredCandles) -> Candles:
            self.state.restore(left)
            found, since = left.slices, left.whole_from  # before that they were read as minutes
            return {
                slot: candle
                for slot, candle in self.slices_of(shards).items()
                if slot.start >= since and (slot not in found or found[slot].ticks < candle.ticks)
            }

        return self.recovery.taken_over(shards).pipe(ops.observe_on(self.loop), self.step(lacking))

    def unarchived(self, shards: frozenset[str]) -> Observable[Candles]:
        """Make the minutes of shards pending that the archive may lack; emit them."""
        return self.recovery.unarchived(shards).pipe(
            ops.do_action(self.add_to_backlog),
            ops.do_action(self.backlog.note_cached),
            ops.do_action(lambda _: self.archive_sink.backlog_recovered(shards)),
        )

    # Writes to the archive

    def rows_archived(self) -> Observable[Any]:
        """Write the backlog to the archive, again and again until it succeeds or the drain is given up."""

        def failed(error: Exception, _: float) -> None:
            self.branches.attempted("archive")
            self.log.archive_failed(error, len(self.backlog))

        def repeated(write: Callable[[], None], backoff: Backoff, until: Observable[Any]) -> Observable[Any]:
            return rx.from_callable(write, scheduler=self.pool).pipe(
                retry_with_backoff(backoff, self.loop, until, failed)
            )

        sink = self.archive_sink
        # The first attempts end without an item where the pipeline ends before one succeeds.
        return repeated(sink.upsert_rows, Backoff(0.1, 1.0), self.ended).pipe(
            ops.map(rx.just),
            ops.default_if_empty(repeated(sink.upsert_rest, DRAIN_BACKOFF, self.drain_given_up)),
            ops.merge_all(),
        )

    def days_rolled_up(self) -> Observable[Any]:
        """Roll up days that are over, step by step. Ends with the pipeline at once: the next run continues it."""
        step = rx.timer(ROLLUP_PAUSE_SECONDS, scheduler=self.loop).pipe(
            ops.flat_map(lambda _: rx.from_callable(self.archive_sink.roll_up, scheduler=self.pool))
        )

        def failed(error: Exception, _: float) -> None:
            self.branches.attempted("days")
            self.log.rollup_failed(error, len(self.backlog))

        def all_steps(_: int) -> Observable[bool]:
            return step.pipe(
                ops.repeat(),
                ops.take_while(lambda more: more and self.ownership.leads),
                retry_with_backoff(ROLLUP_BACKOFF, self.loop, self.ended, failed),
            )

        return rx.interval(ROLLUP_SECONDS, scheduler=self.loop).pipe(
            ops.filter(lambda _: self.archive_sink.available_once.is_set() and self.ownership.leads),
            conflate_map(all_steps, keep_newer, self.branch("days")),
            ops.take_until(self.ended),
        )

    def clocks_measured(self) -> Observable[Any]:
        """Measure the clocks of the current mode's exchanges, one after the other. Ends with the pipeline at once."""

        def measure(mode: Mode) -> None:
            for feed in self.feeds[mode]:
                feed.measure_clock()

        def measured(mode: Mode) -> Observable[Any]:
            return rx.from_callable(partial(isolated(measure, self.log.step_failed), mode), scheduler=self.pool)

        return self.modes.pipe(
            ops.map(
                lambda mode: rx.timer(FIRST_CLOCK_SECONDS, CLOCK_SECONDS, scheduler=self.loop).pipe(
                    ops.map(lambda _: mode)
                )
            ),
            ops.switch_latest(),
            conflate_map(measured, keep_newer),
            ops.take_until(self.ended),
        )

    def branch(self, name: str) -> Callable[[], Branch]:
        """Return a function that creates a branch for each subscription."""
        return lambda: self.branches.add(name)
