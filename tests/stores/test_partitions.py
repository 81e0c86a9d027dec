"""Daily partitions: the conversion of a table in use, retention by dropping, and what goes wrong with both."""

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS, Candle, Candles, Mode, Series, Slot
from marketflow.resources import resource
from marketflow.stores.postgres import reader, retention, rollups
from marketflow.stores.postgres.connections.bounded_connection import BoundedConnection
from marketflow.stores.postgres.partitioning import conversion
from marketflow.stores.postgres.partitioning.daily_partitions import DailyPartitions
from marketflow.stores.postgres.retention import Retention
from marketflow.stores.postgres.rollups import PostgresRollups
from marketflow.stores.postgres.rows import DAY_MS, connection_keywords, to_datetime
from marketflow.stores.postgres.writer import PostgresWriter
from tests.stores.test_retention import counts, ticks_of_everything
from tests.support.partitions import partition
from tests.support.servers import wait_until

DAY = 1_763_683_200_000  # midnight, UTC
NOW = DAY + 10 * DAY_MS + 60 * MINUTE_MS
SERIES = [Series(Mode.LIVE, exchange, "BTCUSDT") for exchange in ("exchange1", "exchange2")]


def candle(start: int, ticks: int = 4) -> Candle:
    return Candle(2, 3, 1, 2, 2 * ticks, ticks, start, start, start, start, 0, 0)


def minutes(day: int, count: int = 20, ticks: int = 4) -> Candles:
    start = DAY + day * DAY_MS
    return {Slot(series, start + n * 7 * MINUTE_MS): candle(start, ticks) for series in SERIES for n in range(count)}


def write(place: dict[str, Any], rows: Candles) -> None:
    with closing(PostgresWriter(connection_keywords(**place), resource("ddl"), 200)) as archive:
        assert archive.write(rows) == 0


def roll_up(place: dict[str, Any], retention: Retention | None = None, now_ms: int = NOW) -> None:
    with closing(PostgresRollups(connection_keywords(**place), retention=retention)) as days:
        while days.roll_up(now_ms):
            pass


def partitions(user: "psycopg.Connection[Any]") -> dict[str, int]:
    """The number of rows of each partition that has any, or is a day's from before NOW."""
    query = "select inhrelid::regclass::text from pg_inherits where inhparent = 'aggregates'::regclass order by 1"
    found = {}
    for (name,) in user.execute(query).fetchall():
        ((rows,),) = user.execute(f"select count(*) from {name}").fetchall()  # noqa: S608
        if rows or "aggregates_2025112" in name:
            found[name] = rows
    return found


@pytest.fixture(autouse=True)
def _patient_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first query of a connection plans all partitions, which takes longer beside other tests."""
    monkeypatch.setattr(reader, "READ_SECONDS", 10.0)


@pytest.fixture
def user(postgres_db: dict[str, Any]) -> Iterator["psycopg.Connection[Any]"]:
    """Ten days of minutes: the first of them from before the conversion, the others in a partition each."""
    write(postgres_db, minutes(0))
    partition(postgres_db, to_datetime(DAY))
    with BoundedConnection.open(connection_keywords(**postgres_db)) as connection:
        DailyPartitions().add(connection, NOW)
    for day in range(1, 10):
        write(postgres_db, minutes(day))
    with psycopg.connect(**postgres_db, autocommit=True) as connection:
        yield connection


KEPT = {"aggregates_20251128": 40, "aggregates_20251129": 40, "aggregates_20251130": 40}


def test_expired_partitions_are_dropped_and_their_days_stay(
    postgres_db: dict[str, Any], user: "psycopg.Connection[Any]"
) -> None:
    assert partitions(user)["aggregates_before"] == partitions(user)["aggregates_20251122"] == 40
    before = ticks_of_everything(postgres_db)
    roll_up(postgres_db, Retention(3))
    assert partitions(user) == KEPT
    assert counts(user) == (120, 60, 20)
    assert ticks_of_everything(postgres_db) == before == [1600, 1600]
    roll_up(postgres_db, Retention(3, 5))
    assert counts(user) == (120, 30, 10)
    assert ticks_of_everything(postgres_db) == [800, 800]


def test_partition_of_a_day_that_is_not_rolled_up_stays(
    postgres_db: dict[str, Any], user: "psycopg.Connection[Any]"
) -> None:
    """A late minute has marked its day; the days before it are dropped."""
    roll_up(postgres_db)
    write(postgres_db, minutes(4, ticks=9))
    with BoundedConnection.open(connection_keywords(**postgres_db)) as connection:
        retention = Retention(3)
        while retention.step(connection, NOW):
            pass
        assert next(iter(partitions(user))) == "aggregates_20251125"
        assert connection.execute("select aggregates_drop_partition()").fetchone() == (None,)
    roll_up(postgres_db, Retention(3))
    assert partitions(user) == KEPT
    assert ticks_of_everything(postgres_db) == [1600 + 200, 1600 + 200]


def test_nothing_is_dropped_before_it_is_rolled_up(
    postgres_db: dict[str, Any], user: "psycopg.Connection[Any]"
) -> None:
    """Whatever `kept_from` says."""
    user.execute("update aggregates_rolled_until set kept_from = '2025-12-01Z', rolled_until = '2025-11-24Z'")
    names = [user.execute("select aggregates_drop_partition()").fetchone() for _ in range(4)]
    assert names == [("aggregates_before",), ("aggregates_20251122",), ("aggregates_20251123",), (None,)]


def test_dropping_by_retention_marks_no_day(postgres_db: dict[str, Any], user: "psycopg.Connection[Any]") -> None:
    roll_up(postgres_db)
    days = "select exchange, timestamp, tick_count, hourly, xmin from aggregates_daily order by 1, 2"
    before = user.execute(days).fetchall()
    roll_up(postgres_db, Retention(3))
    assert partitions(user) == KEPT
    assert user.execute(days).fetchall() == before


def test_late_minute_of_a_dropped_day_is_kept_for_a_day(
    postgres_db: dict[str, Any], user: "psycopg.Connection[Any]"
) -> None:
    """Its day stays as it is, and the next retention deletes it."""
    roll_up(postgres_db, Retention(3))
    write(postgres_db, minutes(1, count=1, ticks=9))
    assert partitions(user) == KEPT | {"aggregates_other": 2}
    roll_up(postgres_db, Retention(3))
    assert ticks_of_everything(postgres_db) == [1600, 1600]
    write(postgres_db, minutes(10))
    roll_up(postgres_db, Retention(3), NOW + DAY_MS)
    assert "aggregates_other" not in partitions(user)
    assert counts(user) == (120, 66, 22)


def test_expired_rows_of_the_first_partition_are_deleted(
    postgres_db: dict[str, Any], user: "psycopg.Connection[Any]"
) -> None:
    """It ends later, so they are deleted as from a plain table."""
    write(postgres_db, minutes(-2) | minutes(-1))
    roll_up(postgres_db, Retention(10))
    assert partitions(user)["aggregates_before"] == 40
    assert counts(user) == (400, 72, 24)


def test_partitions_are_added_ahead_and_take_waiting_rows(
    postgres_db: dict[str, Any], user: "psycopg.Connection[Any]"
) -> None:
    """After a stop of some weeks rows of today are there first; stray ones of far days stay where they are."""
    write(postgres_db, minutes(40) | minutes(48) | minutes(400))
    assert partitions(user)["aggregates_other"] == 120
    days = "select * from aggregates_daily"
    before = user.execute(days).fetchall()
    roll_up(postgres_db, now_ms=NOW + 30 * DAY_MS)
    found = partitions(user)
    assert (found["aggregates_20251231"], found["aggregates_other"]) == (40, 80)
    assert before == []
    roll_up(postgres_db, now_ms=NOW + 38 * DAY_MS)
    assert (partitions(user)["aggregates_20260108"], partitions(user)["aggregates_other"]) == (40, 40)
    assert counts(user)[0] == 400 + 120
    user.execute("update aggregates set tick_count = 5 where timestamp >= '2025-12-30Z' and timestamp < '2026-01-02Z'")
    roll_up(postgres_db, now_ms=NOW + 39 * DAY_MS)
    assert ticks_of_everything(postgres_db)[1] == 1600


def test_reader_of_hours_delays_a_drop_and_nothing_else(
    postgres_db: dict[str, Any], user: "psycopg.Connection[Any]", log: list[str]
) -> None:
    with psycopg.connect(**postgres_db) as reading:
        reading.execute("select count(*) from aggregates").fetchall()
        roll_up(postgres_db, Retention(3))
        assert counts(user) == (400, 60, 20)
        assert len([line for line in log if "expired partition cannot be dropped yet" in line]) == 1
        write(postgres_db, minutes(9, ticks=5))
    roll_up(postgres_db, Retention(3))
    assert partitions(user) == KEPT


def test_rows_are_stored_when_no_partition_can_be_added(
    postgres_db: dict[str, Any], user: "psycopg.Connection[Any]", log: list[str]
) -> None:
    user.execute("drop function aggregates_add_partitions")
    write(postgres_db, minutes(40))
    roll_up(postgres_db, Retention(3), NOW + 31 * DAY_MS)
    assert partitions(user) == {"aggregates_other": 40}
    assert len([line for line in log if "partitions cannot be added yet" in line]) == 1


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize(
    ("statement", "values", "planned"),
    [
        (rollups._MAKE_HOURS, {"since": 3, "until": 5}, {"aggregates_20251124", "aggregates_20251125"}),
        (rollups._MOVE, {"first": 4, "end": 5, "rolled": 4, "until": 5}, {"aggregates_20251125"}),
        (rollups._MOVE, {"first": -99, "end": 1, "rolled": -99, "until": 1}, {"aggregates_before"}),
        (retention._OLDEST, {"ended": 0, "scanned": 1}, {"aggregates_before"}),
        (retention._OLDEST, {"ended": 2, "scanned": 2}, {"aggregates_before", "aggregates_20251122"}),
    ],
)  # fmt: skip
def test_upkeep_plans_only_the_partitions_it_needs(
    postgres_db: dict[str, Any], statement: str, values: dict[str, int], planned: set[str]
) -> None:
    """With all of 90 partitions in each plan a roll-up takes ten times as long."""
    days: dict[str, Any] = {name: to_datetime(DAY + day * DAY_MS) for name, day in values.items()}
    marks = {"exchange": ["exchange1"], "pair_name": ["BTCUSDT"], "mode": ["live"], "day": [to_datetime(DAY)]}
    with BoundedConnection.open(connection_keywords(**postgres_db)) as connection:
        plan = connection.execute(f"explain {statement}", days | marks).fetchall()
    found = set(re.findall(r" on (aggregates_(?:before|other|\d+))", "\n".join(line for (line,) in plan)))
    assert found == planned


def test_conversion_keeps_rows_grants_triggers_and_key(postgres_db: dict[str, Any]) -> None:
    write(postgres_db, minutes(0) | minutes(1))
    roll_up(postgres_db, now_ms=DAY + 3 * DAY_MS)
    described = """
        select column_name, ordinal_position, column_default, is_nullable, data_type from information_schema.columns
        where table_name = 'aggregates' order by ordinal_position
    """
    constraints = """
        select conname, contype, pg_get_constraintdef(oid) from pg_constraint
        where conrelid = 'aggregates'::regclass and conname <> 'aggregates_before' order by 1
    """
    triggers = """
        select translate(pg_get_triggerdef(oid), '()', '') from pg_trigger
        where tgrelid = 'aggregates'::regclass order by tgname
    """
    grants = "select a.* from pg_class, aclexplode(relacl) as a where oid = 'aggregates'::regclass order by 2, 3"
    with psycopg.connect(**postgres_db, autocommit=True) as user:
        name = f"reader_of_{postgres_db['dbname']}"
        user.execute(f"create role {name}; grant select, delete on aggregates to {name} with grant option")
        user.execute(f"alter default privileges in schema public grant all on tables to {name}")
        user.execute("create index by_time on aggregates (timestamp)")
        queries = ("select * from aggregates order by exchange, timestamp", described, constraints, triggers, grants)
        before = [user.execute(query).fetchall() for query in queries]
        partition(postgres_db, to_datetime(DAY + DAY_MS))
        assert [user.execute(query).fetchall() for query in queries] == before
        partition(postgres_db, to_datetime(DAY + 5 * DAY_MS))  # changes nothing
        assert [user.execute(query).fetchall() for query in queries] == before
        others = """
            select relname from pg_inherits join pg_class on pg_class.oid = inhrelid, aclexplode(relacl)
            where inhparent = 'aggregates'::regclass and grantee <> relowner
        """
        assert user.execute(others).fetchall() == []
        user.execute("update aggregates set tick_count = 5 where exchange = 'exchange1'")
        roll_up(postgres_db, now_ms=DAY + 3 * DAY_MS)
        assert ticks_of_everything(postgres_db) == [360, 360]
        assert user.execute("select distinct version from aggregates order by 1").fetchall() == [(1,), (2,)]
        user.execute("truncate aggregates")
        assert counts(user) == (0, 0, 0)
        user.execute(f"drop owned by {name}; drop role {name}")


def today() -> datetime:
    return datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


@pytest.mark.parametrize("small", [True, False])
def test_conversion_beside_a_writer_loses_no_row(
    postgres_db: dict[str, Any], monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    """Its connection and its prepared statements are those from before."""
    if not small:
        monkeypatch.setattr(conversion, "SMALL_BYTES", 0)
    start = int(today().timestamp()) * 1000
    ended = threading.Event()
    written: Candles = {}
    with psycopg.connect(**postgres_db, autocommit=True) as user:
        user.execute("alter database {} set deadlock_timeout = '10s'".format(postgres_db["dbname"]))

        def keep_writing() -> None:
            with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 2)) as archive:
                number = 0
                while not ended.is_set():
                    rows = {Slot(series, start - number * MINUTE_MS): candle(start) for series in SERIES}
                    assert archive.write(rows) == 0
                    written.update(rows)
                    number += 1

        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(keep_writing)
            try:
                wait_until(lambda: len(written) > 40)
                with BoundedConnection.open(connection_keywords(**postgres_db)) as connection:
                    conversion.partition(connection)
                number = len(written)
                wait_until(lambda: len(written) > number + 40 or writing.done())
            finally:
                ended.set()
            writing.result()
        assert user.execute("select count(*), count(distinct (exchange, timestamp)) from aggregates").fetchall() == [
            (len(written), len(written))
        ]
        roll_up(postgres_db, now_ms=start + DAY_MS // 2)
        user.execute("update aggregates set tick_count = 5 where timestamp < %s", [today()])
        marks = user.execute("select count(*) from aggregates_daily where tick_count is null").fetchone()
        assert marks == (2,)
        (until,) = user.execute("select partitioned_from from aggregates_rolled_until").fetchone() or (None,)
        assert until == today() + timedelta(days=1 if small else 8)


def test_constraint_of_a_killed_conversion_loses_no_row(postgres_db: dict[str, Any]) -> None:
    write(postgres_db, minutes(0))
    with (
        psycopg.connect(**postgres_db, autocommit=True) as user,
        closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 200)) as archive,
    ):
        user.execute(
            "alter table aggregates add constraint aggregates_before check (timestamp < '2025-11-22Z') not valid"
        )
        with pytest.raises(Unavailable, match="aggregates_before"):
            archive.write(minutes(0, ticks=5) | minutes(1))
        partition(postgres_db, to_datetime(DAY + 4 * DAY_MS))
        assert archive.write(minutes(0, ticks=5) | minutes(1)) == 0
        assert ticks_of_everything(postgres_db)[0] == 360


@pytest.mark.parametrize(
    ("obstacle", "named"),
    [
        ("create view mine as select * from aggregates", "view mine"),
        ("create table mine (like aggregates including all); alter table mine add constraint to_minutes"
         " foreign key (exchange, pair_name, mode, timestamp) references aggregates", "foreign key to_minutes"),
        ("create policy mine on aggregates", "policy mine"),
        ("create table mine () inherits (aggregates)", "inheritance"),
        ("grant select (timestamp) on aggregates to public", "column timestamp"),
        ("alter table aggregates disable trigger deleted", "trigger deleted"),
        ("insert into aggregates values ('X', 'x', 'live', '2100-01-01Z', 1, 1, 1, 1, 1, 1)",
         "2025-11-22 or later"),
        ("alter table aggregates drop constraint aggregates_valid", "no candles"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("small", [True, False])
def test_conversion_that_would_lose_something_is_refused(
    postgres_db: dict[str, Any], monkeypatch: pytest.MonkeyPatch, obstacle: str, named: str, small: bool
) -> None:
    monkeypatch.setattr(conversion, "DAYS_AHEAD", 0)
    if not small:
        monkeypatch.setattr(conversion, "SMALL_BYTES", 0)
    write(postgres_db, minutes(0))
    with psycopg.connect(**postgres_db, autocommit=True) as user:
        user.execute(obstacle)
        with pytest.raises(Unavailable, match=named):
            partition(postgres_db, to_datetime(DAY))
        left = "select relkind from pg_class where oid = 'aggregates'::regclass"
        assert user.execute(left).fetchall() == [("r",)]
        assert user.execute("select from pg_constraint where conname = 'aggregates_before'").fetchall() == []


def test_table_that_its_user_has_partitioned_stays(postgres_db: dict[str, Any]) -> None:
    with psycopg.connect(**postgres_db, autocommit=True) as user:
        table = (resource("ddl") / "0001_aggregates.sql").read_text()
        user.execute(table.rstrip().removesuffix(";") + " partition by range (timestamp)")
        user.execute("create table mine partition of aggregates for values from (minvalue) to ('2025-11-24Z')")
        user.execute("create table others partition of aggregates default")
        write(postgres_db, minutes(0) | minutes(5))
        with pytest.raises(Unavailable, match="not by MarketFlow"):
            partition(postgres_db, to_datetime(DAY))
        roll_up(postgres_db, Retention(2))
        assert partitions(user) == {"others": 40}
        assert user.execute("select to_regclass('mine') is not null").fetchone() == (True,)


def test_conversion_waits_for_long_transactions_and_gives_up(
    postgres_db: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "LOCK_ATTEMPTS", 2)
    write(postgres_db, minutes(0))
    with psycopg.connect(**postgres_db) as reading:
        reading.execute("select count(*) from aggregates").fetchall()
        with pytest.raises(Unavailable, match="long transactions"):
            partition(postgres_db, to_datetime(DAY))
        write(postgres_db, minutes(1))
    partition(postgres_db, to_datetime(DAY + DAY_MS))


@pytest.mark.parametrize("partitioned", [False, True])
@pytest.mark.parametrize(("rows", "seconds"), [(15_000, 3.0), (100_000, 20.0)])
def test_backlog_of_many_series_is_written_in_time(
    postgres_db: dict[str, Any], rows: int, seconds: float, partitioned: bool
) -> None:
    """Of 15,000 series, after an outage; twice, as after a COMMIT whose answer was lost."""
    series = [Series(Mode.LIVE, f"exchange{n % 3}", f"SYMBOL{n // 3}") for n in range(15_000)]
    starts = [DAY + n * MINUTE_MS for n in range(-(-rows // len(series)))]
    slots = [Slot(each, start) for start in starts for each in series][:rows]
    backlog = {slot: candle(slot.start) for slot in slots}
    with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 200)) as archive:
        archive.write({})
        if partitioned:
            partition(postgres_db, to_datetime(DAY - DAY_MS))
        for _ in range(2):
            began = time.monotonic()
            assert archive.write(backlog) == 0
            assert time.monotonic() - began < seconds
    with psycopg.connect(**postgres_db, autocommit=True) as user:
        assert partitions(user).get("aggregates_20251121" if partitioned else "", rows) == rows
        assert counts(user)[0] == rows
