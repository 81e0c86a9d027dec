"""How much 1, 2 and 3 ingest processes take together, on a plain Redis and on a Redis Cluster of six nodes.

The processes share the exchanges, each the standby of another. Two kinds of traffic: `flood`, three exchanges that send
five symbols as fast as all their clients take them, and `15000`, ten exchanges with 1500 symbols each and one tick a
second of every series. An exchange sends the same to all its clients, as real ones do: where there are standbys every
tick is received and decoded twice. A tick counts once, by the rows in PostgreSQL.

Everything runs on one machine: feeder, ingest processes, Redis and PostgreSQL share its cores. What more processes gain
shows only where cores are idle: `idle` says how many were, `used` how many these processes used.
`decoded_core_s` compares also on a busy machine: ticks that a core of the ingest processes receives, decodes and merges
in a second, with those of standbys. `of_limit` is their share of what a core decodes that does nothing else.

    python -m tests.benchmarks.cluster
    python -m tests.benchmarks.cluster --traffic 15000 --store cluster --processes 2
"""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import select
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import psutil
import psycopg
import redis

from marketflow.model import minute_start
from marketflow.settings import Settings
from tests.benchmarks.breadth import CASES, STEP_SECONDS, Traffic, members, wait_for_second
from tests.benchmarks.cores import Cores
from tests.benchmarks.feeder import LINES_A_BLOCK, STAMP, Clients, blocks
from tests.benchmarks.ingest import decode_limit
from tests.benchmarks.report import report
from tests.benchmarks.stage import STALE_AFTER_SECONDS, Stage, stage
from tests.support.redis_cluster import RedisCluster, redis_program
from tests.support.servers import HOST, wait_until

TRAFFIC = ("flood", "15000")
STORES = ("plain", "cluster")
UNREMARKABLE = re.compile(r" DEBUG ")
FLOODING = 3
MEASURED_SECONDS, QUICK_SECONDS = 30.0, 8.0
ROWS_SECONDS = 90.0
"""How long rows may take: the minute must end first."""

BEGIN_SECOND = 45  # of a minute, so that the end of one is part of the measurement

Part = tuple[str, int]
"""An exchange and the start of a minute (Unix ms)."""

Block = Callable[[int], tuple[bytes, int]]
"""Gives what an exchange sends at a step, and how many ticks that is."""


def symbols_of(traffic: str) -> list[str]:
    return list(Settings().symbols) if traffic == "flood" else [f"S{n}USDT" for n in range(CASES["15000"].symbols)]


def exchanges_of(traffic: str) -> int:
    return FLOODING if traffic == "flood" else CASES["15000"].exchanges


def block_of(traffic: str, symbols: Sequence[str], number: int) -> Block:
    """Return what an exchange sends, by step."""
    if traffic != "flood":
        return Traffic(CASES["15000"], symbols, number).at
    prepared = blocks(symbols)

    def at(step: int) -> tuple[bytes, int]:
        return prepared[step % len(prepared)].replace(STAMP, b"%d" % (time.time_ns() // 1_000_000)), LINES_A_BLOCK

    return at


class Exchange:
    """An exchange of the feeder, with a thread that sends the same to all its clients."""

    def __init__(self, traffic: str, symbols: Sequence[str], number: int) -> None:
        self.listener = socket.create_server((HOST, 0))
        self.sent: Counter[int] = Counter()
        """Ticks by the minute (Unix ms) of their stamp, each counted once."""
        self._block = block_of(traffic, symbols, number)
        self._paced = traffic != "flood"
        self._clients = Clients()

    def send(self, ended: threading.Event) -> None:
        """Send until the event: as fast as the slowest client takes it, or a step every STEP_SECONDS."""
        began, step = time.monotonic(), 0
        while not ended.is_set():
            self.accept()
            block, ticks = self._block(step)
            minute = minute_start(int(block[-len(STAMP) - 2 : -2]))  # each line ends with it
            self._clients.send(block)
            self.sent[minute] += ticks if self._clients else 0
            step += 1
            if self._paced:
                time.sleep(max(0.0, began + step * STEP_SECONDS - time.monotonic()))
            else:
                while self._clients.behind and not ended.is_set():
                    self.send_rest()

    def send_rest(self) -> None:
        """Send more of what is kept for clients that are behind; wait up to STEP_SECONDS until one takes it."""
        select.select([], self._clients.behind, [], STEP_SECONDS)
        self._clients.send()

    def accept(self) -> int:
        """Accept waiting connections; return how many clients there are."""
        while select.select([self.listener], [], [], 0)[0]:
            self._clients.add(self.listener.accept()[0])
        return len(self._clients)


def feed(pipe: "multiprocessing.connection.Connection", traffic: str, symbols: Sequence[str]) -> None:
    """The feeder process: announces ports, and sends from the order "go" to "stop", whose answer are its ticks."""
    exchanges = [Exchange(traffic, symbols, number) for number in range(exchanges_of(traffic))]
    pipe.send([exchange.listener.getsockname()[1] for exchange in exchanges])
    ended = threading.Event()
    threads = [threading.Thread(target=exchange.send, args=(ended,)) for exchange in exchanges]
    while (order := pipe.recv()) != "stop":
        if order == "clients":
            pipe.send([exchange.accept() for exchange in exchanges])
        else:
            for thread in threads:
                thread.start()
            pipe.send(None)
    ended.set()
    for thread in threads:
        thread.join()
    sent = {(f"exchange{n}", minute): ticks for n, each in enumerate(exchanges) for minute, ticks in each.sent.items()}
    pipe.send(Counter(sent))
    while not pipe.poll():  # keep the connections open until all has been counted
        for exchange in exchanges:
            exchange.accept()  # and take new ones, as an exchange that is silent does
            exchange.send_rest()


class Store(NamedTuple):
    """The Redis of a run: settings that name it, its processes, and clients of its masters."""

    settings: Mapping[str, object]
    pids: Mapping[str, int]
    clients: "Sequence[redis.Redis]"


@contextmanager
def store_of(kind: str, servers: Stage) -> Iterator[Store]:
    """Yield the plain Redis of the stage, or six nodes; without Debian's redis-server this fails."""
    if kind == "plain":
        assert servers.redis.process
        with servers.redis.client() as client:
            yield Store({}, {"redis": servers.redis.process.pid}, [client])
        return
    with RedisCluster(servers.folder / "cluster") as cluster, ExitStack() as stack:
        masters = cluster.masters()
        pids = {}
        for number, node in enumerate(cluster.nodes):
            assert node.process
            pids[f"{'master' if node in masters else 'replica'}{number}"] = node.process.pid
        clients = [stack.enter_context(node.client()) for node in masters]
        yield Store({"REDIS__HOST": "", "REDIS__NODES": ",".join(cluster.addresses)}, pids, clients)


def ticks_in_rows(connection: "psycopg.Connection[Any]") -> Counter[Part]:
    """Count the ticks in the rows, by exchange and minute."""
    rows = connection.execute(
        "select exchange, (extract(epoch from timestamp) * 1000)::int8, sum(tick_count)::int8 from aggregates"
        " group by 1, 2"
    )
    return Counter({(exchange, minute): ticks for exchange, minute, ticks in rows})


def explanation(sent: Counter[Part], in_rows: Counter[Part], logs: Iterable[str]) -> str:
    """Return what rows lack or have too many, and what the processes say of it: the sum alone may hide both."""
    wrong = {part: in_rows[part] - sent[part] for part in sent.keys() | in_rows.keys() if in_rows[part] != sent[part]}
    lines = [f"{exchange} {minute}: {more:+} ticks in its rows" for (exchange, minute), more in sorted(wrong.items())]
    return "\n".join([*lines, *(line for log in logs for line in log.splitlines() if not UNREMARKABLE.search(line))])


def run(traffic: str, kind: str, processes: int, seconds: float) -> dict[str, Any]:
    """One measurement."""
    symbols = symbols_of(traffic)
    limit = decode_limit(symbols)
    with stage() as servers, store_of(kind, servers) as store, ExitStack() as stack:
        ours, theirs = multiprocessing.Pipe()
        feeder = multiprocessing.get_context("spawn").Process(target=feed, args=(theirs, traffic, symbols))
        feeder.start()
        stack.callback(feeder.kill)
        exchanges = ",".join(f'{{name="exchange{n}",address="{HOST}:{port}"}}' for n, port in enumerate(ours.recv()))
        settings = {"MODE": "live", "EXCHANGES": f"[{exchanges}]", "SYMBOLS": json.dumps(symbols), **store.settings}
        settings["FLOW__STALE_AFTER_SECONDS"] = STALE_AFTER_SECONDS
        ingest = [servers.start(settings, "--role", "ingest", wait=False) for _ in range(processes)]

        def all_connected() -> bool:  # owners, and standbys where there is another process
            ours.send("clients")
            return bool(min(ours.recv()) >= min(2, processes))

        wait_until(all_connected, 60, "not every exchange has its clients")
        if seconds >= MEASURED_SECONDS:
            wait_for_second(BEGIN_SECOND)
        assert feeder.pid
        assert servers.postgres.process
        parties = {f"ingest{n + 1}": each.process.pid for n, each in enumerate(ingest)} | {"feeder": feeder.pid}
        parties |= {"postgres": servers.postgres.process.pid, **store.pids}
        ours.send("go")
        ours.recv()
        began, idle = time.monotonic(), psutil.cpu_times().idle
        with Cores(parties) as cores:
            time.sleep(seconds)
        idle = (psutil.cpu_times().idle - idle) / (time.monotonic() - began)
        ours.send("stop")
        sent: Counter[Part] = ours.recv()
        elapsed = time.monotonic() - began
        time.sleep(1)  # what is under way
        slots = sum(members(client, "window") for client in store.clients)
        with servers.postgres.connect() as connection:
            if traffic != "flood":  # a stop has no time for thousands of rows and leaves them in Redis
                deadline = time.monotonic() + ROWS_SECONDS
                while ticks_in_rows(connection) != sent and time.monotonic() < deadline:
                    time.sleep(0.5)
            codes = [each.stop(timeout=60)[0] for each in ingest]
            found = ticks_in_rows(connection)
        if found != sent:
            print(explanation(sent, found, [each.log for each in ingest]), file=sys.stderr)
        in_rows = found.total()
        ours.send("done")
        ingest_cores = sum(used for name, used in cores.used.items() if name.startswith("ingest"))
        decoded_core_s = in_rows * min(2, processes) / elapsed / ingest_cores
        return {
            "traffic": traffic,
            "store": kind,
            "processes": processes,
            "ticks_s": in_rows / elapsed,
            "slots_s": slots / elapsed,
            "decoded_core_s": decoded_core_s,
            "of_limit": decoded_core_s / limit,
            "ingest": {name: used for name, used in cores.used.items() if name.startswith("ingest")},
            "others": {
                "feeder": cores.used["feeder"],
                "postgres": cores.used["postgres"],
                "redis": sum(cores.used[name] for name in store.pids),
                "redis_most": max(cores.used[name] for name in store.pids),
            },
            "used": sum(cores.used.values()),
            "idle": idle,
            "elsewhere": max(0.0, (os.cpu_count() or 0) - idle - sum(cores.used.values())),
            "sent": sent.total(),
            "in_rows": in_rows,
            "wrong_parts": sum(found[part] != sent[part] for part in sent.keys() | found.keys()),
            "exit_codes": max(codes),
        }


def verdict(measured: Sequence[Mapping[str, Any]]) -> str:
    """Return what limits the figures."""
    cores = os.cpu_count() or 0
    full = sum(row["idle"] < 0.1 * cores for row in measured)
    return (
        f"Feeder, ingest processes, Redis and PostgreSQL share {cores} cores here. In {full} of {len(measured)} runs"
        " less than a tenth of them was idle: there the machine is the limit, and more processes only divide it; each"
        " standby decodes its ticks once more. `elsewhere` is what other programs of this machine used."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traffic", action="append", choices=TRAFFIC, help="may be given again; default: both")
    parser.add_argument("--store", action="append", choices=STORES, help="may be given again; default: both")
    parser.add_argument("--processes", action="append", type=int, help="may be given again; default: 1, 2 and 3")
    parser.add_argument("--quick", action="store_true", help="some seconds, for a look")
    arguments = parser.parse_args()
    stores = arguments.store or STORES
    if "cluster" in stores and redis_program("redis-server") is None:
        parser.error("there is no redis-server of 7.0 or later on PATH (Debian's package of this name)")
    measured = [
        run(traffic, kind, processes, QUICK_SECONDS if arguments.quick else MEASURED_SECONDS)
        for traffic in arguments.traffic or TRAFFIC
        for kind in stores
        for processes in arguments.processes or (1, 2, 3)
    ]
    report("cluster", measured)
    print(verdict(measured))
    return 0 if all(not row["wrong_parts"] and not row["exit_codes"] for row in measured) else 1


if __name__ == "__main__":
    sys.exit(main())
