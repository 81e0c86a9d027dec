"""The whole pipeline in virtual time, with scripted feeds and stores in memory."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import reactivex as rx
from reactivex import Observable
from reactivex import operators as ops
from reactivex.subject import Subject
from reactivex.testing import TestScheduler

from marketflow.errors import Unavailable
from marketflow.feeds.corrections import Corrections, NoCorrections
from marketflow.feeds.decoder import Decoder
from marketflow.feeds.feed import FeedReport
from marketflow.model import (
    Candles,
    FeedState,
    Mode,
    Series,
    Slot,
    Tick,
    candle_of,
    merge_all,
    more_complete,
    slice_start,
)
from marketflow.pipeline.backlog import DEFAULT_LIMIT, Backlog
from marketflow.pipeline.fan_in import FeedSet, ModeSwitch
from marketflow.pipeline.graph import Pipeline
from marketflow.pipeline.shard_ownership import Ownership
from marketflow.pipeline.state import WindowState
from marketflow.stores.ports import RecoveredCandles, RowsWritten, Wanted, every_series
from marketflow.stores.unwritten_slices import UnwrittenSlices
from tests.support.market import MINUTE

START_MS = MINUTE
EXCHANGE = "exchange1"
BTC = Series(Mode.TEST, EXCHANGE, "BTCUSDT")
ETH = Series(Mode.TEST, EXCHANGE, "ETHUSDT")
LIVE_BTC = BTC._replace(mode=Mode.LIVE)


class ScriptedFeed:
    """A feed that emits what the test sends."""

    state = FeedState.CONNECTED
    absent = ()
    pause_seconds = 0.0

    def __init__(self, mode: Mode, exchange: str = EXCHANGE) -> None:
        self.exchange = exchange
        self.place = "a script"
        self.decoder = Decoder(mode, exchange, ("BTCUSDT", "ETHUSDT"), lambda: 0, 0, lambda *_: None)
        self.subscriptions = 0
        self.open = 0
        self.clock_measurements = 0
        self._batches: Subject[Candles] = Subject()

    @property
    def connections(self) -> "tuple[ScriptedFeed]":
        return (self,)

    @property
    def refusals(self) -> Mapping[str, str]:
        return {}

    def take_symbols(self, symbols: Mapping[str, str]) -> None:
        self.decoder.take_symbols(symbols)

    def report(self) -> FeedReport:
        return FeedReport()

    def measure_clock(self) -> None:
        self.clock_measurements += 1

    def doubles_by_symbol(self) -> None:
        pass

    def batches(self) -> Observable[Candles]:
        def subscribe(_: object) -> Observable[Candles]:
            self.subscriptions += 1
            self.open += 1
            return self._batches.pipe(ops.finally_action(self._close))

        return rx.defer(subscribe)

    def _close(self) -> None:
        self.open -= 1

    def send(self, batch: Candles) -> None:
        self._batches.on_next(batch)

    def fail(self, error: Exception) -> None:
        failing, self._batches = self._batches, Subject()
        failing.on_error(error)

    def stop(self) -> None:
        self._batches.on_completed()


class FakeCache:
    """Cache in memory; raises Unavailable while `down`."""

    def __init__(self) -> None:
        self.down = False
        self.lacking = False
        self.left_behind: Candles = {}
        self.backlog: Candles = {}
        self.newest: dict[Series, Tick] = {}
        self.newest_writes: list[dict[Series, Tick]] = []
        self.slices: Candles = {}
        self.slice_writes: list[Candles] = []
        self.minutes: Candles = {}
        self.archived_until = 0
        self.noted_as_stored: set[Slot] = set()
        self.broken_writes = 0
        self.unwritten = UnwrittenSlices()

    @property
    def complete(self) -> bool:
        return not self.down and not self.lacking

    def _check(self) -> None:
        if self.down:
            self.lacking = True
            raise Unavailable("down")
        if self.broken_writes:
            self.broken_writes -= 1
            raise RuntimeError("a bug in the cache")

    def put_newest(self, newest: dict[Series, Tick]) -> bool:
        self._check()
        self.newest_writes.append(newest)
        self.newest |= newest
        return True

    def put_slices(self, slices: Candles) -> None:
        self._check()
        self.slice_writes.append(slices)
        self.slices |= slices

    def put_minutes(self, minutes: Candles) -> bool:
        self._check()
        self.minutes |= minutes
        return True

    def recover(self, minute_ms: int, wanted: Wanted = every_series) -> RecoveredCandles:
        self._check()
        return RecoveredCandles({slot: candle for slot, candle in self.left_behind.items() if wanted(slot.series)})

    def unarchived(self, shards: Collection[str], shard_of: Callable[[Series], str]) -> Candles:
        self._check()
        return {slot: candle for slot, candle in self.backlog.items() if shard_of(slot.series) in shards}

    def note_stored(self, minutes: Iterable[Slot]) -> None:
        self.noted_as_stored |= {*minutes}

    def mark_archived(self, until: int, shards: Collection[str]) -> None:
        self._check()
        self.archived_until = until

    def lacks(self, series: Series) -> bool:
        return True

    def needs_refill(self) -> bool:
        if self.down:
            return False
        lacking, self.lacking = self.lacking, False
        return lacking

    def empty(self) -> None:
        self.newest, self.slices, self.minutes = {}, {}, {}
        self.lacking = True


class FakeArchive:
    """Archive in memory, which keeps the more complete version of each row; raises Unavailable while `down`."""

    def __init__(self, now_ms: Callable[[], int]) -> None:
        self.down = False
        self.rows_a_transaction = 1000
        self.transactions_left: int | None = None
        """Number of transactions after which it is down."""
        self.refuses: set[Series] = set()
        self.rows: Candles = {}
        self.written_at: dict[Slot, list[int]] = {}
        self._now_ms = now_ms

    def recent(self, series: Iterable[Series], since: int) -> Candles:
        if self.down:
            raise Unavailable("down")
        return {slot: candle for slot, candle in self.rows.items() if slot.series in series and slot.start >= since}

    def write(self, minutes: Candles, on_written: RowsWritten | None = None) -> int:
        rows = sorted(minutes.items(), key=lambda row: row[0].start)
        size, rejected = self.rows_a_transaction, 0
        for begin in range(0, max(1, len(rows)), size):
            rejected += self._transaction(dict(rows[begin : begin + size]), on_written)
        return rejected

    def _transaction(self, minutes: Candles, on_written: RowsWritten | None) -> int:
        self.down = self.down or self.transactions_left == 0
        if self.down:
            raise Unavailable("down")
        if self.transactions_left:
            self.transactions_left -= 1
        written = {slot: candle for slot, candle in minutes.items() if slot.series not in self.refuses}
        for slot, candle in written.items():
            self.rows[slot] = more_complete(candle, self.rows.get(slot, candle))
            self.written_at.setdefault(slot, []).append(self._now_ms())
        if on_written is not None:
            on_written(minutes, len(minutes) - len(written))
        return len(minutes) - len(written)


class FakeDays:
    """Roll-up with a number of steps to do; raises Unavailable while `down`."""

    def __init__(self) -> None:
        self.down = False
        self.steps = 0
        self.asked_at: list[int] = []

    def roll_up(self, now_ms: int) -> bool:
        self.asked_at.append(now_ms)
        if self.down:
            raise Unavailable("down")
        self.steps = max(0, self.steps - 1)
        return self.steps > 0


class World:
    """The pipeline in virtual time, from the start of a minute."""

    def __init__(
        self,
        mode: Mode = Mode.TEST,
        feeds: Mapping[Mode, Sequence[ScriptedFeed]] | None = None,
        workers: int = 2,
        pending_limit: int = DEFAULT_LIMIT,
        late_after_ms: int = 2000,
        corrections: Corrections | None = None,
        ownership: Ownership | None = None,
    ) -> None:
        self.scheduler = TestScheduler()
        self.feeds: Mapping[Mode, Sequence[ScriptedFeed]] = feeds or {each: [ScriptedFeed(each)] for each in Mode}
        self.feed_set = FeedSet(self.feeds)
        self.cache = FakeCache()
        self.archive = FakeArchive(lambda: self.now_ms)
        self.days = FakeDays()
        self.state = WindowState(late_after_ms)
        self.backlog = Backlog(pending_limit)
        self.modes = ModeSwitch(mode)
        self.sent: list[tuple[Series, Tick]] = []
        self.errors: list[Exception] = []
        self.completed = False
        self.clock_step_ms = 0
        self.pipeline = Pipeline(
            modes=self.modes.changes,
            feeds=self.feed_set,
            state=self.state,
            backlog=self.backlog,
            cache=self.cache,
            archive=self.archive,
            rollups=self.days,
            workers_per_exchange=workers,
            loop=self.scheduler,
            pool=self.scheduler,
            clock=lambda: self.now_ms * 1_000_000,
            corrections=corrections or NoCorrections(),
            ownership=ownership or Ownership(),
        )

    @property
    def feed(self) -> ScriptedFeed:
        """The first feed of test mode."""
        return self.feeds[Mode.TEST][0]

    @property
    def seconds(self) -> float:
        """Virtual time since the start."""
        return float(self.scheduler.clock)

    @property
    def now_ms(self) -> int:
        return START_MS + self.clock_step_ms + round(self.seconds * 1000)

    def start(self) -> "World":
        self.pipeline.observable().subscribe(on_error=self.errors.append, on_completed=self._complete)
        self.run(0.001)
        return self

    def _complete(self) -> None:
        self.completed = True

    def run(self, seconds: float) -> None:
        """Let virtual time pass."""
        self.scheduler.advance_to(round(self.seconds + seconds, 6))
        assert not self.errors, self.errors

    def run_until_ms(self, at_ms: int) -> None:
        """Let virtual time pass until a moment after START_MS."""
        self.run((START_MS + at_ms - self.now_ms) / 1000)

    def send(self, *prices: float, series: Series = BTC, ago_ms: int = 0, feed: ScriptedFeed | None = None) -> None:
        """Ticks that happened `ago_ms` before now and arrive together, now."""
        batch: list[Candles] = []
        for price in prices:
            tick = Tick(price, self.now_ms - ago_ms, self.now_ms * 1_000_000 + len(self.sent))
            self.sent.append((series, tick))
            batch.append({Slot(series, slice_start(tick.at)): candle_of(tick)})
        (feed or self.feed).send(merge_all(batch))

    def stop(self, drain_seconds: float = 4.0) -> None:
        """Stop as the engine does: the feeds complete, then the modes; after a while the drain is given up."""
        for feeds in self.feeds.values():
            for feed in feeds:
                feed.stop()
        self.modes.end()
        self.scheduler.schedule_relative(drain_seconds, lambda *_: self.pipeline.give_up_drain())
