"""What 10,000 alert rules cost at 100,000 ticks a second, and how long it takes from a tick to its event.

MarketFlow runs in live mode on a real Redis and a real PostgreSQL, both roles in one process, once without rules and
once with them. A feeder, a process of its own, sends lines of 20 symbols on three exchanges. Rules watch levels of
each series, of all exchanges and of the reference price, spread over twice the range in which prices move, half of them
within it. A fourth exchange sends a tick that crosses a level now and then, in step with nothing; its event is awaited
at /stream/alerts. The delay is by the clock of this machine, from the sending of the tick to the event.

The exit code is 1 when a crossing has no event, or another one has two.

    python -m tests.benchmarks.alerts
"""

import argparse
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from tests.benchmarks.cores import Cores
from tests.benchmarks.feeder import blocks
from tests.benchmarks.ingest import EXCHANGES, Feeder, decode_lines
from tests.benchmarks.report import percentile, report
from tests.benchmarks.stage import stage
from tests.support.application import ROOT, Application, ScriptedExchange
from tests.support.servers import HOST, wait_until

SYMBOLS = tuple(f"S{number}USDT" for number in range(20))
PROBE = "PROBEUSDT"
WARM_UP_SECONDS = 3.0
EVENT_SECONDS = 5.0


def rules(count: int) -> list[dict[str, Any]]:
    """Return price rules: of the three exchanges, of all of them, and of the reference price."""
    rng = random.Random(11)
    prices = {line.symbol: line.price for block in blocks(SYMBOLS) for line in decode_lines(block)}
    sources: list[dict[str, Any]] = [{"exchange": name} for name in (*EXCHANGES, "reference")] + [{}]
    return [
        {
            "kind": "price",
            "symbol": (symbol := SYMBOLS[number % len(SYMBOLS)]),
            "level": round(prices[symbol] * rng.uniform(0.98, 1.02), 4),
            "cooldown": "1h",
            **sources[number // len(SYMBOLS) % len(sources)],
        }
        for number in range(count)
    ]


class Probe:
    """Ticks of one series that cross a level, and their events."""

    def __init__(self, exchange: ScriptedExchange, application: Application) -> None:
        self._exchange = exchange
        self._application = application
        self._arrived: dict[float, list[float]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self.delays: list[float] = []
        """Milliseconds from the sending of a tick to its event."""

    def start(self) -> None:
        self._exchange.send(1.0, symbol=PROBE)
        self._thread.start()
        time.sleep(1.0)  # until the stream stands

    def cross(self, number: int) -> None:
        """Send a price on the other side of the level, and await its event. Each price is another one."""
        price = 2.0 + number / 1000 if number % 2 == 0 else 1.0 - number / 10_000
        sent = time.time()
        self._exchange.send(price, symbol=PROBE)
        wait_until(lambda: price in self._arrived, EVENT_SECONDS, f"the crossing at {price} has no event")
        self.delays.append((self._arrived[price][0] - sent) * 1000)

    def check(self) -> None:
        """Check that no crossing had two events."""
        assert all(len(arrived) == 1 for arrived in self._arrived.values()), "a crossing had two events"

    def _follow(self) -> None:
        url = f"{self._application.http.base_url}/stream/alerts"
        with httpx.stream("GET", url, timeout=30) as response:
            for event in _events(response):
                if event["symbol"] == PROBE:
                    self._arrived.setdefault(event["value"], []).append(time.time())
                if self._ended.is_set():
                    return


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    kind = ""
    for line in response.iter_lines():
        name, _, value = line.partition(": ")
        if name == "event":
            kind = value
        elif name == "data" and kind == "alert":
            yield json.loads(value)


def measure(count: int, rate: float, seconds: float, checkout: Path = ROOT) -> dict[str, Any]:
    """One run with `count` rules."""
    rng = random.Random(3)
    with stage(checkout) as servers, ScriptedExchange("probe") as probing:
        feeder = Feeder(SYMBOLS, rate, seconds + WARM_UP_SECONDS)
        with closing(feeder):
            exchanges = [
                {"name": name, "address": f"{HOST}:{port}"} for name, port in zip(EXCHANGES, feeder.ports, strict=True)
            ]
            exchanges.append({"name": "probe", "address": probing.address})
            given = [{"kind": "price", "symbol": PROBE, "exchange": "probe", "level": 1.5, "cooldown": "0s"}]
            config = servers.folder / "config.json"
            alerts = [*rules(count), *given] if count else given
            config.write_text(
                json.dumps({"mode": "live", "symbols": [*SYMBOLS, PROBE], "exchanges": exchanges, "alerts": alerts})
            )
            application = servers.start({}, "--config", str(config))
            wait_until(lambda: set(application.get("/health")["exchanges"].values()) <= {"connected", "stale"})
            probe = Probe(probing, application)
            probe.start()
            sending = threading.Thread(target=feeder.send, daemon=True)
            sending.start()
            time.sleep(WARM_UP_SECONDS)
            end, number = time.monotonic() + seconds - 1, 0
            began = _ticks(application)
            with Cores({"marketflow": application.process.pid}) as cores:
                while time.monotonic() < end:
                    probe.cross(number)
                    number += 1
                    time.sleep(rng.uniform(0.25, 0.45))
            ticks, took = _ticks(application)
            rate_seen = (ticks - began[0]) / (took - began[1])
            sending.join(20)
            probe.check()
            stored = application.get("/events/alerts", limit="1000")["events"]
    return {
        "rules": count,
        "ticks_per_second": rate_seen,
        "cores": round(cores.used["marketflow"], 3),
        "crossings": len(probe.delays),
        "delay_p50_ms": statistics.median(probe.delays),
        "delay_p99_ms": percentile(probe.delays, 99),
        "delay_max_ms": max(probe.delays),
        "other_events": len([each for each in stored if each["event"]["symbol"] != PROBE]),
    }


def _ticks(application: Application) -> tuple[int, float]:
    """The ticks that were received, and when that was (seconds of the monotonic clock)."""
    text = application.http.get("/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("marketflow_ticks_total{")]
    return sum(int(float(line.rpartition(" ")[2])) for line in lines), time.monotonic()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", type=int, default=10_000, help="%(default)s")
    parser.add_argument("--rate", type=float, default=100_000, help="ticks a second in all; %(default)s")
    parser.add_argument("--seconds", type=float, default=20, help="length of a run; %(default)s")
    parser.add_argument("--quick", action="store_true", help="runs of eight seconds")
    arguments = parser.parse_args(argv)
    seconds = 8.0 if arguments.quick else arguments.seconds
    began = datetime.now().astimezone().isoformat(timespec="seconds")
    print(f"{began}: {arguments.rules} rules at {arguments.rate:,.0f} ticks/s", flush=True)
    report("alerts", [measure(count, arguments.rate, seconds) for count in (0, arguments.rules)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
