"""Counters and log lines of the pipeline, kept out of its graph."""

import threading
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from loguru import logger
from msgspec import field

from marketflow.clock import Clock, milliseconds
from marketflow.counters import DelayCounter
from marketflow.errors import Starting, Unavailable
from marketflow.feeds.feed import Connection
from marketflow.logs import Outage, RateLimit
from marketflow.model import Series, Tick
from marketflow.text import failure_text


class ConnectionFailure(NamedTuple):
    """Why and when (Unix ms) a connection of a feed ended, and when the next attempt begins (Unix ms)."""

    text: str
    at: int
    next_try_at: int


class PipelineCounters(msgspec.Struct, eq=False):
    """What the pipeline has processed, and what failed, since the start."""

    failed_batches: int = 0
    """Batches that were dropped because a step raised, which is a bug."""
    cache_errors: int = 0
    archive_errors: int = 0
    rows_written: int = 0
    rows_refused: int = 0
    tick_to_cache: DelayCounter = field(default_factory=DelayCounter)
    """From the receipt of a tick to the cache's confirmation; of conflated ticks, the delay of the newest one.

    Only writes that are confirmed at once count: some of those that follow another within 0.1 s are not.
    """
    reconnects: dict[str, int] = field(default_factory=dict)
    failures: dict[Connection, ConnectionFailure] = field(default_factory=dict)
    """The last one of each connection."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, failed_batches: int = 0, cache_errors: int = 0) -> None:
        """Add to counters that several threads share: `+=` alone is a read and a write, and loses counts."""
        with self._lock:
            self.failed_batches += failed_batches
            self.cache_errors += cache_errors


class Instrumentation:
    """Counts and logs the events of one pipeline."""

    def __init__(self) -> None:
        self.counters = PipelineCounters()
        self._limit = RateLimit(10.0)
        self._archive_outage = Outage("PostgreSQL cannot be used", "PostgreSQL can be used again")
        self._rollup_outage = Outage("days cannot be rolled up", "days can be rolled up again")
        self._start_logged = False
        self._late_ticks_logged = 0
        self._measured: dict[Series, int] = {}  # sequence of the last tick whose delay was counted

    def step_failed(self, error: Exception) -> None:
        """A step of the graph raised: its batch is dropped."""
        self.counters.add(failed_batches=1)
        self._limit.log_bug("a step of the pipeline failed and its batch is dropped", error)

    def latest_written(self, arrived: Mapping[Series, Tick | None], written: Mapping[Series, Tick], now: int) -> None:
        """Count the delays of ticks that have just arrived and are now in the cache, each once.

        A tick that arrives during a write may be part of that write and of the next one.

        Args:
            arrived: the ticks for which the write was made; None in a refill, which has no delay.
            written: what was written, perhaps newer.
            now: time of the confirmation (Unix ns).
        """
        received = {
            series: tick.sequence
            for series, tick in written.items()
            if arrived[series] is not None and self._measured.get(series) != tick.sequence
        }
        self.counters.tick_to_cache.count([(now - each) / 1e9 for each in received.values()])
        self._measured.update(received)

    def cache_failed(self, error: Exception) -> None:
        """A call of the cache failed."""
        self.counters.add(cache_errors=1)
        if not isinstance(error, Unavailable):  # the cache logs its own outages
            self._limit.log_bug("a write to the cache failed and its candles are dropped", error)

    def recovery_failed(self, error: Exception) -> None:
        """What an earlier run left could not be read."""
        if not isinstance(error, Unavailable):
            self._limit.log("recovery", "ERROR", f"what an earlier run left in the cache cannot be read: {error!r}")

    def late_ticks(self, count: int) -> None:
        """So far `count` ticks came after their minute had expired from the window state."""
        if count > self._late_ticks_logged:
            self._late_ticks_logged = count
            self._limit.log("late ticks", "WARNING", f"{count} ticks so far came for minutes long closed")

    def rows_dropped(self, count: int) -> None:
        """The backlog was full and dropped its oldest rows."""
        if count:
            text = f"{count} minute rows are dropped: more wait for PostgreSQL than memory may hold"
            self._limit.log("rows dropped", "ERROR", text)

    def rows_written(self, count: int, refused: int) -> None:
        """The archive has confirmed `count` rows, of which it refused some for what is in them."""
        self.counters.rows_refused += refused
        self.counters.rows_written += count - refused

    def archive_available(self) -> None:
        """The archive has answered a write."""
        self._archive_outage.over("archive", for_all=True)

    def archive_failed(self, error: Exception, pending: int) -> None:
        """A write to the archive failed, and is repeated."""
        if isinstance(error, Starting):
            if not self._start_logged:
                logger.info("PostgreSQL is being started, {}", _waiting(pending, error))
            self._start_logged = True
            return
        self.counters.archive_errors += 1
        self._archive_outage.failed("archive", _waiting(pending, error))

    def rollup_succeeded(self) -> None:
        """A step of the daily roll-up succeeded."""
        self._archive_outage.over("days")
        self._rollup_outage.over("days")

    def rollup_failed(self, error: Exception, pending: int) -> None:
        """A step of the daily roll-up failed, and is repeated."""
        if isinstance(error, Unavailable) and error.is_unreachable:
            self._archive_outage.failed("days", _waiting(pending, error))
        else:
            self._rollup_outage.failed("days", f"answers about long periods are slow: {error}")


def _waiting(pending: int, error: Exception) -> str:
    return f"{pending} minute rows wait for it: {error}"


class ConnectionLog:
    """Logs when a connection begins, is lost and returns; counts its reconnects."""

    def __init__(self, connection: Connection, counters: PipelineCounters, clock: Clock) -> None:
        self._connection = connection
        self._clock = clock
        self._exchange = connection.exchange
        self._place = f"{connection.exchange} at {connection.place}"
        self._counters = counters
        self._outage = Outage(f"cannot connect to {self._place}", f"connected to {self._place}")
        self._connected_once = False

    def receiving(self) -> None:
        """The first ticks of a connection have arrived."""
        self._outage.over(self._exchange)
        if not self._connected_once:
            self._connected_once = True
            logger.bind(exchange=self._exchange).info("ticks of {} come in", self._place)
            self._outage = Outage(f"lost {self._place}", f"ticks of {self._place} come in again")

    def lost(self, error: Exception, pause: float) -> None:
        """The connection failed; the next attempt follows after `pause` seconds, or once the venue allows it."""
        reconnects = self._counters.reconnects
        reconnects[self._exchange] = reconnects.get(self._exchange, 0) + 1
        pause = max(pause, self._connection.pause_seconds)
        text = failure_text(error)
        now_ms = milliseconds(self._clock())
        self._counters.failures[self._connection] = ConnectionFailure(text, now_ms, now_ms + round(1000 * pause))
        self._outage.failed(self._exchange, f"trying again in {pause:.1f} s: {text}")
