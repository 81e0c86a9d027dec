"""How long it takes from the sending of a tick until the clients of the stream have it, and what they cost.

MarketFlow runs in live mode on a real Redis and a real PostgreSQL; three exchanges with 5 symbols send evenly from
another process, and yet another one holds the clients: 1, 100 and 1,000 of them, each of all series, at one process of
MarketFlow. All of a tick's way counts: the socket of the exchange, the flow, Redis, and back to the clients. Prices
that newer ones have replaced are not sent; every price that a client receives counts.

Meanwhile GET /prices/latest is asked every 10 ms, with clients and, for comparison, without.

The limit, measured in the same run: a server that does nothing but write the same events to as many clients, with the
same rests (`bare.stream`), while the same ticks come.

    python -m tests.benchmarks.stream
"""

import argparse
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.benchmarks import bare
from tests.benchmarks.cores import Cores
from tests.benchmarks.feeder import Feeder
from tests.benchmarks.live import EXCHANGES, LATEST, SETUPS, SYMBOLS, Live
from tests.benchmarks.rawhttp import Client, request_of
from tests.benchmarks.report import percentile, report
from tests.benchmarks.stage import stage
from tests.benchmarks.stream_readers import STREAMS, Seen, StreamReaders
from tests.support.application import ROOT
from tests.support.servers import HOST

CLIENTS = (1, 100, 1000)
WARM_UP_SECONDS = 2.0
PAUSE_SECONDS = 0.01
MEGABYTE = 1 << 20


def measure(
    setup: str, clients: int, rate: float, seconds: float, stream: str = "prices", checkout: Path = ROOT
) -> dict[str, Any]:
    """So many clients of a MarketFlow of their own."""
    with stage(checkout) as servers, ExitStack() as stack:
        servers.settings["HTTP__STREAMS_PER_CLIENT"] = max(CLIENTS) * 10  # all clients have one address
        live = Live(servers, stack, setup, rate)
        answering = psutil.Process(live.application.process.pid)
        _ask(live, WARM_UP_SECONDS)
        alone = _ask(live, seconds / 2)
        before = answering.memory_info().rss
        readers = stack.enter_context(StreamReaders(live.application.port, clients, stream))
        _ask(live, WARM_UP_SECONDS)
        readers.begin()
        began = time.monotonic()
        with Cores(live.processes | {"clients": readers.pid}) as cores:
            beside = _ask(live, seconds)
        seen, took = readers.seen(), time.monotonic() - began
        memory = answering.memory_info().rss
    limit = _limit(clients, rate, seconds)
    return {
        "setup": setup,
        "stream": stream,
        "clients": clients,
        **{f"p{at}_ms": percentile(seen.ages, at) for at in (50, 90, 99)},
        "max_ms": max(seen.ages),
        **{f"limit_p{at}_ms": percentile(limit.seen.ages, at) for at in (50, 99)},
        **{f"p{at}_of_limit": percentile(seen.ages, at) / percentile(limit.seen.ages, at) for at in (50, 99)},
        "events_per_second": seen.events / took,
        "a_client": seen.events / took / clients,
        "mb_per_second": seen.received / took / MEGABYTE,
        "rss_before_mb": before / MEGABYTE,
        "rss_mb": memory / MEGABYTE,
        "kb_a_client": (memory - before) / 1024 / clients,
        **{f"latest_p{at}_ms": percentile(beside, at) for at in (50, 99)},
        **{f"alone_p{at}_ms": percentile(alone, at) for at in (50, 99)},
        "limit_a_client": limit.seen.events / limit.seconds / clients,
        "cores": {process: round(used, 2) for process, used in cores.used.items()},
        "limit_cores": {process: round(used, 2) for process, used in limit.cores.items()},
    }


class _Limit(NamedTuple):
    seen: Seen
    seconds: float
    cores: Mapping[str, float]


def _limit(clients: int, rate: float, seconds: float) -> _Limit:
    """The same ticks and clients at a server that only writes."""
    with bare.stream() as server, ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection((HOST, server.port))) for _ in EXCHANGES]
        readers = stack.enter_context(StreamReaders(server.port, clients))
        stack.enter_context(Feeder(connections[:2], SYMBOLS, rate))
        stack.enter_context(Feeder(connections[2:], SYMBOLS, rate))
        time.sleep(WARM_UP_SECONDS)
        readers.begin()
        began = time.monotonic()
        with Cores({"limit": server.pid, "clients": readers.pid}) as cores:
            time.sleep(seconds)
        seen, took = readers.seen(), time.monotonic() - began
    return _Limit(seen, took, cores.used)


def _ask(live: Live, seconds: float) -> list[float]:
    """Ask for a latest price every PAUSE_SECONDS; gives the milliseconds that each answer took."""
    took = []
    request = request_of(LATEST)
    end = time.monotonic() + seconds
    with Client(live.application.port) as client:
        while (began := time.monotonic()) < end:
            client.get(request)
            took.append((time.monotonic() - began) * 1000)
            time.sleep(PAUSE_SECONDS)
    return took


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--setup", choices=(*SETUPS, "all"), default="both", help="one process, feeds and API apart, or each"
    )
    parser.add_argument("--clients", type=int, action="append", help="only this number; can be repeated")
    parser.add_argument("--rate", type=float, default=100, help="ticks a second and exchange; %(default)s")
    parser.add_argument("--seconds", type=float, default=15, help="how long each is measured; %(default)s")
    parser.add_argument("--stream", choices=STREAMS, default="prices", help="what the clients receive; %(default)s")
    parser.add_argument("--quick", action="store_true", help="three seconds each, for a look")
    arguments = parser.parse_args(argv)
    seconds = 3.0 if arguments.quick else arguments.seconds
    setups = SETUPS if arguments.setup == "all" else (arguments.setup,)
    clients = arguments.clients or CLIENTS
    report(
        "stream",
        [measure(setup, each, arguments.rate, seconds, arguments.stream) for setup in setups for each in clients],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
