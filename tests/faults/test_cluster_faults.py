"""Faults of a Redis Cluster other than the death of a master, and of processes that end meanwhile."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from marketflow.model import MINUTE_MS
from marketflow.stores.redis.keys import MODE_KEY, SHARDS_KEY
from tests.faults.cluster_watch import (
    SYMBOLS,
    THEIRS_SECONDS,
    Watch,
    assert_not_disturbed,
    on_cluster,
    seconds_until_replaced,
    started,
    symbols_of,
)
from tests.faults.conftest import (
    WINDOW_MS,
    Record,
    seconds_until,
    wait_for_windows,
    wait_until_connected,
    wait_until_warm,
)
from tests.support.application import ROOT, Application, ScriptedExchange, Traffic, now_ms
from tests.support.oracle import Rows, assert_rows_equal
from tests.support.redis_cluster import RedisCluster
from tests.support.roles import IngestProcess, Roles, stop_all
from tests.support.servers import wait_until
from tests.support.tls import OPENSSL, certificate

pytestmark = pytest.mark.cluster

USERS = ROOT / "deploy" / "redis" / "cluster-users.acl"


@pytest.fixture
def servers(redis_cluster: RedisCluster, postgres_db: dict[str, Any]) -> dict[str, object]:
    return on_cluster(redis_cluster, postgres_db)


def assert_answers_good(watch: Watch, traffic: Traffic) -> None:
    """Check that each answer was a 200 that counts no tick twice, or a 503 that names what is missing."""
    assert not watch.counted_twice(traffic.sent)
    assert watch.statuses.keys() <= {200, 503}, watch.refused[:10]
    assert not [each for each in watch.refused if "unavailable" not in each[2]]
    assert watch.slowest < 1.5


def assert_others_go_on(record: Record, watch: Watch, since: float, theirs: set[str], promoted: float) -> None:
    """Check that no gap in the prices is longer than after the death of a master, and short for other symbols."""
    gap = watch.longest_gap(theirs, since)
    record("gap of its symbols", gap)
    record("slowest answer", watch.slowest)
    record("answers", dict(watch.statuses))
    record("refused", watch.refused[:3])
    assert gap <= max(THEIRS_SECONDS, promoted + 0.5)
    assert_not_disturbed(record, watch, set(SYMBOLS) - theirs, since)


def test_frozen_master_disturbs_no_others(
    roles: Roles,
    redis_cluster: RedisCluster,
    broadcasting: list[ScriptedExchange],
    rows: Callable[[], Rows],
    record_property: Record,
) -> None:
    """After it is thawed it has old data, and is a master by its own map at first."""
    ingest, api = started(roles, broadcasting)
    master = redis_cluster.masters()[1]
    theirs = symbols_of(redis_cluster, master)
    with Traffic(broadcasting, SYMBOLS, rate=300) as traffic, Watch(api, ingest) as watch:
        quiet_since = time.monotonic()
        wait_for_windows(4)
        watch.note_quiet(quiet_since)
        frozen_at = time.monotonic()
        with redis_cluster.frozen(master):
            promoted = seconds_until_replaced(redis_cluster, master)
            wait_for_windows(2)
        wait_for_windows(2)
        assert_others_go_on(record_property, watch, frozen_at, theirs, promoted)
        seconds_until(lambda: api.get("/health")["redis"] == "ok", 10)
    stop_all(ingest, api)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)
    assert_answers_good(watch, traffic)


@pytest.fixture
def divisible_cluster(server_folder: Path) -> Iterator[RedisCluster]:
    """A cluster whose nodes can be cut off from each other."""
    cluster = RedisCluster(server_folder / "cluster")
    cluster.use_bus_proxies()
    with cluster:
        yield cluster


def test_master_cut_off_from_the_others_is_replaced(
    roles: Roles,
    divisible_cluster: RedisCluster,
    broadcasting: list[ScriptedExchange],
    rows: Callable[[], Rows],
    record_property: Record,
) -> None:
    """It accepts writes of its clients until it detects the partition; these are lost, and written again."""
    cluster = divisible_cluster
    roles.settings["REDIS__NODES"] = cluster.addresses[0]
    ingest, api = started(roles, broadcasting)
    master = cluster.owner_of(SHARDS_KEY)
    theirs = symbols_of(cluster, master)
    with Traffic(broadcasting, SYMBOLS, rate=300) as traffic, Watch(api, ingest) as watch:
        quiet_since = time.monotonic()
        wait_for_windows(4)
        watch.note_quiet(quiet_since)
        cut_at = time.monotonic()
        with cluster.cut_off(master):
            promoted = seconds_until_replaced(cluster, master)
            wait_for_windows(3)
            assert master.call("ROLE")[0] == "master"
            assert api.switch("live") == {"mode": "live", "previous": "live"}
            assert_others_go_on(record_property, watch, cut_at, theirs, promoted)
        wait_for_windows(1)
        seconds_until(lambda: api.get("/health")["redis"] == "ok", 10)
        for symbol in theirs:
            seconds_until(lambda s=symbol: api.get(f"/prices/average/{s}?period=1s")["ticks"] > 100, 5)  # type: ignore[misc]
    stop_all(ingest, api)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)
    assert_answers_good(watch, traffic)


def test_killed_replicas_disturb_nothing(
    roles: Roles,
    redis_cluster: RedisCluster,
    broadcasting: list[ScriptedExchange],
    rows: Callable[[], Rows],
) -> None:
    ingest, api = started(roles, broadcasting)
    replicas = [node for node in redis_cluster.nodes if node not in redis_cluster.masters()]
    with Traffic(broadcasting, SYMBOLS, rate=300) as traffic, Watch(api) as watch:
        wait_for_windows(1)
        for node in replicas:
            node.kill()
        wait_for_windows(3)
        assert api.get("/health")["status"] == "ok"
        assert watch.statuses.keys() == {200}, watch.refused[:10]
        for node in replicas:
            node.start()
        redis_cluster.wait_until_whole()
        wait_for_windows(1)
    stop_all(ingest, api)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)
    assert "Redis cannot be used" not in ingest.log


def test_restart_of_the_whole_cluster_keeps_rows_exact(
    roles: Roles,
    redis_cluster: RedisCluster,
    broadcasting: list[ScriptedExchange],
    rows: Callable[[], Rows],
) -> None:
    """All nodes are killed, and come back without data."""
    ingest, api = started(roles, broadcasting)
    with Traffic(broadcasting, SYMBOLS, rate=100) as traffic, Watch(api) as watch:
        wait_for_windows(2)
        for node in redis_cluster.nodes:
            node.kill()
        wait_for_windows(2)
        for node in redis_cluster.nodes:
            node.start()
        redis_cluster.wait_until_whole()
        back_at = time.monotonic()
        seconds_until(lambda: api.get("/health")["status"] == "ok", 10)
        seconds_until(lambda: all(watch.arrivals[symbol][-1] > back_at for symbol in SYMBOLS), 5)
        wait_for_windows(1)
    stop_all(ingest, api)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)
    assert_answers_good(watch, traffic)


@pytest.mark.skipif(OPENSSL is None, reason="there is no openssl to make certificates")
def test_cluster_with_tls_and_a_user_survives_a_killed_master(
    roles: Roles,
    server_folder: Path,
    broadcasting: list[ScriptedExchange],
    rows: Callable[[], Rows],
) -> None:
    key, certificate_path = certificate(server_folder, "nodes", "IP:127.0.0.1")
    for path in (key, certificate_path):
        path.chmod(0o644)
    cluster = RedisCluster(server_folder / "cluster", requirepass="operator", masterauth="operator")
    for node in cluster.nodes:
        node.use_tls(key, certificate_path)
    with cluster:
        user = next(line.split()[1:] for line in USERS.read_text().splitlines() if line.startswith("user marketflow "))
        for node in cluster.nodes:
            node.call("ACL", "SETUSER", *user)
        roles.settings |= {
            "REDIS__NODES": f"127.0.0.1:{cluster.nodes[0].meet_port}",
            "REDIS__TLS": "true",
            "REDIS__TLS_CA": certificate_path,
            "REDIS__USERNAME": "marketflow",
            "REDIS__PASSWORD": "change-me",
        }
        ingest, api = started(roles, broadcasting)
        with Traffic(broadcasting, SYMBOLS, rate=100) as traffic, Watch(api) as watch:
            wait_for_windows(1)
            master = cluster.masters()[0]
            master.kill()
            seconds_until_replaced(cluster, master)
            seconds_until(lambda: api.get("/health")["redis"] == "ok", 10)
            wait_for_windows(1)
        stop_all(ingest, api)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)
    assert_answers_good(watch, traffic)


def test_owner_and_master_killed_together_lose_no_tick(
    roles: Roles,
    redis_cluster: RedisCluster,
    broadcasting: list[ScriptedExchange],
    rows: Callable[[], Rows],
) -> None:
    """The master is that of the shard table, so that no process can take over before its replica is promoted."""
    first, second, api = roles.ingest(), roles.ingest(), roles.api()
    wait_until_warm(broadcasting)
    wait_until_connected(api, broadcasting)
    with Traffic(broadcasting, SYMBOLS, rate=100) as traffic, Watch(api) as watch:
        wait_for_windows(2)
        with redis_cluster.killed(redis_cluster.owner_of(SHARDS_KEY)):
            first.kill()
            wait_for_windows(5)
        seconds_until(lambda: api.get("/health")["status"] == "ok", 10)
        wait_for_windows(1)
    stop_all(second, api)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)
    assert_answers_good(watch, traffic)


def test_mode_switch_during_failover_is_adopted(
    roles: Roles, redis_cluster: RedisCluster, broadcasting: list[ScriptedExchange]
) -> None:
    ingest, api = started(roles, broadcasting)
    with redis_cluster.killed(redis_cluster.owner_of(MODE_KEY)):
        began = time.monotonic()
        statuses: list[int] = []
        while not statuses or statuses[-1] != 200:
            answer = api.http.post("/mode/test")
            statuses.append(answer.status_code)
            assert answer.status_code in (200, 503), answer.text
            assert "unavailable" in answer.text or answer.status_code == 200
            assert time.monotonic() - began < 10
        seconds_until(lambda: api.get("/mode") == {"mode": "test"}, 5)
        wait_until(lambda: api.find("/prices/latest/COIN0"))
        assert api.get("/health")["exchanges"] == dict.fromkeys([each.name for each in broadcasting], "generated")
    stop_all(ingest, api)


def test_end_of_all_processes_without_a_master_loses_no_tick(
    roles: Roles,
    redis_cluster: RedisCluster,
    broadcasting: list[ScriptedExchange],
    rows: Callable[[], Rows],
) -> None:
    """The current minute is written to the archive, and recovered from there or from the replica."""
    ingest, api = started(roles, broadcasting)
    with Traffic(broadcasting, SYMBOLS, rate=100) as traffic:
        wait_for_windows(2)
        master = redis_cluster.masters()[0]
        master.kill()
        wait_for_windows(1)
        traffic.end()
        stop_all(ingest, api)
        assert_rows_equal(rows(), traffic.sent, WINDOW_MS)
    master.start()
    redis_cluster.wait_until_whole()
    ingest.start()
    wait_until_warm(broadcasting, 1)
    with Traffic(broadcasting, SYMBOLS, rate=100) as traffic:
        wait_for_windows(2)
    stop_all(ingest)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)


def test_cluster_that_needs_every_slot_is_back_after_a_failover(
    roles: Roles,
    redis_cluster: RedisCluster,
    broadcasting: list[ScriptedExchange],
    rows: Callable[[], Rows],
) -> None:
    """With cluster-require-full-coverage all masters refuse commands until a replica has been promoted."""
    ingest, api = started(roles, broadcasting)
    with ExitStack() as stack:
        for node in redis_cluster.nodes:
            node.call("CONFIG", "SET", "cluster-require-full-coverage", "yes")
            stack.callback(node.call, "CONFIG", "SET", "cluster-require-full-coverage", "no")
        with Traffic(broadcasting, SYMBOLS, rate=100) as traffic, Watch(api) as watch:
            wait_for_windows(1)
            stack.enter_context(redis_cluster.killed(redis_cluster.masters()[2]))
            seconds_until(lambda: api.get("/health")["redis"] == "down", 5)
            seconds_until(lambda: api.get("/health")["status"] == "ok", 10)
            back_at = time.monotonic()
            seconds_until(lambda: all(watch.arrivals[symbol][-1] > back_at for symbol in SYMBOLS), 5)
            wait_for_windows(1)
    stop_all(ingest, api)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)
    assert_answers_good(watch, traffic)


def test_changed_number_of_buckets_loses_no_tick(
    server_folder: Path,
    roles: Roles,
    broadcasting: list[ScriptedExchange],
    rows: Callable[[], Rows],
) -> None:
    """Of a minute that only Redis has. A process with another number is refused, and a previous one answers no more."""
    roles.settings["FLOW__WINDOW_SECONDS"] = 60
    ingest, api = started(roles, broadcasting)
    other = IngestProcess(server_folder, roles.settings | {"REDIS__BUCKETS": 5}, ("--role", "ingest"))
    with Traffic(broadcasting, SYMBOLS, rate=100) as traffic:
        assert other.fails() == 1
        assert "redis.buckets is 5, but the keys in Redis are divided into 16" in other.log
        assert "Traceback" not in other.log
    seconds_until(lambda: answers_all(api, traffic), 10)
    ingest.kill()
    roles.settings |= {"REDIS__BUCKETS": 5}
    ingest, new_api = started(roles, broadcasting)
    seconds_until(lambda: answers_all(new_api, traffic), 10)
    seconds_until(lambda: api.get("/health")["redis"] == "down", 5)
    wait_until(lambda: now_ms() % MINUTE_MS < 40_000, 21)  # the archive gets none of what is sent next
    again_at = now_ms()
    with Traffic(broadcasting, SYMBOLS, rate=100) as traffic:
        wait_for_windows(2)
        answers = [api.http.get(f"/prices/latest/{symbol}") for symbol in SYMBOLS]
    assert {answer.status_code for answer in answers} <= {200, 404, 503}
    # Where a minute has ended meanwhile, the archive has prices of before.
    found = [datetime.fromisoformat(answer.json()["timestamp"]) for answer in answers if answer.status_code == 200]
    assert all(at.timestamp() * 1000 < again_at for at in found)
    seconds_until(lambda: answers_all(new_api, traffic), 10)
    stop_all(ingest, api, new_api)
    assert_rows_equal(rows(), traffic.sent)


def answers_all(api: Application, traffic: Traffic) -> bool:
    """Return whether averages contain all ticks that were sent, which must be of the last five minutes."""
    sent = Counter(series.symbol for series, _ in traffic.sent)
    return all(api.get(f"/prices/average/{symbol}?period=5m")["ticks"] == count for symbol, count in sent.items())
