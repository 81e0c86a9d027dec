"""Run a pytest command; repeat failed tests alone once, and record those that pass then in a ledger of flaky tests.

Pytest's cache is one of its own, so that several can run at the same time.

python .ci/flaky.py COMMAND, in the project's folder.

A test that fails alone, too, fails the run. One that passes alone is printed as FLAKY and appended to the ledger; if
the ledger has it already, that fails the run. Commit the new line or mend the test; delete its line once mended.
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LEDGER = Path(".ci/flaky.txt")
"""Lines of a date and a test id; what begins with # is a comment."""

AGAIN = ("-m", "pytest", "-q", "-m", "", "--last-failed", "--last-failed-no-failures", "none")

TESTS_FAILED = 1
"""pytest's exit code; others but 0 mean that it did not run all tests."""


def recorded() -> set[str]:
    """Return the test ids in the ledger."""
    lines = LEDGER.read_text().splitlines() if LEDGER.exists() else []
    return {line.split(maxsplit=1)[1] for line in lines if line.strip() and not line.startswith("#")}


def last_failed(cache: str) -> set[str]:
    """Return the ids of the tests that failed and have not passed since."""
    file = Path(cache, "v/cache/lastfailed")
    return set(json.loads(file.read_text())) if file.exists() else set()


def record(tests: set[str]) -> None:
    """Append tests to the ledger with today's date."""
    today = datetime.datetime.now(datetime.UTC).date()
    with LEDGER.open("a") as ledger:
        ledger.writelines(f"{today} {test}\n" for test in sorted(tests))


def run(command: str) -> int:
    """Run a command and its failed tests once more alone; return the exit code."""
    with tempfile.TemporaryDirectory() as cache:
        return run_with(cache, command)


def run_with(cache: str, command: str) -> int:
    """Run a command and its failed tests with pytest's cache in this folder."""
    environment = os.environ | {"PYTEST_ADDOPTS": f"{os.environ.get('PYTEST_ADDOPTS', '')} -o cache_dir={cache}"}
    code = subprocess.run(["bash", "-c", command], env=environment).returncode  # noqa: S607 - the bash that runs .ci/run
    failed = last_failed(cache)
    if code != TESTS_FAILED or not failed:
        return code
    print(f"== once more, one at a time: {len(failed)} tests that failed", flush=True)
    code = subprocess.run([sys.executable, *AGAIN], env=environment).returncode
    if code not in (0, TESTS_FAILED):
        return code
    flaky = failed - last_failed(cache)
    known = recorded()
    for test in sorted(flaky):
        print(f"FLAKY: {test} failed, and passed alone{', and is in ' + str(LEDGER) if test in known else ''}")
    record(flaky - known)
    return TESTS_FAILED if flaky & known else code


if __name__ == "__main__":
    sys.exit(run(sys.argv[1]))
