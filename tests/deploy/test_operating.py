"""The sections of deploy/README.md about the database, carried out as written on a PostgreSQL of the system."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from marketflow.model import MINUTE_MS, Candle, Mode, Series, Slot
from marketflow.resources import resource
from marketflow.stores.postgres.rollups import PostgresRollups
from marketflow.stores.postgres.rows import DAY_MS, connection_keywords
from marketflow.stores.postgres.writer import PostgresWriter
from tests.deploy.configuration import shell_blocks
from tests.support.application import ROOT
from tests.support.servers import HOST, free_port, wait_until

PROGRAMS = Path("/usr/lib/postgresql/15/bin")
DAY = 1_763_683_200_000  # midnight, UTC
PASSWORDS = {name: f"password-of-{name.lower()}" for name in ("OWNER", "WRITER", "READER")}


class System:
    """A PostgreSQL of the system, run by a user without rights."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._data = folder / "data"
        self._user = {"user": "nobody"} if os.geteuid() == 0 else {}
        self._folder = folder

    def __enter__(self) -> "System":
        self._folder.mkdir(mode=0o755)
        if self._user:
            shutil.chown(self._folder, "nobody")
        self._run("initdb", "--auth=trust", "--username=postgres", "--no-sync", f"--pgdata={self._data}")
        command = [PROGRAMS / "postgres", "-D", self._data, "-h", HOST, "-p", str(self.port), "-k", "", "-F"]
        with (self._folder / "log").open("wb") as log:
            self._server = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder, **self._user)  # type: ignore[call-overload]
        wait_until(self._answers, 20)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.terminate()
        self._server.wait(20)

    def _run(self, program: str, *arguments: str) -> None:
        command = [PROGRAMS / program, *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=self._folder, timeout=60, **self._user)  # type: ignore[call-overload]

    def _answers(self) -> bool:
        return (
            subprocess.run([PROGRAMS / "pg_isready", "-q", "-h", HOST, "-p", str(self.port)], check=False).returncode
            == 0
        )

    def shell(self, commands: str, **variables: str) -> str:
        """What commands of the README print, run in a checkout; its `.venv` is that of the tests."""
        checkout = self._folder / "checkout"
        if not checkout.exists():
            checkout.mkdir()
            for name in ("deploy", "marketflow", "ddl", "settings.toml", ".venv"):
                if (ROOT / name).exists():
                    (checkout / name).symlink_to(ROOT / name)
        environment = os.environ | {"PGHOST": HOST, "PGPORT": str(self.port), "PGUSER": "postgres", **variables}
        environment["PATH"] = f"{PROGRAMS}:{environment['PATH']}"
        done = subprocess.run(
            ["bash", "-e", "-c", commands], cwd=checkout, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def keywords(self, role: str) -> dict[str, Any]:
        """Of a connection as one of the three roles."""
        password = PASSWORDS[role.upper()]
        return connection_keywords(HOST, self.port, f"marketflow_{role}", password, "marketflow")

    def query(self, statement: str, role: str = "writer") -> list[tuple[Any, ...]]:
        with psycopg.connect(host=HOST, port=self.port, user=f"marketflow_{role}", dbname="marketflow") as connection:
            return connection.execute(statement).fetchall()


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, server_root: Path) -> Iterator[System]:
    if not (PROGRAMS / "postgres").exists():
        pytest.skip(f"there is no {PROGRAMS / 'postgres'} (Debian's postgresql-15)")
    if not (ROOT / ".venv").exists():
        pytest.skip("the checkout has no .venv, which the commands name")
    with System(server_root / "system-postgres") as made:
        passwords = " ".join(f"{name}_PASSWORD={value}" for name, value in PASSWORDS.items())
        (commands,) = shell_blocks("Database")
        made.shell(commands.replace("OWNER_PASSWORD=... WRITER_PASSWORD=... READER_PASSWORD=...", passwords))
        yield made


def write(system: System) -> None:
    for exchange in ("exchange1", "exchange3"):
        series = Series(Mode.LIVE, exchange, "BTCUSDT")
        minutes = {
            Slot(series, DAY + n * MINUTE_MS): Candle(2, 3, 1, 2, 8.0, 4, DAY, DAY, DAY, DAY, 0, 0) for n in range(5)
        }
        with closing(PostgresWriter(system.keywords("writer"), resource("ddl"), 10)) as archive:
            assert archive.write(minutes) == 0
    roll_up(system)


def roll_up(system: System) -> None:
    with closing(PostgresRollups(system.keywords("writer"))) as days:
        while days.roll_up(DAY + 9 * DAY_MS):
            pass


EACH = "select exchange, sum(tick_count) from {} group by exchange order by exchange"


def test_database_section_makes_roles_that_can_write_and_read(system: System) -> None:
    write(system)
    assert system.query(EACH.format("aggregates"), "reader") == [("exchange1", 20), ("exchange3", 20)]
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        system.query("delete from aggregates returning 1", "reader")


def test_restored_dump_takes_the_place_of_the_database(system: System) -> None:
    write(system)
    (commands,) = shell_blocks("Dump and restore")
    system.shell(commands)
    assert system.query(EACH.format("aggregates"), "reader") == [("exchange1", 20), ("exchange3", 20)]
    question = "select has_database_privilege('public', 'marketflow', 'connect')"
    assert system.shell(f'psql --tuples-only --command "{question}"').strip() == "f"
    roll_up(system)
    assert system.query(EACH.format("aggregates_daily")) == [("exchange1", 20), ("exchange3", 20)]
    system.shell("dropdb marketflow_before")


def test_deleted_exchange_is_gone_and_others_stay(system: System) -> None:
    write(system)
    (statements,) = shell_blocks("Retention", "sql")
    command = 'psql --set ON_ERROR_STOP=1 --command "$STATEMENTS" marketflow'
    system.shell(command, STATEMENTS=statements, PGUSER="marketflow_writer")
    roll_up(system)
    for table in ("aggregates", "aggregates_daily", "aggregates_hourly"):
        assert system.query(EACH.format(table)) == [("exchange1", 20)]


def test_partitioned_minutes_outlive_a_dump_and_restore(system: System) -> None:
    write(system)
    (commands,) = shell_blocks("Retention")
    system.shell(commands, OWNER_PASSWORD=PASSWORDS["OWNER"])
    (commands,) = shell_blocks("Dump and restore")
    system.shell(commands)
    write(system)
    assert system.query(EACH.format("aggregates"), "reader") == [("exchange1", 20), ("exchange3", 20)]
    assert system.query(EACH.format("aggregates_daily")) == [("exchange1", 20), ("exchange3", 20)]
    assert system.query("select aggregates_drop_partition()") == [(None,)]
    ((partitions,),) = system.query("select count(*) from pg_inherits where inhparent = 'aggregates'::regclass")
    assert partitions == 10
