"""`marketflow check` on a real Redis Cluster of six nodes, each finding seen on one that has its cause."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from marketflow.cli.check import cluster_checks
from marketflow.cli.check.check_result import CheckResult, CheckState
from marketflow.cli.check.runner import DEADLINE_SECONDS, run_checks
from marketflow.runtime.store_servers import find_servers
from marketflow.settings import load
from marketflow.stores.redis import keys
from tests.support.redis_cluster import ClusterNode, RedisCluster
from tests.support.servers import HOST, RedisServer, free_port, wait_until

WELL = ["Redis cluster", "Redis memory", "Redis rights", "Redis cluster"]

pytestmark = pytest.mark.usefixtures("nothing_set")


@pytest.fixture(scope="module")
def cluster(server_root: Path) -> Iterator[RedisCluster]:
    """A cluster of this module's own: its tests change its settings, and set them back."""
    with RedisCluster(server_root / "checked-cluster") as running:
        yield running


def look(seeds: list[str], buckets: int = 16, **more: str) -> list[CheckResult]:
    at: dict[str, object] = {"redis.nodes": seeds, "redis.buckets": buckets}
    settings = load(None, at | {f"redis.{name}": value for name, value in more.items()})
    return cluster_checks.cluster_check(settings, find_servers(settings)).run()


def _setting(node: ClusterNode, name: str) -> str:
    with node.client(decode_responses=True) as client:
        return str(client.config_get(name)[name])


def problems(results: list[CheckResult]) -> list[CheckResult]:
    return [result for result in results if result.state is not CheckState.OK]


def only(results: list[CheckResult]) -> CheckResult:
    (result,) = problems(results)
    return result


def test_healthy_cluster_is_ok_and_stays_empty(cluster: RedisCluster) -> None:
    results = look(cluster.addresses[:1])
    assert problems(results) == []
    assert [result.what for result in results] == WELL
    assert results[0].found.startswith("6 of 6 nodes are up, 3 masters, Redis 7.")
    assert results[2].found == "well on 3 nodes"
    assert results[3].found.startswith("16 buckets on 3 masters")
    assert [node.call("DBSIZE") for node in cluster.nodes] == [0] * 6


def test_full_coverage_and_slow_node_timeout_warn(cluster: RedisCluster) -> None:
    node = cluster.nodes[4]
    changed = {"cluster-require-full-coverage": "yes", "cluster-node-timeout": "15000"}
    before = {name: _setting(node, name) for name in changed}
    for name, value in changed.items():
        node.call("CONFIG", "SET", name, value)
    try:
        results = problems(look(cluster.addresses[:1]))
    finally:
        for name, value in before.items():
            node.call("CONFIG", "SET", name, value)
    assert {(result.where, result.state) for result in results} == {(node.address, CheckState.WARNING)}
    coverage, timeout = results
    assert "cluster-require-full-coverage yes" in coverage.found
    assert "back after 16.2 s" in timeout.found
    assert "cluster-node-timeout 1000" in timeout.advice


def test_dead_replica_leaves_its_master_alone(cluster: RedisCluster) -> None:
    master = cluster.masters()[0]
    (replica,) = cluster.replicas_of(master)
    with cluster.killed(replica):
        wait_until(lambda: "fail" in str(master.call("CLUSTER", "NODES")))
        results = problems(look([master.address]))
    assert {result.state for result in results} == {CheckState.WARNING}
    assert [result.where for result in results] == [replica.address, master.address]
    assert "cannot reach it" in results[0].found
    assert "has no replica" in results[1].found
    assert f"add-node NEW:PORT {master.address} --cluster-slave" in results[1].advice


def test_uncovered_slots_fail_the_check(cluster: RedisCluster) -> None:
    master, other = cluster.masters()[:2]
    slot = next(first for first, _, port in cluster.slot_ranges() if port == master.port)
    for node in cluster.nodes:
        if node in cluster.masters():
            node.call("CLUSTER", "DELSLOTS", slot)
    try:
        result = only(look([other.address]))
    finally:
        master.call("CLUSTER", "ADDSLOTS", slot)
        cluster.wait_until_whole()
    assert result.state is CheckState.FAILED
    assert result.found == "1 of 16384 slots have no master that answers"
    assert "redis-cli --cluster fix" in result.advice


def test_buckets_on_one_master_alone_warn(cluster: RedisCluster) -> None:
    few = only(look(cluster.addresses[:1], buckets=1))
    assert few.state is CheckState.WARNING
    assert "none on" in few.found
    assert few.advice.startswith("raise redis.buckets")
    master = cluster.masters()[0]
    text = master.call("CLUSTER", "NODES")
    nodes = cluster_checks.parse_nodes(text, HOST)
    slot = next(first for first, _, port in cluster.slot_ranges() if port == master.port)
    others = [keys.Bucket(number).slot for number in range(16)]
    (uneven,) = cluster_checks.bucket_results("here", nodes, [*others, *[slot] * 32])
    assert uneven.found.endswith("uneven")


def test_other_number_of_buckets_is_found(cluster: RedisCluster) -> None:
    with cluster.client() as client:
        client.set(keys.BUCKETS_KEY, 16)
        client.set(keys.BUCKETS_HELD_KEY, 16)
        try:
            assert problems(look(cluster.addresses[:1])) == []
            in_use = problems(look(cluster.addresses[:1], buckets=32))[-1]
            client.delete(keys.BUCKETS_HELD_KEY)
            changed = problems(look(cluster.addresses[:1], buckets=32))[-1]
        finally:
            client.delete(keys.BUCKETS_KEY)
    assert in_use.state is CheckState.FAILED
    assert in_use.found == "processes that run have 16 buckets, and redis.buckets is 32"
    assert "Changing redis.buckets" in in_use.advice
    assert changed.state is CheckState.WARNING
    assert changed.found == "the keys are divided into 16 buckets, and redis.buckets is 32"


def test_eviction_policy_of_one_node_is_found(cluster: RedisCluster) -> None:
    node = cluster.nodes[5]
    node.call("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    node.call("CONFIG", "SET", "maxmemory", "100mb")
    try:
        result = only(look(cluster.addresses[:1]))
    finally:
        node.call("CONFIG", "SET", "maxmemory", "0")
        node.call("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert (result.what, result.where, result.state) == ("Redis memory", node.address, CheckState.FAILED)
    assert "noeviction" in result.advice


@pytest.mark.parametrize(
    ("rule", "refused"),
    [
        ("-spublish", "refused: SPUBLISH ("),
        ("-ssubscribe", "refused: SSUBSCRIBE ("),
        ("resetchannels", "refused: PUBLISH, SPUBLISH, SUBSCRIBE, SSUBSCRIBE ("),
        ("-cluster|slots", "refused: CLUSTER SLOTS ("),
        ("-cluster|info", "refused: CLUSTER INFO ("),
        ("-eval", "refused: EVAL ("),
    ],
)
def test_missing_rights_on_one_node_are_named(cluster: RedisCluster, rule: str, refused: str) -> None:
    node = cluster.masters()[1]
    for each in cluster.nodes:
        each.call("ACL", "SETUSER", "limited", "on", ">secret", "~marketflow:*", "&marketflow:*", "+@all")
    node.call("ACL", "SETUSER", "limited", *rule.split())
    try:
        result = only(look(cluster.addresses[:1], username="limited", password="secret"))
    finally:
        for each in cluster.nodes:
            each.call("ACL", "DELUSER", "limited")
    assert (result.what, result.where, result.state) == ("Redis rights", node.address, CheckState.FAILED)
    assert result.found.startswith(refused)
    assert "ACL" in result.advice


def test_rights_without_info_and_config_are_enough(cluster: RedisCluster) -> None:
    rules = ["on", ">secret", "~marketflow:*", "&marketflow:*", "+@all", "-config"]
    for node in cluster.nodes:
        node.call("ACL", "SETUSER", "limited", *rules)
    try:
        found = look(cluster.addresses[:1], username="limited", password="secret")
        assert problems(found) == []
        assert "CONFIG is not permitted" in found[0].found
        for node in cluster.nodes:
            node.call("ACL", "SETUSER", "limited", "-info")
        results = problems(look(cluster.addresses[:1], username="limited", password="secret"))
    finally:
        for node in cluster.nodes:
            node.call("ACL", "DELUSER", "limited")
    assert [(result.what, result.state) for result in results] == [("Redis cluster", CheckState.WARNING)] * 6


def test_seed_that_is_down_warns_and_others_are_asked(cluster: RedisCluster) -> None:
    seed = f"{HOST}:{free_port()}"
    result = only(look([seed, cluster.addresses[0]]))
    assert (result.where, result.state) == (seed, CheckState.WARNING)
    assert "redis.nodes" in result.advice
    assert only(look([seed])).state is CheckState.FAILED


def test_check_command_looks_at_the_cluster_of_the_settings(cluster: RedisCluster) -> None:
    results = run_checks(load(None, {"redis.nodes": cluster.addresses[:1], "http.port": free_port()}))
    assert [result.what for result in results][:4] == WELL
    assert "Redis" not in {result.what for result in results}


def test_plain_redis_in_the_nodes_fails(redis_db: RedisServer) -> None:
    result = only(look([f"{HOST}:{redis_db.port}"]))
    assert (result.state, result.found) == (CheckState.FAILED, "it is no node of a cluster")
    assert "redis.host" in result.advice


def test_node_announced_at_another_address_fails(cluster: RedisCluster) -> None:
    node, port = cluster.nodes[3], free_port()
    node.call("CONFIG", "SET", "cluster-announce-port", port)
    first = cluster.nodes[0]
    try:
        wait_until(lambda: re.search(f":{port}@.* connected", first.call("CLUSTER", "NODES")))
        result = only(look([first.address]))
    finally:
        node.call("CONFIG", "SET", "cluster-announce-port", 0)
        wait_until(lambda: f":{port}@" not in str(first.call("CLUSTER", "NODES")))
        cluster.wait_until_whole()
    assert (result.where, result.state) == (f"{HOST}:{port}", CheckState.FAILED)
    assert "cluster-announce" in result.advice


def test_frozen_node_costs_its_timeout_once(cluster: RedisCluster) -> None:
    with cluster.frozen(cluster.nodes[5]):
        began = time.monotonic()
        results = problems(look([cluster.addresses[0], cluster.nodes[5].address]))
        assert time.monotonic() - began < DEADLINE_SECONDS
    assert {result.where for result in results} >= {cluster.nodes[5].address}


def test_versions_before_sharded_notifications_fail() -> None:
    line = "a1 10.0.0.1:6379@16379,one.example myself,master - 0 0 1 connected 0-5460 7000 [5461->-b2]"
    (node,) = cluster_checks.parse_nodes(line, "")
    assert (node.where, node.slots) == ("one.example:6379", ((0, 5460), (7000, 7000)))
    (node,) = cluster_checks.parse_nodes(line.replace("one.example", ",shard-id=7"), "")
    assert node.where == "10.0.0.1:6379"
    (node,) = cluster_checks.parse_nodes(line.replace("10.0.0.1", "").replace(",one.example", ""), "10.0.0.9")
    assert node.where == "10.0.0.9:6379"
    (old,) = cluster_checks.version_results(node, {"redis_version": "6.2.14"})
    assert (old.state, old.advice) == (CheckState.FAILED, "upgrade it")
    (valkey,) = cluster_checks.version_results(node, {"redis_version": "7.2.4", "valkey_version": "8.0.1"})
    assert (valkey.state, valkey.found) == (CheckState.OK, "Valkey 8.0.1")
