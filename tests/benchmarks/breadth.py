"""What many series cost: CPU, memory, commands to Redis, and how soon after its end all rows of a minute are written.

The application runs as a process in live mode with a real Redis and a real PostgreSQL. A feeder, a process of its own,
sends one tick a second of every series, spread evenly over the second, or as many as are asked for in the shape of
Zipf: the n-th symbol of an exchange gets a share of 1/n. Each case sees a whole minute and the beginning of another.
The limit is what this machine does at all: commands a second of a client that sends them in pipelines of a thousand.

    python -m tests.benchmarks.breadth --case 1500 --case 15000 --restart
    python -m tests.benchmarks.breadth --case 50000 --processes 2

Each case ends with a stop in mid-minute. Rows that it leaves in Redis are written by another start, so that `in_rows`
is all that was sent unless the stop has lost rows, which are `in_no_store`.

With --restart the application is killed in mid-minute (kill -9) and started again: how soon it is ready, takes ticks
and has written the rows of that minute.

With --processes several ingest processes share each exchange, by its symbols, and are standbys of each other: each
receives and decodes all ticks. `late_s` is by how much the feeder was behind at the end: its clients, or the machine,
did not take more ticks.
"""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import random
import select
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import psycopg
import redis

from marketflow.model import MINUTE_MS
from tests.benchmarks.report import report
from tests.benchmarks.stage import Stage, stage
from tests.support.application import ROOT, Application
from tests.support.servers import HOST, wait_until

STEP_SECONDS = 0.01
"""How often the feeder sends."""

STAMP = b"1000000000000"

ROWS_SECONDS = 60.0
"""How long a start may take to write the rows that a stop in mid-minute has left in Redis."""


class Case(NamedTuple):
    """How many series there are, and ticks a second: 0 for one of each series, else in the shape of Zipf."""

    exchanges: int
    symbols: int
    rate: int = 0

    @property
    def series(self) -> int:
        return self.exchanges * self.symbols


CASES = {
    "15": Case(3, 5),
    "1500": Case(5, 300),
    "15000": Case(10, 1500),
    "50000": Case(10, 5000),
    "zipf": Case(5, 300, 200_000),
}

# Bytes of Redis, as in deploy/README.md. Up to 128 slices of one tick are stored in a packed list.
SERIES_BYTES, PACKED_SLICE_BYTES, SLICE_BYTES, FULL_CANDLE_BYTES = 1600, 60, 150, 270


class Traffic:
    """The lines of a case, for one exchange: a block for each step, again and again."""

    def __init__(self, case: Case, symbols: Sequence[str], number: int) -> None:
        rng = random.Random(number)
        lines = [
            b'{"symbol":"%s","price":%.2f,"timestamp":%s}\n' % (s.encode(), rng.uniform(1, 7e4), STAMP) for s in symbols
        ]
        steps = round(1 / STEP_SECONDS)
        if case.rate:
            weights = [1 / (n + 1) for n in range(len(lines))]
            size = round(case.rate / case.exchanges / steps)
            self.blocks = [rng.choices(lines, weights, k=size) for _ in range(steps)]
        else:
            self.blocks = [lines[step::steps] for step in range(steps)]
        self._joined = [b"".join(block) for block in self.blocks]

    def at(self, step: int) -> tuple[bytes, int]:
        """What is sent at a step, stamped with now, and how many ticks that is."""
        step %= len(self.blocks)
        now = b"%d" % (time.time_ns() // 1_000_000)
        return self._joined[step].replace(STAMP, now), len(self.blocks[step])


def feed(pipe: "multiprocessing.connection.Connection", case: Case, symbols: Sequence[str]) -> None:
    """Feeder process: sends its ports, then the same to all clients of an exchange, until it gets a message.

    Then it sends how many ticks of which minute it sent, each counted once, and by how many seconds it was late.
    """
    listeners = [socket.create_server((HOST, 0)) for _ in range(case.exchanges)]
    pipe.send([listener.getsockname()[1] for listener in listeners])
    traffic = [Traffic(case, symbols, number) for number in range(case.exchanges)]
    clients: list[list[socket.socket]] = [[] for _ in listeners]
    sent: Counter[int] = Counter()
    began = time.monotonic()
    step = 0
    while not pipe.poll():
        for ready in select.select(listeners, [], [], 0)[0]:
            clients[listeners.index(ready)].append(ready.accept()[0])
        for number, of_exchange in enumerate(clients):
            block, ticks = traffic[number].at(step)
            for client in list(of_exchange):
                try:
                    client.sendall(block)
                except OSError:
                    of_exchange.remove(client)
                    client.close()
            if of_exchange:
                sent[time.time_ns() // 1_000_000 // MINUTE_MS * MINUTE_MS] += ticks
        step += 1
        time.sleep(max(0.0, began + step * STEP_SECONDS - time.monotonic()))
    pipe.recv()
    pipe.send((sent, max(0.0, time.monotonic() - began - step * STEP_SECONDS)))
    pipe.recv()  # keep the connections open until all has been counted
    for one in (*(client for of_exchange in clients for client in of_exchange), *listeners):
        one.close()


def pipelined_limit(client: "redis.Redis") -> float:
    """Commands a second that one client of this machine does in pipelines of a thousand; median of several."""
    rates = []
    for _ in range(15):
        began = time.perf_counter()
        with client.pipeline(transaction=False) as pipe:
            for number in range(1000):
                pipe.set(f"limit:{number}", number)
            pipe.execute()
        rates.append(1000 / (time.perf_counter() - began))
    client.flushall()
    return statistics.median(rates)


class Look(NamedTuple):
    """A look at the processes of the application, its Redis and its PostgreSQL."""

    at: float
    cpu: float
    most_cpu: float
    rss: int
    redis_cpu: float
    postgres_cpu: float
    commands: int


def cpu_with_children(process: psutil.Process) -> float:
    """CPU seconds of a server, and of its processes: sessions, and those that rewrite the append-only file."""
    seconds = 0.0
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # it has just ended, and counts with its parent
            seconds += sum(each.cpu_times()[:4])
    return seconds


class Watch:
    """Looks at all of them twice a second, from a thread."""

    def __init__(self, pids: Sequence[int], redis_pid: int, postgres_pid: int, client: "redis.Redis") -> None:
        self._processes = [psutil.Process(pid) for pid in pids]
        self._redis, self._postgres = psutil.Process(redis_pid), psutil.Process(postgres_pid)
        self._client = client
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.looks: list[Look] = []

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            own = [sum(process.cpu_times()[:2]) for process in self._processes]
            try:
                info: dict[str, Any] = self._client.info("stats")
            except redis.TimeoutError:  # on a machine that is too busy for the case
                continue
            rss = sum(process.memory_info().rss for process in self._processes)
            self.looks.append(
                Look(
                    time.monotonic(),
                    sum(own),
                    max(own),
                    rss,
                    cpu_with_children(self._redis),
                    cpu_with_children(self._postgres),
                    info["total_commands_processed"],
                )
            )

    def rate(self, name: str) -> float:
        """How much of a figure a second, once it runs steadily."""
        first, last = self.looks[len(self.looks) // 6], self.looks[-1]
        return float(getattr(last, name) - getattr(first, name)) / (last.at - first.at)


def rows_of(connection: "psycopg.Connection[Any]", minute: int) -> int:
    row = connection.execute(
        "select count(*) from aggregates where timestamp = to_timestamp(%s)", [minute // 1000]
    ).fetchone()
    return int(row[0]) if row else 0


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def wait_for_second(second: float) -> int:
    """Wait until a second of a minute; gives the start of that minute in Unix ms."""
    wait = (second * 1000 - now_ms()) % MINUTE_MS
    time.sleep(wait / 1000)
    return now_ms() // MINUTE_MS * MINUTE_MS


def seconds_until_rows(connection: "psycopg.Connection[Any]", minute: int, series: int) -> float:
    """From the end of a minute until all of its rows are there."""
    wait_until(lambda: rows_of(connection, minute) >= series, 90, "not all rows came")
    return (now_ms() - minute - MINUTE_MS) / 1000


def predicted_bytes(case: Case, client: "redis.Redis") -> float:
    """Redis memory by the formula in deploy/README.md, for the stored slices and minutes."""
    slices = members(client, "window")
    of_one_tick = PACKED_SLICE_BYTES if slices <= 128 * case.series else SLICE_BYTES
    size = FULL_CANDLE_BYTES if case.rate else of_one_tick
    return case.series * SERIES_BYTES + slices * size + members(client, "minutes") * FULL_CANDLE_BYTES


def members(client: "redis.Redis", kind: str) -> int:
    """How many members all sorted sets of a kind have."""
    keys = list(client.scan_iter(match=f"*:{kind}", count=5000))
    with client.pipeline(transaction=False) as pipe:
        for key in keys:
            pipe.zcard(key)
        return sum(pipe.execute())


def start(servers: Stage, settings: Mapping[str, object], processes: int) -> list[Application]:
    """Start one process of both roles, or several ingest processes."""
    if processes == 1:
        return [servers.start(settings)]
    started = [servers.start(settings, "--role", "ingest", wait=False) for _ in range(processes)]
    wait_until(lambda: all("takes ticks in" in each.log for each in started), 30, "not all processes own shards")
    return started


def ticks_in_rows(connection: "psycopg.Connection[Any]") -> int:
    row = connection.execute("select coalesce(sum(tick_count), 0)::int8 from aggregates").fetchone()
    return int(row[0]) if row else 0


def run(name: str, case: Case, restart: bool, checkout: Path = ROOT, processes: int = 1) -> dict[str, Any]:
    """One measurement."""
    symbols = [f"S{number}USDT" for number in range(case.symbols)]
    with stage(checkout) as servers, ExitStack() as stack:
        client = stack.enter_context(servers.redis.client())
        limit = pipelined_limit(client)
        empty: int = client.info("memory")["used_memory"]
        ours, theirs = multiprocessing.Pipe()
        feeder = multiprocessing.get_context("spawn").Process(target=feed, args=(theirs, case, symbols))
        feeder.start()
        stack.callback(feeder.kill)
        shards = f",shards={processes}" if processes > 1 else ""
        exchanges = ",".join(
            f'{{name="exchange{number}",address="{HOST}:{port}"{shards}}}' for number, port in enumerate(ours.recv())
        )
        wait_for_second(45)
        settings = {"MODE": "live", "EXCHANGES": f"[{exchanges}]", "SYMBOLS": json.dumps(symbols)}
        applications = start(servers, settings, processes)
        assert servers.redis.process
        assert servers.postgres.process
        with servers.postgres.connect() as connection:
            pids = [each.process.pid for each in applications]
            servers_pids = servers.redis.process.pid, servers.postgres.process.pid
            with Watch(pids, *servers_pids, client) as watch:
                minute = wait_for_second(0)
                time.sleep(MINUTE_MS / 1000)
                written = seconds_until_rows(connection, minute, case.series)
                time.sleep(5)
            used: int = client.info("memory")["used_memory"]
            predicted, slices = predicted_bytes(case, client), members(client, "window")
            again = restarted(applications[0], connection, case) if restart else {}
            ours.send("stop")
            sent, late = ours.recv()
            time.sleep(1)
            stopped = [each.stop(timeout=30) for each in applications]
            drained = [each.drained() for each in applications]
            in_redis = sum(each.in_redis for each in drained)
            in_no_store = sum(each.in_no_store for each in drained)
            if in_redis:  # which the next start writes
                applications[0].start(timeout=60)
                with suppress(AssertionError):
                    wait_until(lambda: ticks_in_rows(connection) == sum(sent.values()), ROWS_SECONDS)
                applications[0].stop(timeout=30)
            ours.send("done")
            in_rows = ticks_in_rows(connection)
        ticks_a_second = case.rate or case.series
        return {
            "case": name,
            "series": case.series,
            "processes": processes,
            "most_cores": watch.rate("most_cpu"),
            "cores": watch.rate("cpu"),
            "us_a_tick": watch.rate("cpu") / ticks_a_second * 1e6,
            "redis_cores": watch.rate("redis_cpu"),
            "postgres_cores": watch.rate("postgres_cpu"),
            "commands_s": watch.rate("commands"),
            "limit_s": limit,
            "rss_mb_begin": watch.looks[0].rss / 1e6,
            "rss_mb_end": watch.looks[-1].rss / 1e6,
            "rss_mb_max": max(look.rss for look in watch.looks) / 1e6,
            "redis_mb": (used - empty) / 1e6,
            "predicted_mb": predicted / 1e6,
            "slices": slices,
            "rows_after_s": written,
            "redis_away": sum(each.log.count("Redis cannot be used") for each in applications),
            "late_s": late,
            "sent": sum(sent.values()),
            "in_rows": in_rows,
            "stop_s": max(seconds for _, seconds in stopped),
            "left_in_redis": in_redis,
            "in_no_store": in_no_store,
            "exit_code": max(code for code, _ in stopped),
        } | again


def restarted(application: Application, connection: "psycopg.Connection[Any]", case: Case) -> dict[str, object]:
    """Kill it in mid-minute and start it again."""
    minute = wait_for_second(30)
    application.kill()
    began = time.monotonic()
    application.start(timeout=60)
    ready = time.monotonic() - began

    def connected() -> bool:
        return set(application.get("/health")["exchanges"].values()) == {"connected"}

    wait_until(connected, 60)
    flowing = time.monotonic() - began
    rss = psutil.Process(application.process.pid).memory_info().rss
    return {
        "ready_after_s": ready,
        "ticks_after_s": flowing,
        "rss_mb_restarted": rss / 1e6,
        "rows_after_restart_s": seconds_until_rows(connection, minute, case.series),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="may be given again; default: all")
    parser.add_argument("--restart", action="store_true", help="kill it as well, and start it again")
    parser.add_argument(
        "--processes", action="append", type=int, help="ingest processes; may be given again; default: 1"
    )
    parser.add_argument("--quick", action="store_true", help="15 series only, for a look")
    arguments = parser.parse_args()
    numbers = arguments.processes or [1]
    if arguments.restart and max(numbers) > 1:
        parser.error("--restart is for one process")
    names = ["15"] if arguments.quick else arguments.case or CASES
    measured = [
        run(name, CASES[name], arguments.restart, processes=processes) for name in names for processes in numbers
    ]
    report("breadth", measured)
    exact = arguments.restart or all(each["sent"] == each["in_rows"] for each in measured)
    return 0 if exact and not any(each["exit_code"] for each in measured) else 1


if __name__ == "__main__":
    sys.exit(main())
