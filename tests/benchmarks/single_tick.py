"""What one tick costs at a low rate: CPU of MarketFlow and of Redis, commands to Redis, and context switches.

MarketFlow runs in live mode in one process, on a real Redis and a real PostgreSQL; three exchanges send 100 ticks a
second each, evenly, from other processes. At that rate no two ticks share the work of a batch. Before the first tick
it measures what MarketFlow uses while it is connected and nothing ticks: nobody asks in either part.

    python -m tests.benchmarks.single_tick
"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from tests.benchmarks.cores import Cores
from tests.benchmarks.live import Live
from tests.benchmarks.report import report
from tests.benchmarks.stage import Stage, stage
from tests.support.application import ROOT

RATE = 100
WARM_UP_SECONDS = 2.0

_VOLUNTARY = re.compile(r"^voluntary_ctxt_switches:\s*(\d+)$", re.MULTILINE)


def measure(seconds: float, checkout: Path = ROOT) -> dict[str, float]:
    """Return the cost of a tick, of MarketFlow unless named otherwise, and the use of a core without ticks.

    CPU is in microseconds; commands are those that Redis ran, those of scripts included; context switches are the
    voluntary ones of all threads.
    """
    with stage(checkout) as servers, ExitStack() as stack:
        live = Live(servers, stack, "both", RATE)
        live.pause()
        time.sleep(WARM_UP_SECONDS)  # the first seconds compile and connect
        with Cores(live.processes) as idle:
            time.sleep(seconds)
        live.resume()
        time.sleep(WARM_UP_SECONDS)
        sent, commands, began = live.sent, _commands(servers), time.monotonic()
        switches = _context_switches(live.processes["marketflow"])
        with Cores(live.processes) as cores:
            time.sleep(seconds)
        elapsed = time.monotonic() - began
        switches = _context_switches(live.processes["marketflow"]) - switches
        ticks = live.sent - sent
        return {
            "ticks": ticks,
            "cpu_us": cores.used["marketflow"] * elapsed / ticks * 1e6,
            "redis_cpu_us": cores.used["redis"] * elapsed / ticks * 1e6,
            "redis_commands": (_commands(servers) - commands) / ticks,
            "context_switches": switches / ticks,
            "idle_core_percent": idle.used["marketflow"] * 100,
        }


def _commands(servers: Stage) -> int:
    """Return how many commands Redis has run."""
    with servers.redis.client() as client:
        return int(client.info("stats")["total_commands_processed"])


def _context_switches(pid: int) -> int:
    """Return how often the threads of a process have waited for something."""
    waited = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with suppress(FileNotFoundError):  # the thread has ended
            found = _VOLUNTARY.search(status.read_text())
            waited += int(found[1]) if found else 0
    return waited


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="how long to measure; %(default)s")
    parser.add_argument("--quick", action="store_true", help="five seconds, for a look")
    arguments = parser.parse_args(argv)
    report("single_tick", [measure(5 if arguments.quick else arguments.seconds)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
