"""The left edge of the graph: the feeds of the current mode, merged into one stream of candle batches.

The feeds may change while they run: those that are added begin, those that are removed end, the others go on.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import reactivex as rx
from reactivex import Observable, abc
from reactivex import operators as ops
from reactivex.subject import BehaviorSubject

from marketflow.clock import Clock
from marketflow.feeds.feed import Connection, Feed, each_while_present
from marketflow.model import Candles, Mode, Series
from marketflow.pipeline.instrumentation import ConnectionLog, PipelineCounters
from marketflow.pipeline.operators import completion, retry_with_backoff
from marketflow.tasks import Backoff

FEEDS_STOP_SECONDS = 1.0
"""How long feeds may take to emit what they have received, once they are stopped."""


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


class FeedSet(Mapping[Mode, Sequence[Feed]]):
    """The feeds of each mode at present; reading is for any thread."""

    def __init__(self, feeds: Mapping[Mode, Sequence[Feed]]) -> None:
        self._lock = threading.Lock()
        self._feeds = BehaviorSubject(dict(feeds))

    def __getitem__(self, mode: Mode) -> Sequence[Feed]:
        return self._feeds.value[mode]

    def __iter__(self) -> Iterator[Mode]:
        return iter(self._feeds.value)

    def __len__(self) -> int:
        return len(self._feeds.value)

    @property
    def series(self) -> frozenset[Series]:
        """All series of the feeds, of both modes."""
        return frozenset().union(*(feed.decoder.series for feeds in self.values() for feed in feeds))

    def connections(self, mode: Mode) -> Observable[Sequence[Connection]]:
        """Emit all connections of the feeds of a mode: those of now, then those after each change."""
        return self._feeds.pipe(ops.map(lambda _: [each for feed in self[mode] for each in feed.connections]))

    def replace(self, feeds: Mapping[Mode, Sequence[Feed]]) -> None:
        """Replace the feeds; those that stay, as the same objects, are not interrupted.

        Those that are removed are stopped, after they have emitted what they have received.
        """
        with self._lock:
            for feed in {feed for mode in self for feed in self[mode]}.difference(*feeds.values()):
                feed.stop()
            self._feeds.on_next(dict(feeds))


def fan_in(
    modes: Observable[Mode],
    feeds: FeedSet,
    reconnect: Backoff,
    loop: abc.SchedulerBase,
    counters: PipelineCounters,
    clock: Clock,
) -> Observable[Candles]:
    """Merge the feeds of the current mode, each connection with its own reconnects; completes soon after `modes` does.

    Args:
        modes: the current mode and each that follows.
        feeds: the feeds of each mode, which may change.
        reconnect: pauses between the attempts of a feed.
        loop: scheduler of these pauses.
        counters: counts the reconnects.
        clock: the time of failures.
    """
    ended = completion(modes)

    def connected(connection: Connection, removed: Observable[Any]) -> Observable[Candles]:
        log = ConnectionLog(connection, counters, clock)
        until = rx.merge(ended, removed)
        attempts = connection.batches().pipe(retry_with_backoff(reconnect, loop, until, log.lost, log.receiving))
        return attempts.pipe(ops.take_until(soon_after(removed)))

    def feeds_of(mode: Mode) -> Observable[Candles]:
        return feeds.connections(mode).pipe(ops.take_until(ended), each_while_present(connected))

    def soon_after(stopped: Observable[Any]) -> Observable[Any]:
        # A feed that blocks must not hold up the end.
        return stopped.pipe(ops.delay(FEEDS_STOP_SECONDS, scheduler=loop))

    return modes.pipe(
        ops.distinct_until_changed(),
        ops.map(feeds_of),
        ops.switch_latest(),
        ops.take_until(soon_after(ended)),
    )
