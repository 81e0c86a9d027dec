"""What the death of a master of a Redis Cluster costs the cache, by cluster-node-timeout; the cluster has six nodes.

A thread for each symbol writes a slice every 50 ms by the writer of the product; its near cache listens. Then a master
is killed (kill -9). Redis copies what it has acknowledged to the replica a moment later, so it may lose writes that it
has acknowledged; the pipeline writes them again, which is left out here.

`gap_of_others_s` is the longest time without an announcement of any other symbol from the kill on, `gap_before_s` that
of all symbols before it: what this machine does by itself.

    python -m tests.benchmarks.failover --timeout 1000 --timeout 500
"""

import argparse
import asyncio
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

from marketflow.clock import system_clock
from marketflow.errors import Unavailable
from marketflow.model import Mode, Series, Slot, Tick, candle_of
from marketflow.stores.redis.buckets.bucketed_cache import BucketedCache
from marketflow.stores.redis.buckets.bucketed_writer import BucketedWriter
from marketflow.stores.redis.connection import cluster_keywords
from marketflow.stores.redis.keys import Bucket, bucket_of
from tests.benchmarks.report import report
from tests.support.redis_cluster import RedisCluster
from tests.support.servers import HOST

BUCKETS = 16
SYMBOLS = 15
STEP_SECONDS = 0.05
WARM_SECONDS, AFTER_SECONDS = 7.0, 7.0

LOOK_SECONDS = 0.05
"""How often the new master is looked for."""


class Run:
    """Writes and announcements by symbol, with their moments in seconds of the monotonic clock."""

    def __init__(self, keywords: dict[str, Any]) -> None:
        self.series = [Series(Mode.LIVE, "exchange1", f"COIN{number}") for number in range(SYMBOLS)]
        self.acknowledged: defaultdict[Series, dict[int, float]] = defaultdict(dict)
        self.announced: defaultdict[Series, dict[int, float]] = defaultdict(dict)
        self._keywords = keywords
        self.ended = threading.Event()
        self.is_live = threading.Event()

    def write(self, writer: BucketedWriter, series: Series) -> None:
        """Write slices of one series until the end."""
        began, number = time.monotonic(), 0
        while not self.ended.wait(max(0.0, began + number * STEP_SECONDS - time.monotonic())):
            number += 1
            start = time.time_ns() // 100_000_000 * 100 + number % 2  # two of a slice differ
            try:
                writer.put_slices({Slot(series, start): candle_of(Tick(float(number), start, number))})
            except Unavailable:
                continue
            self.acknowledged[series][start] = time.monotonic()

    async def listen(self) -> None:
        """Note announcements until the end."""
        cache = BucketedCache.connect(self._keywords, system_clock, 10_000)
        listening = asyncio.create_task(cache.listen())

        def take(slots: Sequence[tuple[Slot, object]]) -> None:
            now = time.monotonic()
            for (series, start), _ in slots:
                self.announced[series][start] = now

        with cache.announcing_slots(take):
            while not self.ended.is_set():
                if cache.live:
                    self.is_live.set()
                await asyncio.sleep(0.01)
        listening.cancel()
        await cache.close()


def measure(timeout_ms: int, folder: Path) -> dict[str, object]:
    """Kill a master; return what that has cost."""
    with RedisCluster(folder, timeout_ms) as cluster:
        keywords = cluster_keywords([(HOST, cluster.nodes[0].port)], BUCKETS, "")
        run = Run(keywords)
        with closing(BucketedWriter.connect(keywords, run.series, system_clock, 70)) as writer:
            writer.recover()
            threads = [threading.Thread(target=run.write, args=(writer, each)) for each in run.series]
            threads.append(threading.Thread(target=asyncio.run, args=(run.listen(),)))
            for thread in threads:
                thread.start()
            run.is_live.wait(10)
            time.sleep(1)  # the first writes make their connections
            begun_at = time.monotonic()
            time.sleep(WARM_SECONDS)
            master = cluster.owner_of(_bucket(run.series[0]).series_key)
            theirs = [each for each in run.series if cluster.owner_of(_bucket(each).series_key) is master]
            master.kill()
            killed_at = time.monotonic()
            while master in cluster.masters():
                time.sleep(LOOK_SECONDS)
            promoted = time.monotonic() - killed_at
            time.sleep(AFTER_SECONDS)
            run.ended.set()
            for thread in threads:
                thread.join(10)
        stored = {}
        with cluster.client() as client:
            for series in run.series:
                entries = client.zrange(_bucket(series).window_key(series), 0, -1, withscores=True)
                stored[series] = {int(score) for _, score in entries}
        others = [each for each in run.series if each not in theirs]
        return {
            "timeout_ms": timeout_ms,
            "promoted_after_s": promoted,
            "gap_of_its_symbols_s": max(_gap(run.announced[each], killed_at) for each in theirs),
            "acknowledged": sum(len(run.acknowledged[each]) for each in theirs),
            "lost": sum(len(run.acknowledged[each].keys() - stored[each]) for each in theirs),
            "missed": sum(len(run.acknowledged[each].keys() - run.announced[each].keys()) for each in theirs),
            "gap_of_others_s": max(_gap(run.announced[each], killed_at) for each in others),
            "gap_before_s": max(_gap(run.announced[each], begun_at, killed_at) for each in run.series),
        }


def _bucket(series: Series) -> Bucket:
    return Bucket(bucket_of(series.symbol, BUCKETS))


def _gap(moments: dict[int, float], since: float, until: float = inf) -> float:
    times = sorted(at for at in moments.values() if since < at < until)
    return max(later - earlier for earlier, later in pairwise([since, *times]))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure each timeout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=int, action="append", help="cluster-node-timeout in ms; several by turns")
    parser.add_argument("--quick", action="store_true", help="one timeout")
    arguments = parser.parse_args(argv)
    measured = []
    for timeout_ms in arguments.timeout or ([1000] if arguments.quick else [2000, 1000, 500]):
        with tempfile.TemporaryDirectory() as folder:
            measured.append(measure(timeout_ms, Path(folder) / "cluster"))
    report("failover", measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
