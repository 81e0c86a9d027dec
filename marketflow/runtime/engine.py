"""The running flow with everything it needs: built, started and stopped as one thing."""

import gc
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from loguru import logger
from reactivex import abc

from marketflow.clock import Clock, milliseconds
from marketflow.cluster.messages import IngestState
from marketflow.counters import ExchangeCounters, IngestCounters
from marketflow.errors import Unavailable
from marketflow.feeds.decoder import REASONS
from marketflow.feeds.factory import configured_feeds
from marketflow.feeds.reject_log import RATES_SECONDS, FeedRates
from marketflow.model import MINUTE_MS, Candles, FeedState, Mode
from marketflow.pipeline.backlog import Backlog
from marketflow.pipeline.branches import CHECK_SECONDS, Branch
from marketflow.pipeline.fan_in import ModeSwitch
from marketflow.pipeline.graph import Pipeline
from marketflow.pipeline.operators import Backoff
from marketflow.pipeline.schedulers import NamedPool, TimingLoop
from marketflow.pipeline.state import WindowState
from marketflow.settings import Settings
from marketflow.stores.ports import RecoveredCandles
from marketflow.stores.postgres.retention import Retention
from marketflow.stores.postgres.rollups import PostgresRollups
from marketflow.stores.postgres.writer import PostgresWriter
from marketflow.stores.redis.writer import RedisWriter

BEGIN_SECONDS = 1.0
"""How long a start may wait for each store to say what an earlier run left."""

DRAIN_SECONDS = 4.0
"""How long the end may take: what is under way is written, the open minutes are stored."""

MOST_THREADS = 128
"""How many slices are written at the same time, however many partitions there are: partitions share the threads."""

YOUNG_OBJECTS = 50_000
"""How many objects are made before garbage is looked for. A batch of many series is thousands of short-lived ones: with
Python's 700 nearly half of all time at 15,000 series went into looking, and what it found was nothing."""

SWITCH_SECONDS = 0.0005
"""How long a thread may keep Python's lock while another waits for it. A tick passes it from thread to thread half a
dozen times, and beside an exchange that floods it waited up to 5 ms, which is Python's own, each time."""

FORCE_SECONDS = 0.5
"""How long it may take from the moment when there is no patience left: time enough unless a store is frozen."""


class Engine:
    """Feeds, flow and its stores.

    Args:
        settings: all of them.
        redis: keywords of a Redis client.
        postgres: keywords of a PostgreSQL connection.
        ddl: folder of the schema.
        clock: wall-clock time.
        mode: the mode to begin in.
        on_failure: called once, from any thread, should the flow itself break: nothing flows from then on.
        may_recover: whether what is in the cache is known to be what an earlier run left, and not what another one is
            writing. Until then nothing is written there either.
        may_be_joined: whether another process may take ticks into the same cache for a while.
        may_write: whether this process is known to be the one to write, to either store. Until then all that it has
            waits in memory.
    """

    def __init__(
        self,
        settings: Settings,
        redis: dict[str, Any],
        postgres: dict[str, Any],
        ddl: Path,
        clock: Clock,
        mode: Mode,
        on_failure: Callable[[], None],
        may_recover: Callable[[], bool] = lambda: True,
        may_write: Callable[[], bool] = lambda: True,
        may_be_joined: bool = False,
    ) -> None:
        self._on_failure = on_failure
        self._stopping = False
        self._done = threading.Event()
        self._came_round = threading.Event()  # the thread of all timers, since it was last asked
        self._came_round.set()
        self._waited_for = threading.Event()  # what `stop` waits for: the end of the flow, or that of all patience
        self._subscription: abc.DisposableBase | None = None
        self._loop = TimingLoop("timing", self._timer_failed)
        self._generating = TimingLoop("generator", self._timer_failed)
        self._timers = {"timing": self._loop, "generator": self._generating}
        self._closing = threading.Event()
        self._watching = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        partitions = len(settings.exchanges) * settings.flow.workers_per_exchange
        threads = min(partitions, MOST_THREADS) + 5
        self._pool = NamedPool("worker", threads)
        self.feeds = configured_feeds(settings, clock, self._generating)
        self.modes = ModeSwitch(mode)
        series = [series for feeds in self.feeds.values() for feed in feeds for series in feed.decoder.series]
        self.window_state = WindowState(
            settings.flow.late_after_ms,
            settings.flow.ahead_ms,
            settings.flow.minute_ms,
            slices_held_ms=settings.flow.slices_held_ms,
            closed_after_ms=settings.flow.closed_after_ms,
        )
        self.cache = cast(
            "_LeasedCache", _LeasedCache.connect(redis, series, clock, settings.redis.ttl_seconds, threads + 8)
        )
        self.cache.may_recover, self.cache.may_write = may_recover, may_write
        self.archive = _LeasedArchive(postgres, ddl, settings.flow.db_batch_size)
        self.archive.may_write = may_write
        self._days = PostgresRollups(
            postgres, retention=Retention(settings.archive.minutes_days, settings.archive.days_days)
        )
        self.pipeline = Pipeline(
            modes=self.modes.changes,
            feeds=self.feeds,
            state=self.window_state,
            backlog=Backlog(),
            cache=self.cache,
            archive=self.archive,
            rollups=self._days,
            workers_per_exchange=settings.flow.workers_per_exchange,
            loop=self._loop,
            pool=self._pool,
            clock=clock,
            reconnect=Backoff(settings.flow.reconnect_after_seconds),
            read_again=self.cache.slices_between if may_be_joined else None,
        )

    @property
    def running(self) -> bool:
        """Whether ticks flow."""
        return self._subscription is not None and not self._stopping and not self._done.is_set()

    @property
    def cache_complete(self) -> bool:
        """Whether the cache has confirmed all that was written to it, refills included."""
        return self.cache.complete and self.pipeline.cache_confirmed

    def is_alive(self) -> bool:
        """Whether the thread of all timers has come round since this was last asked."""
        came_round = self._came_round.is_set()
        if came_round:
            self._came_round.clear()
            self._loop.schedule(lambda *_: self._came_round.set())
        return came_round

    def feed_states(self) -> tuple[Mode, dict[str, FeedState]]:
        """The mode that runs, and how its feeds do by the names of their exchanges."""
        mode = self.modes.current
        return mode, {feed.exchange: feed.state for feed in self.feeds[mode]}

    def clock_offsets_ms(self) -> dict[str, int]:
        """How far the clocks of exchanges that are wrong are ahead of this machine's, by exchange."""
        feeds = self.feeds[self.modes.current]
        return {feed.exchange: feed.decoder.clock_offset_ms for feed in feeds if feed.decoder.clock_offset_ms}

    def state(self) -> IngestState:
        """How everything does at this moment."""
        stalled = tuple(self.pipeline.branches.stalled)
        return IngestState(
            *self.feed_states(), self.cache_complete, self.archive.available, stalled, self.clock_offsets_ms()
        )

    def counters(self) -> IngestCounters:
        """What has been counted since the start."""
        counters = self.pipeline.counters
        return IngestCounters(
            exchanges={feed.exchange: self._counters_of(feed.exchange) for feed in self.feeds[self.modes.current]},
            tick_to_cache=counters.tick_to_cache.so_far(),
            ticks_too_late=self.window_state.late_ticks,
            cache_errors=counters.cache_errors,
            archive_errors=counters.archive_errors,
            rows_written=counters.rows_written,
            rows_refused=counters.rows_refused,
            rows_pending=len(self.pipeline.backlog),
            rows_dropped=self.pipeline.backlog.dropped,
            given_up=counters.failed_batches,
            stalls=dict(self.pipeline.branches.stalls),
        )

    def _counters_of(self, exchange: str) -> ExchangeCounters:
        decoders = {
            mode: feed.decoder for mode, feeds in self.feeds.items() for feed in feeds if feed.exchange == exchange
        }
        received = decoders[self.modes.current].last_received
        return ExchangeCounters(
            ticks=sum(decoder.ticks for decoder in decoders.values()),
            rejected={reason: sum(decoder.rejected[reason] for decoder in decoders.values()) for reason in REASONS},
            timestamps_replaced=sum(decoder.timestamps_replaced for decoder in decoders.values()),
            reconnects=self.pipeline.counters.reconnects.get(exchange, 0),
            last_tick_at=None if received is None else milliseconds(received),
        )

    def switch(self, mode: Mode) -> Mode:
        """Run another mode; gives the one before. Blocks until the feeds of that one are closed.

        Raises:
            Unavailable: ticks do not flow yet, or no longer.
        """
        if not self.running:
            raise Unavailable("the feeds are starting or stopping")
        before = self.modes.switch(mode)
        if before is not mode:
            logger.info("{} mode, it was {} mode before", mode, before)
        return before

    def start(self) -> None:
        """Let it flow, and return when it does. Stores that are away are tried again."""
        gc.set_threshold(YOUNG_OBJECTS)
        sys.setswitchinterval(SWITCH_SECONDS)
        self._subscription = self.pipeline.observable().subscribe(on_error=self._broken, on_completed=self._ended)
        self._watching.start()
        for asked in (self.pipeline.begun, self.pipeline.archive_sink.available_once):
            asked.wait(BEGIN_SECONDS)

    def stop(self) -> None:
        """Take no more ticks, write what was taken, and close everything; within DRAIN_SECONDS and a little."""
        self._stopping = True
        for feeds in self.feeds.values():
            for feed in feeds:
                feed.stop()
        self.modes.end()
        self._drain()
        self._close()

    def abandon(self) -> None:
        """Take no more ticks, give up what was not yet written, and close everything."""
        self._stopping = True
        disposed = threading.Event()

        def dispose(*_: object) -> None:
            if self._subscription is not None:
                self._subscription.dispose()
            disposed.set()

        # On the thread of all timers, none of which is then in the middle of something that it cannot end.
        self._loop.schedule(dispose)
        disposed.wait(FORCE_SECONDS)
        self._close()

    def _drain(self) -> None:
        self._waited_for.wait(DRAIN_SECONDS)
        if not self._done.is_set():
            waiting = len(self.pipeline.backlog)
            busy = ", ".join(f"{name} {count}" for name, count in sorted(self.pipeline.branches.busy().items()))
            logger.warning(
                "the flow did not drain in time; {} minute rows wait in Redis for the next start; given up are the"
                " writes of these branches, with what slices they hold: {}",
                waiting,
                busy or "none",
            )

    def _watch(self) -> None:
        """Look at the branches and the threads of all timers, and log what feeds lose, for as long as ticks flow."""
        timers = [(loop, self.pipeline.branches.add(name)) for name, loop in self._timers.items()]
        rates, logged_at = FeedRates(), time.monotonic()
        while not self._closing.wait(CHECK_SECONDS):
            try:
                for loop, branch in timers:
                    if not branch.busy:
                        branch.busy = True
                        loop.schedule(partial(_came_round, branch))
                self.pipeline.branches.check(now := time.monotonic())
                if now - logged_at >= RATES_SECONDS:
                    rates.log(self.counters().exchanges, now - logged_at)
                    logged_at = now
            except Exception as error:  # noqa: BLE001 - one that looked no more would report nothing for ever
                logger.opt(exception=error).error("the branches cannot be looked at, which is a bug")

    def _close(self) -> None:
        self._closing.set()
        if self._subscription is not None:
            self._subscription.dispose()
        for scheduler in self._timers.values():
            scheduler.dispose()
        self._pool.close()
        self._days.close()
        self.archive.close()
        self.cache.close()

    def force_stop(self) -> None:
        """Give `stop` no more than FORCE_SECONDS from now."""
        timer = threading.Timer(FORCE_SECONDS, self._waited_for.set)
        timer.daemon = True
        timer.start()

    def _ended(self) -> None:
        self._done.set()
        self._waited_for.set()

    def _timer_failed(self, error: Exception) -> None:
        if not self._stopping:
            self._broken(error)

    def _broken(self, error: Exception) -> None:
        self._ended()
        logger.opt(exception=error).critical("the flow broke, which is a bug; stopping")
        self._on_failure()


class _LeasedCache(RedisWriter):
    """The cache, of which nothing is read back, and to which nothing is written, while that is another's to do."""

    may_recover: Callable[[], bool]
    may_write: Callable[[], bool]

    def recover(self, minute_ms: int = MINUTE_MS) -> RecoveredCandles:
        """What the run before left of the last minutes."""
        if not self.may_recover():
            raise Unavailable("another process may be writing to the cache")
        return super().recover(minute_ms)

    def check_may_write(self) -> None:
        """Reject writes while another process may hold the lease.

        Raises:
            Unavailable: nothing may be written now.
        """
        if not self.may_write():
            raise _held_back()
        super().check_may_write()


class _LeasedArchive(PostgresWriter):
    """The archive, to which nothing is written while that may be another's to do."""

    may_write: Callable[[], bool]

    def write(self, minutes: Candles) -> int:
        """Upsert rows.

        Raises:
            Unavailable: another process may have them, or as of PostgresWriter.
        """
        if not self.may_write():
            raise _held_back()
        return super().write(minutes)


def _came_round(branch: Branch, *_: object) -> None:
    branch.finished += 1
    branch.busy = False


def _held_back() -> Unavailable:
    return Unavailable("held back until Redis says which process takes ticks")
