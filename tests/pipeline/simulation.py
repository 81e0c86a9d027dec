"""An hour of the whole pipeline in virtual time, with everything going wrong that can, and the account of its ticks.

Real: the pipeline with its window state, modes and backlog, and the cache with its codecs, its circuit breaker and its
recovery, on a Redis of memory. Simulated from one seed: feeds, archive, time, and all faults.

What happens: ticks out of order, late, too late, ahead of the clock and in bursts; feeds that fail; switches of the
mode; stores that are down, slow, stuck (calls time out, done or not), emptied, that lose the
answer to what they did, or raise unexpected exceptions; crashes, ends and starts, each at any moment of the others.

The n-th tick of a minute costs 2**n, n shuffled: the total of any candle says which ticks are in it, once each.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import ceil
from random import Random
from random import seed as seed_backoffs
from typing import Any, TypeVar, cast

import msgspec
import redis
from reactivex import abc

from marketflow.errors import Unavailable
from marketflow.model import (
    MINUTE_MS,
    SLICE_MS,
    Candle,
    Candles,
    Mode,
    Series,
    Slot,
    Tick,
    candle_of,
    merge_all,
    minute_start,
    slice_start,
)
from marketflow.pipeline.backlog import Backlog
from marketflow.pipeline.fan_in import FeedSet, ModeSwitch
from marketflow.pipeline.graph import Pipeline
from marketflow.pipeline.state import WindowState
from marketflow.settings.shards import LEAD
from marketflow.stores.cache_limits import RECENT_MS
from marketflow.stores.circuit_breaker import CircuitBreaker
from marketflow.stores.ports import RowsWritten
from marketflow.stores.redis import codec, keys
from marketflow.stores.redis.writer import RedisWriter
from marketflow.tasks import Backoff
from tests.pipeline.virtual_time import VirtualPool, VirtualTime
from tests.pipeline.world import START_MS, FakeArchive, FakeDays, ScriptedFeed
from tests.support.memory_redis import MemoryRedis, MemoryRedisClient
from tests.support.oracle import candle_of_ticks

EXCHANGES = ("exchange1", "exchange2")
SYMBOLS = ("BTCUSDT", "ETHUSDT")
ALL_SERIES = [Series(mode, exchange, symbol) for mode in Mode for exchange in EXCHANGES for symbol in SYMBOLS]

HOUR_SECONDS = 3600
LATE_AFTER_MS = 2000
TICKS_A_MINUTE = 50  # of a series, at most: their prices must add up exactly
WRITTEN_SECONDS = 5.0  # a minute, after its end or the archive's return
REFILLED_SECONDS = 2.0  # the cache, after its return
CRASH_SECONDS = 0.2  # of ticks, at most, may be lost by a crash
DRAIN_SECONDS = 4.0  # for the end

_T = TypeVar("_T")


class Trouble:
    """Faults of one store.

    Args:
        random: of the seed.
        now: virtual seconds.
        error: what a network failure looks like.
        patience: seconds after which a call times out.
    """

    def __init__(self, random: Random, now: Callable[[], float], error: type[Exception], patience: float) -> None:
        self._random, self._now, self._error, self._patience = random, now, error, patience
        self.sleep: Callable[[float], None] = lambda seconds: None
        self.down = self.slow = self.stuck = False
        self.bugs = self.lost_answers = 0
        self._last = 0.0

    @property
    def at_work(self) -> bool:
        return bool(self.down or self.slow or self.stuck or self.bugs or self.lost_answers)

    def healthy_for(self, seconds: float) -> bool:
        return not self.at_work and self._now() - self._last >= seconds

    def felt(self) -> None:
        """Return whether there is a fault, or was until now."""
        self._last = self._now()

    def call(self, work: Callable[[], _T]) -> _T:
        if not self.at_work:
            return work()
        self.felt()
        if self.slow or self.stuck:
            return self._slowly(work)
        if self.down:
            raise self._error("down")
        if self.bugs:
            self.bugs -= 1
            raise RuntimeError("a bug")
        self.lost_answers -= 1
        work()
        raise self._error("the answer was lost")

    def _slowly(self, work: Callable[[], _T]) -> _T:
        longest = self._patience * (1.5 if self.stuck else 0.5)
        there, back = (longest * self._random.triangular(0, 1, 1) for _ in range(2))
        self.sleep(min(there, self._patience))
        if there > self._patience:
            raise self._error("no answer in time, never arrived")
        if self.down:
            raise self._error("went down")
        answer = work()
        self.sleep(min(back, self._patience - there) if there + back > self._patience else back)
        if there + back > self._patience or self.down:
            raise self._error("no answer in time, though done")
        return answer


class SimulatedArchive(FakeArchive):
    """The fake archive, for one thread at a time, with trouble; rows keep no order of arrival."""

    def __init__(self, now_ms: Callable[[], int], trouble: Trouble) -> None:
        super().__init__(now_ms)
        self._trouble = trouble
        self._asked = False
        self.adopted: Callable[[int], None] = lambda since: None

    def recent(self, series: Iterable[Series], since: int) -> Candles:
        rows = self._alone(lambda: super(SimulatedArchive, self).recent(series, since))
        self.adopted(since)
        return {slot: _of_row(candle) for slot, candle in rows.items()}

    def write(self, minutes: Candles, on_written: RowsWritten | None = None) -> int:
        return self._alone(lambda: super(SimulatedArchive, self).write(minutes, on_written))

    def _alone(self, work: Callable[[], _T]) -> _T:
        assert not self._asked, "the archive is for one thread at a time"
        self._asked = True
        try:
            return self._trouble.call(work)
        finally:
            self._asked = False


class SimulatedDays(FakeDays):
    """Days with the archive's trouble, and always something left to do; for one thread at a time."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__()
        self._trouble = trouble
        self._asked = False

    def roll_up(self, now_ms: int) -> bool:
        assert not self._asked, "days are for one thread at a time"
        self._asked = True
        self.steps = self.steps or 3
        try:
            return self._trouble.call(lambda: super(SimulatedDays, self).roll_up(now_ms))
        finally:
            self._asked = False


def _of_row(candle: Candle) -> Candle:
    return msgspec.structs.replace(candle, first_sequence=0, last_sequence=0, version=1)


@dataclass
class Minute:
    """What was sent of one minute of one series.

    `required` must end in the row; what a crash has taken is no longer required. `uncertain` is a minute of which both
    stores had a part at a crash, neither all of it: which of them survives depends on what is asked first.
    """

    prices: list[int]
    ticks: dict[int, Tick] = field(default_factory=dict)  # by the bit of the price
    arrived: dict[int, float] = field(default_factory=dict)  # virtual seconds
    required: int = 0
    uncertain: bool = False

    def before(self, seconds: float) -> int:
        """Return the ticks that are required and arrived before."""
        return self.required & sum(bit for bit, at in self.arrived.items() if at < seconds)


def bits_of(candle: Candle | None) -> int:
    """The ticks in a candle."""
    if candle is None:
        return 0
    bits = int(candle.total)
    assert bits.bit_count() == candle.ticks, f"ticks are doubled or made up: {candle}"
    return bits


@dataclass
class Run:
    """One life of the process."""

    time: VirtualTime
    pool: VirtualPool
    feeds: dict[Mode, list[ScriptedFeed]]
    cache: RedisWriter
    state: WindowState
    backlog: Backlog
    modes: ModeSwitch
    pipeline: Pipeline
    started: float
    subscription: abc.DisposableBase | None = None
    recovered: float | None = None
    completed: bool = False
    too_late: int = 0


class Simulation:
    """One hour out of a seed."""

    def __init__(self, seed: int, seconds: int = HOUR_SECONDS) -> None:
        self._length = seconds
        self._seed = seed
        self.random = Random(seed)
        self.now_us = 0
        self.trace: list[str] = []
        self.minutes: dict[Slot, Minute] = {}
        self.slices: dict[Slot, float] = {}  # when the last tick of each arrived
        self.awaiting_adoption: set[Slot] = set()
        self.redis_trouble = Trouble(self.random, lambda: self.seconds, redis.ConnectionError, 0.25)
        self.archive_trouble = Trouble(self.random, lambda: self.seconds, Unavailable, 2.0)
        self.redis = MemoryRedis(self.redis_trouble.call)
        self.archive = SimulatedArchive(lambda: self.now_ms, self.archive_trouble)
        self.archive.adopted = self._adopted
        self.adopted_at = 0.0
        self.mode = Mode.TEST
        self.run: Run | None = None
        self.ticks = self.lost = 0

    # Time

    @property
    def seconds(self) -> float:
        return (self.run.time.now_us if self.run else self.now_us) / 1_000_000

    @property
    def now_ms(self) -> int:
        return START_MS + (self.run.time.now_us if self.run else self.now_us) // 1000

    def note(self, what: str) -> None:
        self.trace.append(f"{self.seconds:10.3f} {what}")

    def play(self) -> None:
        """Let the hour pass, and compare the rows with all ticks."""
        seed_backoffs(self._seed)
        events = script(self.random, self._length)
        self.start()
        for seconds, event in events:
            self._advance(seconds)
            event(self)
        self._advance(self._length)
        self.heal()
        self.start()
        self._advance(self.seconds + 6)
        self.check()
        self.stop()
        self.check_rows_at_the_end()

    def _advance(self, seconds: float) -> None:
        self.now_us = max(self.now_us, round(seconds * 1_000_000))
        if self.run:
            self.run.time.advance_to(self.now_us)
            self._watch(self.run)

    def _watch(self, run: Run) -> None:
        if run.recovered is None and run.cache.recovered and run.cache.backlog_read:
            run.recovered = self.seconds

    # Starts and ends

    def start(self) -> None:
        if self.run:
            return
        self.note("start")
        time = VirtualTime(self.now_us)
        trouble = (self.redis_trouble, self.archive_trouble)
        pool = VirtualPool(
            time, self.random, lambda: any(each.slow or each.stuck for each in trouble) and self.random.random() < 0.5
        )
        for each in trouble:
            each.sleep = pool.sleep

        def clock() -> int:
            return (START_MS * 1000 + time.now_us) * 1000

        client = cast("redis.Redis", MemoryRedisClient(self.redis))

        def monotonic() -> float:
            return time.now_us / 1_000_000

        circuit_breaker = CircuitBreaker(monotonic=monotonic)
        cache = RedisWriter(client, ALL_SERIES, clock, 70, lambda: circuit_breaker, monotonic=monotonic)
        feeds = {mode: [ScriptedFeed(mode, exchange) for exchange in EXCHANGES] for mode in Mode}
        state, backlog, modes = WindowState(LATE_AFTER_MS), Backlog(), ModeSwitch(self.mode)
        pipeline = Pipeline(
            modes=modes.changes,
            feeds=FeedSet(feeds),
            state=state,
            backlog=backlog,
            cache=cache,
            archive=self.archive,
            rollups=SimulatedDays(self.archive_trouble),
            workers_per_exchange=2,
            loop=time,
            pool=pool,
            clock=clock,
            reconnect=Backoff(uniform=self.random.random),
        )
        run = self.run = Run(time, pool, feeds, cache, state, backlog, modes, pipeline, self.seconds)

        def broke(error: Exception) -> None:
            raise AssertionError("the pipeline broke") from error

        def completed() -> None:
            run.completed = True

        run.subscription = pipeline.observable().subscribe(on_error=broke, on_completed=completed)

    def crash(self) -> None:
        if self.run:
            self._end("crash", CRASH_SECONDS + 0.05)

    def stop(self) -> None:
        """Stop as the engine does."""
        run = self.run
        if not run:
            return
        self.note("stop")
        for number, symbol in product(range(len(EXCHANGES)), SYMBOLS):
            self.send(number, symbol, [0])  # the last ticks are emitted as well
        whole = self.redis_trouble.healthy_for(REFILLED_SECONDS) and self.archive_trouble.healthy_for(0.0)
        for feeds in run.feeds.values():
            for feed in feeds:
                feed.stop()
        run.modes.end()
        deadline = self.seconds + DRAIN_SECONDS
        while not run.completed and self.seconds < deadline:
            self._advance(self.seconds + 0.05)
        run.pipeline.give_up_drain()
        self._advance(self.seconds + 0.2)
        if whole:
            assert run.completed, "the end did not come in time"
            lacking = [slot for slot, minute in self.minutes.items() if self._lacks(slot, minute)]
            assert not lacking or run.recovered is None, f"not in the archive at the end: {lacking}"
        assert run.subscription is not None
        run.subscription.dispose()
        if run.completed:
            assert run.state.late_ticks == run.too_late, f"{run.state.late_ticks} counted of {run.too_late} too late"
        self._end("ended" if run.completed else "given up", 0.0)

    def _end(self, how: str, may_lose_seconds: float) -> None:
        run = self.run
        assert run is not None
        in_memory_only = self._settle(run, may_lose_seconds)
        self.note(f"{how}, {in_memory_only} ticks lost")
        run.pool.kill()
        self.now_us = max(self.now_us, run.time.now_us)
        self.run = None

    def _settle(self, run: Run, may_lose_seconds: float) -> int:
        """Account for the ticks that are in no store."""
        lost = 0
        ages: list[float] = []
        survivors = self._survivors()
        for slot, minute in self.minutes.items():
            best = survivors(slot, minute)
            gone = minute.required & ~best
            if gone:
                if not minute.uncertain:
                    ages += [self.seconds - at for bit, at in minute.arrived.items() if bit & gone]
                lost += gone.bit_count()
                minute.required &= best
        self.lost += lost
        if run.recovered is not None and self._cache_is_whole(run):
            late = [age for age in ages if age > may_lose_seconds]
            assert not late, f"lost though the cache was there: ticks that arrived {late} s before"
        return lost

    def _cache_is_whole(self, run: Run) -> bool:
        return (
            run.recovered is not None
            and self.redis_trouble.healthy_for(REFILLED_SECONDS)
            and self.seconds - run.recovered >= REFILLED_SECONDS
        )

    def _survivors(self) -> Callable[[Slot, Minute], int]:
        """Return what the next run will find of a minute."""
        slices: dict[Slot, int] = {}
        for slot, candle in self._stored(keys.window_key).items():
            start = Slot(slot.series, minute_start(slot.start))
            slices[start] = slices.get(start, 0) + bits_of(candle)
        closed = self._stored(keys.minutes_key)
        archived_until = codec.decode_start(self.redis.strings.get(keys.PLAIN.archived_key(LEAD)))
        still_open = minute_start(self.now_ms) - RECENT_MS - 2 * MINUTE_MS

        def survivors(slot: Slot, minute: Minute) -> int:
            sliced, row = slices.get(slot, 0), bits_of(self.archive.rows.get(slot))
            backlog = bits_of(closed.get(slot)) if slot.start >= archived_until else 0
            best = max(sliced, row, backlog, key=int.bit_count)
            cached = sliced | backlog
            if row & ~cached and cached & ~row:  # the cache was emptied since the row was written, or had let it go
                minute.uncertain = True
            if slot.start >= still_open and best & ~sliced:
                if best == row and not (sliced | backlog) & ~row:
                    self.awaiting_adoption.add(slot)
                else:
                    minute.uncertain = True
            if slot in self.awaiting_adoption and best & ~row:
                minute.uncertain = True
            return best

        return survivors

    def _adopted(self, since: int) -> None:
        self.adopted_at = self.seconds
        for slot in self.awaiting_adoption:
            lacking = self.minutes[slot].required & ~bits_of(self.archive.rows.get(slot))
            self.minutes[slot].uncertain |= slot.start < since and lacking != 0  # memory no longer held it
        self.awaiting_adoption.clear()

    # Faults

    def heal(self) -> None:
        for trouble in (self.redis_trouble, self.archive_trouble):
            if trouble.at_work:
                trouble.felt()
            trouble.down = trouble.slow = trouble.stuck = False
            trouble.bugs = trouble.lost_answers = 0
        self.note("all is well")

    def empty_cache(self) -> None:
        self.note("the cache is emptied")
        self.redis.empty()
        self.redis_trouble.felt()
        if self.run and self.run.recovered is not None:
            return
        began = self.run.started if self.run else self.seconds
        survivors = self._survivors()
        for slot, minute in self.minutes.items():
            earlier = minute.before(began)
            if earlier:
                best = survivors(slot, minute)
                self.lost += (earlier & ~best).bit_count()
                minute.required &= ~(earlier & ~best)

    def fail_feed(self, number: int) -> None:
        if self.run:
            feed = self.run.feeds[self.mode][number]
            if feed.open:
                feed.fail(OSError("gone"))

    def switch(self) -> None:
        self.mode = Mode.LIVE if self.mode == Mode.TEST else Mode.TEST
        if self.run:
            other = self.run.modes.switch(self.mode)
            assert not any(feed.open for feed in self.run.feeds[other]), "a feed of the mode that was left is open"

    # Ticks

    def send(self, number: int, symbol: str, ages_ms: list[int]) -> None:
        """Send ticks that arrive together, if the exchange is connected."""
        run = self.run
        if run is None or not run.feeds[self.mode][number].open:
            return
        series = Series(self.mode, EXCHANGES[number], symbol)
        batches = [self._tick(run, series, age, n) for n, age in enumerate(ages_ms)]
        run.feeds[self.mode][number].send(merge_all(batches))

    def _tick(self, run: Run, series: Series, age_ms: int, n: int) -> Candles:
        at = self.now_ms - age_ms
        sequence = self.now_ms * 1_000_000 + n
        if age_ms > RECENT_MS:
            run.too_late += 1
            return {Slot(series, slice_start(at)): candle_of(Tick(1.0, at, sequence))}
        minute = self._minute(Slot(series, minute_start(at)))
        if not minute.prices:
            return {}
        bit = 1 << minute.prices.pop()
        tick = Tick(float(bit), at, sequence)
        minute.ticks[bit] = tick
        minute.arrived[bit] = self.seconds
        minute.required |= bit
        self.ticks += 1
        slot = Slot(series, slice_start(at))
        self.slices[slot] = self.seconds
        return {slot: candle_of(tick)}

    def _minute(self, slot: Slot) -> Minute:
        if slot not in self.minutes:
            prices = list(range(TICKS_A_MINUTE))
            self.random.shuffle(prices)
            self.minutes[slot] = Minute(prices)
        return self.minutes[slot]

    # Promises

    def check(self) -> None:
        """Everything that holds at any moment, given that what it takes has been there for long enough."""
        if self.run:
            if self.redis_trouble.healthy_for(3.0) and self.seconds - self.run.started > 3.0:
                assert self.run.recovered is not None, "what an earlier run left was not read"
            self._check_archive(self.run)
            self._check_cache(self.run)
            self._check_memory(self.run)

    def _check_archive(self, run: Run) -> None:
        if (
            not self.archive_trouble.healthy_for(WRITTEN_SECONDS)
            or run.recovered is None
            or self.seconds - run.recovered < WRITTEN_SECONDS
        ):
            return
        for slot, minute in self.minutes.items():
            if slot in self.awaiting_adoption or minute.uncertain:
                continue
            if slot.start + MINUTE_MS + WRITTEN_SECONDS * 1000 <= self.now_ms:
                lacking = minute.required & ~bits_of(self.archive.rows.get(slot))
                lacking = lacking and lacking & minute.before(self.seconds - LATE_AFTER_MS / 1000)
                assert not lacking, f"{slot} lacks {lacking.bit_count()} ticks in the archive"

    def _check_cache(self, run: Run) -> None:
        if not self._cache_is_whole(run):
            return
        settled = self.seconds - 1.0
        stored = self._stored(keys.window_key)
        for slot, candle in run.state.all_slices().items():
            if self.slices[slot] < settled and slot.start >= minute_start(self.now_ms) - RECENT_MS:
                assert stored.get(slot) == candle, f"{slot} in the cache is {stored.get(slot)} and not {candle}"
        stored = self._stored(keys.minutes_key)
        if run.started <= self.adopted_at < settled:  # before, the archive may know more of them than memory
            for slot, candle in run.state.all_closed().items():
                if (
                    max(self.minutes[slot].arrived.values()) < settled
                    and slot.start + MINUTE_MS + LATE_AFTER_MS <= self.now_ms - 1000
                ):
                    assert stored.get(slot) == candle, f"{slot} in the cache is {stored.get(slot)} and not {candle}"
        for series, tick in run.state.all_newest().items():
            fields = self.redis.hmget(keys.latest_key(series), keys.LATEST_FIELDS)
            if tick.sequence / 1e6 - START_MS < settled * 1000:
                latest = codec.decode_latest(fields)
                of_this_run = tick.sequence / 1e6 - START_MS >= run.started * 1000
                assert latest == tick or (not of_this_run and (latest is None or latest.order > tick.order)), (
                    f"the newest of {series} in the cache is {latest} and not {tick}"
                )

    def _check_memory(self, run: Run) -> None:
        oldest = minute_start(self.now_ms - 2 * SLICE_MS) - RECENT_MS  # what is older has expired
        if run.recovered is not None and self.seconds - run.recovered > MINUTE_MS / 1000 + 1:
            # Until then what was restored may be older.
            assert all(slot.start >= oldest for slot in run.state.all_slices()), "memory keeps what is too old"
            closed = len(run.state.all_closed())
            assert closed <= len(ALL_SERIES) * ceil(RECENT_MS / MINUTE_MS + 2), f"memory keeps {closed} minutes"
        assert len(run.backlog) <= len(self.minutes)
        open_feeds = [mode for mode, feeds in run.feeds.items() if any(feed.open for feed in feeds)]
        assert open_feeds in ([], [self.mode]), f"{self.mode} runs, and open are the feeds of {open_feeds}"

    def check_rows_at_the_end(self) -> None:
        for slot in self.archive.rows:
            assert slot in self.minutes, f"a row without ticks that were sent: {slot}"
        for slot, minute in self.minutes.items():
            row = self.archive.rows.get(slot)
            bits = bits_of(row)
            assert not bits & ~sum(minute.ticks), f"{slot} has ticks that were not sent"
            assert not self._lacks(slot, minute), f"{slot} lacks ticks at the end"
            if row is not None:
                expected = candle_of_ticks([tick for bit, tick in minute.ticks.items() if bit & bits])
                assert _of_row(row) == _of_row(expected), f"{slot} is {row} and not {expected}"

    def _lacks(self, slot: Slot, minute: Minute) -> bool:
        """Whether the archive lacks ticks that it must have."""
        excused = minute.uncertain or slot in self.awaiting_adoption
        return not excused and minute.required & ~bits_of(self.archive.rows.get(slot)) != 0

    def _stored(self, key_of: Callable[[Series], str]) -> Candles:
        return {
            Slot(series, start): candle
            for series in ALL_SERIES
            for start, candle in codec.decode_slots(self.redis.sorted_sets.get(key_of(series), {}).items()).items()
        }


Event = tuple[float, Callable[[Simulation], Any]]


def script(random: Random, length: int) -> list[Event]:
    """Return what happens in `length` seconds, in order."""

    def moments(mean: float) -> Iterable[float]:
        at = random.expovariate(1 / mean)
        while at < length - 10:
            yield at
            at += random.expovariate(1 / mean)

    events: list[Event] = []
    for begin in moments(2.0):
        events.append((begin, _sending(random)))
    for begin in moments(60):
        events += _burst(random, begin)
    for begin in moments(200):
        events += _trouble(random, begin, "redis")
    for begin in moments(200):
        events += _trouble(random, begin, "archive")
    for begin in moments(300):
        events.append((begin, Simulation.empty_cache))
    for begin in moments(500):
        end = random.choice((Simulation.crash, Simulation.crash, Simulation.stop))
        events += [(begin, end), (begin + random.choice((0, 1, 10, 100)) * random.random(), Simulation.start)]
    for begin in moments(120):
        events.append((begin, partial(Simulation.fail_feed, number=random.randrange(len(EXCHANGES)))))
    for begin in moments(300):
        events.append((begin, Simulation.switch))
    for number in range(length // 60):
        events += [(number * 60 + WRITTEN_SECONDS + 0.05, Simulation.check), (number * 60 + 37.5, Simulation.check)]
    return sorted(events, key=lambda event: event[0])


def _burst(random: Random, begin: float) -> list[Event]:
    """More than a partition can write while it is slow, in many slices of one series."""
    number, symbol = random.randrange(len(EXCHANGES)), random.choice(SYMBOLS)
    longest = random.choice((500, 5000, 20_000))
    return [
        (begin + n * 0.03, partial(Simulation.send, number=number, symbol=symbol, ages_ms=[random.randrange(longest)]))
        for n in range(12)
    ]


def _sending(random: Random) -> Callable[[Simulation], None]:
    number, symbol = random.randrange(len(EXCHANGES)), random.choice(SYMBOLS)
    ages = [_age(random) for _ in range(random.choice((1, 1, 1, 2, 5)))]
    return partial(Simulation.send, number=number, symbol=symbol, ages_ms=ages)


def _age(random: Random) -> int:
    """Mostly of a moment ago; late, and ahead of the clock; too late."""
    longest = random.choices((200, LATE_AFTER_MS, 60_000, RECENT_MS - 1000, -5000), (80, 10, 5, 2, 3))[0]
    if random.random() < 0.003:
        return RECENT_MS + MINUTE_MS + random.randrange(1000, 600_000)
    return round(longest * random.random())


def _trouble(random: Random, begin: float, store: str) -> list[Event]:
    kind = random.choice(("down", "down", "slow", "stuck", "bugs", "lost_answers"))
    value: object = random.randint(1, 3) if kind in ("bugs", "lost_answers") else True

    def set_to(value: object) -> Callable[[Simulation], None]:
        def change(world: Simulation) -> None:
            trouble: Trouble = getattr(world, f"{store}_trouble")
            trouble.felt()
            setattr(trouble, kind, value)
            world.note(f"{store}: {kind} is {value}")

        return change

    longest = 30 if kind in ("slow", "stuck") else 1500 if store == "archive" else 200  # threads take real time
    seconds = random.choice((1, 10, 30, longest)) * random.random()
    end = begin + seconds
    events: list[Event] = []
    if kind == "slow":
        events = [event for n in range(3) for event in _burst(random, begin + n / 2)]
    after = WRITTEN_SECONDS if store == "archive" else REFILLED_SECONDS
    return [
        *events,
        (begin, set_to(value)),
        (end, set_to(0 if kind in ("bugs", "lost_answers") else False)),
        (end + after + 0.01, Simulation.check),
    ]
