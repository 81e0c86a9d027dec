"""The ingest engine: feeds, pipeline and its stores, built, started and stopped as one unit."""

import gc
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from loguru import logger
from reactivex import abc

from marketflow.alerts.alert_service import AlertService, RuleRefused
from marketflow.alerts.deliveries import Deliveries
from marketflow.alerts.webhook_sender import WebhookSender
from marketflow.clock import Clock, milliseconds
from marketflow.cluster.messages import IngestState, RuleChange, RuleChanged
from marketflow.counters import ExchangeCounters, IngestCounters
from marketflow.errors import Unavailable
from marketflow.feeds.decoder import REASONS
from marketflow.feeds.factory import FeedFactory, configured_recorder
from marketflow.feeds.feed import Feed
from marketflow.feeds.reject_log import RATES_SECONDS, FeedRates
from marketflow.model import MINUTE_MS, Candles, FeedState, Mode, Series, Tick
from marketflow.pipeline.backlog import Backlog
from marketflow.pipeline.branches import CHECK_SECONDS, IDLE_CHECK_SECONDS, Branch
from marketflow.pipeline.fan_in import FeedSet, ModeSwitch
from marketflow.pipeline.graph import Pipeline
from marketflow.pipeline.schedulers import NamedPool, TimingLoop
from marketflow.pipeline.state import WindowState
from marketflow.runtime.alert_flow import AlertFlow
from marketflow.runtime.feed_status import FeedStatus, hole_counts_of
from marketflow.runtime.venue_backfill import VenueBackfill
from marketflow.settings import Settings
from marketflow.stores.ports import RecoveredCandles
from marketflow.stores.postgres.alert_store import PostgresAlerts
from marketflow.stores.postgres.fetched.fetched_minutes import FetchedMinutes
from marketflow.stores.postgres.holes import PostgresHoles
from marketflow.stores.postgres.retention import Retention
from marketflow.stores.postgres.rollups import PostgresRollups
from marketflow.stores.postgres.writer import PostgresWriter
from marketflow.stores.redis.writer import RedisWriter
from marketflow.tasks import Backoff

BEGIN_SECONDS = 1.0
"""How long a start waits for each store to return what an earlier run left."""

ARCHIVE_START_SECONDS = 2.0
"""How long a write waits for an embedded PostgreSQL that is starting before it counts as unavailable."""

DRAIN_SECONDS = 4.0
"""Time limit for draining: pending writes, and the rows of open minutes."""

MOST_THREADS = 128
"""Threads that write slices; any number of partitions shares them."""

YOUNG_OBJECTS = 50_000
"""Allocations between two garbage collections. A batch of many series is thousands of short-lived objects: with the
default of 700, collections took nearly half of all time at 15,000 series and freed nothing."""

SWITCH_SECONDS = 0.0005
"""Interval after which a thread that holds the GIL must offer it. A tick changes threads half a dozen times, and beside
an exchange that floods it waited up to Python's default of 5 ms each time."""

RECORDER_STOP_SECONDS = 0.5
"""How long a stop waits for the disk that raw frames are recorded on."""

FORCE_SECONDS = 0.5
"""Time limit once a stop is forced: enough unless a store is frozen."""


class Engine:
    """Feeds, pipeline and its stores.

    Args:
        settings: the settings.
        redis: keywords of a Redis client.
        postgres: keywords of a PostgreSQL connection.
        ddl: folder of the schema.
        clock: wall-clock time.
        mode: the initial mode.
        on_failure: called once, from any thread, if the pipeline itself fails; it has ended then.
        may_recover: returns whether the cache is known to hold the data of an earlier run, not of one that still
            writes. Until then nothing is recovered from it.
        may_write: returns whether this process is known to be the leader. Until then nothing is written to either
            store, and everything waits in memory.
        may_be_joined: whether another process may ingest into the same cache for a while.
        announce_newest: as of Parts.
        newest_pause_seconds: pause between writes of newest ticks to the cache.
        archive_started: set once the server of the archive has been started; None is another's, which may be down.
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
        announce_newest: Callable[[Mapping[Series, Tick]], None] | None = None,
        newest_pause_seconds: float = 0.0,
        archive_started: threading.Event | None = None,
    ) -> None:
        self._on_failure = on_failure
        self._stopping = False
        self._reloads = 0
        self._done = threading.Event()
        self._timer_ran = threading.Event()  # whether the timer thread has run since the last check
        self._timer_ran.set()
        self._stop_wait = threading.Event()  # what `stop` waits for: the end of the pipeline, or a forced stop
        self._subscription: abc.DisposableBase | None = None
        self._loop = TimingLoop("timing", self._timer_failed)
        self._generating = TimingLoop("generator", self._timer_failed)
        self._timers = {"timing": self._loop, "generator": self._generating}
        self._closing = threading.Event()
        self._watching = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        partitions = len(settings.exchanges) * settings.flow.workers_per_exchange
        threads = min(partitions, MOST_THREADS) + 5
        self._pool = NamedPool("worker", threads)
        self._recorder = configured_recorder(settings, clock)
        self._settings = settings
        self._factory = FeedFactory(clock, self._generating, self._recorder)
        self._reconfiguring = threading.Lock()
        self.feeds = FeedSet(self._factory.feeds(settings))
        self.modes = ModeSwitch(mode)
        self.window_state = WindowState(
            settings.flow.late_after_ms,
            settings.flow.ahead_ms,
            settings.flow.minute_ms,
            slices_held_ms=settings.flow.slices_held_ms,
            closed_after_ms=settings.flow.closed_after_ms,
        )
        ttl_seconds, series = settings.redis.ttl_seconds, self.feeds.series
        self.cache = cast("_LeasedCache", _LeasedCache.connect(redis, series, clock, ttl_seconds, threads + 8))
        self.cache.may_recover, self.cache.may_write = may_recover, may_write
        self.cache.on_recovered = self._count_after
        self.archive = _LeasedArchive(postgres, ddl, settings.flow.db_batch_size)
        self.archive.may_write, self.archive.started = may_write, archive_started
        self._days = PostgresRollups(
            postgres, retention=Retention(settings.archive.minutes_days, settings.archive.days_days)
        )
        self.holes = PostgresHoles(postgres, may_write)
        self._fetched = FetchedMinutes(postgres, ddl, lambda: may_write() and self.archive.available)
        self._alert_store = PostgresAlerts(postgres, may_write)
        self.alerts = AlertService(
            self._alert_store,
            settings.alerts,
            clock,
            exchanges=lambda: [feed.exchange for feed in self.feeds[Mode.LIVE]],
            newest=self._newest_of_symbol,
        )
        self._sender = WebhookSender(clock)
        deliveries = Deliveries(self._alert_store, self.alerts.evaluator.rules, self._sender.post, clock)
        stale_after_seconds = settings.flow.stale_after_seconds
        self._alert_flow = AlertFlow(self.alerts, deliveries, self.feed_states, stale_after_seconds, clock)
        self._records = VenueBackfill(
            self.feeds[Mode.LIVE],
            self.holes,
            self.cache,
            self._fetched,
            _history_ms(settings),
            self._loop,
            clock,
            lambda: self.modes.current is Mode.LIVE,
            settings.flow.minute_ms,
            settings.flow.closed_after_ms,
            self.alerts.hole_changed,
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
            corrections=self._records.corrections,
            announce_newest=announce_newest,
            pause_newest=partial(time.sleep, newest_pause_seconds) if newest_pause_seconds else None,
            alerts=self._alert_flow.branch,
        )
        self.feed_status = FeedStatus(
            self.feeds,
            lambda: self.modes.current,
            self.pipeline.counters,
            self.pipeline.statistics,
            self.window_state,
            lambda: self.holes.counts,
            settings.flow.stale_after_seconds,
            clock,
            self._records.unsent,
        )

    @property
    def running(self) -> bool:
        """Whether the pipeline runs."""
        return self._subscription is not None and not self._stopping and not self._done.is_set()

    @property
    def cache_complete(self) -> bool:
        """Whether the cache has confirmed all writes, refills included."""
        return self.cache.complete and self.pipeline.cache_confirmed

    def is_alive(self) -> bool:
        """Return whether the timer thread has run since the last call."""
        came_round = self._timer_ran.is_set()
        if came_round:
            self._timer_ran.clear()
            self._loop.schedule(lambda *_: self._timer_ran.set())
        return came_round

    def feed_states(self) -> tuple[Mode, dict[str, FeedState]]:
        """Return the current mode, and the state of its feeds by exchange."""
        mode = self.modes.current
        return mode, {feed.exchange: feed.state for feed in self.feeds[mode]}

    def clock_offsets_ms(self) -> dict[str, int]:
        """Return by how much each wrong exchange clock is ahead of this machine's, by exchange."""
        feeds = self.feeds[self.modes.current]
        return {feed.exchange: feed.decoder.clock_offset_ms for feed in feeds if feed.decoder.clock_offset_ms}

    def state(self) -> IngestState:
        """Return the state at this moment."""
        stalled = tuple(self.pipeline.branches.stalled)
        return IngestState(
            *self.feed_states(),
            self.cache_complete,
            self.archive.available,
            stalled,
            self.clock_offsets_ms(),
            self.feed_status.problems(),
            self.alerts.newest_event,
            self._reloads,
        )

    def counters(self) -> IngestCounters:
        """Return the counters since the start."""
        counters, feeds, mode = self.pipeline.counters, dict(self.feeds), self.modes.current
        return IngestCounters(
            exchanges={feed.exchange: self._counters_of(feed.exchange, mode, feeds) for feed in feeds[mode]},
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
            alerts=self._alert_flow.counters(),
        )

    def _counters_of(self, exchange: str, mode: Mode, feeds: Mapping[Mode, Sequence[Feed]]) -> ExchangeCounters:
        of_exchange = {each: feed for each, of in feeds.items() for feed in of if feed.exchange == exchange}
        decoders = {each: feed.decoder for each, feed in of_exchange.items()}
        received = decoders[mode].last_received
        doubles = [feed.doubles_by_symbol() for feed in of_exchange.values()]
        return ExchangeCounters(
            ticks=sum(decoder.ticks for decoder in decoders.values()),
            rejected={reason: sum(decoder.rejected[reason] for decoder in decoders.values()) for reason in REASONS},
            timestamps_replaced=sum(decoder.timestamps_replaced for decoder in decoders.values()),
            reconnects=self.pipeline.counters.reconnects.get(exchange, 0),
            last_tick_at=None if received is None else milliseconds(received),
            doubles=sum(sum(of_feed.values()) for of_feed in doubles if of_feed),
            holes=hole_counts_of(exchange, mode, self.holes.counts),
            trade_delay=self.pipeline.statistics.delays_of(exchange),
            verified=self._records.verified(exchange),
        )

    def change_rule(self, change: RuleChange) -> RuleChanged:
        """Change an alert rule."""
        try:
            if change.operation == "delete":
                self.alerts.delete(change.id)
                return RuleChanged(change.id)
            if change.rule is None:
                return RuleChanged(change.id, "unavailable")
            if change.operation == "replace":
                return RuleChanged(self.alerts.replace(change.id, change.rule).id)
            return RuleChanged(self.alerts.create(change.rule).id)
        except RuleRefused as refused:
            return RuleChanged(change.id, refused.code)
        except Unavailable as error:
            logger.warning("an alert rule is not changed: {}", error)
            return RuleChanged(change.id, "unavailable")

    def _newest_of_symbol(self, mode: Mode, symbol: str) -> dict[str, Tick]:
        newest = self.window_state.newest_of(Series(mode, feed.exchange, symbol) for feed in self.feeds[mode])
        return {series.exchange: tick for series, tick in newest.items()}

    def switch(self, mode: Mode) -> Mode:
        """Switch the mode and return the previous one. Blocks until the feeds of the previous one are closed.

        Raises:
            Unavailable: the pipeline does not run yet, or no longer.
        """
        if not self.running:
            raise Unavailable("the feeds are starting or stopping")
        before = self.modes.switch(mode)
        if before is not mode:
            logger.info("switched to {} mode from {} mode", mode, before)
        return before

    def reconfigure(self, settings: Settings) -> None:
        """Take the exchanges, symbols and alert rules of other settings, which differ in nothing else.

        Feeds that both name go on. What was received of others until now is written like all else.
        """
        with self._reconfiguring:
            if settings.alerts != self._settings.alerts:
                self.alerts.configure(settings.alerts)
            feeds = self._factory.changed(self.feeds, self._settings, settings)
            newest = {series: tick.at for series, tick in self.window_state.all_newest().items()}
            self._records.take_feeds(feeds[Mode.LIVE], _history_ms(settings), newest)
            self.feeds.replace(feeds)
            self.cache.take_series(self.feeds.series)
            self._settings = settings
            self._reloads += 1

    def start(self) -> None:
        """Start the pipeline; wait briefly for the cache. An unavailable store is retried."""
        gc.set_threshold(YOUNG_OBJECTS)
        sys.setswitchinterval(SWITCH_SECONDS)
        self._subscription = self.pipeline.observable().subscribe(on_error=self._fail, on_completed=self._ended)
        self._watching.start()
        if self._recorder is not None:
            self._recorder.start()
        self.pipeline.begun.wait(BEGIN_SECONDS)

    def wait_for_archive(self) -> None:
        """Wait briefly until the archive has been written to, even if no rows."""
        self.pipeline.archive_sink.available_once.wait(BEGIN_SECONDS)

    def stop(self) -> None:
        """Stop the feeds, drain, and close everything; a little over DRAIN_SECONDS at most."""
        self._stopping = True
        for feeds in self.feeds.values():
            for feed in feeds:
                feed.stop()
        self.modes.end()
        self._drain()
        self._close()

    def abandon(self) -> None:
        """Stop the feeds, discard what is not yet written, and close everything."""
        self._stopping = True
        disposed = threading.Event()

        def dispose(*_: object) -> None:
            if self._subscription is not None:
                self._subscription.dispose()
            disposed.set()

        # On the timer thread, so that no timer is interrupted.
        self._loop.schedule(dispose)
        disposed.wait(FORCE_SECONDS)
        self._close()

    def _count_after(self, recovered: RecoveredCandles) -> None:
        self._records.count_after(recovered.slices, recovered.minutes)

    def _drain(self) -> None:
        self._stop_wait.wait(DRAIN_SECONDS)
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
        """Check the branches and timer threads, and log what feeds lose, until closed."""
        timers = [(loop, self.pipeline.branches.add(name)) for name, loop in self._timers.items()]
        rates, logged_at = FeedRates(), time.monotonic()
        pause = CHECK_SECONDS
        while not self._closing.wait(pause):
            try:
                # Before the timer threads get work: each check would find them busy.
                pause = CHECK_SECONDS if self.pipeline.branches.busy() else IDLE_CHECK_SECONDS
                for loop, branch in timers:
                    if not branch.busy:
                        branch.busy = True
                        loop.schedule(partial(_timer_ran, branch))
                self.pipeline.branches.check(now := time.monotonic())
                if now - logged_at >= RATES_SECONDS:
                    rates.log(self.counters().exchanges, now - logged_at)
                    logged_at = now
            except Exception as error:  # noqa: BLE001 - else no stall would ever be reported again
                logger.opt(exception=error).error("the branches cannot be checked, which is a bug")

    def _close(self) -> None:
        self._closing.set()
        if self._subscription is not None:
            self._subscription.dispose()
        for scheduler in self._timers.values():
            scheduler.dispose()
        self._pool.close()
        self._alert_flow.close()
        self._sender.close()
        if self._recorder is not None:
            self._recorder.stop(RECORDER_STOP_SECONDS)
        self._records.close()
        self._days.close()
        self.holes.close()
        self._alert_store.close()
        self._fetched.close()
        self.archive.close()
        self.cache.close()

    def force_stop(self) -> None:
        """Limit a running `stop` to FORCE_SECONDS from now."""
        timer = threading.Timer(FORCE_SECONDS, self._stop_wait.set)
        timer.daemon = True
        timer.start()

    def _ended(self) -> None:
        self._done.set()
        self._stop_wait.set()

    def _timer_failed(self, error: Exception) -> None:
        if not self._stopping:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._ended()
        logger.opt(exception=error).critical("the pipeline failed, which is a bug; stopping")
        self._on_failure()


class _LeasedCache(RedisWriter):
    """The cache; nothing is recovered from it or written to it while another process may lead."""

    may_recover: Callable[[], bool]
    may_write: Callable[[], bool]
    on_recovered: Callable[[RecoveredCandles], None]

    def recover(self, minute_ms: int = MINUTE_MS) -> RecoveredCandles:
        """Return what an earlier run left of the last minutes.

        Raises:
            Unavailable: another process may lead, or Redis did not answer.
        """
        if not self.may_recover():
            raise Unavailable("another process may lead")
        recovered = super().recover(minute_ms)
        self.on_recovered(recovered)
        return recovered

    def check_may_write(self) -> None:
        """Reject writes while another process may hold the lease.

        Raises:
            Unavailable: nothing may be written now.
        """
        if not self.may_write():
            raise _held_back()
        super().check_may_write()


class _LeasedArchive(PostgresWriter):
    """The archive; nothing is written to it while another process may lead."""

    may_write: Callable[[], bool]
    started: threading.Event | None

    def recent(self, series: Iterable[Series], since: int) -> Candles:
        """Read the rows of the last minutes, once the server has been started."""
        self._wait_for_server()
        return super().recent(series, since)

    def _wait_for_server(self) -> None:
        if self.started is not None:
            self.started.wait(ARCHIVE_START_SECONDS)

    def write(self, minutes: Candles) -> int:
        """Upsert rows, once the server has been started.

        Raises:
            Unavailable: another process may lead, or as of PostgresWriter.
        """
        if not self.may_write():
            raise _held_back()
        self._wait_for_server()
        return super().write(minutes)


def _history_ms(settings: Settings) -> dict[str, int]:
    return {exchange.name: settings.history_ms(exchange) for exchange in settings.exchanges}


def _timer_ran(branch: Branch, *_: object) -> None:
    branch.finished += 1
    branch.busy = False


def _held_back() -> Unavailable:
    return Unavailable("held until Redis answers which process leads")
