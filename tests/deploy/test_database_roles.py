"""deploy/postgres/roles.sql and the backup, with real roles on a real server."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from marketflow.embedded.programs import postgres_programs
from marketflow.model import MINUTE_MS, Candle, Mode, Series, Slot
from marketflow.resources import resource
from marketflow.stores.postgres.reader import PostgresReader
from marketflow.stores.postgres.retention import Retention
from marketflow.stores.postgres.rollups import PostgresRollups
from marketflow.stores.postgres.rows import DAY_MS, connection_keywords
from marketflow.stores.postgres.writer import PostgresWriter
from tests.deploy.configuration import DEPLOY
from tests.support.application import ROOT
from tests.support.servers import PostgresServer

DAY = 1_763_683_200_000  # midnight, UTC
SERIES = Series(Mode.LIVE, "exchange1", "BTCUSDT")
PASSWORDS = {f"{name.upper()}_PASSWORD": f"pass of {name}" for name in ("owner", "writer", "reader")}


def run(server: PostgresServer, program: str, *arguments: str, dbname: str = "postgres", **variables: str) -> str:
    """What a program of PostgreSQL prints, run as the superuser of the server."""
    at = server.keywords
    environment = os.environ | {"PGHOST": at["host"], "PGPORT": str(at["port"]), "PGUSER": at["user"]}
    environment |= {"PGPASSWORD": at["password"], "PGDATABASE": dbname, **variables}
    command = [str(postgres_programs(server.data) / program), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def server(server_folder: Path, postgres_template: Path) -> Iterator[PostgresServer]:
    """A server of its own, for its database has a fixed name."""
    with PostgresServer(server_folder / "postgres", postgres_template) as server:
        with server.connect(dbname="postgres") as connection:
            connection.execute("drop database if exists marketflow")
        run(server, "psql", "--file", str(DEPLOY / "postgres/roles.sql"), **PASSWORDS)
        yield server


def role(server: PostgresServer, name: str) -> dict[str, Any]:
    """Connection keywords of one of the three."""
    at = {"user": f"marketflow_{name}", "password": PASSWORDS[f"{name.upper()}_PASSWORD"], "dbname": "marketflow"}
    return connection_keywords(**server.keywords | at)


def place_of(keywords: dict[str, Any]) -> dict[str, Any]:
    return {key: keywords[key] for key in ("host", "port", "user", "password", "dbname")}


def migrate(server: PostgresServer, name: str, *options: str) -> "subprocess.CompletedProcess[str]":
    at = role(server, name)
    given = {
        f"MARKETFLOW_POSTGRES__{key.upper()}": str(at[key]) for key in ("host", "port", "user", "password", "dbname")
    }
    return subprocess.run(
        [sys.executable, "-m", "marketflow", "migrate", *options], env=os.environ | given, cwd=ROOT,
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def partitions(connection: "psycopg.Connection[Any]") -> list[str]:
    query = "select inhrelid::regclass::text from pg_inherits where inhparent = 'aggregates'::regclass"
    return [name for (name,) in connection.execute(query)]


def minutes(day: int = 0, ticks: int = 4) -> dict[Slot, Candle]:
    start = DAY + day * DAY_MS
    return {
        Slot(SERIES, start + n * MINUTE_MS): Candle(2, 3, 1, 2, 2.0 * ticks, ticks, start, start, start, start, 0, 0)
        for n in range(5)
    }


def ticks_of_the_day(keywords: dict[str, Any]) -> int:
    async def read() -> int:
        reader = PostgresReader(keywords)
        await reader.open()
        try:
            (whole,) = await reader.summary([SERIES], DAY, DAY + DAY_MS)
            assert whole is not None
            return whole.ticks
        finally:
            await reader.close()

    return asyncio.run(read())


@pytest.mark.parametrize("options", [[], ["--partition"]])
def test_three_roles_have_the_rights_they_need_only(server: PostgresServer, options: list[str]) -> None:
    with server.connect() as superuser:
        rights = superuser.execute(
            "select rolname from pg_roles where rolname like 'marketflow\\_%'"
            " and (rolsuper or rolcreaterole or rolcreatedb or rolbypassrls or rolreplication)"
        )
        assert rights.fetchall() == []
    refused = migrate(server, "writer", *options)
    assert refused.returncode == 1
    assert "permission denied" in refused.stderr
    for _ in range(2):
        done = migrate(server, "owner", *options)
        assert done.returncode == 0, done.stderr

    with closing(PostgresWriter(role(server, "writer"), resource("ddl"), 10)) as archive:
        assert archive.write(minutes() | minutes(5)) == 0
        assert archive.write(minutes(0, 5)) == 0
    with closing(PostgresRollups(role(server, "writer"), retention=Retention(2))) as days:
        while days.roll_up(DAY + 9 * DAY_MS):
            pass
    assert ticks_of_the_day(role(server, "reader")) == 25

    for name in ("writer", "reader"):
        with psycopg.connect(**place_of(role(server, name)), autocommit=True) as connection:
            forbidden = ["drop table aggregates", "alter table aggregates add x int", "create table mine (x int)",
                         "create temp table mine (x int)", "truncate aggregates"]  # fmt: skip
            if options:
                assert partitions(connection)
                forbidden += [f"select from {each}" for each in partitions(connection)]
            if name == "reader":
                forbidden += ["select aggregates_drop_partition()"]
                forbidden += ["delete from aggregates", "update aggregates set tick_count = 1"]
            for statement in forbidden:
                with pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.InsufficientPrivilege)):
                    connection.execute(statement)


def test_writer_adds_and_drops_partitions_of_the_owner(server: PostgresServer) -> None:
    assert migrate(server, "owner", "--partition").returncode == 0
    today = int(time.time()) * 1000 // DAY_MS * DAY_MS
    now_ms = today + 20 * DAY_MS
    rows = {Slot(SERIES, start): candle for (_, start), candle in minutes((today - DAY) // DAY_MS).items()}
    with closing(PostgresWriter(role(server, "writer"), resource("ddl"), 10)) as archive:
        archive.write(rows)
        with closing(PostgresRollups(role(server, "writer"), retention=Retention(2))) as days:
            while days.roll_up(now_ms):
                pass
            with server.connect(dbname="marketflow") as superuser:
                found = partitions(superuser)
                assert time.strftime("aggregates_%Y%m%d", time.gmtime(now_ms / 1000)) in found
                superuser.execute(
                    "update aggregates_rolled_until set kept_from = '2100-01-01Z', rolled_until = '2100-01-01Z'"
                )
                owner = "select distinct relowner::regrole::text from pg_class where relname like 'aggregates%'"
                assert superuser.execute(owner).fetchall() == [("marketflow_owner",)]
        with psycopg.connect(**place_of(role(server, "writer")), autocommit=True) as writer:
            assert writer.execute("select aggregates_drop_partition()").fetchone() == ("aggregates_before",)


@pytest.mark.parametrize("options", [[], ["--partition"]])
def test_documented_backup_restores_with_working_triggers(
    server: PostgresServer, server_folder: Path, options: list[str]
) -> None:
    assert migrate(server, "owner", *options).returncode == 0
    with closing(PostgresWriter(role(server, "writer"), resource("ddl"), 10)) as archive:
        archive.write(minutes() | minutes(1))
    with closing(PostgresRollups(role(server, "writer"))) as days:
        while days.roll_up(DAY + 9 * DAY_MS):
            pass

    text = (DEPLOY.parent / "ddl" / "README.md").read_text()
    dump, restore = (
        next(line for line in text.splitlines() if line.startswith(word)).split()
        for word in ("pg_dump ", "pg_restore ")
    )
    file = str(server_folder / "marketflow.dump")
    run(server, *[file if part == "marketflow.dump" else part for part in dump], dbname="marketflow")
    with server.connect(dbname="postgres") as superuser:
        superuser.execute("drop database marketflow with (force)")
        superuser.execute("create database marketflow owner marketflow_owner")
    run(server, *[file if part == "marketflow.dump" else part for part in restore])

    assert ticks_of_the_day(role(server, "reader")) == 20
    with closing(PostgresWriter(role(server, "writer"), resource("ddl"), 10)) as archive:
        archive.write(minutes(0, 6))
    assert ticks_of_the_day(role(server, "reader")) == 30
    with closing(PostgresRollups(role(server, "writer"))) as days:
        while days.roll_up(DAY + 9 * DAY_MS):
            pass
    assert ticks_of_the_day(role(server, "reader")) == 30
    with server.connect(dbname="marketflow") as superuser:
        rolled = superuser.execute("select tick_count from aggregates_daily order by timestamp").fetchall()
        assert rolled == [(30,), (20,)]
