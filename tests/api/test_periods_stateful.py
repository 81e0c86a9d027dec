"""Stateful test of periods and candles: memory, cache, codecs and archive against the list of ticks.

The real memory, cache and reader on a Redis in memory, driven as the pipeline drives them. SEEDS=5000 in the
environment sets the number of histories.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import pytest
import redis
import redis.asyncio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from marketflow.api.problems import NoData
from marketflow.api.queries.boundaries import INTERVALS, Grid
from marketflow.api.queries.candles import CandleRequest
from marketflow.api.queries.prices import ObservedPrice, PeriodSummary, PriceQueries
from marketflow.clock import NANOSECONDS_PER_MS
from marketflow.errors import Unavailable
from marketflow.model import (
    MINUTE_MS,
    Candle,
    Candles,
    Mode,
    Series,
    Slot,
    Tick,
    candle_of,
    merge_all,
    minute_start,
    more_complete,
    slice_start,
)
from marketflow.pipeline.backlog import Backlog
from marketflow.pipeline.state import WindowState
from marketflow.runtime.state_reader import StateReader
from marketflow.stores.cache_limits import MINUTES_KEPT_MS, RECENT_MS
from marketflow.stores.ports import CacheReader
from marketflow.stores.redis.reader import RedisReader
from marketflow.stores.redis.writer import RedisWriter
from tests.api.world import EXCHANGES, NOW, MemoryArchive
from tests.support.memory_redis import AsyncMemoryRedisClient, MemoryRedis, MemoryRedisClient
from tests.support.oracle import candle_of_ticks
from tests.support.seeds import seeds

ALL_SERIES = [Series(Mode.TEST, exchange, "BTCUSDT") for exchange in EXCHANGES]
AHEAD_MS = 5000
LATE_AFTER_MS = 2000
SECOND_MS = 1000

# Whole prices, so that totals are exact; few of them, so that extremes are often tied.
prices = st.integers(1, 5).map(float)
# Many ages are whole seconds, so that they lie on boundaries of periods.
ages = st.one_of(
    st.integers(0, RECENT_MS // SECOND_MS - 1).map(lambda seconds: seconds * SECOND_MS),
    st.integers(-AHEAD_MS, 300),
    st.integers(0, 5000),
    st.integers(0, MINUTE_MS),
    st.integers(0, RECENT_MS - 1),
)
pauses = st.one_of(
    st.integers(1, 5000),
    st.integers(1, RECENT_MS // SECOND_MS).map(lambda seconds: seconds * SECOND_MS),
    st.sampled_from([MINUTE_MS - 1, MINUTE_MS, MINUTE_MS + 1, RECENT_MS]),
    st.integers(1, 2 * RECENT_MS),
    st.integers(1, 26 * 3600 * SECOND_MS),
)
periods = st.one_of(
    st.none(),
    st.integers(1, 10),
    st.integers(1, 2 * RECENT_MS // SECOND_MS),
    st.integers(RECENT_MS // SECOND_MS - 61, RECENT_MS // SECOND_MS + 61),
    st.integers(1, 26 * 3600),
    st.integers(1, 366 * 86_400),
).map(lambda seconds: None if seconds is None else seconds * SECOND_MS)


class Periods(RuleBasedStateMachine):
    """A market and its stores."""

    @initialize(now=st.integers(NOW, NOW + 2 * MINUTE_MS), minute_ms=st.sampled_from([MINUTE_MS, 20_000, 1000]))
    def begin(self, now: int, minute_ms: int) -> None:
        self.now = now
        self.minute_ms = minute_ms
        self.ticks: dict[Series, list[Tick]] = {one: [] for one in ALL_SERIES}
        self.sent = 0
        self.batch: list[Candles] = []
        self.server = MemoryRedis()
        self.archive = MemoryArchive()
        self.emptied = False
        self.start()

    def clock(self) -> int:
        return self.now * NANOSECONDS_PER_MS

    def start(self) -> None:
        client = cast("redis.Redis", MemoryRedisClient(self.server))
        self.state = WindowState(LATE_AFTER_MS, AHEAD_MS, self.minute_ms)
        self.backlog = Backlog()
        self.cache = RedisWriter(client, ALL_SERIES, self.clock, 70)
        self.state.restore(self.cache.recover())
        self.backlog.add(self.cache.unarchived())

    def beat(self) -> None:
        """Do what the pipeline does every 100 ms."""
        self.cache.put_slices(self.state.absorb(merge_all(self.batch), self.now))
        self.batch = []
        closed = self.state.take_closed(self.now)
        self.state.expire(self.now)
        self.backlog.add(closed)
        self.cache.put_minutes(closed)
        if not self.archive.away:
            self.write()
        if self.cache.needs_refill():
            self.cache.put_newest(self.state.all_newest())
            self.cache.put_slices(self.state.all_slices())
            self.cache.put_minutes(self.backlog.rows() | self.state.all_closed())

    def write(self) -> None:
        if (since := self.state.lacks_since(self.now)) is not None:
            self.state.adopt({slot: row for slot, row in self.archive.minutes.items() if slot.start >= since}, since)
        rows = self.backlog.rows()
        for slot, row in rows.items():
            self.archive.minutes[slot] = more_complete(row, self.archive.minutes.get(slot, row))
        self.backlog.confirm(rows)
        self.cache.mark_archived(self.backlog.complete_until(self.now))

    # Events

    @rule(one=st.sampled_from(ALL_SERIES), trades=st.lists(st.tuples(prices, ages), min_size=1, max_size=6))
    def trade(self, one: Series, trades: list[tuple[float, int]]) -> None:
        for price, age in trades:
            self.sent += 1
            tick = Tick(price, self.now - age, self.clock() + self.sent)
            self.ticks[one].append(tick)
            batch = {Slot(one, slice_start(tick.at)): candle_of(tick)}
            self.batch.append(batch)
            self.cache.put_newest(self.state.newest_of(self.state.observe(batch)))

    @rule(pause=pauses)
    def wait(self, pause: int) -> None:
        self.beat()
        self.now += pause
        self.beat()

    @rule()
    def empty_cache(self) -> None:
        self.beat()
        self.server.empty()
        self.emptied = True
        self.beat()

    @rule()
    def begin_archive_outage(self) -> None:
        self.archive.away = True

    @precondition(lambda self: self.archive.away)
    @rule()
    def end_archive_outage(self) -> None:
        self.archive.away = False

    @rule()
    def crash_and_start(self) -> None:
        self.beat()
        self.start()

    # Queries

    @rule(
        lengths=st.lists(periods, min_size=1, max_size=8),
        of_series=st.lists(st.sampled_from(ALL_SERIES), min_size=1, unique=True),
    )
    def query_periods(self, lengths: list[int | None], of_series: list[Series]) -> None:
        self.beat()
        # Also periods with a boundary at a tick or next to it.
        edges = {
            -(-(self.now - tick.at) // SECOND_MS) * SECOND_MS for one in of_series for tick in self.ticks[one][-8:]
        }
        for period in [*lengths, *(edge for edge in sorted(edges) if edge > 0)]:
            self.query_period(period, of_series)

    def query_period(self, period: int | None, of_series: list[Series]) -> None:
        for reader in (StateReader(self.state), self.redis_reader()):
            if self.archive.away and (period is None or period > RECENT_MS):
                if isinstance(reader, StateReader) or self.emptied or period is None:
                    continue  # older minutes are unavailable
                kept = max(minute_start(self.now - period), self.oldest_kept())
                cached = [tick.at for one in of_series for tick in self.within(one, kept)]
                # From the first cached minute: what was before is unknown.
                self.compare(reader, of_series, period, minute_start(min(cached, default=kept)))
            elif period is None:
                self.compare(reader, of_series, None, 0)
            else:
                exact = self.now - period
                self.compare(reader, of_series, period, exact if period <= RECENT_MS else minute_start(exact))

    def compare(self, reader: CacheReader, of_series: Sequence[Series], period: int | None, since: int) -> None:
        expected = [(one, tick) for one in of_series for tick in self.within(one, since)]
        try:
            summary = asyncio.run(self.prices(reader).summary(of_series, period))
        except (NoData, Unavailable):
            assert not expected
            return
        # The ticks do not determine the version.
        candles = {one: msgspec.structs.replace(candle, version=1) for one, candle in summary.candles.items()}
        assert summary._replace(candles=candles) == self.summary(of_series, expected, period, since)
        high, low = max(tick.price for _, tick in expected), min(tick.price for _, tick in expected)
        assert summary.highest() == self.first(of_series, expected, high)
        assert summary.lowest() == self.first(of_series, expected, low)
        assert summary.whole().average == sum(tick.price for _, tick in expected) / len(expected)

    @rule(
        grid=st.sampled_from([*INTERVALS.values()]),
        since=st.one_of(st.none(), ages, st.integers(0, 26 * 3600 * SECOND_MS)),
        until=st.one_of(st.none(), ages, st.integers(0, 26 * 3600 * SECOND_MS)),
        limit=st.sampled_from([1, 2, 3, 1000]),
        of_series=st.lists(st.sampled_from(ALL_SERIES), min_size=1, unique=True),
    )
    def query_candles(
        self, grid: Grid, since: int | None, until: int | None, limit: int, of_series: list[Series]
    ) -> None:
        """Query the range from `since` ago to `until` ago."""
        self.beat()
        begin, end = (None if ago is None else self.now - ago for ago in (since, until))
        if begin is not None and end is not None and begin >= end:
            begin, end = end, begin + 1
        request = CandleRequest(grid, begin, end, limit)
        for reader in (StateReader(self.state), self.redis_reader()):
            known_from = 0
            if self.archive.away:
                if begin is not None or isinstance(reader, StateReader) or self.emptied:
                    continue  # older minutes are unavailable
                known_from = grid.at_or_after(self.oldest_kept())
            expected = self.candles(request, of_series, known_from)
            try:
                chart = asyncio.run(self.prices(reader).candles(of_series, request))
            except Unavailable:
                assert not expected
                assert self.archive.away
                continue
            found = [(start, *fields_of(candle)) for start, candle in chart.candles.items()]
            assert found == expected
            assert [start for start, *_ in found if chart.closed(start)] == [
                start
                for start, *_ in found
                if chart.known_from <= start and grid.end_of(start) <= self.now - LATE_AFTER_MS
            ]

    def candles(self, request: CandleRequest, of_series: Sequence[Series], known_from: int) -> list[tuple[Any, ...]]:
        """Return the ticks of all series folded on the grid, each candle with its opening time."""
        grid, since, until, limit, _ = request
        by_start: dict[int, list[Tick]] = {}
        for one in of_series:
            for tick in self.ticks[one]:
                start = grid.start_of(tick.at)
                if max(since or 0, known_from) <= start and (until is None or start < until):
                    by_start.setdefault(start, []).append(tick)
        starts = sorted(by_start)
        chosen = starts[-limit:] if since is None else starts[:limit]
        return [(start, *fields_of(candle_of_ticks(by_start[start]))) for start in chosen]

    @rule(of_series=st.lists(st.sampled_from(ALL_SERIES), min_size=1, unique=True))
    def query_latest(self, of_series: list[Series]) -> None:
        self.beat()
        last = [(one, max(self.ticks[one], key=lambda tick: tick.order)) for one in of_series if self.ticks[one]]
        newest = [(tick.order_of_receipt, one, tick) for one, tick in last]
        for reader in (StateReader(self.state), self.redis_reader()):
            try:
                quote = asyncio.run(self.prices(reader).latest(of_series))
            except (NoData, Unavailable):
                assert not newest or self.archive.away
                continue
            _, one, tick = max(newest)
            assert quote == ObservedPrice(one, tick.price, tick.at)

    @invariant()
    def memory_is_bounded(self) -> None:
        assert len(self.state.all_slices()) <= sum(map(len, self.ticks.values()))

    # Expected values

    def within(self, one: Series, since: int) -> list[Tick]:
        """Return the ticks since then; a slice counts if its last tick does."""
        last: dict[int, int] = {}
        for tick in self.ticks[one]:
            last[slice_start(tick.at)] = max(tick.at, last.get(slice_start(tick.at), tick.at))
        return [tick for tick in self.ticks[one] if last[slice_start(tick.at)] >= since]

    def summary(
        self, of_series: Sequence[Series], ticks: Sequence[tuple[Series, Tick]], period: int | None, since: int
    ) -> Any:
        return PeriodSummary(
            {one: candle for one in of_series if (candle := candle_of_series(one, ticks)) is not None},
            min(tick.at for _, tick in ticks) if period is None else since,
            max(self.now, *(tick.at for _, tick in ticks), 0),
        )

    def first(self, of_series: Sequence[Series], ticks: Sequence[tuple[Series, Tick]], price: float) -> ObservedPrice:
        at, _, one = min((tick.at, of_series.index(one), one) for one, tick in ticks if tick.price == price)
        return ObservedPrice(one, price, at)

    def oldest_kept(self) -> int:
        return minute_start(self.now - MINUTES_KEPT_MS)

    def prices(self, reader: CacheReader) -> PriceQueries:
        return PriceQueries(reader, self.archive, self.clock, AHEAD_MS, LATE_AFTER_MS)

    def redis_reader(self) -> RedisReader:
        client = cast("redis.asyncio.Redis", AsyncMemoryRedisClient(self.server))
        return RedisReader(client, self.clock, LATE_AFTER_MS + AHEAD_MS, self.minute_ms)


def fields_of(candle: Candle) -> tuple[Any, ...]:
    """Return the compared fields of a candle."""
    return candle.open, candle.high, candle.low, candle.close, candle.average, candle.ticks


def candle_of_series(one: Series, ticks: Sequence[tuple[Series, Tick]]) -> Any:
    own = [tick for other, tick in ticks if other == one]
    return candle_of_ticks(own) if own else None


TestPeriods = Periods.TestCase
TestPeriods.settings = settings(max_examples=len(seeds(150)), stateful_step_count=30, derandomize=True, database=None)
pytest.mark.long(TestPeriods)
