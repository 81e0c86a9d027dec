"""Fixtures that every test may use: one real Redis and one real PostgreSQL for the session."""

import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hypothesis
import psycopg
import pytest
from loguru import logger
from psycopg import sql

from tests.support.application import ScriptedExchange, read_rows
from tests.support.guards import pytest_runtest_call, pytest_runtest_setup, pytest_runtest_teardown  # noqa: F401
from tests.support.oracle import Rows
from tests.support.redis_cluster import RedisCluster
from tests.support.servers import HOST, PostgresServer, RedisServer
from tests.support.tiers import is_unit, takes_minutes

# A shell starts background jobs with SIGINT ignored, which the programs under test would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The time of an example says nothing on a busy machine; that of a whole test is limited anyway.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")

_numbers = itertools.count(1)

_MARKED_FOLDERS = {"faults": pytest.mark.faults, "browser": pytest.mark.browser}


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the folders that are stages of their own, and of the others those of the unit tier.

    Those that are allowed minutes come first, so that no worker of several ends with one of them alone.
    """
    items.sort(key=lambda item: not takes_minutes(item))
    for item in items:
        if mark := _MARKED_FOLDERS.get(item.path.parent.name):
            item.add_marker(mark)
        if item.get_closest_marker("faults") and takes_minutes(item):
            item.add_marker(pytest.mark.minutes)
        if "redis_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.cluster)
        if isinstance(item, pytest.Function) and is_unit(item):
            item.add_marker(pytest.mark.unit)


@pytest.fixture
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty current folder, and no variable of ours."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("MARKETFLOW_"):
            monkeypatch.delenv(name)


@pytest.fixture
def log() -> Iterator[list[str]]:
    """All that is logged."""
    lines: list[str] = []
    handler = logger.add(lines.append, level=0, format="{message} {extra} {exception}")
    yield lines
    logger.remove(handler)


@pytest.fixture(scope="session")
def server_root() -> Iterator[Path]:
    """A folder for the data of servers.

    Not one of pytest's: those are closed to the user that PostgreSQL runs as when the tests run as root. In memory
    where there is plenty, for every server begins with a thousand small files.
    """
    in_memory = Path("/dev/shm")
    plenty = in_memory.is_dir() and shutil.disk_usage(in_memory).free > 2e9
    folder = Path(tempfile.mkdtemp(prefix="mf-tests-", dir=in_memory if plenty else None))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def server_folder(server_root: Path) -> Iterator[Path]:
    """A fresh folder for one test's servers."""
    folder = server_root / f"test{next(_numbers)}"
    folder.mkdir(mode=0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def postgres_template(server_root: Path) -> Path:
    """Where servers find a cluster to copy; the first one makes it."""
    return server_root / "template"


@pytest.fixture(scope="session")
def redis_server(server_root: Path) -> Iterator[RedisServer]:
    """The session's Redis; a test that breaks it mends it."""
    with RedisServer(server_root / "redis", persistent=False) as server:
        yield server


@pytest.fixture
def redis_db(redis_server: RedisServer) -> RedisServer:
    """The session's Redis, emptied."""
    with redis_server.client() as client:
        client.flushall()
    return redis_server


@pytest.fixture(scope="session")
def cluster_servers(server_root: Path) -> Iterator[RedisCluster]:
    """The session's Redis Cluster; a test that breaks it mends it."""
    with RedisCluster(server_root / "cluster") as cluster:
        yield cluster


@pytest.fixture
def redis_cluster(cluster_servers: RedisCluster) -> RedisCluster:
    """The session's Redis Cluster, restored and emptied."""
    cluster_servers.restore()
    return cluster_servers


@pytest.fixture(scope="session")
def postgres_server(server_root: Path, postgres_template: Path) -> Iterator[PostgresServer]:
    """The session's PostgreSQL; a test that breaks it mends it."""
    with PostgresServer(server_root / "postgres", postgres_template) as server:
        yield server


@pytest.fixture
def postgres_db(postgres_server: PostgresServer) -> Iterator[dict[str, Any]]:
    """Connection keywords (host, port, user, password, dbname) of a fresh, empty database."""
    name = f"test{next(_numbers)}"
    # Copying files is quick here; PostgreSQL's default strategy is for servers that are busy with other things.
    with postgres_server.connect() as connection:
        connection.execute(sql.SQL("create database {} strategy file_copy").format(sql.Identifier(name)))
    yield postgres_server.keywords | {"dbname": name}
    with postgres_server.connect() as connection:
        connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def servers(redis_db: RedisServer, postgres_db: dict[str, Any]) -> dict[str, object]:
    """Settings that name servers of the user's own."""
    postgres = {f"POSTGRES__{name.upper()}": value for name, value in postgres_db.items()}
    return postgres | {"REDIS__HOST": HOST, "REDIS__PORT": redis_db.port}


@pytest.fixture
def rows(postgres_db: dict[str, Any]) -> Iterator[Callable[[], Rows]]:
    """Reads the table."""
    with psycopg.connect(**postgres_db, autocommit=True) as connection:
        yield lambda: read_rows(connection)


@pytest.fixture
def exchanges() -> Iterator[list[ScriptedExchange]]:
    with ExitStack() as stack:
        yield [stack.enter_context(ScriptedExchange(f"exchange{n}")) for n in (1, 2, 3)]
