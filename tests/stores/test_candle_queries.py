"""Candles of any length out of the archive are the ticks folded, whatever gaps there are and whatever is rolled up."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import psycopg
import pytest

from marketflow.model import MINUTE_MS, Candle, Candles, Mode, Series, Slot, Tick
from marketflow.resources import resource
from marketflow.stores.ports import CandleRange
from marketflow.stores.postgres.reader import PostgresReader
from marketflow.stores.postgres.rollups import LATE_MS, PostgresRollups
from marketflow.stores.postgres.rows import DAY_MS, connection_keywords, to_datetime
from marketflow.stores.postgres.writer import PostgresWriter
from tests.stores.archive_questions import ArchiveQuestions
from tests.support.oracle import candles_of_ticks
from tests.support.seeds import seeds

DAY = 1_763_683_200_000  # the start of a day
HOUR_MS = 60 * MINUTE_MS
LENGTHS = (MINUTE_MS, 5 * MINUTE_MS, 15 * MINUTE_MS, HOUR_MS, 4 * HOUR_MS, DAY_MS)
SERIES = [Series(Mode.LIVE, exchange, "BTCUSDT") for exchange in ("exchange1", "exchange2")]
OTHERS = [Series(Mode.TEST, "exchange1", "BTCUSDT"), Series(Mode.LIVE, "exchange1", "ETHUSDT")]
EVERYTHING = (0, 2**42 // DAY_MS * DAY_MS)

Keywords = dict[str, Any]


class Market:
    """Ticks, and an archive with their minutes."""

    def __init__(
        self, place: Keywords, archive: PostgresWriter, days: PostgresRollups, reader: ArchiveQuestions
    ) -> None:
        self.place = place
        self.archive = archive
        self.days = days
        self.reader = reader
        self.ticks: list[tuple[Series, Tick]] = []

    def trade(self, *ticks: tuple[Series, Tick]) -> None:
        self.ticks += ticks
        self.archive.write(candles_of_ticks(self.ticks, MINUTE_MS))

    def roll_up(self, now: int) -> None:
        while self.days.roll_up(now + LATE_MS):
            pass

    def found(self, *walks: CandleRange) -> list[list[dict[int, Candle]]]:
        async def all_found(reader: PostgresReader) -> list[list[dict[int, Candle]]]:
            return [await reader.candles(SERIES, walk) for walk in walks]

        return self.reader.ask(all_found)

    def check(self, *walks: CandleRange) -> None:
        for walk, of_each in zip(walks, self.found(*walks), strict=True):
            counted = [(series, tick) for series, tick in self.ticks if walk.since <= tick.at < walk.until]
            right = candles_of_ticks(counted, walk.length_ms)
            for series, candles in zip(SERIES, of_each, strict=True):
                assert_walked(series, candles, right, walk)


def assert_walked(series: Series, found: dict[int, Candle], right: Candles, walk: CandleRange) -> None:
    starts = sorted(slot.start for slot in right if slot.series == series)
    wanted = starts[-walk.limit :] if walk.newest else starts[: walk.limit]
    given = sorted(found)
    assert (given[-walk.limit :] if walk.newest else given[: walk.limit]) == wanted, walk
    for start in wanted:
        candle, expected = found[start], right[Slot(series, start)]
        names = ("open", "high", "low", "close", "ticks", "first_at", "last_at")
        assert [getattr(candle, name) for name in names] == [getattr(expected, name) for name in names], (walk, start)
        assert candle.average == pytest.approx(expected.average, rel=1e-9)


@pytest.fixture
def market(postgres_db: Keywords) -> Iterator[Market]:
    keywords = connection_keywords(**postgres_db)
    with (
        closing(PostgresWriter(keywords, resource("ddl"), 200)) as archive,
        closing(PostgresRollups(keywords)) as days,
        closing(ArchiveQuestions(postgres_db)) as reader,
    ):
        archive.write({})
        yield Market(postgres_db, archive, days, reader)


def some_ticks(random: Random, days: Sequence[int]) -> list[tuple[Series, Tick]]:
    """Ticks that come in bunches, with gaps of minutes, hours and days between them."""
    ticks = []
    for number in range(random.randrange(1, 40)):
        series = random.choice([*SERIES, *SERIES, *OTHERS])
        begin = DAY + random.choice(days) * DAY_MS + random.choice([0, 3, 4, 11, 23]) * HOUR_MS
        begin += random.choice([0, 14, 15, 59]) * MINUTE_MS
        for _ in range(random.randrange(1, 5)):
            at = begin + random.choice([0, 1, MINUTE_MS - 1, random.randrange(HOUR_MS)])
            # Whole prices, few of them, so that extremes are often tied; no two ticks at once, for rows forget which
            # came first.
            ticks.append((series, Tick(float(random.randrange(1, 6)), at, number)))
    return ticks


@pytest.mark.parametrize("seed", seeds(8))
def test_candles_of_any_length_are_the_ticks_folded(market: Market, seed: int) -> None:
    random = Random(seed)
    days = random.sample(range(40), 8)
    at: set[tuple[Series, int]] = set()
    for _ in range(4):
        fresh = {(series, tick.at): (series, tick) for series, tick in some_ticks(random, days)}
        market.trade(*(each for key, each in fresh.items() if key not in at))
        at |= set(fresh)
        if random.random() < 0.7:
            market.roll_up(DAY + random.randrange(45) * DAY_MS)
        walks = []
        for length in LENGTHS:
            since = random.choice([0, DAY // length, (DAY + random.randrange(40 * DAY_MS)) // length]) * length
            until = DAY + random.choice([50 * DAY_MS, random.randrange(40 * 1440) * MINUTE_MS])
            walks.append(
                CandleRange(length, since, max(since, until), random.choice([1, 2, 5, 1000]), random.random() < 0.5)
            )
        market.check(*walks, *(CandleRange(length, *EVERYTHING, 1000, newest=True) for length in LENGTHS))


@pytest.mark.parametrize("length", LENGTHS)
def test_a_gap_of_months_costs_no_candle(market: Market, length: int) -> None:
    market.trade(
        *((SERIES[0], Tick(1.0 + n, DAY + day * DAY_MS + n * HOUR_MS, n)) for day in (0, 1, 300, 301) for n in range(5))
    )
    for rolled in (False, True):
        if rolled:
            market.roll_up(DAY + 302 * DAY_MS)
        for limit in (1, 2, 3, 4, 5, 7, 9, 11, 20):
            market.check(*(CandleRange(length, *EVERYTHING, limit, newest) for newest in (True, False)))


@pytest.mark.parametrize("length", LENGTHS)
def test_candle_cut_by_end_of_range_has_earlier_minutes(market: Market, length: int) -> None:
    """As after the clock was set back, when days are rolled up that lie ahead."""
    minutes = [DAY + hour * HOUR_MS + minute * MINUTE_MS for hour in range(26) for minute in (0, 7, 31, 59)]
    market.trade(*((SERIES[0], Tick(float(n % 7 + 1), at, n)) for n, at in enumerate(minutes)))
    for _ in range(2):
        for until in (DAY + 32 * MINUTE_MS, DAY + 5 * HOUR_MS + 8 * MINUTE_MS, DAY + 24 * HOUR_MS + MINUTE_MS):
            market.check(*(CandleRange(length, 0, until, 1000, newest) for newest in (True, False)))
        market.roll_up(DAY + 3 * DAY_MS)


def test_hours_that_were_made_are_read_and_not_their_minutes(market: Market) -> None:
    market.trade(*((SERIES[0], Tick(1.0, DAY + hour * HOUR_MS, hour)) for hour in range(24)))
    market.roll_up(DAY + DAY_MS)
    with psycopg.connect(**market.place, autocommit=True) as user:
        user.execute("alter table aggregates disable trigger user; delete from aggregates")
    walks = [CandleRange(length, *EVERYTHING, 1000, newest=True) for length in LENGTHS]
    assert [len(candles) for candles, _ in market.found(*walks)] == [0, 0, 0, 24, 6, 1]


def test_days_without_hours_are_read_by_minutes(
    market: Market,
) -> None:
    """While both run, the earlier one replaces marks by days that have no hours."""
    market.trade(*((SERIES[0], Tick(1.0, DAY + hour * HOUR_MS, hour)) for hour in range(24)))
    market.roll_up(DAY + DAY_MS)
    market.trade((SERIES[0], Tick(9.0, DAY + MINUTE_MS, 99)))
    with psycopg.connect(**market.place, autocommit=True) as user:
        user.execute(
            "update aggregates_daily set average_price = 33.0 / 25, min_price = 1, max_price = 9,"
            " open_price = 1, close_price = 1, tick_count = 25, open_at = timestamp,"
            " close_at = timestamp + interval '23 hours'"
        )
        walks = [CandleRange(length, *EVERYTHING, 1000, newest=True) for length in LENGTHS]
        market.check(*walks)
        market.roll_up(DAY + DAY_MS)
        assert user.execute("select hourly, tick_count from aggregates_daily").fetchall() == [(True, 25)]
        assert user.execute("select sum(tick_count) from aggregates_hourly").fetchall() == [(25,)]
        market.check(*walks)


BY_VERSION_2 = """
insert into aggregates_daily
select pair_name, exchange, mode, date_trunc('day', timestamp, 'UTC'),
       sum(average_price * tick_count) / sum(tick_count),
       min(min_price), max(max_price), (array_agg(open_price order by timestamp))[1],
       (array_agg(close_price order by timestamp desc))[1], sum(tick_count), min(open_at), max(close_at)
from aggregates group by 1, 2, 3, 4;
update aggregates_rolled_until set rolled_until = (select max(timestamp) + interval '24 hours' from aggregates_daily);
grant select on aggregates to public;
"""
"""What version 2 of the schema, and its MarketFlow, would have left."""


def test_an_upgrade_keeps_days_and_makes_their_hours_in_steps(postgres_db: Keywords, tmp_path: Path) -> None:
    for file in sorted(resource("ddl").glob("000[12]_*.sql")):
        (tmp_path / file.name).write_text(file.read_text())
    keywords = connection_keywords(**postgres_db)
    ticks = [(SERIES[0], Tick(float(n % 7 + 1), DAY + n * 3 * HOUR_MS, n)) for n in range(40)]
    with closing(PostgresWriter(keywords, tmp_path, 200)) as earlier:
        earlier.write({})
    with psycopg.connect(**postgres_db, autocommit=True) as user:
        for (series, start), candle in candles_of_ticks(ticks, MINUTE_MS).items():
            prices = [candle.average, candle.low, candle.high, candle.open, candle.close, candle.ticks]
            times = [to_datetime(at) for at in (candle.first_at, candle.last_at, candle.low_at, candle.high_at)]
            row = [series.symbol, series.exchange, series.mode.value, to_datetime(start), *prices, *times]
            user.execute(f"insert into aggregates values ({', '.join(['%s'] * 14)})", row)  # noqa: S608
        user.execute(BY_VERSION_2)
        with (
            closing(PostgresWriter(keywords, resource("ddl"), 200)) as archive,
            closing(PostgresRollups(keywords)) as days,
            closing(ArchiveQuestions(postgres_db)) as reader,
        ):
            archive.write({})
            market = Market(postgres_db, archive, days, reader)
            market.ticks = ticks
            walks = [CandleRange(length, *EVERYTHING, limit, newest=True) for length in LENGTHS for limit in (3, 1000)]
            assert user.execute("select count(*) from aggregates_daily where tick_count is null").fetchone() == (0,)
            market.check(*walks)
            more = True
            while more:
                more = days.roll_up(DAY + 9 * DAY_MS)
                market.check(*walks)
            made = "select count(*) filter (where hourly), count(*) from aggregates_daily"
            assert user.execute(made).fetchone() == (5, 5)
        readable = "select has_table_privilege('pg_monitor', 'aggregates_hourly', 'select')"
        assert user.execute(readable).fetchone() == (True,)


def test_rows_shorter_than_a_minute_are_folded_into_minutes(postgres_db: Keywords, market: Market) -> None:
    """As a shorter flow.window_seconds makes them."""
    ticks = [(SERIES[0], Tick(float(n % 5 + 1), DAY + n * 7_000, n)) for n in range(100)]
    market.ticks += ticks
    market.archive.write(candles_of_ticks(ticks, 5_000))
    for limit in (1, 3, 1000):
        market.check(
            *(CandleRange(length, *EVERYTHING, limit, newest) for length in LENGTHS for newest in (True, False))
        )


def test_nothing_is_found_where_nothing_is(market: Market) -> None:
    walks = [CandleRange(length, *EVERYTHING, 10, newest) for length in LENGTHS for newest in (True, False)]
    assert market.found(*walks) == [[{}, {}]] * len(walks)
