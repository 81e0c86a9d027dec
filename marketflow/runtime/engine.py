"""The ingest engine: feeds, pipeline and its stores, built, started and stopped as one unit."""

import gc
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from loguru import logger
from reactivex import abc

from marketflow.alerts.alert_service import AlertService, RuleRefused
from marketflow.alerts.deliveries import Deliveries
from marketflow.alerts.webhook_sender import WebhookSender
from marketflow.clock import Clock, milliseconds
from marketflow.cluster.messages import IngestState, RuleChange, RuleChanged, ShardState
from marketflow.counters import ExchangeCounters, IngestCounters
from marketflow.errors import Starting, Unavailable
from marketflow.feeds.cpu.pacing import Pacing
from marketflow.feeds.decoder import REASONS
from marketflow.feeds.factory import FeedFactory, configured_recorder
from marketflow.feeds.feed import Feed
from marketflow.feeds.reject_log import RATES_SECONDS, FeedRates
from marketflow.logs import RateLimit
from marketflow.model import FINE_STATES, Candles, FeedState, Mode, Series, Tick
from marketflow.pipeline.backlog import Backlog
from marketflow.pipeline.branches import CHECK_SECONDS, IDLE_CHECK_SECONDS, Branch
from marketflow.pipeline.fan_in import FeedSet, ModeSwitch
from marketflow.pipeline.graph import Pipeline
from marketflow.pipeline.schedulers import NamedPool, TimingLoop
from marketflow.pipeline.shard_ownership import Ownership
from marketflow.pipeline.state import WindowState
from marketflow.runtime.alert_flow import AlertFlow
from marketflow.runtime.feed_status import FeedStatus, hole_counts_of
from marketflow.runtime.venue_backfill import VenueBackfill
from marketflow.server.system_limits import error_of_limit
from marketflow.settings import Settings
from marketflow.settings.shards import LEAD, exchange_of
from marketflow.stores.ports import RecoveredCandles, RowsWritten
from marketflow.stores.postgres.alert_store import PostgresAlerts
from marketflow.stores.postgres.fetched.fetched_minutes import FetchedMinutes
from marketflow.stores.postgres.holes import PostgresHoles
from marketflow.stores.postgres.retention import Retention
from marketflow.stores.postgres.rollups import PostgresRollups
from marketflow.stores.postgres.writer import PostgresWriter
from marketflow.stores.redis.buckets.bucketed_writer import BucketedWriter
from marketflow.tasks import Backoff

if TYPE_CHECKING:  # what several processes share; imported where there may be others
    from marketflow.cluster.owner_states import OwnerStates
    from marketflow.cluster.shared_alerts import SharedAlerts

BEGIN_SECONDS = 1.0
"""How long a start waits for each store to return the data of an earlier run."""

ARCHIVE_START_SECONDS = 2.0
"""How long one write waits for an embedded PostgreSQL that is starting: a longer one would count as stalled."""

ARCHIVE_OUTAGE_SECONDS = 60.0
"""How long the embedded PostgreSQL may take to start before that is an outage. On a slow disk initdb takes many
seconds; after INITDB_SECONDS the start fails.
"""

DRAIN_SECONDS = 3.3
"""Time limit for draining: pending writes, and the rows of open minutes."""

LAST_WRITE_SECONDS = 0.2
"""How long a running write may continue after that."""

MOST_THREADS = 128
"""Upper limit of the threads that write slices, which all partitions share."""

YOUNG_OBJECTS = 50_000
"""Allocations between two garbage collections. A batch of many series is thousands of short-lived objects: with the
default of 700, collections took nearly half of all time at 15,000 series and freed nothing."""

SWITCH_SECONDS = 0.0005
"""Interval after which a thread must release the GIL when another one waits. A tick changes threads half a dozen times,
and beside a flooded exchange it waited up to Python's default of 5 ms each time."""

RECORDER_STOP_SECONDS = 0.5
"""How long a stop waits for the disk that raw frames are recorded on."""

WARM_SECONDS = 0.5
"""How long the feed of a standby must have been connected before it is warm: by then the owner has written the slices
from before."""

REACHED_SECONDS = 2.0
"""How long the whole cache must have answered, or a part must not, before ownership depends on it: after a failover one
process finds the new master a little later than another."""

REMOVED_SECONDS = 1.0
"""Time after the removal of a feed by which its last tick has been processed."""

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
        is_alone: whether it owns all shards for good. Otherwise it begins with none, and `assign` sets them.
        announce_newest: see Parts.
        newest_pause_seconds: pause between writes of newest ticks to the cache.
        archive_started: set once the embedded PostgreSQL has been started; None for an external one.
        pacing: pauses of the feeds that lag behind.
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
        is_alone: bool = True,
        announce_newest: Callable[[Mapping[Series, Tick]], None] | None = None,
        newest_pause_seconds: float = 0.0,
        archive_started: threading.Event | None = None,
        pacing: Pacing | None = None,
    ) -> None:
        self._on_failure = on_failure
        self._stopping = False
        self._reloads = 0
        self._done = threading.Event()
        self._timer_ran = threading.Event()  # whether the timer thread has run since the last check
        self._timer_ran.set()
        self._stop_wait = threading.Event()  # set at the end of the pipeline, or by a forced stop
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
        self._factory = FeedFactory(clock, self._generating, self._recorder, pacing)
        self._reconfiguring = threading.RLock()
        self.ownership = Ownership(settings.shards, None if is_alone else ())
        self._standby: frozenset[str] = frozenset()
        self._restoring: frozenset[str] = frozenset()  # owned shards whose candles have yet to be read from the cache
        self._restored: list[RecoveredCandles] = []  # what has been read of those
        self._fed: dict[Mode, frozenset[str]] = dict.fromkeys(Mode, frozenset())  # shards that have a feed
        self._connected_since: dict[str, float] = {}  # by shard
        self._cache_answers, self._cache_since = True, -REACHED_SECONDS  # and since when
        self._replaced: dict[str, int] = {}  # ticks dated by receipt, by exchange
        self._by_receipt: frozenset[str] = frozenset()  # exchanges
        self._newest_at: Mapping[str, int] = {}  # event time of the newest tick by shard, at the last check
        self._ready: frozenset[str] = frozenset()  # of the last call that did not find an assignment under way
        self._shards: dict[str, ShardState] = {}  # likewise
        made = self._factory.feeds(settings) if is_alone else {each: [] for each in Mode}
        self.feeds = FeedSet(made)
        self.modes = ModeSwitch(mode)
        self.window_state = WindowState(
            settings.flow.late_after_ms,
            settings.flow.ahead_ms,
            settings.flow.minute_ms,
            slices_held_ms=settings.flow.slices_held_ms,
            closed_after_ms=settings.flow.closed_after_ms,
        )
        ttl_seconds = settings.redis.ttl_seconds
        self.cache = BucketedWriter.connect(redis, settings.series, clock, ttl_seconds, threads + 8, not is_alone)
        self.archive = _StartingArchive(postgres, ddl, settings.flow.db_batch_size)
        self.archive.started = archive_started
        self._days = PostgresRollups(
            postgres, retention=Retention(settings.archive.minutes_days, settings.archive.days_days)
        )
        self.holes = PostgresHoles(postgres)
        self._fetched = FetchedMinutes(postgres, ddl, lambda: self.archive.available)
        self._alert_store = PostgresAlerts(postgres)
        self._shared_alerts: SharedAlerts | None = None
        self._owner_states: OwnerStates | None = None
        self.alerts = AlertService(
            self._alert_store,
            settings.alerts,
            clock,
            exchanges=lambda: [exchange.name for exchange in self._settings.exchanges],
            newest=self._newest_of_symbol,
        )
        self._sender = WebhookSender(clock)
        deliveries = Deliveries(self._alert_store, self.alerts.evaluator.rules, self._sender.post, clock)
        stale_after_seconds = settings.flow.stale_after_seconds
        if not is_alone:
            self._owner_states, self._shared_alerts = self._shared_with_others(redis, clock)
        self._alert_flow = AlertFlow(
            self.alerts,
            deliveries,
            self.feed_states,
            stale_after_seconds,
            clock,
            lambda: self.ownership.leads,
            self._shared_alerts,
        )
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
            self.alerts.hole_changed if is_alone else lambda hole: None,
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
            read_again=None if is_alone else self.cache.between,
            corrections=self._records.corrections,
            announce_newest=announce_newest,
            pause_newest=partial(time.sleep, newest_pause_seconds) if newest_pause_seconds else None,
            alerts=self._alert_flow.branch,
            ownership=self.ownership,
            series=lambda: self._settings.series,
        )
        self.pipeline.recovery.on_recovered = self._count_after
        self.pipeline.recovery.on_attempted = self._begin_restored
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
            self.ownership,
        )

    def _shared_with_others(self, redis: dict[str, Any], clock: Clock) -> "tuple[OwnerStates, SharedAlerts]":
        """Return the states of the other ingest processes, and the alerts on what all of them write."""
        from marketflow.cluster.owner_states import OwnerStates
        from marketflow.cluster.shared_alerts import SharedAlerts
        from marketflow.cluster.shared_slices import SharedSlices

        settings, owner_states = self._settings, OwnerStates(redis, self.feed_states)
        return owner_states, SharedAlerts(
            self.alerts,
            SharedSlices(self.cache, self.window_state, owner_states),
            owner_states,
            self._alert_store.holes_found,
            lambda: self.modes.current,
            settings.series,
            round(1000 * settings.flow.stale_after_seconds),
            clock,
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
        has_run = self._timer_ran.is_set()
        if has_run:
            self._timer_ran.clear()
            self._loop.schedule(lambda *_: self._timer_ran.set())
        return has_run

    def feed_states(self) -> tuple[Mode, dict[str, FeedState]]:
        """Return the current mode, and the state of its feeds by exchange."""
        mode = self.modes.current
        return mode, {feed.exchange: feed.state for feed in self.feeds[mode]}

    def clock_offsets_ms(self) -> dict[str, int]:
        """Return how far (ms) each wrong exchange clock is ahead of this machine's, by exchange."""
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
        """Change an alert rule; only the leader does."""
        if not self.ownership.leads:
            return RuleChanged(change.id, "unavailable")
        try:
            if change.operation == "delete":
                self.alerts.delete(change.id)
                return RuleChanged(change.id)
            if change.rule is None:
                return RuleChanged(change.id, "unavailable")
            if self._shared_alerts is not None:
                self._shared_alerts.follow([change.rule])
            if change.operation == "replace":
                return RuleChanged(self.alerts.replace(change.id, change.rule).id)
            return RuleChanged(self.alerts.create(change.rule).id)
        except RuleRefused as refused:
            return RuleChanged(change.id, refused.code)
        except Unavailable as error:
            logger.warning("an alert rule is not changed: {}", error)
            return RuleChanged(change.id, "unavailable")

    def _newest_of_symbol(self, mode: Mode, symbol: str) -> dict[str, Tick]:
        if self._shared_alerts is not None:
            return self._shared_alerts.newest(mode, symbol)
        newest = self.window_state.newest_of(Series(mode, feed.exchange, symbol) for feed in self.feeds[mode])
        return {series.exchange: tick for series, tick in newest.items()}

    def switch(self, mode: Mode) -> Mode:
        """Switch the mode and return the previous one. Blocks until the feeds of the previous one are closed.

        Raises:
            Unavailable: the pipeline does not run yet, or no longer.
        """
        if not self.running:
            raise Unavailable("the feeds are starting or stopping")
        return self.modes.switch(mode)

    def reconfigure(self, settings: Settings) -> None:
        """Apply the exchanges, symbols and alert rules of other settings, which differ in nothing else.

        Feeds in both settings go on. What was received from others until now is written like all else.
        """
        with self._reconfiguring:
            if self._shared_alerts is not None:
                self._shared_alerts.take_series(settings.series)
                self._shared_alerts.follow(settings.alerts)
            if settings.alerts != self._settings.alerts:
                self.alerts.configure(settings.alerts)
            if not self.ownership.everything:
                # Joined, so that what was received of removed exchanges is still written by their owner.
                self.ownership.take(self.ownership.owned, settings.shards.joined(self.ownership.shards))
            else:
                self.ownership.shards = settings.shards
            self._replace_feeds(settings)
            self.cache.take_series(settings.series)
            self._reloads += 1

    # Shards

    def assign(self, owned: Collection[str], standby: Collection[str], leads: bool) -> None:
        """Own and stand by for these shards from now on.

        Shards that are gained are written at once, from memory where this process was their standby. Feeds that were
        not here begin after one attempt to read what the previous owner left.
        """
        with self._reconfiguring:
            if self._stopping:
                return
            after = frozenset(owned) | ({LEAD} if leads else set())
            gained = after - self.ownership.owned
            self._standby = frozenset(standby)
            self._restoring = (self._restoring & after) | (gained - {LEAD})
            led = self.ownership.leads
            self.ownership.take(after)
            self._replace_feeds(self._settings)
            if leads and not led and self._shared_alerts is not None:
                self._shared_alerts.begin()
            elif led and not leads:
                self.alerts.on_change()

    def ready(self) -> frozenset[str]:
        """Return the shards of the standby that could be owned at once: the warm ones, and those that are always cold.

        None while not all of the cache can be reached. Call it a few times a second. It does not wait for a running
        assignment, on which the lease must not depend, but returns the same as before.
        """
        if self._reconfiguring.acquire(blocking=False):
            try:
                self._ready = self._find_ready(time.monotonic(), self.modes.current is Mode.LIVE)
            finally:
                self._reconfiguring.release()
        return self._ready

    def _find_ready(self, now: float, live: bool) -> frozenset[str]:
        if (answers := self.cache.answers) is not self._cache_answers:
            self._cache_answers, self._cache_since = answers, now
        feeds = {feed.exchange: feed for feed in self.feeds[Mode.LIVE]}
        self._find_dated_by_receipt(feeds)
        connected = {
            shard
            for shard in self._standby & self._fed[Mode.LIVE]
            if live and (feed := feeds.get(exchange_of(shard))) is not None and feed.state in FINE_STATES
        }
        self._connected_since = {shard: self._connected_since.get(shard, now) for shard in connected}
        if not self._cache_answers or now - self._cache_since < REACHED_SECONDS:
            return frozenset()
        return (self._warm_since(WARM_SECONDS) & self._standby) | self.cold

    def is_cut_off(self) -> bool:
        """Return whether a part of the cache had not answered for a while at the last call of `ready`."""
        return not self._cache_answers and time.monotonic() - self._cache_since >= REACHED_SECONDS

    def _warm_since(self, seconds: float) -> frozenset[str]:
        now = time.monotonic()
        return frozenset(shard for shard, since in self._connected_since.items() if now - since >= seconds)

    def shards(self) -> dict[str, ShardState]:
        """Return the state of each shard here; while an assignment is under way the same as before, like `ready`."""
        if self._reconfiguring.acquire(blocking=False):
            try:
                self._shards = self._find_shards()
            finally:
                self._reconfiguring.release()
        return self._shards

    def _find_shards(self) -> dict[str, ShardState]:
        cold, warm = self.cold, self._warm_since(WARM_SECONDS) & self._standby
        newest_at = self._newest_at
        owned = self.ownership.owned - {LEAD}
        found = {shard: ShardState("connecting", newest_at.get(shard)) for shard in self._standby | owned}
        # The feeds of a shard begin after one attempt to read what the previous owner left.
        begun = owned - self._restoring
        for state, of in (("warm", warm), ("cold", cold), ("owner", begun)):
            found |= {shard: msgspec.structs.replace(found[shard], state=state) for shard in of}
        return found

    def _newest_by_shard(self) -> dict[str, int]:
        """Return the event time (Unix ms) of the newest tick of each shard, of the mode that runs."""
        newest: dict[str, int] = {}
        mode, shard_of = self.modes.current, self.ownership.shards.of
        for series, tick in self.window_state.all_newest().items():
            if series.mode is mode:
                shard = shard_of(series)
                newest[shard] = max(tick.at, newest.get(shard, 0))
        return newest

    @property
    def owned_are_warm(self) -> bool:
        """Whether a standby may have all ticks of what is owned."""
        owned = self.ownership.owned - {LEAD}
        return self.modes.current is Mode.LIVE and self._warm(owned) == owned

    @property
    def cold(self) -> frozenset[str]:
        """The shards of the standby that have no ticks in memory, because no other process receives the same ones.

        Generated ticks, and those that are dated by receipt, exist in one process only. What a venue sent between two
        owners is fetched by REST.
        """
        if self.modes.current is Mode.TEST:
            return self._standby
        return self._standby - self._warm(self._standby)

    def _warm(self, shards: frozenset[str]) -> frozenset[str]:
        """Return the shards of which two processes receive the same ticks."""
        by_tcp = {exchange.name for exchange in self._settings.exchanges if not exchange.venue} - self._by_receipt
        return frozenset(shard for shard in shards if exchange_of(shard) in by_tcp)

    def _replace_feeds(self, settings: Settings) -> None:
        before, self._settings = self._settings, settings
        shards: dict[Mode, frozenset[str]] | None = None
        if not self.ownership.everything:
            owned = self.ownership.owned & {*settings.shards.names}
            begun = owned - self._restoring
            live = begun | (owned & self._fed[Mode.LIVE]) | self._warm(self._standby)
            shards = {Mode.TEST: begun, Mode.LIVE: live}
            if before is settings and shards == self._fed:
                return
            self._fed = shards
        feeds = self._factory.changed(self.feeds, before, settings, shards)
        newest = {series: tick.at for series, tick in self.window_state.all_newest().items()}
        self._records.take_feeds(feeds[Mode.LIVE], _history_ms(settings), newest)
        if not self._restoring:
            for recovered in self._restored:
                self._records.count_after(recovered.slices, recovered.minutes)
            self._restored = []
        self.feeds.replace(feeds)

    def _begin_restored(self, shards: frozenset[str]) -> None:
        """Begin the feeds of shards after the attempt to read what their previous owner left."""
        with self._reconfiguring:
            self._restoring -= shards
            self._replace_feeds(self._settings)

    def _find_dated_by_receipt(self, feeds: Mapping[str, Feed]) -> None:
        """Stand by without feeds for exchanges whose ticks are dated by receipt: each process dates them otherwise."""
        replaced = {exchange: feed.decoder.timestamps_replaced for exchange, feed in feeds.items()}
        found = {exchange for exchange, count in replaced.items() if count > self._replaced.get(exchange, 0)}
        self._replaced |= replaced
        if not found <= self._by_receipt:
            self._by_receipt |= found
            self._replace_feeds(self._settings)
            cold = self.cold
            self._loop.schedule_relative(
                REMOVED_SECONDS,
                lambda *_: self.window_state.remove(self.ownership.within(cold - self.ownership.owned)),
            )

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
        """Wait briefly for the first successful write to the archive, which may have no rows."""
        self.pipeline.archive_sink.available_once.wait(BEGIN_SECONDS)

    def stop(self) -> None:
        """Stop the feeds, drain, and close everything; a little over DRAIN_SECONDS and LAST_WRITE_SECONDS at most."""
        self._stopping = True
        for feeds in self.feeds.values():
            for feed in feeds:
                feed.stop()
        self.modes.end()
        self._drain()
        self._close()

    def _count_after(self, shards: frozenset[str], recovered: RecoveredCandles) -> None:
        """Have feeds that begin afterwards count only trades that are newer than what was recovered."""
        with self._reconfiguring:
            warm = self._fed[Mode.LIVE]

            def begins(candles: Candles) -> Candles:
                return {
                    slot: candle
                    for slot, candle in candles.items()
                    if self.ownership.shards.of(slot.series) not in warm
                }

            if not self.ownership.everything:
                recovered = recovered._replace(slices=begins(recovered.slices), minutes=begins(recovered.minutes))
            if shards & self._restoring:
                self._restored.append(recovered)
            else:
                self._records.count_after(recovered.slices, recovered.minutes)

    def _drain(self) -> None:
        """Wait until everything is written or the time is over, and log how many minute rows are in which store."""
        pipeline = self.pipeline
        written = pipeline.counters.rows_written
        self._stop_wait.wait(DRAIN_SECONDS)
        pipeline.give_up_drain()
        if not self._done.wait(LAST_WRITE_SECONDS):
            rest = pipeline.archive_sink.end_windows()
            pipeline.add_to_backlog(self.ownership.slots_in(self.ownership.owned, rest))
            busy = ", ".join(f"{name} {count}" for name, count in sorted(pipeline.branches.busy().items()))
            logger.warning("the drain did not end in time; these branches still write: {}", busy or "none")
        pending = pipeline.backlog.pending()
        logger.log(
            "ERROR" if pending.in_no_store else "WARNING" if pending.in_cache else "INFO",
            "drained: {} minute rows are written; {} are confirmed by Redis alone and will be written after the next"
            " start; {} are in neither store",
            pipeline.counters.rows_written - written,
            *pending,
        )

    def _watch(self) -> None:
        """Check the branches and timer threads, and log what feeds lose, until closed."""
        timers = [(loop, self.pipeline.branches.add(name)) for name, loop in self._timers.items()]
        rates, logged_at = FeedRates(), time.monotonic()
        pause, limit = CHECK_SECONDS, RateLimit(60.0)
        while not self._closing.wait(pause):
            try:
                # Before the timer threads get work, which would make each check find them busy.
                idle = self.ownership.everything and not self.pipeline.branches.busy()
                pause = IDLE_CHECK_SECONDS if idle else CHECK_SECONDS
                for loop, branch in timers:
                    if not branch.busy:
                        branch.busy = True
                        loop.schedule(partial(_timer_ran, branch))
                self.pipeline.branches.check(now := time.monotonic())
                if not self.ownership.everything:
                    # Not while the lease is renewed: short of CPU, 15,000 series take a second, and it would expire.
                    self._newest_at = self._newest_by_shard()
                if now - logged_at >= RATES_SECONDS:
                    rates.log(self.counters().exchanges, now - logged_at)
                    logged_at = now
            except Exception as error:  # noqa: BLE001 - else no stall would ever be reported again
                limit.log_bug("the branches cannot be checked", error)

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
        if self._owner_states is not None:
            self._owner_states.close()
        self._fetched.close()
        self.archive.close()
        self.cache.close()

    def force_stop(self) -> None:
        """Limit a running `stop` to FORCE_SECONDS from now."""
        timer = threading.Timer(FORCE_SECONDS, self._stop_wait.set)
        timer.daemon = True
        timer.start()

    def abandon_archive(self) -> None:
        """Write no more rows, since the server of the archive has not been started; limits a `stop` likewise."""
        self.archive.abandon()
        self.force_stop()

    def _ended(self) -> None:
        self._done.set()
        self._stop_wait.set()

    def _timer_failed(self, error: Exception) -> None:
        if not self._stopping:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._ended()
        if (limit := error_of_limit(error)) is not None:
            logger.critical("the pipeline failed: {}; stopping", limit)
        else:
            logger.opt(exception=error).critical("the pipeline failed, which is a bug; stopping")
        self._on_failure()


class _StartingArchive(PostgresWriter):
    """The archive, whose server may be starting."""

    started: threading.Event | None
    _awaited_since: float | None = None
    _abandoned = False

    def abandon(self) -> None:
        """Wait no longer for the server, and write nothing."""
        self._abandoned = True
        if self.started is not None:
            self.started.set()

    def recent(self, series: Iterable[Series], since: int) -> Candles:
        """Read the rows of the last minutes, once the server has been started."""
        self._await_server()
        return super().recent(series, since)

    def write(self, minutes: Candles, on_written: RowsWritten | None = None) -> int:
        """Upsert rows, once the server has been started."""
        self._await_server()
        return super().write(minutes, on_written)

    def _await_server(self) -> None:
        if self.started is None or (self.started.is_set() and not self._abandoned):
            return
        if self._awaited_since is None:
            self._awaited_since = time.monotonic()
        if not self.started.wait(ARCHIVE_START_SECONDS) or self._abandoned:
            is_late = time.monotonic() - self._awaited_since > ARCHIVE_OUTAGE_SECONDS
            raise (Unavailable if is_late else Starting)("the embedded server is still starting")


def _history_ms(settings: Settings) -> dict[str, int]:
    return {exchange.name: settings.history_ms(exchange) for exchange in settings.exchanges}


def _timer_ran(branch: Branch, *_: object) -> None:
    branch.finished += 1
    branch.busy = False
