"""Price queries with both stores available, with an empty one, and during outages."""

import asyncio
from collections.abc import Sequence

import pytest

from marketflow.api.problems import NoData
from marketflow.api.queries.prices import ObservedPrice, PeriodSummary, PriceQueries
from marketflow.clock import NANOSECONDS_PER_MS
from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS, Candle, Mode, Series, Slot, Tick, candle_of, minute_start
from marketflow.stores.cache_limits import MINUTES_KEPT_MS, RECENT_MS
from tests.api.world import EXCHANGES, NOW, MemoryArchive, World, series

ONE = [series()]
EVERY = [series(exchange) for exchange in EXCHANGES]
DAY_MS = 24 * 60 * MINUTE_MS


def prices_of(world: World) -> PriceQueries:
    return PriceQueries(world.cache, world.archive, lambda: world.now * NANOSECONDS_PER_MS)


def latest(world: World, of: Sequence[Series] = ONE) -> ObservedPrice:
    return asyncio.run(prices_of(world).latest(of))


def summary(world: World, period: int | None, of: Sequence[Series] = ONE) -> PeriodSummary:
    return asyncio.run(prices_of(world).summary(of, period))


@pytest.fixture
def world() -> World:
    """Ticks of two days, two hours, ten minutes, two minutes and one second ago, with falling prices."""
    world = World()
    for price, age_ms in ((50.0, 2 * DAY_MS), (40.0, 2 * 3_600_000), (30.0, 600_000), (20.0, 120_000), (10.0, 1_000)):
        world.trade(price, age_ms)
    for slot in [slot for slot in world.cache.minutes if slot.start + MINUTE_MS <= NOW - MINUTES_KEPT_MS]:
        del world.cache.minutes[slot]
    return world


def test_latest_is_newest_by_event_time() -> None:
    world = World()
    world.trade(1.0, 300, series("exchange1"))
    world.trade(2.0, 100, series("Exchange2"))
    world.trade(3.0, 200, series("exchange3"))
    assert latest(world, EVERY) == ObservedPrice(series("Exchange2"), 2.0, NOW - 100)


def test_clock_ahead_does_not_win_newest_price() -> None:
    world = World()
    received = NOW * NANOSECONDS_PER_MS
    ahead, later = Tick(1.0, NOW + 4_900, received), Tick(2.0, NOW + 10, received + 20 * NANOSECONDS_PER_MS)
    world.cache.newest_ticks = {series("exchange1"): ahead, series("Exchange2"): later}
    assert latest(world, EVERY) == ObservedPrice(series("Exchange2"), 2.0, NOW + 10)


def test_later_arrival_wins_within_one_millisecond() -> None:
    world = World()
    world.cache.newest_ticks = {series("exchange1"): Tick(1.0, NOW, 8), series("Exchange2"): Tick(2.0, NOW, 7)}
    assert latest(world, EVERY).price == 1.0


def test_latest_from_cache_reads_no_archive(world: World) -> None:
    assert latest(world, EVERY).price == 10.0
    assert world.archive.queries == 0


@pytest.mark.parametrize("cache_away", [False, True])
def test_latest_falls_back_to_close_of_last_minute(world: World, *, cache_away: bool) -> None:
    world.cache.newest_ticks.clear()
    world.cache.away = cache_away
    assert latest(world, EVERY) == ObservedPrice(series(), 20.0, NOW - 120_000)


def test_archive_outage_keeps_latest_price(world: World) -> None:
    world.archive.away = True
    assert latest(world).price == 10.0


@pytest.mark.parametrize(("cache_away", "archive_away"), [(True, True), (False, True), (True, False)])
def test_empty_result_during_outage_is_unavailable(*, cache_away: bool, archive_away: bool) -> None:
    world = World()
    world.cache.away, world.archive.away = cache_away, archive_away
    with pytest.raises(Unavailable):
        latest(world)
    for period in (DAY_MS, None):
        with pytest.raises(Unavailable):
            summary(world, period)


def test_empty_result_of_all_stores_is_no_data() -> None:
    world = World()
    with pytest.raises(NoData):
        latest(world)
    for period in (1_000, DAY_MS, None):
        with pytest.raises(NoData):
            summary(world, period)


def test_recent_period_from_cache_reads_no_archive(world: World) -> None:
    world.archive.away = True
    assert summary(world, RECENT_MS).whole().ticks == 2
    with pytest.raises(NoData):
        summary(world, 999)
    assert world.archive.queries == 0


@pytest.mark.parametrize(("period", "high"), [(600_000, 30.0), (DAY_MS, 40.0), (3 * DAY_MS, 50.0)])
def test_long_period_begins_at_minute_of_its_boundary(world: World, period: int, high: float) -> None:
    found = summary(world, period)
    assert (found.since, found.until) == (minute_start(NOW - period), NOW)
    assert (found.highest().price, found.lowest().price) == (high, 10.0)


def test_all_time_summary_begins_at_first_tick(world: World) -> None:
    found = summary(world, None, EVERY)
    assert (found.since, found.until, found.whole().ticks) == (NOW - 2 * DAY_MS, NOW, 5)


@pytest.mark.parametrize(
    ("period", "since", "ticks"),
    [
        (600_000, minute_start(NOW - 600_000), 3),
        (3 * DAY_MS, minute_start(NOW - 2 * 3_600_000), 4),
        (None, NOW - 2 * 3_600_000, 4),
    ],
)
def test_archive_outage_shortens_period_to_cached_minutes(
    world: World, period: int | None, since: int, ticks: int
) -> None:
    world.archive.away = True
    found = summary(world, period)
    assert (found.since, found.until, found.whole().ticks) == (since, NOW, ticks)


@pytest.mark.parametrize(
    ("period", "since", "ticks"),
    [
        (121_000, minute_start(NOW - 121_000), 1),
        (600_000, minute_start(NOW - 600_000), 2),
        (None, NOW - 2 * DAY_MS, 4),
    ],
)
def test_redis_outage_ends_period_with_last_row(world: World, period: int | None, since: int, ticks: int) -> None:
    world.cache.away = True
    found = summary(world, period)
    assert (found.since, found.until) == (since, minute_start(NOW - 120_000) + MINUTE_MS)
    assert found.whole().ticks == ticks


def test_redis_outage_uses_row_of_running_minute(world: World) -> None:
    world.cache.away = True
    world.archive.minutes[Slot(series(), minute_start(NOW))] = candle_of(Tick(60.0, NOW - 9_000, 1))
    assert summary(world, 10_000) == PeriodSummary(
        {series(): candle_of(Tick(60.0, NOW - 9_000, 1))}, minute_start(NOW), NOW
    )


@pytest.mark.parametrize("period", [1_000, 600_000, None])
def test_outage_of_both_stores_makes_period_unavailable(world: World, period: int | None) -> None:
    world.cache.away = world.archive.away = True
    with pytest.raises(Unavailable):
        summary(world, period)


def test_earliest_of_equal_extremes_counts() -> None:
    world = World()
    for age_ms, exchange in ((300, "exchange1"), (500, "Exchange2"), (400, "exchange3")):
        world.trade(7.0, age_ms, series(exchange))
    found = summary(world, 1_000, EVERY)
    assert found.highest() == found.lowest() == ObservedPrice(series("Exchange2"), 7.0, NOW - 500)


def test_cancelled_request_cancels_its_queries() -> None:
    archive = HangingArchive()

    async def cancel_during_query() -> None:
        world = World()
        query = asyncio.create_task(
            PriceQueries(world.cache, archive, lambda: NOW * NANOSECONDS_PER_MS).summary(ONE, None)
        )
        await archive.queried.wait()
        query.cancel()
        with pytest.raises(asyncio.CancelledError):
            await query

    asyncio.run(cancel_during_query())
    assert archive.cancelled


class HangingArchive(MemoryArchive):
    """An archive whose summaries never return."""

    def __init__(self) -> None:
        super().__init__()
        self.queried = asyncio.Event()
        self.cancelled = False

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        self.queried.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return []


@pytest.mark.parametrize("mode", list(Mode))
def test_queries_never_read_other_mode(mode: Mode) -> None:
    world = World()
    for price, other in ((1.0, Mode.TEST), (2.0, Mode.LIVE)):
        for age_ms in (1_000, 600_000, 2 * DAY_MS):
            world.trade(price, age_ms, series(mode=other))
    of_mode = [series(mode=mode)]
    expected = {Mode.TEST: 1.0, Mode.LIVE: 2.0}[mode]
    assert latest(world, of_mode).price == expected
    for period in (1_000, 600_000, None):
        whole = summary(world, period, of_mode).whole()
        assert whole.high == whole.low == expected
