"""What a client sees of a Redis Cluster while something is wrong with it: answers, and prices by the stream."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from itertools import pairwise
from typing import Any

from marketflow.model import SLICE_MS, Series, Tick
from marketflow.stores.redis.connection import TIMEOUT_SECONDS
from marketflow.stores.redis.keys import Bucket, bucket_of
from tests.api.streaming.stream_client import Stream
from tests.faults.conftest import wait_until_connected
from tests.support.application import Application, ScriptedExchange
from tests.support.redis_cluster import ClusterNode, RedisCluster
from tests.support.roles import Roles
from tests.support.servers import wait_until

SYMBOLS = [f"COIN{number}" for number in range(15)]
"""Enough for buckets on each master."""

THEIRS_SECONDS = 3.0
"""Longest time without a price of a symbol whose master has died."""

OTHERS_SECONDS = 0.1
"""Longest time without a price of any other symbol meanwhile."""


class Watch:
    """Follows the stream of all prices, and asks for prices of all symbols; notes gaps and bad answers."""

    def __init__(self, api: Application) -> None:
        self._api = api
        self._ended = threading.Event()
        self.arrivals: defaultdict[str, list[float]] = defaultdict(list)
        """When a price of each symbol came by the stream, in seconds of the monotonic clock."""
        self.statuses: defaultdict[int, int] = defaultdict(int)
        """How many answers had which status."""
        self.refused: list[tuple[str, float, str]] = []
        """Path, moment and answer of what was not a good one."""
        self.health: list[Mapping[str, Any]] = []
        self.averages: list[Mapping[str, Any]] = []
        """Answers about the average of some seconds."""
        self.slowest = 0.0
        self.quiet_gap = 0.0
        """The longest time without a price of any symbol before a fault, see `note_quiet`."""
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._follow, self._ask)]

    def __enter__(self) -> "Watch":
        follow, ask = self._threads
        follow.start()
        wait_until(lambda: all(self.arrivals[symbol] for symbol in SYMBOLS), 10)  # before that it is a 404
        ask.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(10)

    def note_quiet(self, since: float) -> None:
        """Note what gaps there are without a fault."""
        self.quiet_gap = self.longest_gap(SYMBOLS, since)

    def gaps(self, symbol: str, since: float) -> list[float]:
        """The times without a price of a symbol since a moment, up to now; the longest first."""
        times = [since, *(at for at in self.arrivals[symbol] if at > since), time.monotonic()]
        return sorted((later - earlier for earlier, later in pairwise(times)), reverse=True)

    def longest_gap(self, symbols: Iterable[str], since: float) -> float:
        """The longest time without a price of one of these symbols."""
        return max(self.gaps(symbol, since)[0] for symbol in symbols)

    def second_gap(self, symbols: Iterable[str], since: float) -> float:
        """The same, but for the longest one of each symbol."""
        return max(self.gaps(symbol, since)[1] for symbol in symbols)

    def counted_twice(self, sent: Iterable[tuple[Series, Tick]]) -> list[Mapping[str, Any]]:
        """The averages of more ticks than were sent in their period."""
        times: defaultdict[str, list[int]] = defaultdict(list)
        for series, tick in sent:
            times[series.symbol].append(tick.at)

        def most(answer: Mapping[str, Any]) -> int:
            begin, end = (round(datetime.fromisoformat(answer[name]).timestamp() * 1000) for name in ("from", "to"))
            return sum(begin - SLICE_MS <= at <= end for at in times[answer["symbol"]])

        return [answer for answer in self.averages if answer["ticks"] > most(answer)]

    def _follow(self) -> None:
        with Stream(self._api.port) as stream:
            for event in stream:
                now = time.monotonic()
                if event.name == "prices":
                    for price in event.data["prices"]:
                        self.arrivals[price["symbol"]].append(now)
                elif event.name == "health":
                    self.health.append(event.data)
                if self._ended.is_set():
                    return

    def _ask(self) -> None:
        while not self._ended.is_set():
            for symbol in SYMBOLS:
                for path in (f"/prices/latest/{symbol}", f"/prices/average/{symbol}?period=10s", "/tickers", "/health"):
                    began = time.monotonic()
                    answer = self._api.http.get(path)
                    self.statuses[answer.status_code] += 1
                    if answer.status_code != 200:
                        self.refused.append((path, began, answer.text))
                    elif "average" in path:
                        self.averages.append(answer.json())
                    self.slowest = max(self.slowest, time.monotonic() - began)
                    self._ended.wait(0.01)


def symbols_of(cluster: RedisCluster, node: ClusterNode) -> set[str]:
    """The symbols whose bucket is on a node."""
    return {each for each in SYMBOLS if cluster.owner_of(Bucket(bucket_of(each, 16)).series_key) is node}


def assert_not_disturbed(record: Callable[[str, object], None], watch: Watch, others: set[str], since: float) -> None:
    """Nothing has happened to these symbols since a moment, by what the watch saw before.

    Each has a price every 17 ms, so nearly all of a gap is the machine's: without a fault the longest one is 0.06 to
    0.17 s on two busy cores. One such gap is therefore left out, unless it is as long as two timeouts of Redis.
    """
    longest, second = watch.longest_gap(others, since), watch.second_gap(others, since)
    record("longest gaps of others", (longest, second))
    record("longest gap of all before", watch.quiet_gap)
    assert second <= max(OTHERS_SECONDS, watch.quiet_gap)
    assert longest <= max(2 * TIMEOUT_SECONDS, watch.quiet_gap)


def on_cluster(cluster: RedisCluster, postgres: Mapping[str, object]) -> dict[str, object]:
    """Settings that name a cluster, by one of its nodes, and the PostgreSQL of these connection keywords."""
    settings = {f"POSTGRES__{name.upper()}": value for name, value in postgres.items()}
    return {**settings, "REDIS__NODES": cluster.addresses[0], "SYMBOLS": ",".join(SYMBOLS)}


def started(roles: Roles, exchanges: Iterable[ScriptedExchange]) -> tuple[Application, Application]:
    """An ingest process and an API process, which both work."""
    ingest, api = roles.ingest(), roles.api()
    wait_until_connected(api, exchanges)
    wait_until(lambda: api.get("/health")["status"] == "ok", 10)
    return ingest, api
