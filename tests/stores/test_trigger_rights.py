"""Nobody gets the rights of the tables' owner through the functions of the triggers; the attacks are real ones."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import psycopg
import pytest
from psycopg import sql

from marketflow.resources import resource
from marketflow.stores.postgres import PostgresArchive
from marketflow.stores.rows import connection_keywords

FUNCTIONS = ("aggregates_changed", "aggregates_truncated", "aggregates_versioned")


@pytest.fixture
def owner(postgres_db: dict[str, Any]) -> Iterator["psycopg.Connection[Any]"]:
    """The owner of the tables, who is a superuser, as where MarketFlow is alone on a server."""
    with closing(PostgresArchive(connection_keywords(**postgres_db), resource("ddl"), 10)) as archive:
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
    """Also one that was attached before the right to do so was taken away."""
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


def test_names_of_strangers_are_not_found_in_the_place_of_ours(
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
