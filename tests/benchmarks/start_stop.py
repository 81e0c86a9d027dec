"""How long it takes from the start of the process to the first price, and from SIGTERM to its end.

Cold: the first start of all, with the embedded servers and generated prices, which makes a new PostgreSQL cluster.
Warm: the second one. Then with servers that are there already. It is stopped while it generates 300 ticks a second, and
while three exchanges flood: what it said to have counted just before the signal must be in the rows.

All data are in memory where there is room; a disk would make the cold start longer. The limits are an empty Python
program, and one that imports the application.

    python -m tests.benchmarks.start_stop
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx

from tests.benchmarks.feeder import Feeder
from tests.benchmarks.live import EXCHANGES, SYMBOLS
from tests.benchmarks.report import report
from tests.benchmarks.stage import Stage, logs_on_error, stage
from tests.support.application import ROOT, Application, ScriptedExchange, exchanges_setting
from tests.support.servers import wait_until

IMPORTS = (
    "import gc; gc.disable(); import marketflow.cli.main, marketflow.logs, marketflow.settings,"
    " marketflow.runtime.processes, marketflow.runtime.engine"
)
"""What `marketflow` imports for the first price, and as it does: without garbage collections."""

FLOOD_SECONDS = 1.5
STOP_TIMEOUT_SECONDS = 20.0


class Times:
    """Seconds by what took them, and what went wrong."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.lost: defaultdict[str, int] = defaultdict(int)
        self.failed: defaultdict[str, int] = defaultdict(int)

    def first_price(self, what: str, application: Application) -> None:
        """Start it and wait until it tells a price."""
        began = time.monotonic()
        application.start(wait=False)
        wait_until(lambda: _price(application), timeout=60, message="no price came")
        self.seconds[what].append(time.monotonic() - began)

    def stop(self, what: str, application: Application) -> None:
        """End it by SIGTERM."""
        code, seconds = application.stop(signal.SIGTERM, STOP_TIMEOUT_SECONDS)
        self.seconds[what].append(seconds)
        self.failed[what] += code != 0

    def run(self, what: str, program: str) -> None:
        """Run a line of Python."""
        began = time.monotonic()
        # In the environment of an Application: one that forbids bytecode files would make it compile each time.
        environment = {"PATH": os.environ["PATH"]}
        subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env=environment)
        self.seconds[what].append(time.monotonic() - began)

    def table(self) -> list[dict[str, object]]:
        """A row for each."""
        return [
            {
                "what": what,
                "runs": len(seconds),
                "median_s": statistics.median(seconds),
                "min_s": min(seconds),
                "max_s": max(seconds),
                "failed": self.failed[what],
                "ticks_lost": self.lost[what],
            }
            for what, seconds in self.seconds.items()
        ]


def _price(application: Application) -> object:
    assert application.process.poll() is None, application.log
    try:
        return application.find(f"/prices/latest/{SYMBOLS[0]}")
    except httpx.TransportError:  # it does not listen yet
        return None


def embedded(times: Times, folder: Path, checkout: Path = ROOT) -> None:
    """The first start of all and the second one, as a user sees them."""
    folder.mkdir(mode=0o711)
    for start in ("cold", "warm"):
        with ExitStack() as stack:
            application = Application(folder, checkout=checkout)
            stack.enter_context(logs_on_error([application]))
            stack.push(application)
            times.first_price(f"first price, embedded servers, {start}", application)
            times.stop(f"stop, embedded servers, {start}", application)


def apart(times: Times, stage: Stage) -> None:
    """With servers that are there already."""
    application = stage.prepare({})
    times.first_price("first price, own servers", application)
    times.stop("stop, own servers", application)


def flooded(times: Times, stage: Stage) -> None:
    """Stop while three exchanges send as fast as they can."""
    what = "stop, flooded"
    with ExitStack() as stack:
        exchanges = [stack.enter_context(ScriptedExchange(name)) for name in EXCHANGES]
        application = stage.start({"MODE": "live", "EXCHANGES": exchanges_setting(*exchanges)})
        connections = [exchange.client() for exchange in exchanges]
        feeders = [stack.enter_context(Feeder([connection], SYMBOLS, rate=100)) for connection in connections]
        for feeder in feeders:
            feeder.flood()
        time.sleep(FLOOD_SECONDS)
        counted = sum(application.get(f"/prices/average/{symbol}")["ticks"] for symbol in SYMBOLS)
        times.stop(what, application)
    with stage.postgres.connect() as connection:
        row = connection.execute("select sum(tick_count)::int8 from aggregates where mode = 'live'").fetchone()
    assert row is not None
    times.lost[what] += max(0, counted - (row[0] or 0))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="of each; %(default)s")
    parser.add_argument("--quick", action="store_true", help="one run, for a look")
    arguments = parser.parse_args(argv)
    times = Times()
    with stage() as servers:
        for number in range(1 if arguments.quick else arguments.runs):
            times.run("python -c pass", "pass")
            times.run("import the application", f"{IMPORTS}; import os; os._exit(0)")
            embedded(times, servers.folder / f"embedded-{number}")
            apart(times, servers)
            flooded(times, servers)
    table = times.table()
    report("start_stop", table)
    return 1 if any(row["failed"] or row["ticks_lost"] for row in table) else 0


if __name__ == "__main__":
    sys.exit(main())
