"""What is too old is deleted, and what is made of it stays for as long as it should."""

import asyncio
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import psycopg
import pytest

from marketflow.errors import SettingsError
from marketflow.model import MINUTE_MS, Candle, Mode, Series, Slot
from marketflow.resources import resource
from marketflow.settings import load
from marketflow.stores.ports import CandleRange
from marketflow.stores.postgres import retention
from marketflow.stores.postgres.connections.bounded_connection import BoundedConnection
from marketflow.stores.postgres.reader import PostgresReader
from marketflow.stores.postgres.retention import Retention
from marketflow.stores.postgres.rollups import PostgresRollups
from marketflow.stores.postgres.rows import DAY_MS, connection_keywords
from marketflow.stores.postgres.writer import PostgresWriter

DAY = 1_763_683_200_000  # midnight, UTC
NOW = DAY + 10 * DAY_MS + 60 * MINUTE_MS
SERIES = [Series(Mode.LIVE, exchange, "BTCUSDT") for exchange in ("exchange1", "exchange2")]


def minutes(day: int, count: int = 20) -> dict[Slot, Candle]:
    start = DAY + day * DAY_MS
    return {
        Slot(series, start + n * 7 * MINUTE_MS): Candle(2, 3, 1, 2, 8, 4, start, start, start, start, 0, 0)
        for series in SERIES
        for n in range(count)
    }


@pytest.fixture
def user(postgres_db: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator["psycopg.Connection[Any]"]:
    """A connection to a database with ten days of minutes, of which few go at once."""
    monkeypatch.setattr(retention, "_OLDEST", retention._OLDEST.replace("5000", "30"))
    monkeypatch.setattr(retention, "ROWS_A_STEP", 30)
    with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 200)) as archive:
        for day in range(10):
            archive.write(minutes(day))
    with psycopg.connect(**postgres_db, autocommit=True) as connection:
        yield connection


def roll_up(place: dict[str, Any], retention: Retention | None = None, now_ms: int = NOW) -> None:
    with closing(PostgresRollups(connection_keywords(**place), retention=retention)) as days:
        while days.roll_up(now_ms):
            pass


def counts(user: "psycopg.Connection[Any]") -> tuple[int, ...]:
    tables = ("aggregates", "aggregates_hourly", "aggregates_daily")
    found = (user.execute(f"select count(*) from {table}").fetchone() for table in tables)  # noqa: S608
    return tuple(row[0] for row in found if row)


def ticks_of_everything(place: dict[str, Any]) -> list[int]:
    """By one period over all, and by candles of a day."""

    async def read() -> list[int]:
        reader = PostgresReader(connection_keywords(**place))
        await reader.open()
        try:
            whole = await reader.summary(SERIES, 0, NOW)
            days = await reader.candles(SERIES, CandleRange(DAY_MS, DAY, NOW, 500, False))
            return [sum(each.ticks for each in whole if each), sum(c.ticks for of in days for c in of.values())]
        finally:
            await reader.close()

    return asyncio.run(read())


def ticks_between(place: dict[str, Any], since: int, until: int) -> int:
    async def read() -> int:
        reader = PostgresReader(connection_keywords(**place))
        await reader.open()
        try:
            return sum(each.ticks for each in await reader.summary(SERIES, since, until) if each)
        finally:
            await reader.close()

    return asyncio.run(read())


def test_edge_over_expired_minutes_is_the_whole_day(
    postgres_db: dict[str, Any], user: "psycopg.Connection[Any]"
) -> None:
    """Minutes after the first day; those of the first seven days are deleted."""
    roll_up(postgres_db, Retention(3))
    kept = 7 * 1440
    stored = [day * 1440 + n * 7 for day in range(10) for n in range(20)]
    found, expected = {}, {}
    for since in (0, 1, 60, 1440, 3000, kept - 1, kept, kept + 1, kept + 100, 11_000):
        for until in (30, 1440, 2000, kept - 1, kept, kept + 20, 12_000, 14_400):
            if since < until:
                first = since // 1440 * 1440 if since < kept else since
                last = -(-until // 1440) * 1440 if until < kept else until
                expected[since, until] = sum(4 * len(SERIES) for minute in stored if first <= minute < last)
                found[since, until] = ticks_between(postgres_db, DAY + since * MINUTE_MS, DAY + until * MINUTE_MS)
    assert found == expected


def test_clock_far_ahead_deletes_no_minute_too_early(
    postgres_db: dict[str, Any], user: "psycopg.Connection[Any]", log: list[str]
) -> None:
    """Neither PostgreSQL's clock nor the newest row confirm it."""
    roll_up(postgres_db, Retention(3, 5), NOW + 400 * DAY_MS)
    assert counts(user) == (120, 30, 10)
    assert len([line for line in log if "clock" in line]) == 1


def test_rows_of_a_wrong_day_do_not_confirm_the_clock(
    postgres_db: dict[str, Any], user: "psycopg.Connection[Any]"
) -> None:
    with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 200)) as archive:
        archive.write(minutes(210))
    roll_up(postgres_db, Retention(3), NOW + 200 * DAY_MS)
    assert counts(user)[0] == 120 + 40


def test_without_settings_everything_is_kept(postgres_db: dict[str, Any], user: "psycopg.Connection[Any]") -> None:
    roll_up(postgres_db)
    assert counts(user) == (400, 60, 20)


def test_old_minutes_go_and_their_days_stay(postgres_db: dict[str, Any], user: "psycopg.Connection[Any]") -> None:
    before = ticks_of_everything(postgres_db)
    roll_up(postgres_db, Retention(3))
    assert counts(user) == (120, 60, 20)
    assert ticks_of_everything(postgres_db) == before == [1600, 1600]


def test_old_days_go_later(postgres_db: dict[str, Any], user: "psycopg.Connection[Any]") -> None:
    roll_up(postgres_db, Retention(3, 5))
    assert counts(user) == (120, 30, 10)
    assert ticks_of_everything(postgres_db) == [800, 800]


def test_minutes_that_are_kept_still_change_their_days(
    postgres_db: dict[str, Any], user: "psycopg.Connection[Any]"
) -> None:
    roll_up(postgres_db, Retention(3))
    user.execute("update aggregates set tick_count = 5")
    roll_up(postgres_db, Retention(3))
    assert ticks_of_everything(postgres_db) == [1600 + 120, 1600 + 120]


def test_what_is_late_beyond_the_retention_changes_no_day(
    postgres_db: dict[str, Any], user: "psycopg.Connection[Any]"
) -> None:
    retention = Retention(3)
    roll_up(postgres_db, retention)
    with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 200)) as archive:
        archive.write(minutes(0, 1))
    roll_up(postgres_db, retention)
    assert ticks_of_everything(postgres_db) == [1600, 1600]
    assert counts(user) == (122, 60, 20)
    with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 200)) as archive:
        archive.write(minutes(10))
    roll_up(postgres_db, retention, NOW + DAY_MS)
    assert counts(user) == (120, 66, 22)


def test_nothing_goes_before_it_is_rolled_up(postgres_db: dict[str, Any], user: "psycopg.Connection[Any]") -> None:
    user.execute("update aggregates_rolled_until set kept_from = 'epoch'")
    with closing(PostgresRollups(connection_keywords(**postgres_db), retention=Retention(3))) as days:
        while days.roll_up(NOW):
            for _, minutes_left in [counts(user)[:2]]:
                assert minutes_left >= 0
            lost = user.execute(
                "select count(*) from (select date_trunc('day', timestamp, 'UTC') from aggregates_daily"
                " where tick_count is null except select date_trunc('day', timestamp, 'UTC') from aggregates) as lost"
            ).fetchone()
            assert lost == (0,)
    assert ticks_of_everything(postgres_db) == [1600, 1600]


def test_late_minute_keeps_its_day_from_the_retention(
    postgres_db: dict[str, Any], user: "psycopg.Connection[Any]"
) -> None:
    """It marks its day between the look for marks and the deletion."""
    roll_up(postgres_db)
    user.execute(
        "insert into aggregates select pair_name, exchange, mode, timestamp + interval '1 minute', average_price,"
        " min_price, max_price, open_price, close_price, tick_count from aggregates"
        " where exchange = 'exchange1' order by timestamp limit 1"
    )
    with BoundedConnection.open(connection_keywords(**postgres_db)) as connection:
        retention = Retention(3)
        while retention.step(connection, NOW):
            pass
    roll_up(postgres_db)
    assert ticks_of_everything(postgres_db) == [1604, 1604]


def test_retention_of_a_partitioned_table_deletes_old_rows_alone(postgres_db: dict[str, Any]) -> None:
    """Rows of different partitions have the same place in their files."""
    with psycopg.connect(**postgres_db, autocommit=True) as user:
        table = (resource("ddl") / "0001_aggregates.sql").read_text()
        user.execute(table.rstrip().removesuffix(";") + " partition by range (timestamp)")
        user.execute("create table early partition of aggregates for values from (minvalue) to ('2025-11-26Z')")
        user.execute("create table later partition of aggregates for values from ('2025-11-26Z') to (maxvalue)")
        with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 200)) as archive:
            for day in range(10):
                archive.write(minutes(day))
        roll_up(postgres_db, Retention(3))
        assert counts(user) == (120, 60, 20)
        assert ticks_of_everything(postgres_db) == [1600, 1600]


def test_deleted_minutes_take_their_day_along(postgres_db: dict[str, Any], user: "psycopg.Connection[Any]") -> None:
    """By hand, a deletion is a change: what is asked by the day is what its minutes say."""
    roll_up(postgres_db)
    user.execute("delete from aggregates where timestamp < '2025-11-22Z'")
    roll_up(postgres_db)
    assert counts(user) == (360, 54, 18)


@pytest.mark.usefixtures("nothing_set")
@pytest.mark.parametrize(
    ("minutes_kept", "days_kept", "allowed"),
    [("", "", True), ("2d", "", True), ("90d", "90d", True), ("90d", "400d", True), ("90d", "89d", False),
     ("", "90d", False), ("1d", "", False), ("0d", "", False), ("90", "", False), ("90h", "", False)],
)  # fmt: skip
def test_settings_of_the_retention_are_checked(minutes_kept: str, days_kept: str, allowed: bool) -> None:
    given = {"archive.keep_minutes": minutes_kept, "archive.keep_days": days_kept}
    if allowed:
        assert load(None, given).archive.keep_minutes == minutes_kept
    else:
        with pytest.raises(SettingsError, match=r"archive\.keep_"):
            load(None, given)
