from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from marketflow.cli.check import postgres_checks
from marketflow.cli.check.check_result import CheckResult, CheckState
from marketflow.embedded.child_server import Answer
from marketflow.embedded.server_process import ServerProcess
from marketflow.resources import resource
from marketflow.runtime.store_servers import find_servers
from marketflow.settings import load
from marketflow.stores.postgres.connections import session
from marketflow.stores.postgres.connections.bounded_connection import BoundedConnection
from marketflow.stores.postgres.migrations import apply_ddl
from tests.support.partitions import partition
from tests.support.pgbouncer import pgbouncer
from tests.support.proxy import Proxy
from tests.support.servers import HOST, PostgresServer, free_port

pytestmark = pytest.mark.usefixtures("nothing_set")


def look(keywords: Mapping[str, Any], **more: object) -> dict[str, CheckResult]:
    """What is found, by what was looked at."""
    at = {"host": HOST, "sslmode": "prefer", **keywords, **more}
    settings = load(None, {f"postgres.{name}": value for name, value in at.items()})
    return {result.what: result for result in postgres_checks.postgres_check(settings, find_servers(settings)).run()}


def only(results: dict[str, CheckResult]) -> CheckResult:
    (result,) = results.values()
    return result


def states(results: dict[str, CheckResult]) -> dict[str, CheckState]:
    return {what.removeprefix("PostgreSQL "): result.state for what, result in results.items()}


@pytest.fixture
def execute(postgres_db: dict[str, Any]) -> Iterator[Callable[[str], object]]:
    """Tells the database something, as its superuser."""
    with psycopg.connect(**postgres_db, autocommit=True) as connection:
        yield lambda text: connection.execute(text.encode())


@pytest.fixture
def schema(postgres_db: dict[str, Any]) -> None:
    """The tables of this version."""
    with BoundedConnection.open(postgres_db) as connection:
        apply_ddl(connection, resource("ddl"))


@contextmanager
def user(postgres_db: dict[str, Any], *grants: str) -> Iterator[dict[str, Any]]:
    """The keywords of a user who has no rights but these."""
    with psycopg.connect(**postgres_db, autocommit=True) as connection:
        connection.execute("create role guest login password 'guest'")
        try:
            for grant in grants:
                connection.execute(grant.encode())
            yield postgres_db | {"user": "guest", "password": "guest"}
        finally:
            connection.execute("drop owned by guest")
            connection.execute("drop role guest")


def test_empty_database_is_ok_and_stays_empty(postgres_db: dict[str, Any]) -> None:
    found = look(postgres_db)
    assert states(found) == {"PostgreSQL": CheckState.OK, "schema": CheckState.OK, "rows": CheckState.OK}
    assert found["PostgreSQL schema"].found.startswith("0001_aggregates.sql, 0002_aggregates_daily.sql, 0003_")
    assert found["PostgreSQL rows"].found == "none of test mode yet"
    with psycopg.connect(**postgres_db) as connection:
        assert connection.execute("select count(*) from pg_tables where schemaname = 'public'").fetchone() == (0,)


@pytest.mark.usefixtures("schema")
def test_schema_and_age_of_newest_row_are_reported(
    postgres_db: dict[str, Any], execute: Callable[[str], object]
) -> None:
    execute(
        "insert into aggregates (pair_name, exchange, mode, timestamp, average_price, min_price, max_price, open_price,"
        " close_price, tick_count) select 'BTCUSDT', exchange, 'test', now() - age::interval, 1, 1, 1, 1, 1, 1 from ("
        "values ('exchange2', '90 min'), ('exchange1', '3 h'), ('no longer configured', '1 min')) as t (exchange, age)"
    )
    found = look(postgres_db)
    assert states(found) == {"PostgreSQL": CheckState.OK, "schema": CheckState.OK, "rows": CheckState.OK}
    assert found["PostgreSQL"].found.startswith("PostgreSQL 1")
    assert found["PostgreSQL schema"].found.startswith("up to date")
    assert found["PostgreSQL rows"].found == "the newest minute of test mode began 90 min ago"


@pytest.mark.usefixtures("schema")
def test_newer_schema_warns_and_older_one_is_ok(postgres_db: dict[str, Any], execute: Callable[[str], object]) -> None:
    execute("insert into ddl_applied (name) values ('0099_future.sql')")
    newer = look(postgres_db)["PostgreSQL schema"]
    assert (newer.state, newer.found) == (CheckState.WARNING, "0099_future.sql applied by a newer MarketFlow")
    execute("delete from ddl_applied where name >= '0002'")
    older = look(postgres_db)["PostgreSQL schema"]
    assert older.state is CheckState.OK
    missing = sorted(file.name for file in resource("ddl").glob("*.sql"))[1:]
    assert older.found.startswith(f"{', '.join(missing)} not applied yet;")


@pytest.mark.parametrize(
    ("wrong", "message", "advice"),
    [
        ({"password": "hush"}, "password authentication failed", "set postgres.user and postgres.password"),
        ({"user": "nobody", "password": "hush"}, "password authentication failed", "set postgres.user"),
        ({"dbname": "nothing"}, 'database "nothing" does not exist', "CREATE DATABASE"),
        ({"sslmode": "require"}, "SSL", "set postgres.sslmode"),
        ({"host": "no-such-host.invalid"}, "resolve", "correct postgres.host"),
    ],
)
def test_failed_connection_has_advice(
    postgres_db: dict[str, Any], wrong: dict[str, Any], message: str, advice: str
) -> None:
    result = only(look(postgres_db | wrong))
    assert result.state is CheckState.FAILED
    assert message in result.found
    assert result.advice.startswith(advice)
    assert "hush" not in str(result)
    assert postgres_db["password"] not in str(result)


def test_refused_connection_fails_with_advice(postgres_db: dict[str, Any]) -> None:
    result = only(look(postgres_db, port=free_port()))
    assert result.state is CheckState.FAILED
    assert result.advice.startswith("start PostgreSQL")


def test_frozen_server_fails_at_the_timeout(postgres_server: PostgresServer, postgres_db: dict[str, Any]) -> None:
    postgres_server.pause()
    try:
        result = only(look(postgres_db))
    finally:
        postgres_server.resume()
    assert result.state is CheckState.FAILED
    assert "frozen" in result.advice


@pytest.mark.parametrize("fault", [Proxy.swallow, Proxy.vanish])
def test_dropped_packets_fail_at_the_timeout(postgres_db: dict[str, Any], fault: Callable[[Proxy], None]) -> None:
    with Proxy(postgres_db["port"]) as proxy:
        fault(proxy)
        result = only(look(postgres_db, port=proxy.port))
    assert result.state is CheckState.FAILED
    assert "firewall" in result.advice


def test_user_without_create_right_fails(postgres_db: dict[str, Any]) -> None:
    with user(postgres_db) as guest:
        result = look(guest)["PostgreSQL schema"]
    assert result.state is CheckState.FAILED
    assert "may not create tables in the schema public" in result.found
    assert result.advice.startswith("GRANT CREATE ON SCHEMA public")


@pytest.mark.usefixtures("schema")
def test_missing_rights_are_named(postgres_db: dict[str, Any]) -> None:
    with user(
        postgres_db,
        "grant select, insert on aggregates to guest",
        "grant select, insert, update, delete on aggregates_daily, aggregates_hourly, holes, history, alert_rules,"
        " alert_webhooks, alert_states, alert_events, alert_deliveries to guest",
        "grant select, update on aggregates_rolled_until, ddl_applied to guest",
    ) as guest:
        result = look(guest)["PostgreSQL schema"]
    assert (result.state, result.found) == (CheckState.FAILED, "the user may not: update on aggregates")


@pytest.mark.usefixtures("schema")
def test_rows_are_not_read_without_the_right(postgres_db: dict[str, Any]) -> None:
    with user(postgres_db) as guest:
        found = look(guest)
    assert states(found) == {"PostgreSQL": CheckState.OK, "schema": CheckState.FAILED}
    assert "select on aggregates" in found["PostgreSQL schema"].found


@pytest.mark.usefixtures("schema")
def test_rows_older_than_the_constraint_warn(postgres_db: dict[str, Any], execute: Callable[[str], object]) -> None:
    assert states(look(postgres_db))["schema"] is CheckState.OK
    execute("alter table aggregates drop constraint aggregates_valid")
    execute("alter table aggregates add constraint aggregates_valid check (tick_count > 1) not valid")
    found = look(postgres_db)["PostgreSQL schema"]
    assert found.state is CheckState.WARNING
    assert "aggregates_valid" in found.found


def look_at_partitions(keywords: Mapping[str, Any], keep_minutes: str = "90d") -> tuple[CheckState, str] | None:
    at = {f"postgres.{name}": value for name, value in {"host": HOST, "sslmode": "prefer", **keywords}.items()}
    settings = load(None, at | {"archive.keep_minutes": keep_minutes})
    found = {result.what: result for result in postgres_checks.postgres_check(settings, find_servers(settings)).run()}
    result = found.get("PostgreSQL partitions")
    return None if result is None else (result.state, result.found)


def test_daily_partitions_and_what_they_lack_are_reported(
    postgres_db: dict[str, Any], execute: Callable[[str], object], schema: None
) -> None:
    assert look_at_partitions(postgres_db) is None
    partition(postgres_db, datetime(2026, 11, 20, tzinfo=UTC))
    assert look_at_partitions(postgres_db) == (CheckState.OK, "10 partitions, daily ones from 2026-11-21 on")
    assert look_at_partitions(postgres_db, "") == (
        CheckState.WARNING, "10 partitions, daily ones from 2026-11-21 on, and archive.keep_minutes is not set"
    )  # fmt: skip
    grants = "grant select, insert, update, delete on all tables in schema public to guest"
    with user(postgres_db, grants) as guest:
        state, text = look_at_partitions(guest) or (None, "")
        assert (state, text[-41:]) == (CheckState.WARNING, "and the user may neither add nor drop any")
        execute("grant execute on all functions in schema public to guest")
        assert look_at_partitions(guest) == (CheckState.OK, "10 partitions, daily ones from 2026-11-21 on")


def test_rest_of_a_killed_conversion_warns(
    postgres_db: dict[str, Any], execute: Callable[[str], object], schema: None
) -> None:
    execute("alter table aggregates add constraint aggregates_before check (timestamp < '2026-12-06Z') not valid")
    state, text = look_at_partitions(postgres_db) or (None, "")
    assert state is CheckState.WARNING
    assert "a conversion was killed" in text


@pytest.mark.usefixtures("schema")
def test_upgrade_by_another_owner_fails(postgres_db: dict[str, Any], execute: Callable[[str], object]) -> None:
    execute("delete from ddl_applied where name >= '0002'")
    grants = ("grant create on schema public to guest", "grant all on all tables in schema public to guest")
    with user(postgres_db, *grants) as guest:
        result = look(guest)["PostgreSQL schema"]
    assert result.state is CheckState.FAILED
    assert "another user owns" in result.found


def test_missing_schema_is_reported(postgres_db: dict[str, Any]) -> None:
    result = look(postgres_db, schema="nowhere")["PostgreSQL schema"]
    assert result.state is CheckState.OK
    assert "no schema nowhere yet" in result.found
    with user(postgres_db) as guest:
        result = look(guest, schema="nowhere")["PostgreSQL schema"]
    assert result.state is CheckState.FAILED
    assert "no schema nowhere, which the user may not create" in result.found
    assert result.advice.startswith("CREATE SCHEMA nowhere")


def test_search_path_and_read_only_defaults_have_no_effect(
    postgres_db: dict[str, Any], execute: Callable[[str], object]
) -> None:
    execute(f"alter database {postgres_db['dbname']} set default_transaction_read_only = on")
    with psycopg.connect(**postgres_db, options="-c default_transaction_read_only=off", autocommit=True) as connection:
        connection.execute(f"alter database {postgres_db['dbname']} set search_path = nowhere".encode())
    assert set(states(look(postgres_db)).values()) == {CheckState.OK}


@pytest.mark.parametrize(("encoding", "state"), [("LATIN1", CheckState.WARNING), ("SQL_ASCII", CheckState.OK)])
def test_database_that_cannot_store_all_characters_warns(
    postgres_server: PostgresServer, encoding: str, state: CheckState
) -> None:
    with postgres_server.connect() as connection:
        locale = "locale 'C' locale_provider libc"
        connection.execute(f"create database narrow template template0 encoding '{encoding}' {locale}".encode())
    try:
        result = look(postgres_server.keywords | {"dbname": "narrow"})["PostgreSQL"]
    finally:
        with postgres_server.connect() as connection:
            connection.execute("drop database narrow with (force)")
    assert result.state is state
    assert ("encoded in LATIN1" in result.found) is (state is CheckState.WARNING)


def test_old_version_fails_with_advice(postgres_db: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "OLDEST_VERSION", 99)
    result = only(look(postgres_db))
    assert result.state is CheckState.FAILED
    assert "99 is the oldest" in result.found
    assert result.advice == "upgrade PostgreSQL"


def test_standby_server_fails_the_check(server_folder: Path, postgres_template: Path) -> None:
    class Standby(PostgresServer):
        settings = PostgresServer.settings | {"wal_level": "replica", "max_wal_senders": "10"}

        def create_cluster(self) -> None:
            super().create_cluster()
            (self.data / "standby.signal").touch()

        def probe(self, process: ServerProcess) -> Answer:
            try:
                with self.connect(dbname="postgres"):
                    return Answer.READY
            except psycopg.OperationalError:
                return Answer.SILENT

    with Standby(server_folder / "postgres", postgres_template) as standby:
        result = only(look(standby.keywords | {"dbname": "postgres"}))
    assert result.state is CheckState.FAILED
    assert "standby" in result.found


# --- Poolers


@pytest.mark.usefixtures("schema")
@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_pooler_is_ok_without_prepared_statements(postgres_db: dict[str, Any], server_folder: Path, mode: str) -> None:
    with pgbouncer(server_folder, postgres_db, pool_mode=mode) as place:
        found = look(place, prepared_statements=False)
        assert set(states(found).values()) == {CheckState.OK}
        assert "through a pooler, without prepared statements" in found["PostgreSQL"].found


@pytest.mark.usefixtures("schema")
@pytest.mark.parametrize("ignored", ["extra_float_digits", "extra_float_digits,options"])
def test_pooler_in_front_of_sessions_is_named_with_its_setting(
    postgres_db: dict[str, Any], server_folder: Path, ignored: str
) -> None:
    with pgbouncer(server_folder, postgres_db, ignore_startup_parameters=ignored) as place:
        result = look(place)["PostgreSQL"]
        assert result.state is not CheckState.OK
        assert "set postgres.prepared_statements = false" in result.advice
        assert "pooler" in result.found or "startup parameter" in result.found


@pytest.mark.usefixtures("schema")
def test_session_without_triggers_fails(postgres_db: dict[str, Any]) -> None:
    with psycopg.connect(**postgres_db, autocommit=True) as connection:
        connection.execute(f"alter database {postgres_db['dbname']} set session_replication_role = replica".encode())
    result = look(postgres_db)["PostgreSQL"]
    assert (result.state, "triggers do not fire" in result.found) == (CheckState.FAILED, True)


@pytest.mark.usefixtures("schema")
@pytest.mark.parametrize(
    ("rows", "state", "text"),
    [("", CheckState.OK, "a plain table"), ("aggregates", CheckState.WARNING, "a hypertable")],
)
def test_timescaledb_is_reported(postgres_db: dict[str, Any], rows: str, state: CheckState, text: str) -> None:
    """By its view of hypertables, which stands in for the extension here."""
    assert "TimescaleDB" not in look(postgres_db)
    with psycopg.connect(**postgres_db, autocommit=True) as connection:
        connection.execute("create schema timescaledb_information")
        connection.execute(
            "create view timescaledb_information.hypertables as"
            f" select 'public'::name as hypertable_schema, '{rows}'::name as hypertable_name"
        )
    result = look(postgres_db)["TimescaleDB"]
    assert result.state is state
    assert text in result.found
