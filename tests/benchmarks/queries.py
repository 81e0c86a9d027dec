"""How many answers a second 16 connections get, while 1,000 ticks a second come in, and while an exchange floods.

MarketFlow runs in live mode on a real Redis and a real PostgreSQL that have a day of minutes and the slices of the last
six minutes. Two exchanges send evenly; the third does so too, or as fast as it is taken. The limit is a bare route of
Starlette that answers with as many bytes, asked by turns with MarketFlow under the same conditions. A flood takes CPU
from that route as well: `of_limit_of_calm` is the part of its answers that MarketFlow keeps beside the flood
(`of_calm`), in parts of what the bare route keeps (`limit_of_calm`). Beside the load one
connection looks for marked ticks: how old the answers are. What the load generator, the servers, the feeders and
MarketFlow use of the machine's cores stands beside the counters: they share them.

    python -m tests.benchmarks.queries --setup both
"""

import argparse
import statistics
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from operator import truediv
from typing import Any, NamedTuple

from tests.benchmarks import bare
from tests.benchmarks.cores import Cores
from tests.benchmarks.live import EXCHANGES, LATEST, SETUPS, SYMBOLS, Live
from tests.benchmarks.load import Load, ask
from tests.benchmarks.past import remember_a_day
from tests.benchmarks.rawhttp import Client, request_of
from tests.benchmarks.report import percentile, report
from tests.benchmarks.stage import Stage, stage

TICKS_PER_SECOND = 1000  # of all exchanges
QUERIES = {
    "latest, one exchange": LATEST,
    "latest": "/prices/latest/BTCUSDT",
    "highest 1m": "/prices/highest/BTCUSDT?period=1m",
    "highest 5m": "/prices/highest/BTCUSDT?period=5m",
    "average 24h": "/prices/average/BTCUSDT?period=24h",
}


class Asked(NamedTuple):
    """One measurement: the load, the cores used, the ages of answers in ms, the ticks a second that came in."""

    load: Load
    cores: Mapping[str, float]
    ages: Sequence[float]
    ticks_per_second: float


class Scene:
    """MarketFlow with a day behind it (or without, when not `with_past`), and what is measured of it."""

    def __init__(
        self, stage: Stage, stack: ExitStack, setup: str, workers: int, seconds: int, with_past: bool = True
    ) -> None:
        rate = TICKS_PER_SECOND / len(EXCHANGES)
        if with_past:
            remember_a_day(stage, EXCHANGES, SYMBOLS, rate / len(SYMBOLS))
        self.live = Live(stage, stack, setup, rate, workers)
        self.port = self.live.application.port
        self._seconds = seconds

    def ask(self, port: int, path: str, pid: int | None = None) -> Asked:
        """Load one path, of MarketFlow or of another server with a process of its own."""
        ended = threading.Event()
        processes = self.live.processes | ({} if pid is None else {"limit": pid})
        sent = self.live.sent
        with ThreadPoolExecutor(1) as pool, Cores(processes) as cores:
            watching = pool.submit(self._watch, ended) if pid is None else None
            try:
                load = ask(port, path, self._seconds)
            finally:
                ended.set()
        ages = watching.result() if watching else []
        return Asked(load, cores.used | {"load": load.cores}, ages, (self.live.sent - sent) / self._seconds)

    def _watch(self, ended: threading.Event) -> list[float]:
        ages = []
        while not ended.is_set():
            self.live.marks.pause(0.01, 0.05)
            ages.append(self.live.marks.sample())
        return ages


def measure(scene: Scene, setup: str, query: str, rounds: int) -> list[dict[str, Any]]:
    """Ask the limit and MarketFlow by turns, without the flood first, then with it; a row for each."""
    floods = (False, True)
    path = QUERIES[query]
    with Client(scene.port) as client:
        body = client.get(request_of(path))
    limits: dict[bool, list[Asked]] = {flooding: [] for flooding in floods}
    answers: dict[bool, list[Asked]] = {flooding: [] for flooding in floods}
    with bare.bare_route(body) as limit:
        for _ in range(rounds):
            for flooding in floods:
                if flooding:
                    scene.live.flooder.flood()
                else:
                    scene.live.settle()
                limits[flooding].append(scene.ask(limit.port, bare.PATH, limit.pid))
                answers[flooding].append(scene.ask(scene.port, path))
                scene.live.flooder.ease()
    scene.live.settle()
    kept, limit_kept = _kept(answers), _kept(limits)
    return [
        {
            "setup": setup,
            "query": query,
            "flood": flooding,
            "per_second": _median(answers[flooding], lambda asked: asked.load.per_second),
            "limit": _median(limits[flooding], lambda asked: asked.load.per_second),
            "of_limit": statistics.median(
                asked.load.per_second / limit.load.per_second
                for asked, limit in zip(answers[flooding], limits[flooding], strict=True)
            ),
            "of_calm": statistics.median(kept) if flooding else 1.0,
            "limit_of_calm": statistics.median(limit_kept) if flooding else 1.0,
            "of_limit_of_calm": statistics.median(map(truediv, kept, limit_kept)) if flooding else 1.0,
            "failed": sum(asked.load.failed for asked in answers[flooding]),
            "p50_ms": _median(answers[flooding], lambda asked: asked.load.p50_ms),
            "p99_ms": _median(answers[flooding], lambda asked: asked.load.p99_ms),
            "limit_p99_ms": _median(limits[flooding], lambda asked: asked.load.p99_ms),
            **_ages([age for asked in answers[flooding] for age in asked.ages]),
            "ticks_per_second": _median(answers[flooding], lambda asked: asked.ticks_per_second),
            "cores": _cores(answers[flooding]),
            "limit_cores": _cores(limits[flooding]),
        }
        for flooding in floods
    ]


def _kept(asked: Mapping[bool, Sequence[Asked]]) -> list[float]:
    """What the flood leaves of the answers a second, by round."""
    return [flood.load.per_second / calm.load.per_second for calm, flood in zip(asked[False], asked[True], strict=True)]


def _median(asked: Sequence[Asked], figure: Callable[[Asked], float]) -> float:
    return statistics.median(map(figure, asked))


def _ages(ages: Sequence[float]) -> dict[str, object]:
    return {"age_p50_ms": percentile(ages, 50), "age_p99_ms": percentile(ages, 99), "ages": len(ages)}


def _cores(asked: Sequence[Asked]) -> dict[str, float]:
    return {name: round(statistics.median(one.cores[name] for one in asked), 2) for name in asked[0].cores}


def run(setup: str, queries: Sequence[str], workers: int, rounds: int, seconds: int) -> list[dict[str, Any]]:
    """Measure one set-up."""
    with stage() as servers, ExitStack() as stack:
        scene = Scene(servers, stack, setup, workers, seconds)
        return [row for query in queries for row in measure(scene, setup, query, rounds)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--setup", choices=(*SETUPS, "all"), default="both", help="one process, feeds and API apart, or each"
    )
    parser.add_argument("--workers", type=int, default=1, help="API processes where they are apart; %(default)s")
    parser.add_argument("--query", choices=tuple(QUERIES), action="append", help="only this one; can be repeated")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each query; %(default)s")
    parser.add_argument("--seconds", type=int, default=2, help="how long a turn takes; %(default)s")
    parser.add_argument("--quick", action="store_true", help="one turn of a second, for a look")
    arguments = parser.parse_args(argv)
    rounds, seconds = (1, 1) if arguments.quick else (arguments.rounds, arguments.seconds)
    setups = SETUPS if arguments.setup == "all" else (arguments.setup,)
    queries = arguments.query or tuple(QUERIES)
    measured = [row for setup in setups for row in run(setup, queries, arguments.workers, rounds, seconds)]
    report("queries", measured)
    return 1 if any(row["failed"] for row in measured) else 0


if __name__ == "__main__":
    sys.exit(main())
