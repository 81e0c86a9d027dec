"""Several ingest processes on one Redis and one archive in virtual time: owners and standbys that change at random.

Real: the pipelines with their window states, backlogs and ownership, and the cache on a Redis of memory. Simulated from
one seed: what each process believes to own, feeds, time, and faults. Processes are killed, frozen and cut off from
Redis, each with a warm standby; shards move between living processes; two own a shard at once, or nobody for a while.
Each exchange sends every process the same ticks, and prices are powers of two: a total says which ticks it consists of.
"""

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any, cast

import redis

from marketflow.errors import Unavailable
from marketflow.model import Mode, Series, Slot, Tick, candle_of, minute_start, slice_start
from marketflow.pipeline.backlog import Backlog
from marketflow.pipeline.fan_in import FeedSet, ModeSwitch
from marketflow.pipeline.graph import Pipeline
from marketflow.pipeline.shard_ownership import Ownership
from marketflow.pipeline.state import WindowState
from marketflow.settings.shards import LEAD, ShardMap
from marketflow.stores.cache_limits import SLICES_HELD
from marketflow.stores.circuit_breaker import CircuitBreaker
from marketflow.stores.redis.writer import RedisWriter
from marketflow.tasks import Backoff
from tests.pipeline.virtual_time import VirtualPool, VirtualTime
from tests.pipeline.world import START_MS, FakeArchive, FakeDays, ScriptedFeed
from tests.support.memory_redis import MemoryRedis, MemoryRedisClient

EXCHANGES = ("exchange1", "exchange2")
SHARDS = ShardMap({"exchange1": 2, "exchange2": 1})
SYMBOLS = ("BTCUSDT", "ETHUSDT")
ALL_SERIES = [Series(Mode.LIVE, exchange, symbol) for exchange in EXCHANGES for symbol in SYMBOLS]

WINDOW_MS = 12_000
"""Length of a minute, so that many end while something is wrong."""

LATE_MS = 500

TICKS_A_MINUTE = 50  # of a series: their prices must add up exactly
STEP_US = 40_000

TAKEOVER_SECONDS = 1.25
"""How long after the death of an owner its standby owns its shards."""

WARM_SECONDS = 1.0
"""How long a process is connected before it may be the next owner."""


class Process:
    """One life of an ingest process; it owns what the test says.

    Args:
        number: which process.
        group: the others, with their stores.
        now_us: when it begins.
    """

    def __init__(self, number: int, group: "Group", now_us: int) -> None:
        self.number = number
        self.started_us = now_us
        self.time = VirtualTime(now_us)
        self.frozen = self.cut_off = False
        self._waiting: list[Callable[[], None]] = []
        self.pool = VirtualPool(self.time, group.random, lambda: False)
        server = MemoryRedis(self._call)
        server.strings, server.hashes, server.sorted_sets = (
            group.stored.strings,
            group.stored.hashes,
            group.stored.sorted_sets,
        )
        self.ownership = Ownership(SHARDS, ())
        self.modes = ModeSwitch(Mode.LIVE)
        self.feeds = {exchange: ScriptedFeed(Mode.LIVE, exchange) for exchange in EXCHANGES}
        self.state = WindowState(LATE_MS, minute_ms=group.minute_ms, slices_held=group.slices_held)
        self.completed = False

        def clock() -> int:
            return ((START_MS + group.step_ms) * 1000 + self.time.now_us) * 1000

        def monotonic() -> float:
            return self.time.now_us / 1_000_000

        client = cast("redis.Redis", MemoryRedisClient(server))
        circuit_breaker = CircuitBreaker(monotonic=monotonic)
        cache = RedisWriter(client, ALL_SERIES, clock, 70, lambda: circuit_breaker, monotonic=monotonic)
        self.cache = cache
        self.days = FakeDays()
        self.pipeline = Pipeline(
            modes=self.modes.changes,
            feeds=FeedSet({Mode.TEST: [], Mode.LIVE: list(self.feeds.values())}),
            state=self.state,
            backlog=Backlog(),
            cache=cache,
            archive=group.archive,
            rollups=self.days,
            workers_per_exchange=2,
            loop=self.time,
            pool=self.pool,
            clock=clock,
            reconnect=Backoff(uniform=group.random.random),
            ownership=self.ownership,
            series=lambda: ALL_SERIES,
            read_again=cache.between,
        )
        self.pipeline.log.recovery_failed = group.failed_reads.append  # type: ignore[assignment, method-assign]
        self._subscription = self.pipeline.observable().subscribe(on_error=self._broke, on_completed=self._complete)

    def _call(self, command: Callable[[], Any]) -> Any:
        if self.cut_off:
            raise redis.ConnectionError("cut off")
        return command()

    def _broke(self, error: Exception) -> None:
        raise AssertionError(f"the pipeline of process {self.number} broke") from error

    def _complete(self) -> None:
        self.completed = True

    def warm_for(self, seconds: float) -> bool:
        """Whether it runs, and has been connected for so long."""
        return not self.frozen and self.time.now_us - self.started_us >= seconds * 1e6

    def advance_to(self, now_us: int) -> None:
        if not self.frozen:
            self.time.advance_to(now_us)

    def receive(self, series: Series, tick: Tick) -> None:
        """Take a tick; one that is frozen finds it in the buffer of its socket."""
        if self.frozen:
            self._waiting.append(partial(self.receive, series, tick))
        else:
            received = tick._replace(sequence=(START_MS * 1000 + self.time.now_us) * 1000)
            self.feeds[series.exchange].send({Slot(series, slice_start(tick.at)): candle_of(received)})

    def thaw(self, now_us: int) -> None:
        self.frozen = False
        self.time.now_us = max(self.time.now_us, now_us)
        waiting, self._waiting = self._waiting, []
        for receive in waiting:
            receive()

    def kill(self) -> None:
        self._subscription.dispose()
        self.pool.kill()

    def stop(self) -> None:
        for feed in self.feeds.values():
            feed.stop()
        self.modes.end()


class Group:
    """Some minutes of several processes, out of a seed."""

    minute_ms = WINDOW_MS
    slices_held = SLICES_HELD
    step_ms = 0
    """By how much all clocks have been set."""

    def __init__(self, seed: int, count: int, seconds: int) -> None:
        self.random = Random(seed)
        self.now_us = 0
        self.stored = MemoryRedis()
        self.archive = FakeArchive(lambda: self.now_ms)
        self.sent: dict[Slot, dict[int, Tick]] = {}
        self.trace: list[str] = []
        self.failed_reads: list[Exception] = []
        self.takeovers = 0
        self._prices: dict[Slot, list[int]] = {}
        self._seconds = seconds
        self.processes: list[Process | None] = [Process(number, self, 0) for number in range(count)]
        self.owner: dict[str, int] = {name: number % count for number, name in enumerate((*SHARDS.names, LEAD))}
        self._later: list[tuple[int, Callable[[], None]]] = []
        self._believe()

    @property
    def now_ms(self) -> int:
        return START_MS + self.step_ms + self.now_us // 1000

    def note(self, what: str) -> None:
        self.trace.append(f"{self.now_us / 1e6:9.2f} {what}")

    def play(self) -> None:
        """Let the time pass, with one process out of order at a time; end all, and compare the rows."""
        next_fault = 8.0
        while self.now_us < self._seconds * 1e6:
            self._step()
            if self.now_us >= next_fault * 1e6 and not self._later:
                self.random.choice((self.kill, self.freeze, self.cut_off, self.move, self.share))()
                next_fault = self.now_us / 1e6 + self.random.uniform(0.5, 5)
        while self._later:
            self._step()
        for process in filter(None, self.processes):
            process.stop()
        for _ in range(100):
            self._step(sends=False)
        assert all(process is not None and process.completed for process in self.processes)
        self.compare()

    def compare(self) -> None:
        # Any other error would be repeated in vain.
        assert all(isinstance(error, Unavailable) for error in self.failed_reads), self.failed_reads
        assert self.archive.rows.keys() == self.sent.keys()
        for slot, ticks in self.sent.items():
            row = self.archive.rows[slot]
            bits = int(row.total)
            assert bits.bit_count() == row.ticks, f"{slot} has a tick twice: {row}"
            lacking = sum(ticks) & ~bits
            times = [tick.at - START_MS for bit, tick in ticks.items() if bit & lacking]
            assert not lacking, f"{slot} lacks those of {times}"
            assert (row.high, row.low) == (max(ticks), min(ticks))
            assert row.ticks == len(ticks)

    def _step(self, sends: bool = True) -> None:
        self.now_us += STEP_US
        for due, act in [each for each in self._later if each[0] <= self.now_us]:
            self._later.remove((due, act))
            act()
        for process in filter(None, self.processes):
            process.advance_to(self.now_us)
        if sends and self.random.random() < 0.3:
            self._send()

    def _send(self) -> None:
        series = self.random.choice(ALL_SERIES)
        late = self.random.choices((100, 1500), (9, 1))[0]
        self._send_tick(series, self.now_ms - self.random.randrange(late))

    def _send_tick(self, series: Series, at: int) -> None:
        slot = Slot(series, minute_start(at, self.minute_ms))
        prices = self._prices.setdefault(slot, self.random.sample(range(TICKS_A_MINUTE), TICKS_A_MINUTE))
        if at < START_MS or not prices:
            return
        tick = Tick(float(1 << prices.pop()), at, 0)
        self.sent.setdefault(slot, {})[int(tick.price)] = tick
        for process in filter(None, self.processes):
            process.receive(series, tick)

    # What processes believe to own

    def _believe(self, *numbers: int) -> None:
        """Have processes learn what they own; all that can, without numbers."""
        for number, process in enumerate(self.processes):
            if (
                process is not None
                and not process.frozen
                and not process.cut_off
                and (not numbers or number in numbers)
            ):
                process.ownership.take({name for name, owner in self.owner.items() if owner == number})

    def _in(self, seconds: float, act: Callable[[], None]) -> None:
        self._later.append((self.now_us + round(seconds * 1e6), act))

    def _replace(self, number: int) -> None:
        """Give what a process owned to others that are warm."""
        others = [
            each
            for each, process in enumerate(self.processes)
            if each != number and process is not None and process.warm_for(WARM_SECONDS)
        ]
        for name, owner in self.owner.items():
            if owner == number:
                self.owner[name] = self.random.choice(others)
                self.takeovers += 1
        self._believe()

    def _victim(self) -> tuple[int, Process]:
        number = self.random.randrange(len(self.processes))
        process = self.processes[number]
        assert process is not None
        return number, process

    # Faults

    def kill(self) -> None:
        number, process = self._victim()
        self.note(f"kill {number}")
        process.kill()
        self.processes[number] = None
        self._in(TAKEOVER_SECONDS, partial(self._replace, number))
        self._in(self.random.uniform(1.5, 3), partial(self._start, number))
        self._in(4.2, lambda: None)  # it is warm before the next fault

    def _start(self, number: int) -> None:
        self.note(f"start {number}")
        self.processes[number] = Process(number, self, self.now_us)

    def freeze(self) -> None:
        number, process = self._victim()
        seconds = self.random.choice((0.5, 3.0, 4.5))
        self.note(f"freeze {number} for {seconds} s")
        process.frozen = True

        def thaw() -> None:
            process.thaw(self.now_us)
            self._in(0.25, partial(self._believe, number))

        if seconds > TAKEOVER_SECONDS:
            self._in(TAKEOVER_SECONDS, partial(self._replace, number))
        self._in(seconds, thaw)
        self._in(seconds + 2, lambda: None)

    def cut_off(self) -> None:
        number, process = self._victim()
        seconds = self.random.uniform(1.5, 8)
        self.note(f"cut off {number} for {seconds:.1f} s")
        process.cut_off = True

        def heal() -> None:
            process.cut_off = False
            self._in(0.25, partial(self._believe, number))

        self._in(TAKEOVER_SECONDS, partial(self._replace, number))
        self._in(seconds, heal)
        self._in(seconds + 2, lambda: None)

    def move(self) -> None:
        """Move shards between living processes, each of which learns it at its next call."""
        for name in self.owner:
            if self.random.random() < 0.5:
                self.owner[name] = self.random.randrange(len(self.processes))
        self.note(f"move {self.owner}")
        for number in range(len(self.processes)):
            self._in(self.random.random() / 4, partial(self._believe, number))

    def share(self) -> None:
        """Two processes own the same shards for some seconds."""
        number, process = self._victim()
        self.note(f"{number} owns everything as well")
        process.ownership.take((*SHARDS.names, LEAD))
        self._in(self.random.uniform(0.5, 5), partial(self._believe, number))
