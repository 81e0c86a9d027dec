"""Nobody gets the rights of the tables' owner through the functions of the triggers; the attacks are real ones."""

import asyncio
from collections.abc import Iterator
from contextlib import closing
from itertools import product
from typing import Any

import psycopg
import pytest
from psycopg import sql

from marketflow.cli.check.check_result import CheckState
from marketflow.cli.check.postgres_checks import postgres_check
from marketflow.cli.export.row_reader import RowFilter, find_series, read_blocks, snapshot
from marketflow.errors import Unavailable
from marketflow.model import Candle, Mode, Series, Slot
from marketflow.resources import resource
from marketflow.runtime.store_servers import find_servers
from marketflow.settings import load
from marketflow.stores.ports import CandleRange
from marketflow.stores.postgres.reader import PostgresReader
from marketflow.stores.postgres.retention import Retention
from marketflow.stores.postgres.rollups import PostgresRollups
from marketflow.stores.postgres.rows import DAY_MS, connection_keywords, to_datetime
from marketflow.stores.postgres.writer import PostgresWriter
from tests.support.partitions import partition

DAY = 1_763_683_200_000  # midnight, UTC
HOUR_MS = 60 * 60_000
SERIES = Series(Mode.LIVE, "exchange1", "BTCUSDT")
CANDLE = Candle(2, 3, 1, 2, 8, 4, DAY, DAY, DAY, DAY, 0, 0)

FUNCTIONS = ("aggregates_changed", "aggregates_truncated", "aggregates_versioned")


@pytest.fixture
def owner(postgres_db: dict[str, Any]) -> Iterator["psycopg.Connection[Any]"]:
    """The owner of the tables, who is a superuser, as where MarketFlow is alone on a server."""
    with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 10)) as archive:
        archive.write({})
    with psycopg.connect(**postgres_db, autocommit=True) as connection:
        connection.execute(
            "insert into aggregates_daily (pair_name, exchange, mode, timestamp, tick_count)"
            " values ('BTCUSDT', 'exchange1', 'live', '2026-01-01Z', 1)"
        )
        yield connection


@pytest.fixture
def stranger(postgres_db: dict[str, Any], owner: "psycopg.Connection[Any]") -> Iterator["psycopg.Connection[Any]"]:
    """A role without any grant but what everybody has, who may make tables of its own."""
    name = f"stranger_of_{postgres_db['dbname']}"
    owner.execute(f"create role {name} login password 'stranger'; grant create on schema public to {name}")
    with psycopg.connect(**postgres_db | {"user": name, "password": "stranger"}, autocommit=True) as connection:
        yield connection
    owner.execute(f"drop owned by {name} cascade; drop role {name}")


def days(owner: "psycopg.Connection[Any]") -> int:
    row = owner.execute("select count(*) from aggregates_daily").fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("table", ["temp table mine", "table public.mine"])
def test_stranger_cannot_make_a_trigger_of_the_functions(
    owner: "psycopg.Connection[Any]", stranger: "psycopg.Connection[Any]", function: str, table: str
) -> None:
    stranger.execute(f"create {table} (timestamp timestamptz)")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        stranger.execute(f"create trigger t after truncate on mine for each statement execute function {function}()")
    assert days(owner) == 1


def test_function_refuses_any_other_table(
    owner: "psycopg.Connection[Any]", stranger: "psycopg.Connection[Any]"
) -> None:
    """Also one that was attached before the right to do so was revoked."""
    stranger.execute("create temp table mine (timestamp timestamptz)")
    temporary = stranger.execute(
        "select relnamespace::regnamespace::text from pg_class where relname = 'mine'"
    ).fetchone()
    assert temporary is not None
    owner.execute("grant execute on function aggregates_truncated(), aggregates_changed() to public")
    stranger.execute(
        "create trigger t after truncate on mine for each statement execute function aggregates_truncated()"
    )
    stranger.execute(
        "create trigger c after insert on mine referencing new table as changed"
        " for each statement execute function aggregates_changed()"
    )
    for statement in ("truncate mine", "insert into mine values (now())"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match=r"for the table public\.aggregates alone"):
            stranger.execute(statement)
    assert days(owner) == 1


def test_hostile_cast_in_a_transition_table_runs_no_code(
    owner: "psycopg.Connection[Any]", stranger: "psycopg.Connection[Any]"
) -> None:
    stranger.execute("create type public.hostile as enum ('x')")
    stranger.execute(
        "create function public.attack(public.hostile) returns text language plpgsql as $$ begin"
        " raise exception 'runs as %', current_user using errcode = 'P0999'; end $$"
    )
    stranger.execute("create cast (public.hostile as text) with function public.attack(public.hostile) as implicit")
    stranger.execute(
        "create temp table mine (exchange public.hostile, pair_name public.hostile, mode public.hostile,"
        " timestamp timestamptz)"
    )
    owner.execute("grant execute on function aggregates_changed() to public")
    owner.execute("update aggregates_rolled_until set rolled_until = '2027-01-01Z'")
    stranger.execute(
        "create trigger c after insert on mine referencing new table as changed"
        " for each statement execute function aggregates_changed()"
    )
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="alone"):
        stranger.execute("insert into mine values ('x', 'x', 'x', '2026-05-05Z')")


def test_objects_of_other_roles_do_not_shadow_ours(
    owner: "psycopg.Connection[Any]", stranger: "psycopg.Connection[Any]"
) -> None:
    stranger.execute(
        "create function public.date_trunc(text, timestamptz, text) returns timestamptz language plpgsql as $$ begin"
        " raise exception 'runs as %', current_user; end $$"
    )
    stranger.execute(
        "create function public.later(timestamptz, timestamptz) returns boolean language sql as 'select true'"
    )
    stranger.execute(
        "create operator public.< (leftarg = timestamptz, rightarg = timestamptz, function = public.later)"
    )
    owner.execute("update aggregates_rolled_until set rolled_until = '2027-01-01Z'")
    owner.execute("insert into aggregates values ('BTCUSDT', 'exchange1', 'live', '2026-05-05Z', 1, 1, 1, 1, 1, 1)")
    assert days(owner) == 2


def test_no_function_is_for_everybody(owner: "psycopg.Connection[Any]") -> None:
    for function in FUNCTIONS:
        query = sql.SQL(
            "select has_function_privilege('public', {}, 'execute'), proconfig from pg_proc where proname = {}"
        ).format(sql.Literal(f"{function}()"), sql.Literal(function))
        assert owner.execute(query).fetchall() == [(False, ["search_path=pg_catalog, pg_temp"])]


TYPES = ("smallint", "integer", "bigint", "real", "double precision", "numeric", "text", "timestamp with time zone",
         "interval", "oid", "regclass")  # fmt: skip
OPERATORS = ("+", "-", "*", "/", "=", "<", "<=", ">", ">=")


def plant(stranger: "psycopg.Connection[Any]") -> None:
    """Make operators and functions that fit the arguments of statements better than PostgreSQL's, if not qualified."""
    attack = "language plpgsql as $$ begin raise exception 'runs as %', current_user using errcode = 'P0999'; end $$"
    there = set(
        stranger.execute(
            "select oprname, format_type(oprleft, null), format_type(oprright, null) from pg_operator"
            " where oprnamespace = 'pg_catalog'::regnamespace"
        ).fetchall()
    )
    script = []
    for one, two in product(TYPES, TYPES):
        script += [f"create function public.attack(x {one}, y {two}) returns boolean {attack}"]
        script += [f"create function public.attack8(x {one}, y {two}) returns float8 {attack}"]
        for operator in OPERATORS:
            if (operator, one, two) not in there:
                function = "attack8" if operator in "+-*/" else "attack"
                arguments = f"leftarg = {one}, rightarg = {two}, function = public.{function}"
                script += [f"create operator public.{operator} ({arguments})"]
    stranger.execute("; ".join(script))
    for kind in ("text", "float8", "int8", "int4", "timestamptz"):
        stranger.execute(f"create function public.unnest(x {kind}[]) returns setof {kind} {attack}")
        stranger.execute(f"create function public.collect(x {kind}[], y {kind}) returns {kind}[] {attack}")
        stranger.execute(f"create aggregate public.array_agg({kind}) (sfunc = public.collect, stype = {kind}[])")
        stranger.execute(f"create aggregate public.count({kind}) (sfunc = public.collect, stype = {kind}[])")
    stranger.execute(f"create function public.parse_ident(text) returns text[] {attack}")


def test_statements_find_no_operator_or_function_of_a_stranger(
    postgres_db: dict[str, Any], owner: "psycopg.Connection[Any]", stranger: "psycopg.Connection[Any]"
) -> None:
    """Where everybody may create in the schema of the tables, as in databases made before PostgreSQL 15."""
    plant(stranger)
    owner.execute("delete from aggregates_daily")
    keywords = connection_keywords(**postgres_db)
    series = [Series(Mode.LIVE, exchange, "BTCUSDT") for exchange in ("exchange1", "exchange2")]
    with closing(PostgresWriter(keywords, resource("ddl"), 10)) as archive:
        archive.write({Slot(each, DAY + n * HOUR_MS): CANDLE for each in series for n in range(72)})
        assert len(archive.recent(series, DAY)) == 144
    with closing(PostgresRollups(keywords, retention=Retention(2, 30))) as days:
        while days.roll_up(DAY + 3 * DAY_MS + HOUR_MS):
            pass

    async def read() -> None:
        reader = PostgresReader(keywords)
        await reader.open()
        try:
            assert [each and each.ticks for each in await reader.summary(series, 0, 2**42)] == [288, 288]
            assert [each and each.price for each in await reader.last(series)] == [2, 2]
            for length in (60_000, HOUR_MS, DAY_MS):
                for newest in (False, True):
                    await reader.candles(series, CandleRange(length, DAY, DAY + 3 * DAY_MS, 9, newest))
        finally:
            await reader.close()

    asyncio.run(read())
    place = {f"postgres.{name}": value for name, value in postgres_db.items()}
    settings = load(None, {**place, "redis.host": "127.0.0.1"})
    findings = postgres_check(settings, find_servers(settings)).run()
    assert not [found for found in findings if found.state is CheckState.FAILED or "runs as" in found.found], findings
    with snapshot(keywords) as connection:
        selection = RowFilter(Mode.LIVE)
        for part in find_series(connection, selection):
            assert sum(rows for _, rows in read_blocks(connection, selection, part)) == 48


def test_functions_of_partitions_are_for_writers_alone(
    postgres_db: dict[str, Any], owner: "psycopg.Connection[Any]", stranger: "psycopg.Connection[Any]"
) -> None:
    """And find nothing of a stranger: neither operators, nor a table with the name of a partition."""
    plant(stranger)
    owner.execute("delete from aggregates_daily")
    calls = (
        "select * from aggregates_partitions()",
        "select aggregates_add_partitions('2025-11-22Z', '2025-12-01Z')",
        "select aggregates_drop_partition()",
    )
    for call in calls:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            stranger.execute(call)
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="stranger_of_"):
        partition(postgres_db, to_datetime(DAY))
    owner.execute(f"drop owned by {stranger.info.user} cascade")
    partition(postgres_db, to_datetime(DAY))
    owner.execute(f"grant create on schema public to {stranger.info.user}")
    plant(stranger)
    keywords = connection_keywords(**postgres_db)
    with closing(PostgresWriter(keywords, resource("ddl"), 10)) as archive:
        archive.write({Slot(SERIES, DAY + n * HOUR_MS): CANDLE for n in range(300)})
    with closing(PostgresRollups(keywords, retention=Retention(2, 30))) as rollups:
        while rollups.roll_up(DAY + 12 * DAY_MS + HOUR_MS):
            pass
    assert owner.execute("select min(timestamp) from aggregates").fetchone() == (to_datetime(DAY + 10 * DAY_MS),)
    assert days(owner) == 12
    stranger.execute("create table public.aggregates_20260101 (x int)")
    with pytest.raises(psycopg.errors.DuplicateTable):
        owner.execute("select aggregates_add_partitions('2026-01-01Z', '2026-01-02Z')")


def test_superuser_does_not_take_over_a_table_of_another(
    postgres_db: dict[str, Any], owner: "psycopg.Connection[Any]", stranger: "psycopg.Connection[Any]"
) -> None:
    tables = "aggregates, aggregates_daily, aggregates_hourly, aggregates_rolled_until, holes, history, ddl_applied"
    owner.execute(f"drop table {tables}")
    stranger.execute((resource("ddl") / "0001_aggregates.sql").read_text())
    with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 10)) as archive:
        with pytest.raises(Unavailable, match=r"aggregates belongs to stranger_of_.*superuser"):
            archive.write({})
        assert owner.execute("select to_regclass('aggregates_daily')").fetchall() == [(None,)]
        owner.execute("alter table aggregates owner to current_user")
        archive.write({})


@pytest.mark.parametrize(
    "planted",
    [
        "create function public.attack(oid, regclass) returns boolean language sql as 'select true'; "
        "create operator public.= (leftarg = oid, rightarg = regclass, function = public.attack)",
        "create function public.format(text, name) returns text language sql as 'select null::text'",
    ],
)
def test_no_ddl_is_applied_beside_what_shadows_postgresql(
    postgres_db: dict[str, Any], owner: "psycopg.Connection[Any]", stranger: "psycopg.Connection[Any]", planted: str
) -> None:
    stranger.execute(planted)
    tables = "aggregates, aggregates_daily, aggregates_hourly, aggregates_rolled_until, holes, history, ddl_applied"
    owner.execute(f"drop table {tables}")
    with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 10)) as archive:
        with pytest.raises(Unavailable, match=r"stranger_of_.*revoke create on schema public from public"):
            archive.write({})
        assert owner.execute("select to_regclass('aggregates')").fetchall() == [(None,)]
        owner.execute(f"drop owned by {stranger.info.user} cascade")
        archive.write({})
