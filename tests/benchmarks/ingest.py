"""How many ticks a second MarketFlow takes off three exchange sockets, with every one of them in a row at the end.

The application runs as a process in live mode with a real Redis and a real PostgreSQL. A feeder, a process of its own,
sends prepared blocks of lines, stamped with the time of their sending, at a given rate or as fast as they are taken.
The limit is what this machine can do at all: msgspec's decode_lines alone, on the same bytes, on one core.

    python -m tests.benchmarks.ingest --rate 300000 --seconds 60
"""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil

from marketflow.feeds.guard import Line
from marketflow.settings import Settings
from tests.application import Application
from tests.servers import HOST, PostgresServer, RedisServer, wait_until

EXCHANGES = ("exchange1", "exchange2", "exchange3")
LINES_A_BLOCK = 500
STAMP = b"1000000000000"


class Sample(NamedTuple):
    """One look at the application: seconds since the begin, CPU seconds used, resident bytes."""

    at: float
    cpu: float
    rss: int


def blocks(symbols: Sequence[str], count: int = 16) -> list[bytes]:
    """Prepared blocks of lines; STAMP stands for the time."""
    rng = random.Random(7)
    prices = {symbol: rng.uniform(1, 70_000) for symbol in symbols}
    made = []
    for _ in range(count):
        lines = []
        for i in range(LINES_A_BLOCK):
            symbol = symbols[i % len(symbols)]
            price = round(prices[symbol] * rng.uniform(0.99, 1.01), 2)
            lines.append(b'{"symbol":"%s","price":%.2f,"timestamp":%s}\n' % (symbol.encode(), price, STAMP))
        made.append(b"".join(lines))
    return made


def feed(pipe: "multiprocessing.connection.Connection", symbols: Sequence[str], rate: float, seconds: float) -> None:
    """The feeder process: announces its ports, and at the end the ticks it sent to each exchange's client."""
    listeners = [socket.create_server((HOST, 0)) for _ in EXCHANGES]
    pipe.send([listener.getsockname()[1] for listener in listeners])
    clients = [listener.accept()[0] for listener in listeners]
    pipe.recv()  # everybody is ready
    sent = [0] * len(clients)
    end = time.monotonic() + seconds

    def send(number: int, client: socket.socket) -> None:
        prepared = blocks(symbols)
        began = time.monotonic()
        n = 0
        while (now := time.monotonic()) < end:
            if rate and (ahead := n * LINES_A_BLOCK * len(clients) / rate - (now - began)) > 0:
                time.sleep(ahead)
            client.sendall(prepared[n % len(prepared)].replace(STAMP, b"%d" % (time.time_ns() // 1_000_000)))
            n += 1
        sent[number] = n * LINES_A_BLOCK

    threads = [threading.Thread(target=send, args=item) for item in enumerate(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pipe.send(sent)
    pipe.recv()  # keep the connections open until all has been counted
    for one in (*clients, *listeners):
        one.close()


def decode_limit(symbols: Sequence[str]) -> float:
    """Ticks a second that decoding alone would allow, on one core; median of several runs."""
    data = b"".join(blocks(symbols))
    ticks = data.count(b"\n")
    rates = []
    for _ in range(15):
        began = time.perf_counter()
        msgspec.json.Decoder(Line).decode_lines(data)
        rates.append(ticks / (time.perf_counter() - began))
    return statistics.median(rates)


def watch(pid: int, samples: list[Sample], stop: threading.Event) -> None:
    """Look at a process twice a second."""
    process = psutil.Process(pid)
    began = time.monotonic()
    while not stop.wait(0.5):
        times = process.cpu_times()
        samples.append(Sample(time.monotonic() - began, times.user + times.system, process.memory_info().rss))


def run(rate: float, seconds: float, symbols: Sequence[str]) -> dict[str, float]:
    """One measurement."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="mf-bench-"))
        stack.callback(shutil.rmtree, folder)
        folder.chmod(0o711)
        redis = stack.enter_context(RedisServer(folder / "redis"))
        postgres = stack.enter_context(PostgresServer(folder / "postgres", folder / "template"))

        ours, theirs = multiprocessing.Pipe()
        feeder = multiprocessing.get_context("spawn").Process(target=feed, args=(theirs, symbols, rate, seconds))
        feeder.start()
        stack.callback(feeder.kill)
        ports = ours.recv()
        tables = ",".join(
            f'{{name="{name}",address="{HOST}:{port}"}}' for name, port in zip(EXCHANGES, ports, strict=True)
        )
        settings = {
            "MODE": "live",
            "EXCHANGES": f"[{tables}]",
            "SYMBOLS": json.dumps(list(symbols)),
            "REDIS__HOST": HOST,
            "REDIS__PORT": redis.port,
        } | {f"POSTGRES__{name.upper()}": value for name, value in postgres.keywords.items()}
        application = stack.enter_context(Application(folder, settings))

        limit = decode_limit(symbols)
        samples: list[Sample] = []
        stop = threading.Event()
        watcher = threading.Thread(target=watch, args=(application.process.pid, samples, stop))
        watcher.start()
        ours.send("go")
        began = time.monotonic()
        sent = ours.recv()
        elapsed = time.monotonic() - began

        def counted() -> int:
            return sum(application.get(f"/prices/average/{symbol}")["ticks"] for symbol in symbols)

        wait_until(lambda: counted() >= sum(sent), timeout=20, message="not all ticks were counted")
        caught_up = time.monotonic() - began - elapsed
        stop.set()
        watcher.join()
        code, stopping = application.stop()
        ours.send("done")
        with postgres.connect() as connection:
            row = connection.execute("select coalesce(sum(tick_count), 0)::int8, count(*) from aggregates").fetchone()
        assert row is not None
        steady = [sample for sample in samples if sample.at > min(10, seconds / 4)]
        cpu = (samples[-1].cpu - samples[0].cpu) / (samples[-1].at - samples[0].at)
        return {
            "sent": sum(sent),
            "in_rows": row[0],
            "rows": row[1],
            "seconds": elapsed,
            "ticks_per_second": sum(sent) / elapsed,
            "limit_per_second": limit,
            "of_limit": sum(sent) / elapsed / limit,
            "cores": cpu,
            "caught_up_seconds": caught_up,
            "rss_mb_begin": steady[0].rss / 1e6,
            "rss_mb_end": steady[-1].rss / 1e6,
            "rss_mb_max": max(sample.rss for sample in samples) / 1e6,
            "stop_seconds": stopping,
            "exit_code": code,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rate", type=float, default=300_000, help="ticks a second over all exchanges; 0: all it takes"
    )
    parser.add_argument("--seconds", type=float, default=60, help="how long to send")
    parser.add_argument("--symbols", type=int, default=5, help="symbols on each exchange")
    arguments = parser.parse_args()
    known = Settings().symbols
    symbols = [*known, *(f"S{n}USDT" for n in range(arguments.symbols))][: arguments.symbols]
    figures = run(arguments.rate, arguments.seconds, symbols)
    for name, value in figures.items():
        print(f"{name:>20}  {value:,.3f}" if isinstance(value, float) else f"{name:>20}  {value:,}")
    print(json.dumps({"benchmark": "ingest", "cpus": os.cpu_count()} | figures))
    return 0 if figures["sent"] == figures["in_rows"] and figures["exit_code"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
