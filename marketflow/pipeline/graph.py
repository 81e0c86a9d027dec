"""The flow: from the feeds of the mode that runs to the cache and the archive, as one Observable.

    mode ─ switch ─ feeds ─ merge ─┬─ newest ticks ──────────────── partitions ─ cache
                                   └─ every 100 ms: slices ──┬───── partitions ─ cache
         slices of an earlier run, from the cache: restored ─┤
                                                             └─ closed minutes ─┬─ cache
       minutes of an earlier run that the archive may lack: backlog ────────────┴─ archive ─ every 10 s: days

Items are batches of candles, never single ticks. Up to each sink everything runs on the thread of the feed or of the
timing loop and does dictionary work only; every blocking call runs behind an observe_on of its own, on the pool, and
before each stands a hand-off that merges what has to wait. Nothing here reads a clock, sleeps or knows a store: all of
that is passed in, so the tests run the whole of it in virtual time.

Completing the modes is how it ends: the feeds complete, what is under way drains, the open minutes are written, and
the Observable completes.
"""

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, TypeVar
from zlib import crc32

import reactivex as rx
from loguru import logger
from reactivex import Observable, abc, compose
from reactivex import operators as ops

from marketflow.clock import Clock, milliseconds
from marketflow.counters import DelayCounter
from marketflow.errors import Unavailable
from marketflow.feeds.feed import Feed
from marketflow.logs import Outage, RateLimit
from marketflow.model import SLICE_MS, Candles, Mode, Series, Tick, merge_all, minute_start
from marketflow.pipeline.backlog import Backlog
from marketflow.pipeline.branches import Branch, Branches, Refills
from marketflow.pipeline.operators import (
    Backoff,
    Operator,
    conflate_map,
    conflate_through,
    fan_out,
    isolated,
    partitions,
    retry_with_backoff,
)
from marketflow.pipeline.state import Memory
from marketflow.stores.ports import ArchiveWriter, CacheWriter, RecoveredCandles, Rollups

_T = TypeVar("_T")

PROBE_SECONDS = 0.5
"""How often the cache is asked whether it lacks what was written: a refill begins this soon after its return."""

DAYS_SECONDS = 10.0
"""How often days are looked for that are over."""

DAYS_PAUSE_SECONDS = 0.1
"""How long the work on them rests between its steps of the same length: others need the server meanwhile."""

READ_AGAIN_SECONDS = 0.5
"""How long after the end of its first minute a run reads what another one wrote of it: slices are written by then."""

READ_AGAIN_FROM_MS = 10_000
"""From how long before it began: the other one may have been frozen, and have written late."""

FEEDS_STOP_SECONDS = 1.0
"""How long the feeds may take to hand on what they have received, once the flow is to end."""


@dataclass
class FlowCounts:
    """What the flow has done, and what went wrong, since the start."""

    given_up: int = 0
    cache_errors: int = 0
    archive_errors: int = 0
    rows_written: int = 0
    rows_refused: int = 0
    tick_to_cache: DelayCounter = field(default_factory=DelayCounter)
    """From the receipt of a tick to where the cache has it; of ticks that a newer one overtook, the newer one's."""
    reconnects: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, given_up: int = 0, cache_errors: int = 0) -> None:
        """Count what several threads count: `+=` is a read and a write, between which another thread may write."""
        with self._lock:
            self.given_up += given_up
            self.cache_errors += cache_errors


@dataclass
class Flow:
    """Everything the flow is built from.

    Args:
        modes: the mode that runs and each that follows; completing it ends the flow.
        feeds: the feeds of each mode.
        memory: what the flow knows.
        pending: minutes on their way to the archive.
        cache: where the API reads.
        archive: where minutes stay.
        days: what minutes become once their day is over.
        workers_per_exchange: partitions in which the slices of an exchange go to the cache.
        loop: scheduler of all timers.
        pool: scheduler of all blocking calls.
        clock: the time by which minutes close.
        reconnect: the pauses before a lost feed is tried again.
        read_again: gives the slices between two times that the cache has by then. Where another process may have gone
            on for a while after this one began, the first minute is whole only with what that one wrote meanwhile.
    """

    modes: Observable[Mode]
    feeds: Mapping[Mode, Sequence[Feed]]
    memory: Memory
    pending: Backlog
    cache: CacheWriter
    archive: ArchiveWriter
    days: Rollups
    workers_per_exchange: int
    loop: abc.SchedulerBase
    pool: abc.SchedulerBase
    clock: Clock
    reconnect: Backoff = field(default_factory=Backoff)
    read_again: Callable[[int, int], Candles] | None = None
    counts: FlowCounts = field(default_factory=FlowCounts)

    def __post_init__(self) -> None:
        self._limit = RateLimit(10.0)
        self._archive_outage = Outage("PostgreSQL cannot be used", "PostgreSQL can be used again")
        self._days_outage = Outage("days cannot be rolled up", "days can be rolled up again")
        self._told_too_late = 0
        self._series = {series for feeds in self.feeds.values() for feed in feeds for series in feed.decoder.series}
        self.begun = threading.Event()
        """Set when the feeds begin."""
        self.archive_asked = threading.Event()
        """Set when the archive has answered for the first time."""
        self._backlog_kept = threading.Event()
        self.branches = Branches()
        """Which of the branches have stalled; for the owner of the flow to look at."""
        self._cache_branches: list[Branch] = []
        self._refills = Refills(self._cache_branches)
        self._cache_losses = self._probed().pipe(ops.share())

    def observable(self) -> Observable[Any]:
        """The whole flow, to be subscribed to once. It does its work on the way; its items have no meaning.

        It begins when the cache has been asked once, so that what an earlier run left there is known before the first
        answer. The cache may be away: then it is asked on, and merging makes no difference between early and late.
        """

        def unanswered(error: Exception, _: Observable[Any]) -> Observable[None]:
            self._unanswered(error)
            return rx.just(None)

        asked: Observable[RecoveredCandles | None] = self._on_pool(self._recover)
        return asked.pipe(ops.catch(unanswered), ops.flat_map(self._begin))

    @property
    def cache_confirmed(self) -> bool:
        """Whether no refill of the cache is due or under way: what it lacked, it has confirmed."""
        return self._refills.confirmed

    def _recover(self) -> RecoveredCandles:
        return self.cache.recover(self.memory.minute_ms)

    def _begin(self, left: RecoveredCandles | None) -> Observable[Any]:
        self.begun.set()
        recovered = self._asked_until_answered(self._recover) if left is None else rx.just(left)
        # On the loop, as all that makes slices: of two versions of one, the later is then always the fuller.
        restored = rx.merge(recovered, self._first_minute_again()).pipe(
            ops.observe_on(self.loop), self._surviving(self.memory.restore)
        )
        flowing = self._from_feeds().pipe(
            fan_out(self._newest_to_cache, lambda batches: self._by_slice(batches, restored)),
        )
        return rx.merge(flowing, self._days_rolled_up())

    def _first_minute_again(self) -> Observable[RecoveredCandles]:
        """What the cache has of the minute in which this run began, once that is over or the flow ends."""
        if (read_again := self.read_again) is None:
            return rx.empty()
        began = self._now_ms()
        end = minute_start(began, self.memory.minute_ms) + self.memory.minute_ms
        seconds = (end - began) / 1000 + READ_AGAIN_SECONDS

        def read() -> RecoveredCandles:
            return RecoveredCandles(read_again(began - READ_AGAIN_FROM_MS, end))

        return rx.timer(seconds, scheduler=self.loop).pipe(
            ops.take_until(self._ended()),
            ops.default_if_empty(0),
            ops.flat_map(lambda _: self._asked_until_answered(read)),
        )

    # The left edge

    def _from_feeds(self) -> Observable[Candles]:
        return self.modes.pipe(
            ops.distinct_until_changed(),
            ops.map(self._feeds_of),
            ops.switch_latest(),
            # A feed that hangs in a call must not hold up the end.
            ops.take_until(self._ended().pipe(ops.delay(FEEDS_STOP_SECONDS, scheduler=self.loop))),
        )

    def _feeds_of(self, mode: Mode) -> Observable[Candles]:
        return rx.merge(*map(self._reconnecting, self.feeds[mode]))

    def _reconnecting(self, feed: Feed) -> Observable[Candles]:
        place = f"{feed.exchange} at {feed.place}"
        outage = Outage(f"cannot connect to {place}", f"connected to {place}")
        connected = False

        def came(_: Candles) -> None:
            nonlocal outage, connected
            outage.over(feed.exchange)
            if not connected:
                connected = True
                logger.bind(exchange=feed.exchange).info("ticks of {} come in", place)
                outage = Outage(f"lost {place}", f"ticks of {place} come in again")

        def failed(error: Exception, pause: float) -> None:
            self.counts.reconnects[feed.exchange] = self.counts.reconnects.get(feed.exchange, 0) + 1
            outage.failed(feed.exchange, f"trying again in {pause:.1f} s: {error}")

        return feed.batches().pipe(
            ops.do_action(came), retry_with_backoff(self.reconnect, self.loop, self._ended(), failed)
        )

    def _backlog(self) -> Observable[Candles]:
        """The minutes that an earlier run may not have brought to the archive, once they are pending."""

        def keep(minutes: Candles) -> None:
            self._keep(minutes)
            self._backlog_kept.set()

        return self._asked_until_answered(self.cache.unarchived).pipe(ops.do_action(keep))

    def _on_pool(self, call: Callable[[], Any]) -> Observable[Any]:
        """What a blocking call gives; its exception is an error."""
        return rx.just(None).pipe(ops.observe_on(self.pool), ops.map(lambda _: call()))

    def _asked_until_answered(self, ask: Callable[[], _T]) -> Observable[_T]:
        return self._on_pool(ask).pipe(
            # Often, for the circuit breaker answers for a cache that is away.
            retry_with_backoff(Backoff(0.1, 0.2), self.loop, self._ended(), lambda error, _: self._unanswered(error)),
        )

    def _unanswered(self, error: Exception) -> None:
        if not isinstance(error, Unavailable):
            self._limit.log("recovery", "ERROR", f"what an earlier run left in the cache cannot be read: {error!r}")

    def _ended(self) -> Observable[Any]:
        """One item when the modes complete."""
        return self.modes.pipe(ops.ignore_elements(), ops.default_if_empty(None))

    # Newest ticks

    def _newest_to_cache(self, batches: Observable[Candles]) -> Observable[Any]:
        timed: dict[Series, int] = {}

        def write(newer: dict[Series, Tick | None]) -> None:
            # Read from memory at the last moment: what waited may be older than what was written meanwhile.
            newest = self.memory.newest_of(newer)
            self.cache.put_newest(newest)
            now = self.clock()
            # Once each: one that came during a write may have gone with it, and goes with the next as well.
            came = {
                series: tick.sequence
                for series, tick in newest.items()
                if newer[series] is not None and timed.get(series) != tick.sequence
            }
            self.counts.tick_to_cache.count([(now - received) / 1e9 for received in came.values()])
            timed.update(came)

        return rx.merge(
            batches.pipe(self._surviving(self.memory.observe)),
            # Without the ticks: none of them has just come.
            self._refill(lambda: dict.fromkeys(self.memory.all_newest())),
        ).pipe(
            ops.filter(bool),
            # One partition an exchange: a write costs as much as dozens of ticks in it, and while it is under way the
            # next ticks gather. With more partitions each had a tick to write.
            self._in_lanes("newest", lambda series: series, write, 1),
        )

    # Slices

    def _by_slice(self, batches: Observable[Candles], restored: Observable[Candles]) -> Observable[Any]:
        # An empty buffer goes on as well: it is the beat by which minutes close.
        slices = batches.pipe(
            ops.buffer_with_time(SLICE_MS / 1000, scheduler=self.loop),
            ops.map(merge_all),
            self._surviving(lambda batch: self.memory.absorb(batch, self._now_ms())),
        )
        return rx.merge(slices, restored).pipe(fan_out(self._slices_to_cache, self._by_minute))

    def _slices_to_cache(self, slices: Observable[Candles]) -> Observable[Any]:
        return rx.merge(slices, self._refill(self.memory.all_slices)).pipe(
            ops.filter(bool),
            self._in_lanes("slices", lambda slot: slot.series, self.cache.put_slices, self.workers_per_exchange),
        )

    # Minutes

    def _by_minute(self, slices: Observable[Candles]) -> Observable[Any]:
        closed = rx.concat(
            slices.pipe(self._surviving(lambda _: self._close_minutes())),
            rx.defer(lambda _: rx.just(self.memory.take_all())),
        )
        return closed.pipe(ops.filter(bool), fan_out(self._minutes_to_cache, self._minutes_to_archive))

    def _close_minutes(self) -> Candles:
        now_ms = self._now_ms()
        closed = self.memory.take_closed(now_ms)
        self.memory.forget(now_ms)
        if self.memory.too_late > self._told_too_late:
            self._told_too_late = self.memory.too_late
            self._limit.log("too late", "WARNING", f"{self.memory.too_late} ticks so far came for minutes long closed")
        return closed

    def _minutes_to_cache(self, minutes: Observable[Candles]) -> Observable[Any]:
        # What waits for the archive may be older than what memory holds, and a restart finds it in the cache alone.
        return rx.merge(minutes, self._refill(lambda: self.pending.rows() | self.memory.all_closed())).pipe(
            ops.filter(bool), self._sink("minutes", self.cache.put_minutes)
        )

    def _minutes_to_archive(self, minutes: Observable[Candles]) -> Observable[Any]:
        # The first item brings no rows: it has the archive connect at the start, not when the first minute ends.
        return rx.merge(minutes.pipe(ops.do_action(self._keep)), self._backlog(), rx.just({})).pipe(
            # What waits is in `pending`; the item itself only says that there is something.
            conflate_map(lambda _: self._written(), lambda _, newer: newer, lambda: self.branches.add("archive")),
        )

    def _keep(self, minutes: Candles) -> None:
        if dropped := self.pending.add(minutes):
            text = f"{dropped} minute rows are given up: more wait for PostgreSQL than memory may hold"
            self._limit.log("dropped", "ERROR", text)

    def _written(self) -> Observable[Any]:
        return self._on_pool(self._write_pending).pipe(
            retry_with_backoff(Backoff(0.1, 1.0), self.loop, self._ended(), self._archive_failed),
        )

    def _write_pending(self) -> None:
        now_ms = self._now_ms()
        # Before anything of this run is written, which would look like an earlier run's.
        if (since := self.memory.lacks_since(now_ms)) is not None:
            self.memory.adopt(self.archive.recent(self._series, since), since)
        rows = self.pending.rows()
        refused = self.archive.write(rows)
        self._archive_outage.over("archive", for_all=True)
        self.archive_asked.set()
        if rows:
            self.counts.rows_refused += refused
            self.counts.rows_written += len(rows) - refused
            self.cache.note_stored(rows)
            # Asked before: of a backlog that becomes pending after `confirm` the mark would say that it is archived.
            whole = self._backlog_kept.is_set()
            until = self.pending.confirm(rows, now_ms)
            try:
                if whole:
                    self.cache.mark_archived(until)
            except Unavailable:
                logger.debug("not marked in the cache what is archived: a restart would write some rows once more")

    def _archive_failed(self, error: Exception, pause: float) -> None:
        self.counts.archive_errors += 1
        self._archive_outage.failed("archive", f"{len(self.pending)} minute rows wait for it: {error}")

    # Days

    def _days_rolled_up(self) -> Observable[Any]:
        return rx.interval(DAYS_SECONDS, scheduler=self.loop).pipe(
            ops.filter(lambda _: self.archive_asked.is_set()),
            conflate_map(lambda _: self._rolled_up(), lambda _, newer: newer, lambda: self.branches.add("days")),
            ops.take_until(self._ended()),  # without waiting: the next run goes on with it
        )

    def _rolled_up(self) -> Observable[bool]:
        """Step by step, until nothing is left to do."""
        step: Observable[bool] = rx.timer(DAYS_PAUSE_SECONDS, scheduler=self.loop).pipe(
            ops.flat_map(lambda _: self._on_pool(self._roll_up))
        )
        return step.pipe(
            ops.repeat(),
            ops.take_while(lambda more: more),
            retry_with_backoff(Backoff(1.0, 60.0), self.loop, self._ended(), self._days_failed),
        )

    def _roll_up(self) -> bool:
        more = self.days.roll_up(self._now_ms())
        self._archive_outage.over("days")
        self._days_outage.over("days")
        return more

    def _days_failed(self, error: Exception, pause: float) -> None:
        if isinstance(error, Unavailable) and error.is_unreachable:
            self._archive_outage.failed("days", f"{len(self.pending)} minute rows wait for it: {error}")
        else:
            self._days_outage.failed("days", f"answers about long periods are slow: {error}")

    # What every branch uses

    def _now_ms(self) -> int:
        return milliseconds(self.clock())

    def _surviving(self, work: Callable[[Any], dict[Any, Any]]) -> Operator[Any, Any]:
        """Like map, but an item on which the work raises is given up, told and counted: the flow goes on without it."""

        def survived(item: Any) -> dict[Any, Any]:
            try:
                return work(item)
            except Exception as error:  # noqa: BLE001 - told and counted
                self.counts.add(given_up=1)
                if self._limit.admit("given up") is not None:
                    logger.opt(exception=error).error("a bug; what was worked on is lost, the flow goes on")
                return {}

        return ops.map(survived)

    # Sinks

    def _probed(self) -> Observable[Any]:
        """An item each time the cache turns out to lack what was written to it."""
        return rx.interval(PROBE_SECONDS, scheduler=self.loop).pipe(
            ops.take_until(self._ended()),
            conflate_map(lambda _: self._probe(), lambda _, newer: newer, lambda: self.branches.add("probe")),
            ops.filter(bool),
            ops.observe_on(self.loop),  # for the same reason as what is restored
            ops.do_action(self._follow_refill),
        )

    def _probe(self) -> Observable[bool]:
        def failed(error: Exception, _: Observable[bool]) -> Observable[bool]:
            self._cache_failed(error)
            return rx.empty()

        return self._on_pool(self._needs_refill).pipe(ops.catch(failed))

    def _needs_refill(self) -> bool:
        needed = self.cache.needs_refill()
        if needed:
            self._refills.due()
        return needed

    def _follow_refill(self, _: Any) -> None:
        begun = self._refills.begin()
        # Run by the loop after this action, in which all branches are passed what the cache lacks.
        self.loop.schedule(lambda *_: self._refills.passed(begun))

    def _refill(self, contents: Callable[[], dict[Any, Any]]) -> Observable[dict[Any, Any]]:
        """All of `contents`, each time the cache lacks it."""
        return self._cache_losses.pipe(ops.map(lambda _: contents()))

    def _in_lanes(
        self, name: str, series_of: Callable[[Any], Series], write: Callable[[Any], None], per_exchange: int
    ) -> Operator[Any, Any]:
        partition_names: dict[Series, Hashable] = {}
        exchanges = {feed.exchange for feeds in self.feeds.values() for feed in feeds}

        def partition_of(key: Any) -> Hashable:
            series = series_of(key)
            if (partition := partition_names.get(series)) is None:
                number = crc32(series.symbol.encode()) % per_exchange
                partition = partition_names[series] = (series.exchange, number)
            return partition

        names = list(product(sorted(exchanges), range(per_exchange)))
        return partitions(names, partition_of, self._sink(name, write))

    def _sink(self, name: str, write: Callable[[Any], None]) -> Operator[dict[Any, Any], Any]:
        """Write dicts to the cache, one at a time; later values win while they wait."""

        def branch() -> Branch:
            added = self.branches.add(name)
            self._cache_branches.append(added)
            return added

        on_pool = compose(ops.observe_on(self.pool), ops.map(isolated(write, self._cache_failed)))
        return conflate_through(on_pool, lambda older, newer: older | newer, branch)

    def _cache_failed(self, error: Exception) -> None:
        self.counts.add(cache_errors=1)
        if not isinstance(error, Unavailable):  # which the cache has told of itself
            logger.opt(exception=error).error("a write to the cache failed, what it held is lost to the cache")
