"""What one tick costs at a low rate: CPU of MarketFlow and of Redis, commands to Redis, and context switches.

MarketFlow runs in live mode in one process, on a real Redis and a real PostgreSQL; three exchanges send 100 ticks a
second each, evenly, from other processes. At that rate no two ticks share the work of a batch. Before the first tick
it measures what MarketFlow uses while it is connected and nothing ticks: nobody asks in either part.

    python -m tests.benchmarks.single_tick
"""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.benchmarks.cores import Cores
from tests.benchmarks.live import Live
from tests.benchmarks.report import report
from tests.benchmarks.stage import STALE_AFTER_SECONDS, Stage, stage
from tests.support.application import ROOT
from tests.support.process_counters import context_switches

RATE = 100
WARM_UP_SECONDS = 2.0


def measure(seconds: float, checkout: Path = ROOT) -> dict[str, float]:
    """Return the cost of a tick, of MarketFlow unless named otherwise, and the use of a core without ticks.

    CPU is in microseconds; commands are those that Redis ran, those of scripts included; context switches are the
    voluntary ones of all threads, and apart from them those that took a core away, as other processes do.
    """
    with stage(checkout) as servers, ExitStack() as stack:
        servers.settings["FLOW__STALE_AFTER_SECONDS"] = STALE_AFTER_SECONDS
        live = Live(servers, stack, "both", RATE)
        live.pause()
        time.sleep(WARM_UP_SECONDS)  # the first seconds compile and connect
        with Cores(live.processes) as idle:
            time.sleep(seconds)
        live.resume()
        time.sleep(WARM_UP_SECONDS)
        sent, commands, began = live.sent, _commands(servers), time.monotonic()
        before = context_switches(live.processes["marketflow"])
        with Cores(live.processes) as cores:
            time.sleep(seconds)
        elapsed = time.monotonic() - began
        after = context_switches(live.processes["marketflow"])
        ticks = live.sent - sent
        return {
            "ticks": ticks,
            "cpu_us": cores.used["marketflow"] * elapsed / ticks * 1e6,
            "redis_cpu_us": cores.used["redis"] * elapsed / ticks * 1e6,
            "redis_commands": (_commands(servers) - commands) / ticks,
            "context_switches": (after.voluntary - before.voluntary) / ticks,
            "involuntary_switches": (after.involuntary - before.involuntary) / ticks,
            "idle_core_percent": idle.used["marketflow"] * 100,
        }


def _commands(servers: Stage) -> int:
    """Return how many commands Redis has run."""
    with servers.redis.client() as client:
        return int(client.info("stats")["total_commands_processed"])


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
