"""A row that is no candle costs its own minute of its own series, and no more; a new one is refused."""

import asyncio
import time
from contextlib import closing
from typing import Any

import psycopg
import pytest

from marketflow.model import MINUTE_MS, Candle, Mode, Series, Slot, minute_start
from marketflow.resources import resource
from marketflow.stores.ports import CandleRange
from marketflow.stores.postgres.reader import PostgresReader
from marketflow.stores.postgres.rollups import PostgresRollups
from marketflow.stores.postgres.rows import DAY_MS, connection_keywords, to_datetime
from marketflow.stores.postgres.writer import PostgresWriter

DAY = 1_763_683_200_000  # midnight, UTC
ODD, GOOD = (Series(Mode.LIVE, name, "BTCUSDT") for name in ("exchange1", "exchange2"))

ODD_ROWS: dict[str, dict[str, object]] = {
    "far future": {"timestamp": "56971-01-01Z"},
    "before Christ": {"timestamp": "0044-03-15Z BC"},
    "infinity": {"timestamp": "infinity"},
    "minus infinity": {"timestamp": "-infinity"},
    "year 1": {"timestamp": "0001-01-01Z"},
    "NaN average": {"average_price": "NaN"},
    "NaN high": {"max_price": "NaN"},
    "NaN low": {"min_price": "NaN"},
    "NaN close": {"close_price": "NaN"},
    "infinite": {"max_price": "Infinity"},
    "all NaN": dict.fromkeys(("average_price", "min_price", "max_price", "open_price", "close_price"), "NaN"),
    "cannot be added up": dict.fromkeys(
        ("average_price", "min_price", "max_price", "open_price", "close_price"), 1e308
    ),
    "too many ticks": {"tick_count": 2**63 - 1},
    "odd close time": {"close_at": "infinity", "open_at": "-infinity"},
    "odd extreme time": {"max_at": "56971-01-01Z", "min_at": "0044-03-15Z BC"},
    "low above high": {"min_price": 3.0, "max_price": 1.0},
    "average above high": {"average_price": 10.0},
}
SPOIL_NO_MINUTE = ("odd close time", "odd extreme time")
"""Of these the prices can be added up."""

NULLS: dict[str, dict[str, object]] = {
    "null average": {"average_price": None},
    "null low": {"min_price": None},
    "null open": {"open_price": None},
    "null ticks": {"tick_count": None},
    "no ticks": {"tick_count": 0},
}
"""Rows that only a table made by others can have."""

_COLUMNS = ("pair_name", "exchange", "mode", "timestamp", "average_price", "min_price", "max_price", "open_price",
            "close_price", "tick_count", "open_at", "close_at", "min_at", "max_at")  # fmt: skip


def put(user: "psycopg.Connection[Any]", series: Series, start: int, **odd: object) -> None:
    at = to_datetime(start)
    prices = {"average_price": 2.0, "min_price": 1.0, "max_price": 3.0, "open_price": 1.5, "close_price": 2.5}
    row: dict[str, object] = {
        "pair_name": series.symbol,
        "exchange": series.exchange,
        "mode": series.mode.value,
        "timestamp": at,
    }
    row |= {**prices, "tick_count": 4, "open_at": at, "close_at": at, "min_at": at, "max_at": at, **odd}
    marks = ", ".join(["%s"] * len(_COLUMNS))
    user.execute(f"insert into aggregates ({', '.join(_COLUMNS)}) values ({marks})", [row[name] for name in _COLUMNS])  # noqa: S608


@pytest.mark.parametrize("odd", [*ODD_ROWS, *NULLS])
def test_odd_row_costs_its_own_minute_alone(postgres_db: dict[str, Any], odd: str, log: list[str]) -> None:
    keywords = connection_keywords(**postgres_db)
    with psycopg.connect(**postgres_db, autocommit=True) as user:
        for file in sorted(resource("ddl").glob("000[123]*.sql")):  # as it was before there was a constraint
            user.execute(file.read_text())
        user.execute("create table ddl_applied (name text primary key, applied_at timestamptz not null default now())")
        user.execute(
            "insert into ddl_applied select unnest(%s::text[])",
            [[file.name for file in resource("ddl").glob("000[123]*.sql")]],
        )
        for series in (ODD, GOOD):
            put(user, series, DAY)
            put(user, series, DAY + 2 * MINUTE_MS)
        if odd in NULLS:
            for column in NULLS[odd]:
                user.execute(f"alter table aggregates alter column {column} drop not null")
            user.execute("alter table aggregates drop constraint aggregates_tick_count_check")
        put(user, ODD, DAY + MINUTE_MS, **(ODD_ROWS | NULLS)[odd])

        with closing(PostgresWriter(keywords, resource("ddl"), 10)) as archive:
            archive.write({})
            assert len(archive.recent([GOOD], DAY)) == 2
        (warning,) = (line for line in log if "are no candles" in line)
        assert "live:exchange1:BTCUSDT" in warning

        with closing(PostgresRollups(keywords)) as days:
            while days.roll_up(DAY + 2 * DAY_MS):
                pass
        rolled = user.execute("select exchange, tick_count from aggregates_daily order by 1").fetchall()
        spoiled = odd not in SPOIL_NO_MINUTE
        assert rolled == [("exchange1", 8 if spoiled else 12), ("exchange2", 8)]

        async def read() -> None:
            reader = PostgresReader(keywords)
            await reader.open()
            try:
                newest = await reader.last([ODD, GOOD])
                assert [each and each.price for each in newest] == [2.5, 2.5]
                for since, until in ((0, 2**43), (DAY, DAY + DAY_MS), (DAY + 1, DAY + DAY_MS - 1)):
                    for whole in await reader.summary([ODD, GOOD], since, until):
                        assert whole is None or whole.total == whole.total  # not NaN
                for length in (MINUTE_MS, 60 * MINUTE_MS, DAY_MS):
                    for walk in (
                        CandleRange(length, DAY, DAY + DAY_MS, 9, False),
                        CandleRange(length, DAY, DAY + DAY_MS, 9, True),
                    ):
                        of_odd, of_good = await reader.candles([ODD, GOOD], walk)
                        assert sum(each.ticks for each in of_good.values()) == 8
                        assert sum(each.ticks for each in of_odd.values()) == (8 if spoiled else 12)
            finally:
                await reader.close()

        asyncio.run(read())


@pytest.mark.parametrize("odd", ODD_ROWS)
def test_odd_row_is_refused_once_the_constraint_stands(postgres_db: dict[str, Any], odd: str) -> None:
    with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 10)) as archive:
        archive.write({})
    with psycopg.connect(**postgres_db, autocommit=True) as user:
        put(user, GOOD, DAY)
        with pytest.raises(psycopg.errors.CheckViolation):
            put(user, ODD, DAY, **ODD_ROWS[odd])


def test_constraint_is_valid_for_all_once_odd_rows_are_gone(postgres_db: dict[str, Any], log: list[str]) -> None:
    keywords = connection_keywords(**postgres_db)
    validated = "select convalidated from pg_constraint where conname = 'aggregates_valid'"
    with psycopg.connect(**postgres_db, autocommit=True) as user:
        user.execute((resource("ddl") / "0001_aggregates.sql").read_text())
        for number in range(9):
            put(user, ODD, DAY + number * MINUTE_MS, average_price="NaN")
        with closing(PostgresWriter(keywords, resource("ddl"), 10)) as archive:
            archive.write({})
        assert user.execute(validated).fetchall() == [(False,)]
        assert any("and others" in line for line in log)
        user.execute("delete from aggregates where average_price = 'NaN'")
        with closing(PostgresWriter(keywords, resource("ddl"), 10)) as archive:
            archive.write({})
        assert user.execute(validated).fetchall() == [(True,)]


def flat(price: float, ticks: int = 1) -> Candle:
    return Candle(price, price, price, price, price * ticks, ticks, DAY, DAY, DAY, DAY, 0, 0)


def rolled_up(place: dict[str, Any], now_ms: int = DAY + 2 * DAY_MS) -> None:
    with closing(PostgresRollups(connection_keywords(**place))) as days:
        while days.roll_up(now_ms):
            pass


@pytest.mark.parametrize("price", [5e-324, 1e-320, 1e-300, 1e100])
def test_extreme_price_is_a_candle(postgres_db: dict[str, Any], price: float) -> None:
    """It stands there when the constraint comes, and is written beneath it."""
    with psycopg.connect(**postgres_db, autocommit=True) as user:
        user.execute((resource("ddl") / "0001_aggregates.sql").read_text())
        prices = dict.fromkeys(("average_price", "min_price", "max_price", "open_price", "close_price"), price)
        put(user, GOOD, DAY, **prices)
        with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 10)) as archive:
            assert archive.write({Slot(GOOD, DAY + MINUTE_MS): flat(price)}) == 0
            assert len(archive.recent([GOOD], DAY)) == 2
        valid = user.execute("select convalidated from pg_constraint where conname = 'aggregates_valid'").fetchall()
        assert valid == [(True,)]
        rolled_up(postgres_db)
        assert user.execute("select min_price, tick_count from aggregates_daily").fetchall() == [(price, 5)]


def test_day_with_the_most_ticks_is_rolled_up(postgres_db: dict[str, Any]) -> None:
    with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 10)) as archive:
        most = 10**12
        assert archive.write({Slot(GOOD, DAY + n * MINUTE_MS): flat(1.0, most) for n in range(100)}) == 0
    rolled_up(postgres_db)
    with psycopg.connect(**postgres_db, autocommit=True) as user:
        assert user.execute("select tick_count from aggregates_daily").fetchall() == [(100 * most,)]


@pytest.mark.parametrize("table", ["aggregates_daily", "aggregates_hourly"])
def test_day_that_cannot_be_made_stops_no_other(postgres_db: dict[str, Any], table: str, log: list[str]) -> None:
    """Its answers come from its minutes; days to come are rolled up as well."""
    keywords = connection_keywords(**postgres_db)
    with closing(PostgresWriter(keywords, resource("ddl"), 10)) as archive:
        archive.write({Slot(each, DAY + n * DAY_MS): flat(1.0) for each in (ODD, GOOD) for n in range(3)})
    with psycopg.connect(**postgres_db, autocommit=True) as user:
        user.execute(
            "create function refuse() returns trigger language plpgsql as $$ begin"
            " if new.tick_count is not null and new.exchange = 'exchange1' then raise exception 'refused by a trigger';"
            " end if; return new; end $$;"
            f" create trigger refuse before insert or update on {table} for each row execute function refuse()"
        )
        days = PostgresRollups(keywords)
        with closing(days):
            for _ in range(3):
                while days.roll_up(DAY + 5 * DAY_MS):
                    pass
            made = "select exchange, count(*) from aggregates_daily where hourly group by 1 order by 1"
            assert user.execute(made).fetchall() == [("exchange2", 3)]
            assert user.execute("select count(*) from aggregates_daily where not hourly").fetchall() == [(3,)]
            assert sum("refused by a trigger" in line for line in log) == 1
        user.execute(f"drop trigger refuse on {table}")
        rolled_up(postgres_db, DAY + 5 * DAY_MS)
        assert user.execute(made).fetchall() == [("exchange1", 3), ("exchange2", 3)]


def test_refused_candle_costs_itself_alone(postgres_db: dict[str, Any]) -> None:
    def candle(price: float) -> Candle:
        return Candle(price, price, price, price, price, 1, DAY, DAY, DAY, DAY, 0, 0)

    with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 10)) as archive:
        assert archive.write({Slot(ODD, DAY): candle(1e101), Slot(GOOD, DAY): candle(1.0)}) == 1
        assert archive.recent([ODD, GOOD], 0).keys() == {Slot(GOOD, DAY)}


def test_version_rises_with_each_change_and_in_hours_and_days(postgres_db: dict[str, Any]) -> None:
    keywords = connection_keywords(**postgres_db)
    with closing(PostgresWriter(keywords, resource("ddl"), 10)) as archive:
        archive.write({})
    with psycopg.connect(**postgres_db, autocommit=True) as user, closing(PostgresRollups(keywords)) as days:

        def versions() -> list[list[int]]:
            while days.roll_up(DAY + 2 * DAY_MS):
                pass
            tables = ("aggregates", "aggregates_hourly", "aggregates_daily")
            return [[v for (v,) in user.execute(f"select version from {each} order by timestamp")] for each in tables]  # noqa: S608

        put(user, GOOD, DAY)
        put(user, GOOD, DAY + MINUTE_MS)
        assert versions() == [[1, 1], [1], [1]]
        user.execute("update aggregates set max_price = 4")
        assert versions() == [[2, 2], [3], [3]]
        user.execute("update aggregates set max_price = 4, open_at = timestamp")
        assert versions() == [[2, 2], [3], [3]]
        user.execute("update aggregates set max_price = 5 where timestamp = %s", [to_datetime(DAY)])
        assert versions() == [[3, 2], [4], [4]]


def test_recent_row_keeps_the_version_of_the_pipeline(postgres_db: dict[str, Any]) -> None:
    """A late tick before the minute is closed makes no correction; one after it has the version that the flow says."""
    recent = minute_start(time.time_ns() // 1_000_000) - MINUTE_MS

    def candle(ticks: int, version: int, at: int) -> Candle:
        return Candle(1.0, 1.0, 1.0, 1.0, float(ticks), ticks, at, at, at, at, 0, 0, version)

    with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 10)) as archive:

        def versions(start: int) -> int:
            return archive.recent([GOOD], start)[Slot(GOOD, start)].version

        for ticks, version in ((1, 1), (2, 1), (3, 2), (4, 2), (5, 1)):
            archive.write({Slot(GOOD, recent): candle(ticks, version, recent), Slot(GOOD, DAY): candle(ticks, 1, DAY)})
            assert versions(recent) == {1: 1, 2: 1}.get(ticks, 2)
            assert archive.recent([GOOD], DAY)[Slot(GOOD, DAY)].version == ticks
        with psycopg.connect(**postgres_db, autocommit=True) as user:
            user.execute("update aggregates set max_price = 4 where timestamp = %s", [to_datetime(recent)])
        assert versions(recent) == 3
