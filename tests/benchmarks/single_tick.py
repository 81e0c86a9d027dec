"""What one tick costs at a low rate: CPU of MarketFlow and of Redis, and commands to Redis.

MarketFlow runs in live mode in one process, on a real Redis and a real PostgreSQL; three exchanges send 100 ticks a
second each, evenly, from other processes. At that rate no two ticks share the work of a batch.

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
from tests.benchmarks.stage import Stage, stage
from tests.support.application import ROOT

RATE = 100
WARM_UP_SECONDS = 2.0


def measure(seconds: float, checkout: Path = ROOT) -> dict[str, float]:
    """Return the cost of a tick: CPU in microseconds, and commands that Redis ran, those of scripts included."""
    with stage(checkout) as servers, ExitStack() as stack:
        live = Live(servers, stack, "both", RATE)
        time.sleep(WARM_UP_SECONDS)  # the first seconds compile and connect
        sent, commands, began = live.sent, _commands(servers), time.monotonic()
        with Cores(live.processes) as cores:
            time.sleep(seconds)
        elapsed = time.monotonic() - began
        ticks = live.sent - sent
        return {
            "ticks": ticks,
            "cpu_us": cores.used["marketflow"] * elapsed / ticks * 1e6,
            "redis_cpu_us": cores.used["redis"] * elapsed / ticks * 1e6,
            "redis_commands": (_commands(servers) - commands) / ticks,
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
