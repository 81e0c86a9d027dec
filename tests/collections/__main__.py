"""The Postman collection against real applications, run by newman.

python -m tests.collections               every set-up, one after the other
python -m tests.collections live          one of them

newman is `.venv/bin/newman` unless --newman says otherwise; `.ci/run collections` installs it.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from marketflow.settings import VENUES
from tests.support.application import ROOT, Application
from tests.support.servers import HOST, free_port, wait_until

COLLECTION = ROOT / "collections" / "marketflow.postman_collection.json"
ENVIRONMENT = ROOT / "collections" / "local.postman_environment.json"

TOKEN = "open-sesame-open-sesame"
EXCHANGES = ("exchange1", "exchange2", "exchange3")
NEWMAN_SECONDS = 240.0

FAILURES_SHOWN = 3000
"""Characters about failed tests that are shown once more in the end."""

READY_SECONDS = 60.0
CONNECTIONS = 20
"""How many in a row must find the application ready; each reaches one of its workers by chance."""


@dataclass(frozen=True)
class SetUp:
    """An application to run the collection against, freshly started on empty embedded servers."""

    mode: str
    token: str = TOKEN
    separate: bool = False
    """Feeds and two workers of the API in processes of their own."""
    venues: Sequence[str] = field(default=())
    """Simulated venues beside the exchanges, in live mode."""
    folders: Sequence[str] = field(default=())
    """What is run; everything by default."""
    switches: bool = True
    """Whether the collection may switch the mode, which it does not unless a variable says so."""


SET_UPS = {
    "test": SetUp("test"),
    "live": SetUp("live", venues=VENUES),
    "separate": SetUp("live", separate=True),
    "open": SetUp("test", token="", folders=("Start here", "Mode", "Switch the mode", "Errors", "In the end")),
    "reading": SetUp("test", folders=("Start here", "Mode", "Switch the mode", "In the end"), switches=False),
}


@dataclass(frozen=True)
class Outcome:
    """What newman said: its exit code, and skipped tests as (place in the collection, name)."""

    code: int
    output: str
    skipped: frozenset[tuple[str, str]]

    @property
    def failures(self) -> str:
        """The failed tests: what follows newman's table."""
        return self.output.rpartition("┘")[2].strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Run it against each set-up; 1 when a test failed, an application did not end well, or a test ran nowhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(SET_UPS)}; all by default")
    parser.add_argument("--newman", type=Path, default=ROOT / ".venv" / "bin" / "newman", help="%(default)s")
    parser.add_argument("--verbose", action="store_true", help="show every request and test, not only the summary")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.names) - set(SET_UPS):
        parser.error(f"no such set-up: {', '.join(sorted(unknown))}")
    if not arguments.newman.exists():
        parser.error(f"there is no {arguments.newman}: npm install --global --prefix .venv newman")
    outcomes = {}
    for name in arguments.names or SET_UPS:
        print(f"== newman: {name}", flush=True)
        outcomes[name] = _run(SET_UPS[name], arguments.newman)
        print(
            outcomes[name].output if arguments.verbose or outcomes[name].code else _summary(outcomes[name]), flush=True
        )
    never_run = _never_run(outcomes)
    failed = [name for name, outcome in outcomes.items() if outcome.code]
    for name in failed:  # last, since logs are cut at their beginning
        print(f"== failed: {name}\n{outcomes[name].failures[-FAILURES_SHOWN:]}", file=sys.stderr)
    return 1 if failed or never_run else 0


def _run(setup: SetUp, newman: Path) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="marketflow-newman-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # PostgreSQL runs as another user when started by root
        try:
            outcome = _run_in(folder, setup, newman)
        except BaseException:
            print(_logs(folder), file=sys.stderr)
            raise
        return outcome if outcome.code == 0 else replace(outcome, output=f"{_logs(folder)}\n{outcome.output}")


def _run_in(folder: Path, setup: SetUp, newman: Path) -> Outcome:
    with ExitStack() as stack:
        exchanges = stack.enter_context(_exchanges(folder, setup.venues)) if setup.mode == "live" else _nowhere()
        processes = stack.enter_context(_application(folder, setup, exchanges))
        outcome = _newman(newman, folder, setup, processes[-1])
        if outcome.code:
            return outcome
        switched = "mode switched to" in _logs(folder)
        assert switched is setup.switches, f"the mode was {'' if switched else 'not '}switched"
        for process in reversed(processes):
            code, seconds = process.stop(signal.SIGTERM)
            assert code == 0, f"exit code {code} after SIGTERM"
            print(f"ended by SIGTERM with 0 after {seconds:.1f} s")
        return outcome


def _logs(folder: Path) -> str:
    """What all processes said."""
    logs = [*sorted(folder.glob("*.log")), *sorted(folder.glob("*/application.log"))]
    return "\n".join(f"== {log.relative_to(folder)}\n{log.read_text(errors='replace')}" for log in logs)


@contextmanager
def _exchanges(folder: Path, venues: Sequence[str]) -> Iterator[str]:
    """Simulated exchanges and venues, each a process; gives the setting that names them."""
    addresses = {}
    with ExitStack() as stack:
        for name in (*EXCHANGES, *venues):
            port = free_port()
            command = [sys.executable, "-m", "marketflow", "exchange", "--port", str(port)]
            command += ["--venue", name] if name in venues else ["--name", name]
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            process = stack.enter_context(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log))
            stack.callback(process.terminate)
            addresses[name] = f"{HOST}:{port}"
        yield _setting(addresses)


def _nowhere() -> str:
    """The setting that names exchanges which are not there."""
    return _setting({name: f"{HOST}:{free_port()}" for name in EXCHANGES})


def _setting(addresses: Mapping[str, str]) -> str:
    tables = [
        f'{{name="{name}",venue="{name}",url="ws://{address}",rest_url="http://{address}"}}'
        if name in VENUES
        else f'{{name="{name}",address="{address}"}}'
        for name, address in addresses.items()
    ]
    return f"[{', '.join(tables)}]"


@contextmanager
def _application(folder: Path, setup: SetUp, exchanges: str) -> Iterator[list[Application]]:
    """Its processes, the one that answers last, once all that answer are healthy and have prices of every exchange."""
    given = {
        "DATA_DIR": folder / "data",
        "EXCHANGES": exchanges,
        "HTTP__TOKEN": setup.token,
        "MODE": setup.mode,
    }
    with ExitStack() as stack:
        processes = []
        if setup.separate:
            apart = folder / "feeds"
            apart.mkdir()
            processes.append(Application(apart, given, ("--role", "ingest")).start(wait=False))
            stack.push(processes[0].__exit__)
        arguments = ("--role", "api", "--workers", "2") if setup.separate else ()
        answering = Application(folder, given, arguments)
        stack.push(answering.__exit__)
        answering.start(timeout=READY_SECONDS)
        for path in ("/health", *(f"/prices/average/{name}/BTCUSDT" for name in (*EXCHANGES, *setup.venues))):
            wait_until(partial(_is_ready, answering, path), READY_SECONDS, f"not ready: {path}")
        yield [*processes, answering]


def _is_ready(application: Application, path: str) -> bool:
    """Whether all workers answer, by connections of their own, and are healthy."""
    for _ in range(CONNECTIONS):
        answer = application.http.get(path, headers={"Connection": "close"})
        if answer.status_code != 200 or answer.json().get("status", "ok") != "ok":
            return False
    return True


def _newman(newman: Path, folder: Path, setup: SetUp, application: Application) -> Outcome:
    variables = {
        "baseUrl": str(application.http.base_url).rstrip("/"),
        "token": setup.token,
        "expected_mode": setup.mode,
        "live_feeds": "connected" if setup.mode == "live" else "none",
        "fresh": "true",
        "switch_mode": "yes" if setup.switches else "",
    }
    report = folder / "report.json"
    command = [str(newman), "run", str(COLLECTION), "--environment", str(ENVIRONMENT), "--color", "off"]
    command += ["--reporters", "cli,json", "--reporter-json-export", str(report)]
    command += ["--timeout-request", "10000", "--timeout-script", "60000"]
    for name, value in variables.items():
        command += ["--env-var", f"{name}={value}"]
    for name in setup.folders:
        command += ["--folder", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NEWMAN_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if error.stdout else ""
        return Outcome(1, f"{output}\nno end within {NEWMAN_SECONDS:.0f} s", frozenset())
    told = json.loads(report.read_text()) if report.exists() else {"run": {"executions": []}}
    return Outcome(done.returncode, done.stdout + done.stderr, frozenset(_skipped(told)))


def _skipped(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for execution in report["run"]["executions"]:
        for assertion in execution.get("assertions", ()):
            if assertion["skipped"]:
                yield execution["item"]["name"], assertion["assertion"]


def _summary(outcome: Outcome) -> str:
    """newman's table, and what was left out."""
    table = [line for line in outcome.output.splitlines() if line.startswith(("┌", "│", "├", "└"))]
    return "\n".join(table + [f"left out: {place}: {name}" for place, name in sorted(outcome.skipped)])


def _never_run(outcomes: Mapping[str, Outcome]) -> bool:
    """Whether a test was left out by everybody who should run all; only where every set-up had its turn."""
    if set(outcomes) != set(SET_UPS):
        return False
    never = frozenset.intersection(*(outcomes[name].skipped for name, each in SET_UPS.items() if not each.folders))
    for place, name in sorted(never):
        print(f"no set-up runs this test: {place}: {name}", file=sys.stderr)
    return bool(never)


if __name__ == "__main__":
    began = time.monotonic()
    code = main()
    print(f"== newman: {time.monotonic() - began:.0f} s", flush=True)
    sys.exit(code)
