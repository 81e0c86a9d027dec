"""How many ticks a second MarketFlow takes off three exchange sockets, with every one of them in a row at the end.

The application runs as a process in live mode with a real Redis and a real PostgreSQL. A feeder, a process of its own,
sends prepared blocks of lines, stamped with the time of their sending, as fast as they are taken or at a given rate.
Begun in mid-minute, a run of 60 s crosses a minute's end. Two limits, measured in the same run: what msgspec's
decode_lines alone does with the same bytes on one core, and what the feeder sends to somebody who only receives.

The exit code is 1 when a row is not exactly what was sent.

    python -m tests.benchmarks.ingest
    python -m tests.benchmarks.ingest --rate 300000
"""

import argparse
import json
import math
import multiprocessing
import multiprocessing.connection
import socket
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
import psutil

from marketflow.feeds.decoder import Line
from marketflow.settings import Settings
from tests.benchmarks.feeder import LINES_A_BLOCK, STAMP, blocks
from tests.benchmarks.report import report
from tests.benchmarks.stage import Stage, stage
from tests.support.application import ROOT, Application
from tests.support.servers import HOST, FaultyServer, wait_until

EXCHANGES = ("exchange1", "exchange2", "exchange3")
SINK_SECONDS = 3.0

decode_lines = msgspec.json.Decoder(Line).decode_lines


class Sample(NamedTuple):
    """One look at the processes: seconds of the monotonic clock, CPU seconds used, resident bytes."""

    at: float
    cpu: float
    rss: int


class Sums(NamedTuple):
    """What a series amounts to."""

    ticks: int
    total: float


def sums(symbols: Sequence[str], sent: int) -> dict[str, Sums]:
    """What `sent` blocks amount to, by symbol."""
    prepared = blocks(symbols)
    ticks: defaultdict[str, int] = defaultdict(int)
    totals: defaultdict[str, float] = defaultdict(float)
    for number, block in enumerate(prepared):
        times = len(range(number, sent, len(prepared)))
        for line in decode_lines(block):
            ticks[line.symbol] += times
            totals[line.symbol] += times * line.price
    return {symbol: Sums(ticks[symbol], totals[symbol]) for symbol in ticks if ticks[symbol]}


def feed(pipe: "multiprocessing.connection.Connection", symbols: Sequence[str], rate: float, seconds: float) -> None:
    """The feeder process: announces its ports, and at the end how many blocks it sent to each exchange's client."""
    listeners = [socket.create_server((HOST, 0)) for _ in EXCHANGES]
    pipe.send([listener.getsockname()[1] for listener in listeners])
    clients = [listener.accept()[0] for listener in listeners]
    prepared = blocks(symbols)
    pipe.recv()  # everybody is ready
    sent = [0] * len(clients)
    began = time.monotonic()

    def send(number: int, client: socket.socket) -> None:
        n = 0
        while (now := time.monotonic()) < began + seconds:
            if rate and (ahead := n * LINES_A_BLOCK * len(clients) / rate - (now - began)) > 0:
                time.sleep(ahead)
            client.sendall(prepared[n % len(prepared)].replace(STAMP, b"%d" % (time.time_ns() // 1_000_000)))
            n += 1
        sent[number] = n

    threads = [threading.Thread(target=send, args=item) for item in enumerate(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pipe.send((sent, time.monotonic() - began))
    pipe.recv()  # keep the connections open until all has been counted
    for one in (*clients, *listeners):
        one.close()


class Feeder:
    """The feeder as seen from here; `ports` are those of the exchanges, in order."""

    def __init__(self, symbols: Sequence[str], rate: float, seconds: float) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=feed, args=(theirs, symbols, rate, seconds))
        self._process.start()
        self.ports: list[int] = self._pipe.recv()

    def send(self) -> tuple[list[int], float]:
        """Let it send all it has to; gives the blocks sent to each client, and the seconds that took."""
        self._pipe.send("go")
        sent: tuple[list[int], float] = self._pipe.recv()
        return sent

    def close(self) -> None:
        """End it, and its connections."""
        self._pipe.send("done")
        self._process.join(5)
        self._process.kill()


def decode_limit(symbols: Sequence[str]) -> float:
    """Ticks a second that decoding alone would allow, on one core: the best of several runs, a limit being one."""
    data = b"".join(blocks(symbols))
    ticks = data.count(b"\n")
    rates = []
    for _ in range(15):
        began = time.perf_counter()
        decode_lines(data)
        rates.append(ticks / (time.perf_counter() - began))
    return max(rates)


def feeder_limit(symbols: Sequence[str]) -> float:
    """Ticks a second that the feeder sends to somebody who only receives."""

    def receive(port: int) -> None:
        room = bytearray(1 << 18)
        with socket.create_connection((HOST, port)) as client:
            while client.recv_into(room):
                pass

    with closing(Feeder(symbols, 0, SINK_SECONDS)) as feeder:
        for port in feeder.ports:
            threading.Thread(target=receive, args=(port,), daemon=True).start()
        sent, seconds = feeder.send()
    return sum(sent) * LINES_A_BLOCK / seconds


class Watch:
    """Looks at processes twice a second, on a thread of its own."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._processes = [psutil.Process(pid) for pid in pids]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.samples: list[Sample] = []
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()

    @property
    def cores(self) -> float:
        """CPU seconds a second."""
        first, last = self.samples[0], self.samples[-1]
        return (last.cpu - first.cpu) / (last.at - first.at)

    def _look(self) -> None:
        while True:
            cpu, rss = 0.0, 0
            for process in self._processes:
                with suppress(psutil.NoSuchProcess):  # PostgreSQL has workers that come and go
                    times = process.cpu_times()
                    cpu += times.user + times.system
                    rss += process.memory_info().rss
            self.samples.append(Sample(time.monotonic(), cpu, rss))
            if self._ended.wait(0.5):
                return


class Scraper:
    """Asks for the metrics `rate` times a second, as several Prometheus would, on a thread of its own."""

    def __init__(self, application: Application, rate: float) -> None:
        self._http = httpx.Client(base_url=application.http.base_url)
        self._rate = rate
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self.seconds: list[float] = []
        if rate:
            self._thread.start()

    def close(self) -> None:
        """Ask no more."""
        self._ended.set()
        if self._rate:
            self._thread.join()
        self._http.close()

    def _ask(self) -> None:
        while not self._ended.wait(1 / self._rate):
            began = time.monotonic()
            self._http.get("/metrics").raise_for_status()
            self.seconds.append(time.monotonic() - began)


def pids(server: FaultyServer) -> list[int]:
    return [process.pid for process in server.family()]


def family(pid: int) -> list[int]:
    """A process and its children."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def wrong_series(on: Stage, symbols: Sequence[str], sent: Sequence[int]) -> int:
    """Of how many series the rows are not what was sent."""
    expected = {
        (exchange, symbol): amount
        for exchange, count in zip(EXCHANGES, sent, strict=True)
        for symbol, amount in sums(symbols, count).items()
    }
    with on.postgres.connect() as connection:
        found = {
            (exchange, symbol): Sums(ticks, total)
            for exchange, symbol, ticks, total in connection.execute(
                "select exchange, pair_name, sum(tick_count)::int8, sum(average_price * tick_count)"
                " from aggregates group by 1, 2"
            )
        }
    return sum(
        key not in found
        or key not in expected
        or found[key].ticks != expected[key].ticks
        or not math.isclose(found[key].total, expected[key].total, rel_tol=1e-9)
        for key in expected.keys() | found.keys()
    )


def run(rate: float, seconds: float, symbols: Sequence[str], scrapes: float, checkout: Path = ROOT) -> dict[str, float]:
    """One measurement."""
    with stage(checkout) as on, ExitStack() as stack:
        feeder = stack.enter_context(closing(Feeder(symbols, rate, seconds)))
        tables = ",".join(
            f'{{name="{name}",address="{HOST}:{port}"}}' for name, port in zip(EXCHANGES, feeder.ports, strict=True)
        )
        application = on.start({"MODE": "live", "EXCHANGES": f"[{tables}]", "SYMBOLS": json.dumps(list(symbols))})
        watches = [
            stack.enter_context(closing(Watch(each)))
            for each in (family(application.process.pid), pids(on.redis), pids(on.postgres))
        ]
        with closing(Scraper(application, scrapes)) as scraper:
            sent, elapsed = feeder.send()
        for watch in watches:
            watch.close()
        ticks = sum(sent) * LINES_A_BLOCK
        began = time.monotonic()

        def counted() -> int:
            return sum(application.get(f"/prices/average/{symbol}")["ticks"] for symbol in symbols)

        wait_until(lambda: counted() >= ticks, timeout=20, message="not all ticks were counted")
        caught_up = time.monotonic() - began
        code, stopping = application.stop()
        limit = decode_limit(symbols)
        with on.postgres.connect() as connection:
            row = connection.execute("select coalesce(sum(tick_count), 0)::int8, count(*) from aggregates").fetchone()
        assert row is not None
        memory = [sample.rss / 1e6 for sample in watches[0].samples]
        steady = memory[len(memory) // 4 :]
        return {
            "sent": ticks,
            "in_rows": row[0],
            "rows": row[1],
            "wrong_series": wrong_series(on, symbols, sent),
            "seconds": elapsed,
            "ticks_per_second": ticks / elapsed,
            "decode_limit": limit,
            "of_decode_limit": ticks / elapsed / limit,
            "cores": watches[0].cores,
            "ticks_per_core_second": ticks / elapsed / watches[0].cores,
            "redis_cores": watches[1].cores,
            "postgres_cores": watches[2].cores,
            "caught_up_seconds": caught_up,
            "scrapes": len(scraper.seconds),
            "scrape_ms": 1000 * statistics.median(scraper.seconds) if scraper.seconds else 0.0,
            "rss_mb_begin": steady[0],
            "rss_mb_end": steady[-1],
            "rss_mb_max": max(memory),
            "stop_seconds": stopping,
            "exit_code": code,
        }


def exact(counters: Mapping[str, float]) -> bool:
    """Return whether the rows are exactly what was sent."""
    return counters["sent"] == counters["in_rows"] and not counters["wrong_series"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=0, help="ticks a second over all exchanges; 0: all it takes")
    parser.add_argument("--seconds", type=float, default=60, help="how long to send")
    parser.add_argument("--symbols", type=int, default=5, help="symbols on each exchange")
    parser.add_argument("--scrapes", metavar="N", type=float, default=0, help="ask for /metrics so often a second")
    parser.add_argument("--quick", action="store_true", help="ten seconds, for a look")
    arguments = parser.parse_args()
    known = Settings().symbols
    symbols = [*known, *(f"S{n}USDT" for n in range(arguments.symbols))][: arguments.symbols]
    feeder_alone = feeder_limit(symbols)
    counters = run(arguments.rate, 10 if arguments.quick else arguments.seconds, symbols, arguments.scrapes) | {
        "feeder_limit": feeder_alone
    }
    report("ingest", [counters])
    return 0 if exact(counters) and counters["exit_code"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
