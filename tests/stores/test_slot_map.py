"""The map of slots where a node is dead, no node of a cluster, closed to us, or does not have every slot."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path

import pytest
import redis

from marketflow.stores.redis.buckets.slot_map import SLOTS, Address, SlotMap
from marketflow.stores.redis.connection import cluster_keywords, sync_client
from marketflow.stores.redis.keys import Bucket
from tests.support.redis_cluster import NODE_TIMEOUT_MS, ClusterNode, redis_program
from tests.support.servers import HOST, RedisServer, free_port, wait_until

StartNode = Callable[..., ClusterNode]


@pytest.fixture
def start_node(server_folder: Path) -> Iterator[StartNode]:
    """Starts a cluster of one node, without some slots."""
    program = redis_program("redis-server")
    if program is None:
        pytest.skip("there is no redis-server of 7.0 or later, neither on PATH nor in the folder of REDIS_PROGRAMS")
    with ExitStack() as stack:

        def started(*without: int, **options: str) -> ClusterNode:
            node = ClusterNode(server_folder / "node", program, NODE_TIMEOUT_MS, **options)
            node.start()
            stack.callback(node.stop)
            bounds = [-1, *sorted(without), SLOTS]
            for before, after in pairwise(bounds):
                node.call("CLUSTER", "ADDSLOTSRANGE", before + 1, after - 1)
            if options.get("cluster-require-full-coverage") != "yes":
                wait_until(lambda: "cluster_state:ok" in node.call("CLUSTER", "INFO"))
            return node

        yield started


def test_dead_seed_is_passed_over(start_node: StartNode) -> None:
    node = start_node()
    assert SlotMap([(HOST, free_port()), (HOST, node.port)], {}).owner(0) == Address(HOST, node.port)


def test_plain_redis_as_a_node_is_named(redis_db: RedisServer) -> None:
    with pytest.raises(redis.ConnectionError, match=f"{HOST}:{redis_db.port}: .*cluster support disabled"):
        SlotMap([(HOST, redis_db.port)], {}).owner(0)


def test_refused_password_is_named(start_node: StartNode) -> None:
    node = start_node(requirepass="right")
    assert SlotMap([(HOST, node.port)], {"password": "right"}).owner(0).port == node.port
    with pytest.raises(redis.ConnectionError, match="invalid username-password pair") as refused:
        SlotMap([(HOST, node.port)], {"password": "wrong"}).owner(0)
    assert "wrong" not in str(refused.value)


def test_slot_without_a_master_costs_no_others(start_node: StartNode) -> None:
    node = start_node(Bucket(3).slot)
    slots = SlotMap([(HOST, node.port)], {})
    assert slots.owner(Bucket(2).slot).port == node.port
    with pytest.raises(redis.ConnectionError, match=f"no master has slot {Bucket(3).slot}"):
        slots.owner(Bucket(3).slot)


def test_cluster_that_needs_every_slot_is_down_without_one(start_node: StartNode) -> None:
    """Its map is taken as soon as it has all of them."""
    node = start_node(7, **{"cluster-require-full-coverage": "yes"})
    slots = SlotMap([(HOST, node.port)], {})
    with pytest.raises(redis.ConnectionError, match="the cluster is down"):
        slots.owner(0)
    node.call("CLUSTER", "ADDSLOTS", 7)

    def owner() -> Address | None:
        with suppress(redis.ConnectionError):
            return slots.owner(0)
        return None

    assert wait_until(owner) == Address(HOST, node.port)


def test_announced_address_that_cannot_be_reached_is_named(start_node: StartNode) -> None:
    announced = free_port()
    node = start_node(**{"cluster-announce-port": str(announced)})
    with (
        sync_client(cluster_keywords([(HOST, node.port)], 16, "")) as client,
        pytest.raises(redis.ConnectionError, match=str(announced)),
    ):
        client.ping()
