"""The left edge of the graph: the feeds of the current mode, merged into one stream of candle batches."""

import threading
from collections.abc import Mapping, Sequence

import reactivex as rx
from reactivex import Observable, abc
from reactivex import operators as ops
from reactivex.subject import BehaviorSubject

from marketflow.clock import Clock
from marketflow.feeds.feed import Connection, Feed
from marketflow.model import Candles, Mode
from marketflow.pipeline.instrumentation import ConnectionLog, PipelineCounters
from marketflow.pipeline.operators import completion, retry_with_backoff
from marketflow.tasks import Backoff

FEEDS_STOP_SECONDS = 1.0
"""How long feeds may take to emit what they have received, once the pipeline is to complete."""


class ModeSwitch:
    """Switches between the generator and the exchanges, one switch at a time; its end completes the pipeline."""

    def __init__(self, mode: Mode) -> None:
        self._lock = threading.Lock()
        self._modes = BehaviorSubject(mode)
        self._ended = False

    @property
    def current(self) -> Mode:
        """The current mode."""
        return self._modes.value

    @property
    def changes(self) -> Observable[Mode]:
        """The current mode, then each that follows."""
        return self._modes

    def switch(self, mode: Mode) -> Mode:
        """Switch to a mode; return the one before. The feeds of the old mode are closed when it returns."""
        with self._lock:
            previous = self.current
            if mode != previous and not self._ended:
                self._modes.on_next(mode)
            return previous

    def end(self) -> None:
        """Complete the pipeline."""
        with self._lock:
            self._ended = True
            self._modes.on_completed()


def fan_in(
    modes: Observable[Mode],
    feeds: Mapping[Mode, Sequence[Feed]],
    reconnect: Backoff,
    loop: abc.SchedulerBase,
    counters: PipelineCounters,
    clock: Clock,
) -> Observable[Candles]:
    """Merge the feeds of the current mode, each connection with its own reconnects; completes soon after `modes` does.

    Args:
        modes: the current mode and each that follows.
        feeds: the feeds of each mode.
        reconnect: pauses between the attempts of a feed.
        loop: scheduler of these pauses.
        counters: counts the reconnects.
        clock: the time of failures.
    """
    ended = completion(modes)

    def connected(connection: Connection) -> Observable[Candles]:
        log = ConnectionLog(connection, counters, clock)
        return connection.batches().pipe(retry_with_backoff(reconnect, loop, ended, log.lost, log.receiving))

    def feeds_of(mode: Mode) -> Observable[Candles]:
        return rx.merge(*(connected(connection) for feed in feeds[mode] for connection in feed.connections))

    return modes.pipe(
        ops.distinct_until_changed(),
        ops.map(feeds_of),
        ops.switch_latest(),
        # A feed that blocks must not hold up the end.
        ops.take_until(ended.pipe(ops.delay(FEEDS_STOP_SECONDS, scheduler=loop))),
    )
