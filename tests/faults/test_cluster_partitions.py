"""An ingest process that reads its exchanges and cannot reach all of a Redis Cluster, which all others can."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from marketflow.cluster.shard_table import LAPSED_SECONDS
from marketflow.stores.redis.keys import SHARDS_KEY
from tests.faults.cluster_watch import SYMBOLS, Watch, on_cluster, symbols_of
from tests.faults.conftest import WINDOW_MS, Record, wait_for_windows, wait_until_connected, wait_until_warm
from tests.faults.test_shared_alerts import NAMES, owner_of
from tests.support.application import ScriptedExchange, Traffic
from tests.support.cluster_proxies import ClusterProxies
from tests.support.oracle import Rows, assert_rows_equal
from tests.support.redis_cluster import ClusterNode, RedisCluster
from tests.support.roles import Roles, stop_all
from tests.support.servers import wait_until

pytestmark = pytest.mark.cluster

TAKEN_OVER_SECONDS = 5.0
"""Longest time without prices that it could not write: it waits for two seconds whether a failover is the reason."""

WRITTEN_SECONDS = 5.0
"""How long after it has learned that it lost a shard a process has written it for the last time.

It does so once more after three seconds, when it has read what came before: see LAG_SECONDS.
"""


@pytest.fixture
def servers(redis_cluster: RedisCluster, postgres_db: dict[str, Any]) -> dict[str, object]:
    return on_cluster(redis_cluster, postgres_db)


def masters_of(cluster: RedisCluster, which: str) -> Sequence[ClusterNode]:
    table = cluster.owner_of(SHARDS_KEY)
    others = [node for node in cluster.masters() if node is not table]
    return {"all nodes": cluster.nodes, "the table": [table], "other masters": others, "one master": others[:1]}[which]


@pytest.mark.parametrize(
    ("which", "cut"),
    [
        ("all nodes", ClusterProxies.refuse),
        ("all nodes", ClusterProxies.vanish),
        ("the table", ClusterProxies.vanish),
        ("other masters", ClusterProxies.vanish),
        ("one master", ClusterProxies.refuse),
    ],
)
def test_owner_cut_off_from_redis_is_replaced_and_writes_no_more(
    roles: Roles,
    redis_cluster: RedisCluster,
    broadcasting: list[ScriptedExchange],
    rows: Callable[[], Rows],
    record_property: Record,
    which: str,
    cut: Callable[[ClusterProxies, Sequence[ClusterNode]], None],
) -> None:
    with ClusterProxies(redis_cluster) as way:
        first = roles.ingest(REDIS__NODES=way.addresses)
        second, api = roles.ingest(), roles.api()
        processes = [first, second]
        wait_until_warm(broadcasting)
        wait_until_connected(api, broadcasting)

        def owned() -> list[bool]:
            return [owner_of(redis_cluster, name, processes) is first for name in NAMES]

        wait_until(lambda: any(owned()) and not all(owned()), 10)
        own = [name for name, is_own in zip(NAMES, owned(), strict=True) if is_own]
        with Traffic(broadcasting, SYMBOLS, rate=100) as traffic, Watch(api) as watch:
            wait_for_windows(2)
            cut_at = time.monotonic()
            nodes = masters_of(redis_cluster, which)
            theirs = {symbol for node in nodes for symbol in symbols_of(redis_cluster, node)}
            cut(way, nodes)
            wait_until(lambda: not any(owned()), 10)
            record_property("seconds until it is replaced", time.monotonic() - cut_at)
            wait_for_windows(3)
            gap = max(watch.longest_gap(theirs, cut_at, name) for name in own)
            record_property("longest gap of what it could not write", gap)
            assert gap <= TAKEN_OVER_SECONDS
            way.heal()
            wait_until(lambda: any(owned()), LAPSED_SECONDS + 10, "it gets no shard back")
            back_at = time.monotonic()
            wait_until(lambda: time.monotonic() - back_at > WRITTEN_SECONDS, 10)
            since = time.monotonic()
            wait_for_windows(2)
            strays = {name for name, at in way.written.items() if at > since}
            assert strays <= {name for name, is_own in zip(NAMES, owned(), strict=True) if is_own}
            wait_until(lambda: api.get("/health")["status"] == "ok", 10)
        stop_all(first, second, api)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)
    assert not watch.counted_twice(traffic.sent)
    assert watch.statuses.keys() <= {200, 503}, watch.refused[:10]
