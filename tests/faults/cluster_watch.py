"""What a client sees of a Redis Cluster while something is wrong with it: answers, and prices by the stream."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from marketflow.stores.redis.keys import Bucket, bucket_of
from tests.api.streaming.stream_client import Stream
from tests.support.application import Application
from tests.support.redis_cluster import ClusterNode, RedisCluster
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
        self.slowest = 0.0
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._follow, self._ask)]

    def __enter__(self) -> "Watch":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(10)

    def longest_gap(self, symbol: str, since: float) -> float:
        """The longest time without a price of a symbol since a moment, up to now."""
        times = [since, *(at for at in self.arrivals[symbol] if at > since), time.monotonic()]
        return max(later - earlier for earlier, later in pairwise(times))

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
                    self.slowest = max(self.slowest, time.monotonic() - began)
                    self._ended.wait(0.01)


def symbols_of(cluster: RedisCluster, node: ClusterNode) -> set[str]:
    """The symbols whose bucket is on a node."""
    return {each for each in SYMBOLS if cluster.owner_of(Bucket(bucket_of(each, 16)).series_key) is node}


@contextmanager
def watched(api: Application) -> Iterator[Watch]:
    with Watch(api) as watch:
        wait_until(lambda: all(watch.arrivals[symbol] for symbol in SYMBOLS), 10)
        yield watch
