"""CI's ledger of flaky tests, with a real pytest in a folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "flaky.py"
LEDGER = ".ci/flaky.txt"
FLAKY = "tests/test_one.py::test_flaky[a b]"

TESTS = """
from pathlib import Path
import pytest

@pytest.mark.parametrize("name", ["a b"])
def test_flaky(name):
    ran = Path("ran")
    again = ran.exists()
    ran.touch()
    assert again

def test_broken():
    assert False

def test_sound():
    pass
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a flaky, a broken and a sound test, and an empty ledger."""
    for folder in ("tests", ".ci"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "tests" / "test_one.py").write_text(TESTS)
    (tmp_path / LEDGER).write_text("# flaky tests\n")
    return tmp_path


def ci(project: Path, selected: str, after: str = "") -> "subprocess.CompletedProcess[str]":
    """Run the tests of these names by the script, as if none had run before."""
    (project / "ran").unlink(missing_ok=True)
    command = f"{sys.executable} -m pytest -q -k '{selected}'{after}"
    quick = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run([sys.executable, SCRIPT, command], cwd=project, env=quick, capture_output=True, text=True)


def ledger(project: Path) -> list[str]:
    return (project / LEDGER).read_text().splitlines()[1:]


def test_passing_tests_run_once_and_leave_the_ledger(project: Path) -> None:
    done = ci(project, "sound")
    assert done.returncode == 0
    assert "once more" not in done.stdout
    assert ledger(project) == []


def test_test_that_fails_twice_fails_the_run(project: Path) -> None:
    done = ci(project, "broken or sound")
    assert done.returncode == 1
    assert "FLAKY" not in done.stdout
    assert ledger(project) == []


def test_new_flaky_test_is_printed_and_recorded(project: Path) -> None:
    done = ci(project, "flaky or sound")
    assert done.returncode == 0
    assert f"FLAKY: {FLAKY} failed, and passed alone\n" in done.stdout
    (line,) = ledger(project)
    assert line.split(maxsplit=1)[1] == FLAKY


def test_recorded_flaky_test_fails_the_run_once_it_repeats(project: Path) -> None:
    assert [ci(project, "flaky").returncode for _ in range(2)] == [0, 1]
    assert len(ledger(project)) == 1
    assert ci(project, "sound").returncode == 0


def test_flaky_test_beside_a_broken_one_is_recorded_too(project: Path) -> None:
    done = ci(project, "flaky or broken")
    assert done.returncode == 1
    assert len(ledger(project)) == done.stdout.count("FLAKY: ") == 1


def test_run_that_ended_early_is_not_repaired_by_repeating(project: Path) -> None:
    done = ci(project, "flaky", after="; exit 3")
    assert done.returncode == 3
    assert ledger(project) == []


def test_failure_without_a_failed_test_fails_the_run(project: Path) -> None:
    ci(project, "broken")
    assert ci(project, "sound", after="; exit 1").returncode == 1
