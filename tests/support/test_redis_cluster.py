"""The cluster that tests start: its nodes agree, and a replica follows a master that is killed."""

from tests.support.redis_cluster import MASTERS, RedisCluster
from tests.support.servers import wait_until


def test_cluster_is_whole_and_takes_keys(redis_cluster: RedisCluster) -> None:
    assert len(redis_cluster.masters()) == MASTERS
    with redis_cluster.client() as client:
        for number in range(30):
            client.set(f"key{number}", number)
    owner = redis_cluster.owner_of("key7")
    assert owner.call("GET", "key7") == "7"
    assert sum(node.call("DBSIZE") for node in redis_cluster.masters()) == 30


def test_replica_follows_a_killed_master(redis_cluster: RedisCluster) -> None:
    killed = redis_cluster.masters()[0]
    with redis_cluster.killed(killed):
        wait_until(lambda: len(redis_cluster.masters()) == MASTERS and killed not in redis_cluster.masters(), 20)
    assert killed not in redis_cluster.masters()


def test_failover_and_reshard_move_slots(redis_cluster: RedisCluster) -> None:
    first = redis_cluster.masters()[0]
    promoted = redis_cluster.failover(first)
    assert promoted in redis_cluster.masters()
    assert first not in redis_cluster.masters()
    source, target = redis_cluster.masters()[:2]
    ranges = redis_cluster.slot_ranges()
    redis_cluster.reshard(source, target, 50)
    redis_cluster.wait_until_whole()
    assert redis_cluster.slot_ranges() != ranges


def test_cluster_is_restored_after_a_master_has_lost_its_slots(redis_cluster: RedisCluster) -> None:
    source, target, _ = redis_cluster.masters()
    redis_cluster.reshard(source, target, sum(b - a + 1 for a, b, p in redis_cluster.slot_ranges() if p == source.port))
    redis_cluster.wait_until_settled()
    assert len(redis_cluster.masters()) == MASTERS - 1
    redis_cluster.restore()
    killed = redis_cluster.masters()[0]
    with redis_cluster.killed(killed):
        wait_until(lambda: len(redis_cluster.masters()) == MASTERS and killed not in redis_cluster.masters(), 20)
