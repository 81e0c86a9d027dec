"""Watches answers and streamed prices as a client does while a Redis Cluster has a fault."""

import multiprocessing
import multiprocessing.connection
import os
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import pairwise
from typing import Any

import psutil
import redis

from marketflow.model import SLICE_MS, Mode, Series, Tick
from marketflow.stores.redis.keys import Bucket, bucket_of
from tests.api.streaming.stream_client import Stream
from tests.faults.conftest import seconds_until, wait_until_connected
from tests.support.application import Application, ScriptedExchange, now_ms
from tests.support.core_waits import SAMPLE_SECONDS, CoreWaits
from tests.support.oracle import Rows
from tests.support.redis_cluster import ClusterNode, RedisCluster
from tests.support.roles import Roles
from tests.support.servers import PATIENCE_SECONDS, wait_until

SYMBOLS = [f"COIN{number}" for number in range(15)]
"""Enough for buckets on each master."""

THEIRS_SECONDS = 3.0
"""Longest time without a price of a symbol whose master has died."""

OTHERS_SECONDS = 0.1
"""Longest time without a price of any other symbol meanwhile."""

FILLED_MS = 240_000
"""How much of the past `fill_memory` sends."""

LOOK_SECONDS = 0.05
"""How often a test looks who has which slots: more often it would take CPU from what it measures."""


def _follow(pipe: "multiprocessing.connection.Connection", port: int, groups: Sequence[Sequence[int]]) -> None:
    """Follow the stream in a process of its own: when an event came, kind and content; and "waits" of processes."""
    noted: queue.SimpleQueue[tuple[float, str, Any]] = queue.SimpleQueue()

    def send() -> None:  # which blocks while the test reads nothing
        while True:
            pipe.send(noted.get())

    def sample() -> None:
        waits = CoreWaits(*groups, [os.getpid()])
        while True:
            at, longest = waits.sample()
            noted.put((at, "waits", longest))
            time.sleep(SAMPLE_SECONDS)

    for work in (send, sample):
        threading.Thread(target=work, daemon=True).start()
    with suppress(OSError), Stream(port) as stream:
        for event in stream:
            noted.put((time.monotonic(), event.name, event.data))


class Watch:
    """Follows the stream of all prices, and asks for prices of all symbols; notes gaps and bad answers.

    Args:
        api: is asked.
        others: processes that the prices come through as well.
    """

    def __init__(self, api: Application, *others: Application) -> None:
        self._api = api
        self._ended = threading.Event()
        self.arrivals: defaultdict[str, list[float]] = defaultdict(list)
        """When a price of each symbol came by the stream, in seconds of the monotonic clock."""
        self.of_exchange: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        """The same of each exchange."""
        self.statuses: defaultdict[int, int] = defaultdict(int)
        """How many answers had which status."""
        self.refused: list[tuple[str, float, str]] = []
        """Path, moment and answer of what was not a good one."""
        self.health: list[Mapping[str, Any]] = []
        self.averages: list[Mapping[str, Any]] = []
        """Answers about the average of some seconds."""
        self._asked: list[tuple[float, float]] = []  # when each question was put and answered
        self.quiet_gap = 0.0
        """The longest time without a price of any symbol before a fault, see `note_quiet`."""
        self._waits = CoreWaits()  # whose samples the follower takes
        self._noted_until = 0.0
        self._pipe, theirs = multiprocessing.Pipe(duplex=False)
        prices_pass = [[each.process.pid] for each in (api, *others)]
        servers = [each.pid for each in psutil.Process().children(recursive=True) if [each.pid] not in prices_pass]
        groups = [*prices_pass, servers, [os.getpid()]]  # this process sends, and may have proxies
        spawn = multiprocessing.get_context("spawn")
        self._follower = spawn.Process(target=_follow, args=(theirs, api.port, groups), daemon=True)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._note, self._ask)]

    def __enter__(self) -> "Watch":
        self._follower.start()
        note, ask = self._threads
        note.start()
        # A query before the first price is a 404. No shorter limit: on a busy machine the follower starts slowly.
        wait_until(lambda: all(self.arrivals[symbol] for symbol in SYMBOLS))
        ask.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS + 1)
        self._follower.kill()
        self._follower.join(10)
        self._pipe.close()

    def note_quiet(self, since: float) -> None:
        """Record the longest gap without a fault, as `longest_gap`."""
        self.quiet_gap = self.longest_gap(SYMBOLS, since)

    @property
    def slowest(self) -> float:
        """How long the slowest answer took, without waits for a core."""
        return max(end - begin - self._waits.between(begin, end) for begin, end in [*self._asked])

    def longest_gap(self, symbols: Iterable[str], since: float, exchange: str | None = None) -> float:
        """The longest time without a price of one of these symbols, of one exchange or of any, up to now.

        Without the time of a gap in which threads that the prices come through waited for a core.
        """
        arrivals = self.arrivals if exchange is None else self.of_exchange[exchange]
        gaps = self._gaps(arrivals, symbols, since)
        return max(end - begin - self._waits.between(begin, end) for begin, end in gaps)

    def longest_gap_with_waits(self, symbols: Iterable[str], since: float) -> float:
        """The same by the clock."""
        return max(end - begin for begin, end in self._gaps(self.arrivals, symbols, since))

    def _gaps(
        self, arrivals: Mapping[str, Sequence[float]], symbols: Iterable[str], since: float
    ) -> list[tuple[float, float]]:
        now = time.monotonic()
        wait_until(lambda: self._noted_until >= now)  # what has arrived may not have come to this process yet
        return [
            gap
            for symbol in symbols
            for gap in pairwise([since, *(at for at in list(arrivals[symbol]) if since < at < now), now])
        ]

    def counted_twice(self, sent: Iterable[tuple[Series, Tick]]) -> list[tuple[int, Mapping[str, Any]]]:
        """Return the averages of more ticks than were sent in their period, each with that number."""
        times: defaultdict[str, list[int]] = defaultdict(list)
        for series, tick in sent:
            times[series.symbol].append(tick.at)

        def most(answer: Mapping[str, Any]) -> int:
            begin, end = (round(datetime.fromisoformat(answer[name]).timestamp() * 1000) for name in ("from", "to"))
            return sum(begin - SLICE_MS <= at <= end for at in times[answer["symbol"]])

        return [(most(answer), answer) for answer in self.averages if answer["ticks"] > most(answer)]

    def _note(self) -> None:
        while not self._ended.is_set():
            if not self._pipe.poll(0.1):
                continue
            try:
                at, kind, data = self._pipe.recv()
            except EOFError:  # the follower has ended; the waiting test fails
                return
            if kind == "prices":
                for price in data["prices"]:
                    self.arrivals[price["symbol"]].append(at)
                    self.of_exchange[price["exchange"]][price["symbol"]].append(at)
            elif kind == "health":
                self.health.append(data)
            elif kind == "waits":
                self._waits.note(at, data)
            self._noted_until = at

    def _ask(self) -> None:
        while not self._ended.is_set():
            for symbol in SYMBOLS:
                for path in (f"/prices/latest/{symbol}", f"/prices/average/{symbol}?period=10s", "/tickers", "/health"):
                    if self._ended.is_set():  # a round of all of them may take longer than `__exit__` waits
                        return
                    began = time.monotonic()
                    # Its time is judged without waits for a core: on a busy machine it may be long by the clock.
                    answer = self._api.http.get(path, timeout=PATIENCE_SECONDS)
                    self.statuses[answer.status_code] += 1
                    if answer.status_code != 200:
                        self.refused.append((path, began, answer.text))
                    elif "average" in path:
                        self.averages.append(answer.json())
                    self._asked.append((began, time.monotonic()))
                    self._ended.wait(0.01)


def fill_memory(exchanges: Iterable[ScriptedExchange], rows: Callable[[], Rows]) -> None:
    """Have the minute before now in memory and cache: with ten slices a second of each series.

    These are late ticks, which need FLOW__MAX_CLOCK_SKEW_SECONDS.
    """
    now = now_ms()
    times = range(now - FILLED_MS, now, SLICE_MS)
    for exchange in exchanges:
        lines = []
        for at in times:
            for symbol in SYMBOLS:
                price = 1000 + len(exchange.sent) % 100_003 / 8
                exchange.sent.append((Series(Mode.LIVE, exchange.name, symbol), Tick(price, at, len(exchange.sent))))
                lines.append(f'{{"symbol":"{symbol}","price":{price!r},"timestamp":{at}}}\n'.encode())
        exchange.send_raw(b"".join(lines))
    wait_until(lambda: sum(row["tick_count"] for row in rows().values()) > 0.9 * 3 * len(times) * len(SYMBOLS), 30)


def symbols_of(cluster: RedisCluster, node: ClusterNode) -> set[str]:
    """Return the symbols whose bucket is on a node."""
    ranges = [(begin, end) for begin, end, port in cluster.slot_ranges() if port == node.port]

    def slot(symbol: str) -> int:
        return redis.crc.key_slot(Bucket(bucket_of(symbol, 16)).series_key.encode())

    return {each for each in SYMBOLS if any(begin <= slot(each) <= end for begin, end in ranges)}


def seconds_until_replaced(cluster: RedisCluster, master: ClusterNode) -> float:
    """Wait until a master has no slots any more; return the seconds that took."""
    began = time.monotonic()
    while symbols_of(cluster, master):
        assert time.monotonic() < began + 20, "no replica takes the place of the master"
        time.sleep(LOOK_SECONDS)
    return time.monotonic() - began


def assert_not_disturbed(record: Callable[[str, object], None], watch: Watch, others: set[str], since: float) -> None:
    """Nothing has happened to these symbols since a moment.

    Each has a price every 17 ms. What threads waited for a core of this machine is no gap: of 0.26 to 0.62 s on two
    overloaded cores 0.03 to 0.04 s are left, and 0.21 s if writes wait for a frozen master. A thread that only sleeps
    sees little of it: it overslept by 0.15 s beside gaps of 1.5 s. If there are gaps all the same, as the watch has
    seen them before, twice as long ones are the machine's.
    """
    longest = watch.longest_gap(others, since)
    record("longest gap of others", longest)
    record("with waits for a core", watch.longest_gap_with_waits(others, since))
    record("longest gap of all before", watch.quiet_gap)
    assert longest <= max(OTHERS_SECONDS, 2 * watch.quiet_gap), f"{longest:.3f} s, and {watch.quiet_gap:.3f} s before"


def on_cluster(cluster: RedisCluster, postgres: Mapping[str, object]) -> dict[str, object]:
    """Return settings with one node of a cluster, and with the PostgreSQL of these connection keywords."""
    settings = {f"POSTGRES__{name.upper()}": value for name, value in postgres.items()}
    return {**settings, "REDIS__NODES": cluster.addresses[0], "SYMBOLS": ",".join(SYMBOLS)}


def started(roles: Roles, exchanges: Iterable[ScriptedExchange]) -> tuple[Application, Application]:
    """Return an ingest process and an API process that answers with its prices."""
    ingest, api = roles.ingest(), roles.api()
    wait_until_connected(api, exchanges)
    seconds_until(lambda: api.get("/health")["status"] == "ok", 10)
    return ingest, api
