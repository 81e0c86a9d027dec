"""What the archive promises, with real servers that are killed, frozen, restarted and robbed of their database."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS, Candle, Candles, Mode, Series, Slot, Tick, candle_of, merge_all
from marketflow.resources import resource
from marketflow.stores.postgres import migrations, writer
from marketflow.stores.postgres.connections.bounded_connection import ANSWER_SECONDS, BoundedConnection
from marketflow.stores.postgres.reader import READ_SECONDS, PostgresReader
from marketflow.stores.postgres.rows import CONNECT_SECONDS, connection_keywords
from marketflow.stores.postgres.writer import BATCHES_AT_ONCE, PostgresWriter
from tests.support.market import BTC, ETH, MINUTE
from tests.support.oracle import candle_of_ticks, candles_of_ticks
from tests.support.servers import PostgresServer, wait_until

T = TypeVar("T")
Keywords = dict[str, Any]
DDL = resource("ddl")
LAST = Series(Mode.LIVE, "exchange3", "BTCUSDT")
TEST_BTC = BTC._replace(mode=Mode.TEST)
ODD = Series(Mode.LIVE, "'); drop table aggregates; --", 'B"T\\C%s%(mode)s{}\n')


def minute(number: int = 0, ticks: int = 3, series: Series = BTC, price: float = 100.0) -> Candles:
    """One row of `ticks` ticks, a second apart, with rising prices."""
    start = MINUTE + number * MINUTE_MS
    rising = [Tick(price + i, start + i * 1000, i) for i in range(ticks)]
    return {Slot(series, start): candle_of_ticks(rising)}


def hour(ticks: int = 3, series: Series = BTC) -> Candles:
    return merge_all(minute(number, ticks, series) for number in range(60))


@contextmanager
def archive_at(place: Keywords, batch_size: int = 500, ddl: Path = DDL) -> Iterator[PostgresWriter]:
    """The archive of one run."""
    with closing(PostgresWriter(connection_keywords(**place), ddl, batch_size)) as archive:
        yield archive


def query(place: Keywords, text: str, *parameters: object) -> list[tuple[Any, ...]]:
    with psycopg.connect(**place, autocommit=True) as connection:
        cursor = connection.execute(text, parameters)
        return cursor.fetchall() if cursor.description else []


def ask(place: Keywords, question: Callable[[PostgresReader], Awaitable[T]]) -> T:
    """What a reader answers that lives for one question."""

    async def answer() -> T:
        reader = PostgresReader(connection_keywords(**place))
        await reader.open()
        try:
            return await question(reader)
        finally:
            await reader.close()

    return asyncio.run(answer())


def stored(place: Keywords, series: Series = BTC) -> Candle | None:
    """All rows of a series as one candle."""
    return ask(place, lambda reader: reader.summary([series], 0, 2**42))[0]


def count(place: Keywords) -> int:
    number: int = query(place, "select count(*) from aggregates")[0][0]
    return number


def assert_same(candle: Candle | None, expected: Candle | None) -> None:
    """Equal, with the total up to 1e-9 of itself; rows do not keep sequences."""
    if candle is None or expected is None:
        assert candle is expected
        return
    assert math.isclose(candle.total, expected.total, rel_tol=1e-9)
    for name in Candle.__struct_fields__:
        if name not in ("total", "first_sequence", "last_sequence", "version"):
            assert getattr(candle, name) == getattr(expected, name), name


def available(archive: PostgresWriter) -> bool:
    return archive.available


def writes_again(archive: PostgresWriter, minutes: Candles) -> bool:
    try:
        archive.write(minutes)
    except Unavailable:
        return False
    return True


@pytest.fixture
def archive(postgres_db: Keywords) -> Iterator[PostgresWriter]:
    """An archive on an empty database, schema applied."""
    with archive_at(postgres_db) as archive:
        archive.write({})
        yield archive


@pytest.fixture
def server(server_folder: Path, postgres_template: Path) -> Iterator[PostgresServer]:
    """A PostgreSQL of the test's own."""
    with PostgresServer(server_folder / "postgres", postgres_template) as server:
        yield server


@pytest.fixture
def ddl(tmp_path: Path) -> Path:
    """A folder with one file that cannot be applied twice."""
    (tmp_path / "0001_one.sql").write_text("create table one (x int)")
    return tmp_path


# The schema


def test_the_table_is_as_the_contract_says(archive: PostgresWriter, postgres_db: Keywords) -> None:
    columns = query(
        postgres_db,
        "select column_name, data_type, is_nullable from information_schema.columns where table_name = 'aggregates'",
    )
    assert set(columns) == {
        *((name, "text", "NO") for name in ("pair_name", "exchange", "mode")),
        ("timestamp", "timestamp with time zone", "NO"),
        *((f"{kind}_price", "double precision", "NO") for kind in ("min", "max", "open", "close")),
        ("average_price", "double precision", "YES"),
        ("tick_count", "bigint", "YES"),
        ("version", "integer", "NO"),
        *((name, "double precision", "YES") for name in ("volume", "turnover", "buy_volume", "buy_turnover")),
        ("source", "text", "NO"),
        ("verified", "boolean", "YES"),
        ("venue_values", "ARRAY", "YES"),
        *((f"{kind}_at", "timestamp with time zone", "YES") for kind in ("open", "close", "min", "max")),
    }
    ((key,),) = query(
        postgres_db,
        "select pg_get_constraintdef(oid) from pg_constraint where contype = 'p' and conrelid = 'aggregates'::regclass",
    )
    assert key == 'PRIMARY KEY (exchange, pair_name, mode, "timestamp")'


def test_each_file_is_applied_once_and_recorded(postgres_db: Keywords, ddl: Path) -> None:
    with archive_at(postgres_db, ddl=ddl) as archive:
        archive.write({})
        recorded = query(postgres_db, "select name, applied_at, xmin from ddl_applied")
        assert [name for name, *_ in recorded] == ["0001_one.sql"]
    with archive_at(postgres_db, ddl=ddl) as second:
        second.write({})
        assert query(postgres_db, "select name, applied_at, xmin from ddl_applied") == recorded


def test_later_version_applies_new_files_by_name(postgres_db: Keywords, ddl: Path) -> None:
    with archive_at(postgres_db, ddl=ddl) as archive:
        archive.write({})
    (ddl / "0003_three.sql").write_text("alter table one rename column y to z")
    (ddl / "0002_two.sql").write_text("alter table one rename column x to y")
    with archive_at(postgres_db, ddl=ddl) as later:
        later.write({})
    assert query(postgres_db, "select z from one") == []
    names = query(postgres_db, "select name from ddl_applied order by name")
    assert names == [("0001_one.sql",), ("0002_two.sql",), ("0003_three.sql",)]


def test_ten_instances_that_start_at_once_all_succeed(postgres_db: Keywords, ddl: Path) -> None:
    def start(_: int) -> None:
        with archive_at(postgres_db, ddl=ddl) as archive:
            archive.write({})

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(start, range(10)))
    assert query(postgres_db, "select name from ddl_applied") == [("0001_one.sql",)]


def test_a_file_that_fails_leaves_nothing_half_applied(postgres_db: Keywords, ddl: Path, log: list[str]) -> None:
    second = ddl / "0002_two.sql"
    second.write_text("create table two (x int); create table three (x nonsense)")
    with archive_at(postgres_db, ddl=ddl) as archive:
        with pytest.raises(Unavailable, match="nonsense"):
            archive.write({})
        assert query(postgres_db, "select tablename from pg_tables where schemaname = 'public'") == []
        assert not available(archive)
        assert not any("applied" in line for line in log)
        second.write_text("create table two (x int)")
        archive.write({})
        assert available(archive)
    assert query(postgres_db, "select count(*) from ddl_applied") == [(2,)]


@pytest.fixture
def guest(postgres_db: Keywords) -> Iterator[Keywords]:
    """A user of the database without any rights."""
    name = sql.Identifier(f"guest_of_{postgres_db['dbname']}")
    with psycopg.connect(**postgres_db, autocommit=True) as connection:
        connection.execute(sql.SQL("create role {} login password 'guest'").format(name))
        connection.execute("revoke create on schema public from public")
        yield postgres_db | {"user": name.as_string()[1:-1], "password": "guest"}
        connection.execute(sql.SQL("drop owned by {}").format(name))
        connection.execute(sql.SQL("drop role {}").format(name))


def test_user_without_create_right_runs_on_current_schema(
    archive: PostgresWriter, postgres_db: Keywords, guest: Keywords
) -> None:
    grants = (
        f"grant select, insert, update on aggregates to {guest['user']};"
        f"grant select on aggregates_daily, aggregates_hourly, aggregates_rolled_until, ddl_applied to {guest['user']}"
    )
    query(postgres_db, grants)
    with archive_at(guest) as restricted:
        restricted.write(minute())
    assert_same(stored(guest), minute()[Slot(BTC, MINUTE)])


def test_user_without_create_right_needs_existing_tables(guest: Keywords) -> None:
    with archive_at(guest) as archive, pytest.raises(Unavailable, match="permission denied"):
        archive.write({})


def test_a_file_may_take_longer_than_a_row(postgres_db: Keywords, ddl: Path) -> None:
    (ddl / "0002_slow.sql").write_text(f"select pg_sleep({ANSWER_SECONDS + 0.2})")
    with archive_at(postgres_db, ddl=ddl) as archive:
        archive.write({})
    assert query(postgres_db, "select count(*) from ddl_applied") == [(2,)]


def test_server_cancels_a_migration_that_takes_too_long(
    postgres_db: Keywords, ddl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "DDL_SECONDS", 0.5)
    (ddl / "0002_slow.sql").write_text("select pg_sleep(60)")
    with archive_at(postgres_db, ddl=ddl) as archive, pytest.raises(Unavailable, match="statement timeout"):
        archive.write({})


def test_a_slow_file_does_not_hold_up_the_end(postgres_db: Keywords, ddl: Path) -> None:
    (ddl / "0002_slow.sql").write_text("select pg_sleep(60)")
    with archive_at(postgres_db, ddl=ddl) as archive, ThreadPoolExecutor(1) as pool:
        writing = pool.submit(archive.write, {})
        wait_until(lambda: query(postgres_db, "select 1 from pg_stat_activity where wait_event = 'PgSleep'"))
        archive.close()
        assert isinstance(writing.exception(timeout=1), Unavailable)


# Rows


def test_a_row_says_what_its_ticks_were(archive: PostgresWriter, postgres_db: Keywords) -> None:
    ticks = [Tick(0.1, MINUTE + 59_999, 4), Tick(0.7, MINUTE + 1, 1), Tick(0.05, MINUTE + 30_000, 2)]
    archive.write({Slot(BTC, MINUTE): candle_of_ticks(ticks)})
    ((average, *row),) = query(
        postgres_db,
        "select average_price, pair_name, exchange, mode, timestamp, min_price, max_price, open_price, close_price, "
        "tick_count, open_at, close_at, min_at, max_at from aggregates",
    )
    start = datetime(2025, 11, 21, 1, 54, tzinfo=UTC)
    assert row == [
        *("BTCUSDT", "exchange1", "live", start, 0.05, 0.7, 0.7, 0.1, 3),
        start + timedelta(milliseconds=1),
        start + timedelta(milliseconds=59_999),
        start + timedelta(seconds=30),
        start + timedelta(milliseconds=1),
    ]
    assert math.isclose(average * 3, 0.85, rel_tol=1e-9)


def test_times_do_not_depend_on_the_time_zone(archive: PostgresWriter, postgres_db: Keywords) -> None:
    query(postgres_db, f"alter database {postgres_db['dbname']} set timezone = 'Asia/Kathmandu'")
    with archive_at(postgres_db) as elsewhere:
        elsewhere.write(minute())
    assert_same(stored(postgres_db), minute()[Slot(BTC, MINUTE)])
    assert query(postgres_db, "select timestamp at time zone 'UTC' from aggregates") == [
        (datetime(2025, 11, 21, 1, 54),)  # noqa: DTZ001 - what PostgreSQL gives for a time without a zone
    ]


def test_writing_twice_changes_nothing(archive: PostgresWriter, postgres_db: Keywords) -> None:
    archive.write(hour())
    before = query(postgres_db, "select xmin, ctid, aggregates from aggregates order by timestamp")
    archive.write(hour())
    assert query(postgres_db, "select xmin, ctid, aggregates from aggregates order by timestamp") == before
    assert len(before) == 60


def test_more_complete_row_replaces_less_complete_only(archive: PostgresWriter, postgres_db: Keywords) -> None:
    more_complete = minute(ticks=5, price=90.0)
    for version in (minute(ticks=4), more_complete, minute(ticks=4), minute(ticks=5, price=80.0)):
        archive.write(version)
    assert_same(stored(postgres_db), more_complete[Slot(BTC, MINUTE)])


def raise_on(place: Keywords, condition: str, sqlstate: str) -> None:
    """Have the server raise an error for each row that meets a condition."""
    query(
        place,
        f"create or replace function raising() returns trigger language plpgsql as $$ begin if {condition} then "
        f"raise exception 'of class {sqlstate}' using errcode = '{sqlstate}'; end if; return new; end $$",
    )
    query(place, "create trigger raising before insert on aggregates for each row execute function raising()")


def test_a_backlog_goes_in_batches_and_all_or_nothing(postgres_db: Keywords) -> None:
    last = {Slot(BTC, MINUTE + 60 * MINUTE_MS): candle_of(Tick(1.0, MINUTE + 60 * MINUTE_MS, 1))}
    with archive_at(postgres_db, batch_size=7) as archive:
        archive.write({})
        raise_on(postgres_db, "new.max_price = 1", "53100")
        with pytest.raises(Unavailable, match="53100"):
            archive.write(hour() | last)
        assert count(postgres_db) == 0
        archive.write(hour())
        assert count(postgres_db) == 60
        query(postgres_db, "drop trigger raising on aggregates")
        archive.write(hour() | last)
        assert count(postgres_db) == 61


def test_a_backlog_does_not_wait_for_the_answer_to_each_batch(
    postgres_db: Keywords, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside busy threads each wait takes tens of milliseconds."""
    pipelines: list[BoundedConnection] = []
    begin = BoundedConnection.pipeline

    def begun(connection: BoundedConnection) -> AbstractContextManager[psycopg.Pipeline]:
        pipelines.append(connection)
        return begin(connection)

    monkeypatch.setattr(BoundedConnection, "pipeline", begun)
    with archive_at(postgres_db, batch_size=1) as archive:
        archive.write({})
        archive.write(hour())
    assert count(postgres_db) == 60
    assert len(pipelines) == 60 / BATCHES_AT_ONCE


def test_many_rows_are_committed_in_parts_oldest_first(postgres_db: Keywords, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is confirmed when PostgreSQL goes is there, and no row of the transaction that it cut off."""
    monkeypatch.setattr(writer, "ROWS_A_TRANSACTION", 20)
    confirmed: list[Candles] = []

    def on_written(rows: Candles, rejected: int) -> None:
        confirmed.append(rows)
        if len(confirmed) == 2:
            query(postgres_db, terminate)

    terminate = "select pg_terminate_backend(pid, 1000) from pg_stat_activity where application_name = 'marketflow'"
    with archive_at(postgres_db, batch_size=10) as archive:
        with pytest.raises(Unavailable):
            archive.write(dict(reversed(hour().items())), on_written)
        rows = [slot for part in confirmed for slot in part]
        assert rows == [*hour()][:40]
        assert query(postgres_db, "select count(*), max(timestamp) from aggregates") == [
            (40, datetime.fromtimestamp(max(slot.start for slot in rows) / 1000, UTC))
        ]
        archive.write({slot: candle for slot, candle in hour().items() if slot not in rows}, on_written)
    assert len(confirmed) == 3
    assert count(postgres_db) == 60


def test_rows_that_fail_hold_up_no_other_transaction(
    archive: PostgresWriter, postgres_db: Keywords, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are of the oldest minute, and only they are left to be written again."""
    monkeypatch.setattr(writer, "ROWS_A_TRANSACTION", 20)
    raise_on(postgres_db, "new.pair_name = 'ETHUSDT'", "42501")
    left = hour() | minute(series=ETH)

    def on_written(rows: Candles, rejected: int) -> None:
        for slot in rows:
            del left[slot]

    for _ in range(2):
        with pytest.raises(Unavailable, match="1 of"):
            archive.write(dict(left), on_written)
        assert left == minute(series=ETH)
    assert count(postgres_db) == 60


def test_rows_beyond_too_many_failures_are_not_confirmed(
    archive: PostgresWriter, postgres_db: Keywords, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "ROWS_A_TRANSACTION", 20)
    monkeypatch.setattr(writer, "MOST_SUSPECTS", 30)
    raise_on(postgres_db, "true", "42501")
    confirmed: Candles = {}
    with pytest.raises(Unavailable, match="30 or more of 60 rows"):
        archive.write(hour(), lambda rows, rejected: confirmed.update(rows))
    assert not confirmed


# Rows that are refused


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_rejected_row_is_logged_and_others_are_written(postgres_db: Keywords, log: list[str], batch_size: int) -> None:
    with archive_at(postgres_db, batch_size) as archive:
        archive.write({})
        query(postgres_db, "alter table aggregates add constraint no_ether check (pair_name <> 'ETHUSDT')")
        assert archive.write(hour() | minute(30, series=ETH)) == 1
        assert available(archive)
        assert archive.write(hour(ticks=4)) == 0
    assert query(postgres_db, "select pair_name, count(*), min(tick_count) from aggregates group by 1") == [
        ("BTCUSDT", 60, 4)
    ]
    (logged,) = [line for line in log if "refuses" in line]
    for part in ("ETHUSDT", "exchange2", "live", str(MINUTE + 30 * MINUTE_MS), "no_ether"):
        assert part in logged


def test_candle_that_fits_no_row_is_dropped(archive: PostgresWriter, postgres_db: Keywords) -> None:
    beyond = 2**60  # a time that is none
    empty = minute(1)[Slot(BTC, MINUTE + MINUTE_MS)]
    absurd = {
        Slot(BTC, beyond): empty,
        Slot(BTC._replace(symbol="\0"), MINUTE): empty,
        Slot(BTC._replace(symbol="no ticks"), MINUTE): msgspec.structs.replace(empty, ticks=0),
        Slot(BTC._replace(symbol="less than none"), MINUTE): msgspec.structs.replace(empty, ticks=-1),
        Slot(BTC._replace(symbol="too many"), MINUTE): msgspec.structs.replace(empty, ticks=2**63),
        Slot(BTC._replace(symbol="no high"), MINUTE): msgspec.structs.replace(empty, high=math.nan),
        Slot(BTC._replace(symbol="no low"), MINUTE): msgspec.structs.replace(empty, low=-math.inf),
        Slot(BTC._replace(symbol="no open"), MINUTE): msgspec.structs.replace(empty, open=math.inf),
    }
    assert archive.write(minute() | absurd) == len(absurd)
    assert_same(stored(postgres_db), minute()[Slot(BTC, MINUTE)])


@pytest.mark.parametrize("sqlstate", ["23514", "22003", "P0001", "44000"])
def test_an_error_about_a_row_costs_that_row(archive: PostgresWriter, postgres_db: Keywords, sqlstate: str) -> None:
    raise_on(postgres_db, "new.pair_name = 'ETHUSDT'", sqlstate)
    assert archive.write(hour() | minute(series=ETH)) == 1
    assert count(postgres_db) == 60


OF_ROWS_OR_THE_SERVER = "42P01 42703 42501 25006 XX000"
OF_THE_SERVER = f"{OF_ROWS_OR_THE_SERVER} 53100 53200 57014 57P03 08006 40001 40P01 55P03"


@pytest.mark.parametrize("sqlstate", OF_THE_SERVER.split())
def test_an_error_about_the_server_costs_no_row(archive: PostgresWriter, postgres_db: Keywords, sqlstate: str) -> None:
    raise_on(postgres_db, "new.pair_name = 'ETHUSDT'", sqlstate)
    with pytest.raises(Unavailable):
        archive.write(hour() | minute(series=ETH))
    assert not available(archive)
    assert count(postgres_db) == (60 if sqlstate in OF_ROWS_OR_THE_SERVER.split() else 0)
    query(postgres_db, "drop trigger raising on aggregates")
    assert archive.write(hour() | minute(series=ETH)) == 0
    assert count(postgres_db) == 61


def test_rejection_is_logged_after_other_rows_are_written(
    archive: PostgresWriter, postgres_db: Keywords, log: list[str]
) -> None:
    raise_on(postgres_db, "new.pair_name = 'ETHUSDT'", "23514")
    archive.write(minute(series=LAST))
    with psycopg.connect(**postgres_db) as locking:
        locking.execute("select * from aggregates for update")
        with pytest.raises(Unavailable):  # the row of ETH comes before the one that is locked
            archive.write(minute(series=ETH) | minute(series=LAST, ticks=4))
        assert not [line for line in log if "refuses" in line]
    assert archive.write(minute(series=ETH) | minute(series=LAST, ticks=4)) == 1


def test_two_writers_that_go_opposite_ways_do_not_deadlock(postgres_db: Keywords) -> None:
    series = [BTC._replace(symbol=f"S{number}") for number in range(5)]

    def write(backwards: bool) -> None:
        with archive_at(postgres_db, batch_size=10) as archive:
            for ticks in range(1, 8):
                rows = [item for each in series for item in hour(ticks, each).items()]
                archive.write(dict(reversed(rows) if backwards else rows))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, [False, True]))
    assert query(postgres_db, "select count(*), min(tick_count) from aggregates") == [(300, 7)]


def test_the_next_run_finds_the_recent_minutes_of_all_series(archive: PostgresWriter, postgres_db: Keywords) -> None:
    written = [minute(number, series=series) for number in range(3) for series in (BTC, ETH, TEST_BTC, ODD)]
    archive.write(merge_all(written))
    with archive_at(postgres_db) as next_run:
        found = next_run.recent([BTC, ETH, TEST_BTC, ODD], MINUTE + MINUTE_MS)
    expected = merge_all(written[4:])
    assert found.keys() == expected.keys()
    for slot, candle in found.items():
        assert_same(candle, expected[slot])


def test_the_first_run_finds_no_minutes(postgres_db: Keywords) -> None:
    with archive_at(postgres_db) as archive:
        assert archive.recent([BTC], 0) == {}


def test_names_with_quotes_and_sql_in_them_are_only_data(archive: PostgresWriter, postgres_db: Keywords) -> None:
    archive.write(minute(series=ODD) | minute(series=BTC, ticks=1))
    assert query(postgres_db, "select exchange, pair_name from aggregates where tick_count = 3") == [ODD[1:]]
    assert_same(stored(postgres_db, ODD), minute()[Slot(BTC, MINUTE)])
    (last,) = ask(postgres_db, lambda reader: reader.last([ODD]))
    assert last == Tick(102.0, MINUTE + 2000, 0)


# Outages of PostgreSQL, as the writer sees them


def test_a_write_without_rows_connects_and_prepares(postgres_db: Keywords) -> None:
    with archive_at(postgres_db) as archive:
        assert not available(archive)
        archive.write({})
        assert available(archive)
    assert count(postgres_db) == 0


def test_first_write_after_server_restart_succeeds(server: PostgresServer) -> None:
    with archive_at(server.keywords) as archive:
        archive.write(minute(0))
        server.kill()
        with pytest.raises(Unavailable):
            archive.write(minute(1))
        assert not available(archive)
        for call in (lambda: archive.write({}), lambda: archive.recent([BTC], 0)):
            with pytest.raises(Unavailable):
                call()
        server.start()
        assert archive.recent([BTC], 0).keys() == minute(0).keys()
        archive.write(minute(1))
        assert available(archive)
    assert count(server.keywords) == 2


def test_the_first_write_after_its_idle_connection_was_terminated_succeeds(
    archive: PostgresWriter, postgres_db: Keywords
) -> None:
    terminated = "select pg_terminate_backend(pid, 1000) from pg_stat_activity where application_name = 'marketflow'"
    assert query(postgres_db, terminated) == [(True,)]
    archive.write(minute())
    assert count(postgres_db) == 1


def test_write_to_frozen_server_ends_in_time_and_succeeds_later(server: PostgresServer) -> None:
    with archive_at(server.keywords) as archive:
        archive.write(minute(0))
        server.pause()
        for patience in (ANSWER_SECONDS, CONNECT_SECONDS):  # on the connection there is, then on a new one
            began = time.monotonic()
            with pytest.raises(Unavailable):
                archive.write(minute(1))
            assert time.monotonic() - began < patience + 0.4
        server.resume()
        assert wait_until(lambda: writes_again(archive, minute(1)))
    assert count(server.keywords) == 2


def test_write_waits_for_one_answer_of_a_server_that_freezes(
    server: PostgresServer,
) -> None:
    with archive_at(server.keywords) as archive, ThreadPoolExecutor(1) as pool:
        archive.write(minute(0))
        with server.connect() as locking, locking.transaction():
            locking.execute("lock table aggregates in exclusive mode")
            writing = pool.submit(archive.write, minute(1))
            wait_until(lambda: query(server.keywords, "select 1 from pg_locks where not granted"))
            server.pause()
            began = time.monotonic()
            assert isinstance(writing.exception(), Unavailable)
            assert time.monotonic() - began < ANSWER_SECONDS + 0.4
            server.resume()
        assert wait_until(lambda: writes_again(archive, minute(1)))
    assert count(server.keywords) == 2


def test_a_day_of_rows_is_written_in_time(archive: PostgresWriter, postgres_db: Keywords) -> None:
    series = [Series(Mode.LIVE, f"exchange{n}", f"S{m}") for n in range(3) for m in range(5)]
    day = merge_all(minute(number, series=each) for number in range(24 * 60) for each in series)
    began = time.monotonic()
    archive.write(day)
    assert time.monotonic() - began < 5
    assert count(postgres_db) == len(day) == 21_600


@pytest.mark.parametrize("wrong", [{"password": "battery staple"}, {"dbname": "nowhere"}, {"user": "nobody"}])
def test_wrong_address_is_unavailable_without_showing_password(
    postgres_db: Keywords, wrong: Keywords, log: list[str]
) -> None:
    place = postgres_db | wrong
    with archive_at(place) as archive, pytest.raises(Unavailable) as raised:
        archive.write(minute())
    with pytest.raises(Unavailable) as of_reader:
        ask(place, lambda reader: reader.ping())
    shown = f"{raised.value} {of_reader.value} {log}"
    assert place["password"] not in shown
    assert place["user"] in str(raised.value) or place["dbname"] in str(raised.value)


def test_recreated_database_gets_the_schema_again(
    archive: PostgresWriter, postgres_db: Keywords, postgres_server: PostgresServer
) -> None:
    archive.write(minute(0))
    name = sql.Identifier(postgres_db["dbname"])
    with postgres_server.connect() as connection:
        connection.execute(sql.SQL("drop database {} with (force)").format(name))
        connection.execute(sql.SQL("create database {}").format(name))
    with pytest.raises(Unavailable):
        archive.write(minute(1))
    archive.write(minute(1))
    assert count(postgres_db) == 1


def test_first_write_with_rows_notices_a_dropped_table(archive: PostgresWriter, postgres_db: Keywords) -> None:
    query(postgres_db, "drop table aggregates, ddl_applied")
    with pytest.raises(Unavailable):
        archive.write(minute())
    archive.write(minute())
    assert count(postgres_db) == 1


def sessions(place: Keywords) -> int:
    """How many connections of MarketFlow the server knows."""
    text = (
        "select count(*) from pg_stat_activity where datname = current_database() and application_name = 'marketflow'"
    )
    number: int = query(place, text)[0][0]
    return number


def test_writes_to_locked_table_end_and_leave_no_waiting_session(
    archive: PostgresWriter, postgres_db: Keywords
) -> None:
    with psycopg.connect(**postgres_db) as locking:
        locking.execute("lock table aggregates")
        began = time.monotonic()
        with pytest.raises(Unavailable):
            archive.write(minute())
        assert time.monotonic() - began < ANSWER_SECONDS + 0.4
        wait_until(lambda: sessions(postgres_db) == 0, timeout=1)
    archive.write(minute())


def test_database_that_rejects_every_write_is_not_ready(
    archive: PostgresWriter, postgres_db: Keywords, log: list[str]
) -> None:
    raise_on(postgres_db, "true", "25006")
    archive.close()
    for _ in range(3):
        with pytest.raises(Unavailable, match="1 of 1 rows cannot be written"):
            archive.write(minute())
        assert not available(archive)
    query(postgres_db, "drop trigger raising on aggregates")
    archive.write(minute())
    assert available(archive)
    assert not any("ready" in line for line in log)  # the pipeline logs the end of an outage


def test_rows_of_a_vanished_writer_are_unlocked(archive: PostgresWriter, postgres_db: Keywords) -> None:
    with archive._connected() as vanished:  # what a write leaves when the network eats the rest of it
        vanished.execute("begin")
        archive._upsert(vanished, list(minute().items()), most_suspects=1)
    with archive_at(postgres_db) as other:
        assert wait_until(lambda: writes_again(other, minute()), timeout=5)
    assert count(postgres_db) == 1


# The reader

ticks_of_series = st.lists(
    st.tuples(
        st.sampled_from([BTC, TEST_BTC, ETH]),
        st.builds(
            Tick,
            st.sampled_from([0.1, 0.25, 99.5, 100.0, 1e-9, 123456.789]) | st.floats(1e-6, 1e6),
            st.integers(MINUTE, MINUTE + 4 * MINUTE_MS - 1),
            st.integers(0, 1000),
        ),
    ),
    max_size=30,
    unique_by=lambda item: (item[0], item[1].at),  # rows keep no order of arrival
)
bounds = st.integers(-1, 5).map(lambda number: MINUTE + number * MINUTE_MS) | st.integers(
    MINUTE, MINUTE + 5 * MINUTE_MS
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ticks_of_series, bounds, bounds)
def test_summary_is_the_candle_of_all_its_ticks(
    archive: PostgresWriter, postgres_db: Keywords, ticks: list[tuple[Series, Tick]], since: int, until: int
) -> None:
    query(postgres_db, "truncate aggregates")
    archive.write(candles_of_ticks(ticks, MINUTE_MS))
    asked = [ETH, BTC, TEST_BTC]
    answers = ask(postgres_db, lambda reader: reader.summary(asked, since, until))
    for series, answer in zip(asked, answers, strict=True):
        within = [t for s, t in ticks if s == series and since <= t.at - t.at % MINUTE_MS < until]
        assert_same(answer, candle_of_ticks(within) if within else None)


def test_last_price_is_close_of_last_minute(archive: PostgresWriter, postgres_db: Keywords) -> None:
    archive.write(minute(0) | minute(2, ticks=1, price=5.0) | minute(1) | minute(3, series=TEST_BTC))
    answers = ask(postgres_db, lambda reader: reader.last([ETH, BTC]))
    assert answers == [None, Tick(5.0, MINUTE + 2 * MINUTE_MS, 0)]


def test_rows_without_times_carry_start_of_their_minute(archive: PostgresWriter, postgres_db: Keywords) -> None:
    for number in range(2):
        query(
            postgres_db,
            "insert into aggregates (pair_name, exchange, mode, timestamp, average_price, min_price, max_price, "
            "open_price, close_price, tick_count) values ('BTCUSDT', 'exchange1', 'live', "
            "timestamptz '2025-11-21 01:54Z' + %s * interval '1 minute', 2, 1, 3, 1.5, 2.5, 4)",
            number,
        )
    second = MINUTE + MINUTE_MS
    assert stored(postgres_db) == Candle(1.5, 3.0, 1.0, 2.5, 16.0, 8, MINUTE, second, MINUTE, MINUTE, 0, 0)
    assert ask(postgres_db, lambda reader: reader.last([BTC])) == [Tick(2.5, second, 0)]


def test_query_of_no_series_has_no_answers(archive: PostgresWriter, postgres_db: Keywords) -> None:
    assert ask(postgres_db, lambda reader: reader.summary([], 0, MINUTE)) == []
    assert ask(postgres_db, lambda reader: reader.last([])) == []


def test_last_is_the_close_of_the_last_minute(postgres_db: Keywords, archive: PostgresWriter) -> None:
    """Whatever the times of the closes: by them all rows of a series would have to be sorted."""
    archive.write(minute(0, price=2.0) | minute(1, price=1.0))
    query(postgres_db, "update aggregates set close_at = close_at + interval '10 minutes' where close_price = 4")
    (last,) = ask(postgres_db, lambda reader: reader.last([BTC]))
    assert last is not None
    assert last.price == 3


def test_database_without_schema_is_unavailable(postgres_db: Keywords) -> None:
    async def question(reader: PostgresReader) -> list[Candle | None]:
        await reader.ping()
        for asked in (reader.summary([BTC], 0, MINUTE), reader.last([BTC])):
            with pytest.raises(Unavailable, match="no schema yet"):
                await asked
        with archive_at(postgres_db) as archive:
            archive.write({})
        return await reader.summary([BTC], 0, MINUTE)

    assert ask(postgres_db, question) == [None]


def test_requests_for_locked_table_leave_no_waiting_query(archive: PostgresWriter, postgres_db: Keywords) -> None:
    waiting = (
        "select 1 from pg_stat_activity where datname = current_database() and state = 'active' "
        "and application_name = 'marketflow'"
    )

    async def question(reader: PostgresReader) -> list[Tick | None]:
        with psycopg.connect(**postgres_db) as locking:
            locking.execute("lock table aggregates")
            began = time.monotonic()
            answers = await asyncio.gather(*(reader.last([BTC]) for _ in range(20)), return_exceptions=True)
            assert {type(answer) for answer in answers} == {Unavailable}
            assert time.monotonic() - began < READ_SECONDS + 0.3
            await asyncio.to_thread(wait_until, lambda: query(postgres_db, waiting) == [], 2.0)
        return await reader.last([BTC])

    assert ask(postgres_db, question) == [None]


async def answers_again(reader: PostgresReader, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return await reader.ping()
        except Unavailable:
            assert time.monotonic() < deadline, f"no answer within {seconds} s"
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("requests", [1, 50])
def test_requests_to_frozen_server_end_in_time_and_recover(server: PostgresServer, requests: int) -> None:
    with archive_at(server.keywords) as archive:
        archive.write(minute())

    async def question(reader: PostgresReader) -> None:
        await reader.ping()
        server.pause()
        began = time.monotonic()
        asked = [reader.summary([BTC, ETH], 0, 2**42) for _ in range(requests)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert time.monotonic() - began < READ_SECONDS + 0.3
        assert {type(answer) for answer in answers} == {Unavailable}
        server.resume()
        await answers_again(reader, 5.0)
        assert_same((await reader.summary([BTC], 0, 2**42))[0], minute()[Slot(BTC, MINUTE)])

    ask(server.keywords, question)


def test_ping_of_postgresql_does_not_wait_behind_queries(server: PostgresServer) -> None:
    async def question(reader: PostgresReader) -> None:
        await reader.ping()
        slow = [asyncio.create_task(reader._fetch([("select pg_sleep(0.6)", {})])) for _ in range(40)]
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await reader.ping()
        assert time.monotonic() - began < 0.5
        await asyncio.gather(*slow, return_exceptions=True)

    ask(server.keywords, question)


def test_a_reader_closes_in_time_while_the_server_is_frozen(server: PostgresServer) -> None:
    async def question() -> float:
        reader = PostgresReader(connection_keywords(**server.keywords))
        await reader.open()
        await reader.ping()
        server.pause()
        with pytest.raises(Unavailable):
            await reader.ping()
        began = time.monotonic()
        await reader.close()
        return time.monotonic() - began

    began = time.monotonic()
    assert asyncio.run(question()) < 1.5
    took = time.monotonic() - began
    server.resume()
    assert took < READ_SECONDS + 1.5


def test_cancelled_request_ends_at_once_and_affects_no_other(server: PostgresServer) -> None:
    async def question(reader: PostgresReader) -> None:
        await reader.ping()
        server.pause()
        task = asyncio.create_task(reader.ping())
        await asyncio.sleep(0)
        began = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - began < 0.2
        server.resume()
        await answers_again(reader, 5.0)

    ask(server.keywords, question)


def test_reader_works_within_seconds_of_server_restart(server: PostgresServer) -> None:
    async def question(reader: PostgresReader) -> None:
        await reader.ping()
        server.kill()
        with pytest.raises(Unavailable):
            await reader.ping()
        await asyncio.to_thread(server.start)
        await answers_again(reader, 5.0)

    ask(server.keywords, question)


def test_reader_works_within_seconds_of_a_late_server_start(server_folder: Path, postgres_template: Path) -> None:
    server = PostgresServer(server_folder / "postgres", postgres_template)

    async def question(reader: PostgresReader) -> None:
        for _ in range(3):  # longer than the pool keeps trying
            began = time.monotonic()
            with pytest.raises(Unavailable):
                await reader.ping()
            assert time.monotonic() - began < READ_SECONDS + 0.3
        await asyncio.to_thread(server.start)
        await answers_again(reader, 5.0)

    try:
        ask(server.keywords, question)
    finally:
        server.stop()


def test_many_more_requests_than_connections_are_answered(archive: PostgresWriter, postgres_db: Keywords) -> None:
    archive.write(hour())

    async def at_once(reader: PostgresReader) -> list[list[Tick | None]]:
        return await asyncio.gather(*(reader.last([BTC]) for _ in range(200)))

    assert ask(postgres_db, at_once) == [[Tick(102.0, MINUTE + 59 * MINUTE_MS + 2000, 0)]] * 200
