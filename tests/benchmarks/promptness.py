"""How long it takes from the sending of a tick until GET /prices/latest/{exchange}/{symbol} shows it.

MarketFlow runs in live mode on a real Redis and a real PostgreSQL; three exchanges with 5 symbols send evenly, at 100
and at 1,000 ticks a second and exchange, and in the third case two of them at 100 while the other floods. All of that
comes from other processes. This one sends a marked tick now and then, in step with nothing, and asks back to back on
one connection until it is shown, or a later one of its series.

The limits are measured between the marked ticks: a request to a bare route of Starlette, which is what asking once
costs without any work, and an echo over TCP, which is what the way there and back costs.

    python -m tests.benchmarks.promptness
"""

import argparse
import gc
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks import bare
from tests.benchmarks.cores import Cores
from tests.benchmarks.live import SETUPS, Live
from tests.benchmarks.rawhttp import Client, request_of
from tests.benchmarks.report import percentile, report
from tests.benchmarks.stage import stage
from tests.support.application import ROOT
from tests.support.servers import HOST

BODY = b'{"symbol":"BTCUSDT","exchange":"exchange1","price":67123.45,"timestamp":"2026-11-21T05:12:57.069Z"}'
WARM_UP_SECONDS = 1.0


class Case(NamedTuple):
    """Ticks a second and exchange, and whether the last exchange floods instead."""

    rate: int
    flood: bool


CASES = {"100": Case(100, False), "1000": Case(1000, False), "flood": Case(100, True)}


def measure(name: str, setup: str, samples: int, seconds: float, checkout: Path = ROOT) -> dict[str, Any]:
    """One case on a MarketFlow of its own: `samples` marked ticks, or as many as fit into the time."""
    case = CASES[name]
    with stage(checkout) as servers, ExitStack() as stack:
        live = Live(servers, stack, setup, case.rate)
        probes = {"visible": live.marks.sample} | _limits(stack)
        if case.flood:
            live.flooder.flood()
        _collect(probes, live, samples, WARM_UP_SECONDS)
        sent, began = live.sent, time.monotonic()
        with Cores(live.processes) as cores:
            took = _collect(probes, live, samples, seconds)
        ticks_per_second = (live.sent - sent) / (time.monotonic() - began)
        live.flooder.ease()
        live.settle()
    return {
        "setup": setup,
        "case": name,
        "samples": len(took["visible"]),
        **{f"p{at}_ms": percentile(took["visible"], at) for at in (50, 90, 99)},
        "max_ms": max(took["visible"]),
        **{f"{limit}_p{at}_ms": percentile(took[limit], at) for limit in ("bare", "echo") for at in (50, 99)},
        "ticks_per_second": ticks_per_second,
        "cores": {process: round(used, 2) for process, used in cores.used.items()},
    }


def _collect(
    probes: Mapping[str, Callable[[], float]], live: Live, samples: int, seconds: float
) -> dict[str, list[float]]:
    """Take each probe by turns, with a pause before each turn; gives milliseconds by probe."""
    took: dict[str, list[float]] = {name: [] for name in probes}
    end = time.monotonic() + seconds
    gc.disable()  # of this process, which would otherwise be seen in the counters
    try:
        while len(took["visible"]) < samples and time.monotonic() < end:
            live.marks.pause(0.005, 0.02)
            for name, probe in probes.items():
                took[name].append(probe())
    finally:
        gc.enable()
    return took


def _limits(stack: ExitStack) -> dict[str, Callable[[], float]]:
    """What the machine can do: an echo over TCP, and a request that needs no work."""
    route = stack.enter_context(bare.bare_route(BODY))
    client = stack.enter_context(Client(route.port))
    echoing = stack.enter_context(bare.echo())
    connection = stack.enter_context(socket.create_connection((HOST, echoing.port), timeout=5))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    request = request_of(bare.PATH)

    def ask() -> float:
        began = time.perf_counter()
        client.get(request)
        return (time.perf_counter() - began) * 1000

    def call() -> float:
        began = time.perf_counter()
        connection.sendall(BODY)
        connection.recv(len(BODY), socket.MSG_WAITALL)
        return (time.perf_counter() - began) * 1000

    return {"bare": ask, "echo": call}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--setup", choices=(*SETUPS, "all"), default="both", help="one process, feeds and API apart, or each"
    )
    parser.add_argument("--case", choices=tuple(CASES), action="append", help="only this one; can be repeated")
    parser.add_argument("--samples", type=int, default=1200, help="marked ticks a case; %(default)s")
    parser.add_argument("--seconds", type=float, default=40, help="the longest a case may take; %(default)s")
    parser.add_argument("--quick", action="store_true", help="a hundred marked ticks a case, for a look")
    arguments = parser.parse_args(argv)
    samples, seconds = (100, 5.0) if arguments.quick else (arguments.samples, arguments.seconds)
    setups = SETUPS if arguments.setup == "all" else (arguments.setup,)
    cases = arguments.case or tuple(CASES)
    report("promptness", [measure(case, setup, samples, seconds) for setup in setups for case in cases])
    return 0


if __name__ == "__main__":
    sys.exit(main())
