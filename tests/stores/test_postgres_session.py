"""What is stored and answered does not depend on the defaults of a server, a database, a role or a pooler."""

import asyncio
import os
import resource as limits
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from marketflow.cli.export.row_reader import RowFilter, find_series, read_blocks, snapshot
from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS, Candle, Candles, Mode, Series, Slot
from marketflow.resources import resource
from marketflow.stores.ports import CandleRange
from marketflow.stores.postgres import reader
from marketflow.stores.postgres.connections import session
from marketflow.stores.postgres.connections.bounded_connection import BoundedConnection
from marketflow.stores.postgres.reader import PostgresReader
from marketflow.stores.postgres.rollups import PostgresRollups
from marketflow.stores.postgres.rows import DAY_MS, connection_keywords
from marketflow.stores.postgres.writer import PostgresWriter
from tests.support.core_waits import CoreWaits
from tests.support.pgbouncer import pgbouncer
from tests.support.servers import HOST, PostgresServer

DAY = 1_763_683_200_000  # midnight, UTC
SERIES = Series(Mode.LIVE, "exchänge1", "BTCUSDT")
PRICE = 100.00000000000003  # all digits of which are needed

HOSTILE = {
    "datestyle": "SQL, DMY",
    "intervalstyle": "sql_standard",
    "timezone": "Asia/Kathmandu",
    "extra_float_digits": "0",
    "bytea_output": "escape",
    "client_encoding": "LATIN1",
    "standard_conforming_strings": "off",
    "search_path": "nowhere",
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "default_transaction_deferrable": "on",
    "statement_timeout": "1ms",
    "lock_timeout": "1ms",
    "idle_in_transaction_session_timeout": "1ms",
    "idle_session_timeout": "1ms",
    "transform_null_equals": "on",
    "array_nulls": "off",
    "lc_numeric": "C",
    "plan_cache_mode": "force_custom_plan",
}


@pytest.fixture(autouse=True)
def patient_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait longer for answers than a request does: no test here is about time, and the machine may be busy."""
    monkeypatch.setattr(reader, "READ_SECONDS", 30.0)


def minutes(count: int = 3) -> Candles:
    return {
        Slot(SERIES, DAY + n * MINUTE_MS): Candle(
            PRICE, PRICE, PRICE, PRICE, PRICE * 2, 2, DAY + n * MINUTE_MS + 7, DAY + n * MINUTE_MS + 9, 0, 0, 1, 2
        )
        for n in range(count)
    }


def set_defaults(place: dict[str, Any], settings: dict[str, str]) -> None:
    """Make these the defaults of the database, for everybody who connects from now on."""
    with psycopg.connect(**place, autocommit=True) as connection:
        for name, value in settings.items():
            values = (
                sql.SQL(", ").join(map(sql.Literal, value.split(", "))) if name == "datestyle" else sql.Literal(value)
            )
            connection.execute(
                sql.SQL("alter database {} set {} to {}").format(
                    sql.Identifier(place["dbname"]),
                    sql.Identifier(name),
                    sql.Literal(value) if name != "search_path" else values,
                )
            )


def write_and_read(keywords: dict[str, Any]) -> None:
    """Write minutes, roll them up, and read all of it back in every way there is."""
    written = minutes()
    with closing(PostgresWriter(keywords, resource("ddl"), 2)) as archive:
        assert archive.write(written) == 0
        found = archive.recent([SERIES], DAY)
        assert {slot: (each.close, each.ticks) for slot, each in found.items()} == dict.fromkeys(written, (PRICE, 2))
        assert archive.write(written) == 0
    with closing(PostgresRollups(keywords)) as days:
        while days.roll_up(DAY + 2 * DAY_MS):
            pass

    async def read() -> None:
        reader = PostgresReader(keywords)
        await reader.open()
        try:
            (newest,) = await reader.last([SERIES])
            assert newest is not None
            assert (newest.price, newest.at) == (PRICE, DAY + 2 * MINUTE_MS + 9)
            (whole,) = await reader.summary([SERIES], DAY, DAY + DAY_MS)
            assert whole is not None
            assert (whole.high, whole.ticks, whole.first_at) == (PRICE, 6, DAY + 7)
            for length in (MINUTE_MS, 60 * MINUTE_MS, DAY_MS):
                (candles,) = await reader.candles([SERIES], CandleRange(length, DAY, DAY + DAY_MS, 500, False))
                assert min(candles) == DAY
                assert {each.close for each in candles.values()} == {PRICE}
        finally:
            await reader.close()

    asyncio.run(read())


@pytest.mark.parametrize("name", HOSTILE)
def test_default_of_the_database_changes_nothing(postgres_db: dict[str, Any], name: str) -> None:
    set_defaults(postgres_db, {name: HOSTILE[name]})
    write_and_read(connection_keywords(**postgres_db))


def test_all_hostile_defaults_together_change_nothing(postgres_db: dict[str, Any]) -> None:
    set_defaults(postgres_db, dict(reversed(HOSTILE.items())))
    write_and_read(connection_keywords(**postgres_db))


@pytest.mark.parametrize("pooled", [False, True])
def test_timeouts_of_the_database_end_nothing(server_folder: Path, postgres_db: dict[str, Any], pooled: bool) -> None:
    """They apply until the first statement of the session, or of each transaction at a pooler, has changed them.

    Timeouts of 1 ms would end statements that a busy machine delays, so the test reads the values in force instead.
    """
    set_defaults(postgres_db, {"transaction_timeout": "3s", "statement_timeout": "3s"})

    async def read() -> list[list[tuple[Any, ...]]]:
        archive = PostgresReader(keywords)
        await archive.open()
        try:
            return await archive._fetch([("show transaction_timeout", {}), ("show statement_timeout", {})])
        finally:
            await archive.close()

    with ExitStack() as stack:
        place = stack.enter_context(pgbouncer(server_folder, postgres_db)) if pooled else postgres_db
        keywords = connection_keywords(**place, prepared_statements=not pooled)
        with closing(BoundedConnection.open(keywords)) as connection, connection.pinned():
            assert connection.execute("show transaction_timeout").fetchall() == [("0",)]
            assert connection.execute("show statement_timeout").fetchall() == [("1800ms",)]
        assert asyncio.run(read()) == [[("0",)], [("0",)]]


def test_database_in_sql_ascii_is_served(postgres_server: PostgresServer) -> None:
    with postgres_server.connect() as connection:
        connection.execute(
            "create database ascii template template0 encoding 'SQL_ASCII' locale 'C' locale_provider libc"
        )
    try:
        write_and_read(connection_keywords(**postgres_server.keywords | {"dbname": "ascii"}))
    finally:
        with postgres_server.connect() as connection:
            connection.execute("drop database ascii with (force)")


def test_tables_are_in_the_schema_of_the_settings(postgres_db: dict[str, Any]) -> None:
    write_and_read(connection_keywords(**postgres_db, schema="prices"))
    with psycopg.connect(**postgres_db) as connection:
        found = connection.execute("select schemaname from pg_tables where tablename like 'aggregates%'").fetchall()
        assert set(found) == {("prices",)}
        assert connection.execute("select count(*) from prices.aggregates_daily").fetchall() == [(1,)]


def test_two_schemas_of_one_database_are_apart(postgres_db: dict[str, Any]) -> None:
    for schema in ("first", "second", "public"):
        write_and_read(connection_keywords(**postgres_db, schema=schema))


def test_old_server_is_refused_by_name(postgres_db: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "OLDEST_VERSION", 99)
    archive = PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 2)
    with closing(archive), pytest.raises(Unavailable, match="is too old; 99 is the oldest version that will do"):
        archive.write({})


# --- Unexpected errors


@pytest.mark.parametrize(
    "error", [NotImplementedError("no loader"), RuntimeError("odd"), KeyError("x"), OSError(9, "bad")]
)
def test_any_connection_error_is_an_outage_and_reconnects(postgres_db: dict[str, Any], error: Exception) -> None:
    with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 2)) as archive:
        archive.write({})
        with archive._connection.opened() as first:
            pass
        with pytest.raises(Unavailable, match=type(error).__name__), archive._connection.opened():
            raise error
        assert first.closed
        assert archive.write(minutes()) == 0


@pytest.fixture
def many_open_files() -> Iterator[None]:
    """More files than `select` takes numbers for."""
    soft, hard = limits.getrlimit(limits.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip("the limit of open files cannot be raised")
    limits.setrlimit(limits.RLIMIT_NOFILE, (max(soft, 2000), hard))
    with ExitStack() as stack:
        for _ in range(1100):
            stack.enter_context(open(os.devnull))
        yield
    limits.setrlimit(limits.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_open_files")
def test_connection_with_a_high_file_descriptor_writes(postgres_db: dict[str, Any]) -> None:
    with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 2)) as archive:
        assert archive.write(minutes()) == 0
        assert archive.write(minutes(4)) == 0
        assert len(archive.recent([SERIES], DAY)) == 4


# --- Transaction pooling


def test_pooler_with_transactions_serves_writer_and_readers(server_folder: Path, postgres_db: dict[str, Any]) -> None:
    set_defaults(postgres_db, {"datestyle": "SQL, DMY", "extra_float_digits": "0", "timezone": "Asia/Kathmandu"})
    with pgbouncer(server_folder, postgres_db) as place:
        keywords = connection_keywords(**place, schema="prices", prepared_statements=False)
        write_and_read(keywords)

        async def read(reader: PostgresReader) -> int:
            answers = 0
            for number in range(150):
                whole, newest = await reader.summary([SERIES], DAY + number, DAY + DAY_MS), await reader.last([SERIES])
                assert whole[0] is not None
                assert newest[0] is not None
                assert newest[0].price == PRICE
                answers += 1
            return answers

        def reading(_: int) -> int:
            async def all_of_it() -> int:
                reader = PostgresReader(keywords, max_size=2)
                await reader.open()
                try:
                    return await read(reader)
                finally:
                    await reader.close()

            return asyncio.run(all_of_it())

        with ThreadPoolExecutor(6) as readers, closing(PostgresWriter(keywords, resource("ddl"), 2)) as archive:
            working = readers.map(reading, range(6))
            for count in range(3, 30):
                assert archive.write(minutes(count)) == 0
            assert list(working) == [150] * 6


def test_session_settings_do_not_leak_through_a_pooler(server_folder: Path, postgres_db: dict[str, Any]) -> None:
    with pgbouncer(server_folder, postgres_db, default_pool_size=1) as place:

        def session() -> list[tuple[Any, ...]]:
            with psycopg.connect(**place, autocommit=True, prepare_threshold=None) as other:
                return (
                    other.execute(
                        "select name, setting from pg_settings where source = 'session' and name <> 'application_name'"
                        " and name <> 'client_encoding'"
                    ).fetchall()
                    + other.execute("select name from pg_prepared_statements").fetchall()
                )

        before = session()
        write_and_read(connection_keywords(**place, schema="prices", prepared_statements=False))
        assert session() == before


def test_pooler_is_named_where_settings_expect_sessions(server_folder: Path, postgres_db: dict[str, Any]) -> None:
    with pgbouncer(server_folder, postgres_db) as place:
        archive = PostgresWriter(connection_keywords(**place), resource("ddl"), 2)
        with closing(archive), pytest.raises(Unavailable, match="unsupported startup parameter"):
            archive.write({})


@pytest.mark.parametrize(
    ("name", "value"),
    [("PGDATESTYLE", "SQL, DMY"), ("PGTZ", "Asia/Kathmandu"), ("PGOPTIONS", "-c search_path=nowhere")],
)
@pytest.mark.parametrize("pooled", [False, True])
def test_environment_of_libpq_changes_nothing(
    server_folder: Path,
    postgres_db: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    pooled: bool,
) -> None:
    with ExitStack() as stack:
        place = stack.enter_context(pgbouncer(server_folder, postgres_db)) if pooled else postgres_db
        monkeypatch.setenv(name, value)
        write_and_read(connection_keywords(**place, prepared_statements=not pooled))
        with (
            closing(BoundedConnection.open(connection_keywords(**place, prepared_statements=not pooled))) as connection,
            connection.pinned(),
        ):
            assert connection.execute("show timezone").fetchall() == [("UTC",)]
            assert connection.execute("select timestamptz '2026-11-28 08:00:00Z'::text").fetchall() == [
                ("2026-11-28 08:00:00+00",)
            ]


def test_pooler_that_drops_startup_options_is_served(server_folder: Path, postgres_db: dict[str, Any]) -> None:
    """Many are configured so, for other drivers: the session is then not the one that was asked for."""
    set_defaults(postgres_db, {"timezone": "Asia/Kathmandu", "search_path": "nowhere", "extra_float_digits": "0"})
    with pgbouncer(server_folder, postgres_db, ignore_startup_parameters="extra_float_digits,options") as place:
        for _ in range(3):
            write_and_read(connection_keywords(**place))
        with psycopg.connect(**place, autocommit=True, prepare_threshold=None) as other:
            assert other.execute("select name from pg_prepared_statements").fetchall() == []
            assert other.execute("show search_path").fetchall() == [("nowhere",)]


def test_pooler_and_hostile_defaults_change_nothing(server_folder: Path, postgres_db: dict[str, Any]) -> None:
    set_defaults(postgres_db, {k: v for k, v in HOSTILE.items() if v != "1ms"})
    with pgbouncer(server_folder, postgres_db) as place:
        write_and_read(connection_keywords(**place, prepared_statements=False))


# --- Old servers


@contextmanager
def postgres_13() -> Iterator[int]:
    """The port of what greets as PostgreSQL 13 does: a setting of 14 in the request for a connection ends it."""

    def message(kind: bytes, body: bytes) -> bytes:
        return kind + struct.pack("!i", len(body) + 4) + body

    def serve(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client, suppress(struct.error):
                    while (code := struct.unpack("!i", (request := _request(client))[:4])[0]) in (80877103, 80877104):
                        client.sendall(b"N")  # neither TLS nor GSS
                    assert code == 3 << 16
                    if b"idle_session_timeout" in request:
                        text = b'SFATAL\0C42704\0Mparametro "idle_session_timeout" non riconosciuto\0\0'
                        client.sendall(message(b"E", text))
                    else:
                        client.sendall(message(b"R", struct.pack("!i", 0)))
                        client.sendall(message(b"S", b"server_version\0" + b"13.23\0"))
                        client.sendall(message(b"Z", b"I"))
                        client.recv(1024)

    with socket.create_server((HOST, 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def _request(client: socket.socket) -> bytes:
    (length,) = struct.unpack("!i", client.recv(4, socket.MSG_WAITALL))
    return client.recv(length - 4, socket.MSG_WAITALL)


@pytest.mark.parametrize("prepared_statements", [True, False])
def test_minimum_is_named_for_a_server_without_its_settings(prepared_statements: bool) -> None:
    with postgres_13() as port:
        place = connection_keywords(HOST, port, "me", "", "db", prepared_statements=prepared_statements)
        archive = PostgresWriter(place, resource("ddl"), 2)
        with closing(archive), pytest.raises(Unavailable, match="too old; 14 is the oldest version that will do"):
            archive.write({})
        with pytest.raises(Unavailable, match="too old; 14 is the oldest version that will do"), snapshot(place):
            pass


# --- Rows that cannot be written


def test_fault_of_all_rows_is_found_without_trying_each(postgres_db: dict[str, Any]) -> None:
    """A day of minutes of many series waits, and the right to write them was revoked."""
    with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 200)) as archive:
        archive.write({})
        with psycopg.connect(**postgres_db, autocommit=True) as connection:
            connection.execute("alter table aggregates rename column open_at to opened_at")
        with CoreWaits.of_tests() as waits:
            began = time.monotonic()
            with pytest.raises(Unavailable, match="cannot be written and are tried again"):
                archive.write(minutes(10_000))
            assert waits.seconds_since(began) < 2
        with psycopg.connect(**postgres_db, autocommit=True) as connection:
            connection.execute("alter table aggregates rename column opened_at to open_at")
        assert archive.write(minutes(10_000)) == 0


def test_rows_behind_many_that_fail_are_written(postgres_db: dict[str, Any]) -> None:
    """What fails them is no error of theirs by its code, so that they stay; there are more than one attempt tries."""
    with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 20)) as archive:
        archive.write({})
        with psycopg.connect(**postgres_db, autocommit=True) as connection:
            connection.execute(
                "create function odd() returns trigger language plpgsql as"
                " $$ begin if new.timestamp < %s then perform 1 from nowhere; end if; return new; end $$".replace(
                    "%s", "timestamptz '2025-11-21 04:00:00Z'"
                )
            )
            connection.execute("create trigger odd before insert on aggregates for each row execute function odd()")
            attempts = 0
            while not connection.execute("select count(*) = 260 from aggregates").fetchall()[0][0]:
                attempts += 1
                assert attempts < 6
                with pytest.raises(Unavailable, match="or more of 500 rows cannot be written"):
                    archive.write(minutes(500))
            connection.execute("drop trigger odd on aggregates")
        assert archive.write(minutes(500)) == 0
        assert len(archive.recent([SERIES], DAY)) == 500


def test_tables_in_another_schema_are_logged_before_migration(postgres_db: dict[str, Any], log: list[str]) -> None:
    for schema in ("marketflow", "public", "public"):
        with closing(PostgresWriter(connection_keywords(**postgres_db, schema=schema), resource("ddl"), 2)) as archive:
            archive.write({})
    assert len([line for line in log if "tables are in the schema marketflow as well" in line]) == 1


@pytest.mark.parametrize("ignored", ["", "extra_float_digits,options"])
def test_export_through_a_pooler_is_exact(server_folder: Path, postgres_db: dict[str, Any], ignored: str) -> None:
    defaults = {"datestyle": "SQL, DMY", "extra_float_digits": "0", "timezone": "Asia/Kathmandu", "search_path": "x"}
    set_defaults(postgres_db, defaults)
    with pgbouncer(server_folder, postgres_db, default_pool_size=1, ignore_startup_parameters=ignored) as place:
        keywords = connection_keywords(**place, schema="prices", prepared_statements=bool(ignored))
        with closing(PostgresWriter(keywords, resource("ddl"), 2)) as archive:
            archive.write(minutes(3))
        with snapshot(keywords) as connection:
            selection = RowFilter(Mode.LIVE)
            found = [
                b"".join(data for data, _ in read_blocks(connection, selection, part))
                for part in find_series(connection, selection)
            ]
            ((row, *_),) = (each.decode().splitlines() for each in found)
        assert "2025-11-21T00:00:00.000Z" in row
        assert "100.00000000000003" in row
        with psycopg.connect(**place, autocommit=True, prepare_threshold=None) as other:
            shown = [other.execute(f"show {name}".encode()).fetchall()[0][0] for name in ("timezone", "search_path")]
            assert shown == ["Asia/Kathmandu", "x"]
