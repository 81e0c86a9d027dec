"""The unit tier holds tests that start no process, and guards fail what slips through."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import servers
from tests.support.application import Application, ScriptedExchange
from tests.support.servers import PostgresServer, RedisServer
from tests.support.tiers import starts_process

REPOSITORY = Path(__file__).parent.parent.parent

SERVERS = {"redis_server", "redis_db", "postgres_server", "postgres_db", "servers", "rows", "application", "browser"}

TESTS = """
import asyncio, gc, subprocess, sys
import pytest

@pytest.mark.unit
def test_process():
    try:
        subprocess.run([sys.executable, "-c", ""])
    except Exception:
        pass

def test_process_of_another_tier():
    subprocess.run([sys.executable, "-c", ""])

def test_lost_exception():
    async def failing():
        raise ValueError("lost")
    async def run():
        asyncio.create_task(failing())
        await asyncio.sleep(0.01)
        gc.collect()
    asyncio.run(run())

@pytest.mark.unit
def test_sound():
    pass
"""


class Started:
    """A test double that starts a process."""

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(["true"])


def by_class() -> None:
    Started()


def by_helper() -> None:
    by_class()


def by_module() -> None:
    _ = servers.PostgresServer


def by_nested_function() -> Callable[[], None]:
    return lambda: by_helper()


def by_fork() -> None:
    os.fork()


def with_server(server: RedisServer) -> None:
    assert server.port


def without_process() -> None:
    ScriptedExchange("exchange1")


@pytest.mark.parametrize(
    "test", [by_class, by_helper, by_module, by_nested_function, by_fork, Application, RedisServer]
)
def test_references_to_process_starters_are_found(test: object) -> None:
    assert starts_process(test)


def test_server_fixtures_are_in_no_unit_test(request: pytest.FixtureRequest) -> None:
    """Of all tests that were collected with this one."""
    assert all(starts_process(fixture) for fixture in (RedisServer, PostgresServer))
    units = [each for each in request.session.items if each.get_closest_marker("unit")]
    assert not [each.nodeid for each in units if isinstance(each, pytest.Function) and SERVERS & fixtures_of(each)]


def fixtures_of(item: pytest.Function) -> set[str]:
    """The names of the fixtures of a test, without parameters, which may have the same names."""
    callspec = getattr(item, "callspec", None)
    return {*item.fixturenames} - {*(callspec.params if callspec is not None else ())}


@pytest.mark.parametrize("test", [with_server, without_process, Path.read_text])
def test_code_without_processes_is_left_alone(test: object) -> None:
    assert not starts_process(test)


def test_guards_fail_processes_and_lost_exceptions(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = unit: starts no process\n")
    (tmp_path / "test_one.py").write_text(TESTS)
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "tests.support.guards"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    failed = {line.split()[1].partition("::")[2] for line in done.stdout.splitlines() if line.startswith("FAILED")}
    assert failed == {"test_process", "test_lost_exception"}, done.stdout


def test_unit_tier_is_not_empty(request: pytest.FixtureRequest) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "unit", "tests/test_model.py", __file__]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    chosen = [line.partition("::")[2].partition("[")[0] for line in done.stdout.splitlines() if "::" in line]
    assert "test_merging_is_associative" in chosen
    assert "test_code_without_processes_is_left_alone" in chosen
    assert "test_guards_fail_processes_and_lost_exceptions" not in chosen


def test_tests_that_take_minutes_come_first() -> None:
    files = ("tests/faults/test_alerts.py", "tests/faults/test_venue_kill.py")
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "faults", *files]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    order = [line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line]
    assert order == sorted(order, reverse=True)
    assert {*order} == {*files}
