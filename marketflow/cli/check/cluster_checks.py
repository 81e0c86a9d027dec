"""Health checks of a Redis Cluster: its settings, slots and replicas, and each node of it.

What is well with all nodes takes one line; what is not takes one for each node.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from marketflow.cli.check.check_result import Check, CheckResult, CheckState
from marketflow.cli.check.redis_checks import CHECK_TIMEOUT_SECONDS, error_text, memory_results, rights_result
from marketflow.runtime.store_servers import Servers
from marketflow.settings import Settings
from marketflow.stores.redis.connection import buckets_of, sync_client
from marketflow.stores.redis.keys import BUCKETS_HELD_KEY, BUCKETS_KEY
from marketflow.text import host_port

T = TypeVar("T")
R = TypeVar("R")

WHAT = "Redis cluster"

ClientOf = Callable[[str, int], "redis.Redis"]
"""Makes a client of the node at a host and port."""

OLDEST_VERSION = (7, 0)
"""Oldest version with sharded notifications."""

LONGEST_NODE_TIMEOUT_MS = 1000
"""With it the buckets of a dead master were back after 2.2 s; with 2000 ms it took 3.25 s."""

UNEVEN = 2
"""How often the fair share of buckets a master may have before the check warns."""


class Node(NamedTuple):
    """A node as CLUSTER NODES lists it; `slots` are ranges whose ends are included."""

    id: str
    host: str
    port: int
    flags: frozenset[str]
    master_id: str
    linked: bool
    slots: tuple[tuple[int, int], ...]

    @property
    def where(self) -> str:
        """Its address, as clients are given it."""
        return host_port(self.host, self.port)

    @property
    def is_master(self) -> bool:
        """Whether it is a master that has slots, be it dead or not."""
        return "master" in self.flags and bool(self.slots)

    @property
    def lives(self) -> bool:
        """Whether the node that lists it reaches it."""
        return self.linked and not self.flags & {"fail", "fail?", "noaddr"}

    def has(self, slot: int) -> bool:
        """Whether it serves a slot."""
        return any(first <= slot <= last for first, last in self.slots)


def cluster_check(settings: Settings, servers: Servers) -> Check:
    """Return the checks of the Redis Cluster of the settings."""
    seeds = settings.redis.addresses
    where = ", ".join(host_port(*seed) for seed in seeds)
    access = {name: value for name, value in servers.redis.items() if name not in ("slot_map", "buckets")}

    def client_of(host: str, port: int) -> "redis.Redis":
        return sync_client({**access, "host": host, "port": port}, CHECK_TIMEOUT_SECONDS)

    def checked() -> list[CheckResult]:
        keys = [bucket.series_key for bucket in buckets_of(servers.redis)]
        results = _check(where, seeds, client_of, keys, bool(settings.redis.password))
        return [*results, *_number_results(where, servers)]

    return Check(WHAT, where, checked)


def _check(
    where: str, seeds: Sequence[tuple[str, int]], client_of: ClientOf, keys: Sequence[str], with_password: bool
) -> list[CheckResult]:
    def failed(place: str, error: redis.RedisError, state: CheckState) -> CheckResult:
        if "cluster support disabled" in str(error):
            advice = "set redis.host and redis.port to it, and remove redis.nodes"
            return CheckResult(WHAT, place, state, "it is no node of a cluster", advice)
        found, advice = error_text(error, with_password)
        return CheckResult(WHAT, place, state, found, advice.replace("redis.host and redis.port", "redis.nodes"))

    asked = _at_once(lambda seed: _nodes_of(client_of, *seed), seeds)
    lists = [answer for answer in asked if isinstance(answer, list)]
    errors = [
        (host_port(*seed), answer) for seed, answer in zip(seeds, asked, strict=True) if not isinstance(answer, list)
    ]
    if not lists:
        return [failed(place, error, CheckState.FAILED) for place, error in errors]
    nodes = max(lists, key=lambda some: sum(node.lives for node in some))  # a node that was cut off knows little
    living = [node for node in nodes if node.lives]
    found = _at_once(lambda node: _node_results(node, client_of, keys), living)
    each = [
        result
        for node, answer in zip(living, found, strict=True)
        for result in (answer if isinstance(answer, list) else [_unreachable(node, answer, with_password)])
    ]
    return [
        *_summaries(where, nodes, each),
        *(failed(place, error, CheckState.WARNING) for place, error in errors),
        *(result for result in each if result.state is not CheckState.OK),
        *topology_results(where, nodes),
        *bucket_results(where, nodes, [*map(_slot, keys)]),
    ]


def _summaries(where: str, nodes: Sequence[Node], each: Sequence[CheckResult]) -> Iterator[CheckResult]:
    """Yield one line for all nodes in place of what is well with each."""
    well = [result for result in each if result.state is CheckState.OK]
    masters, living = sum(node.is_master for node in nodes), sum(node.lives for node in nodes)
    versions = sorted({result.found for result in well if result.what == WHAT})
    text = f"{living} of {len(nodes)} nodes are up, {masters} masters"
    yield CheckResult(WHAT, where, CheckState.OK, ", ".join([text, *versions]))
    for what in sorted({result.what for result in well} - {WHAT}):
        count = sum(result.what == what for result in well)
        yield CheckResult(what, where, CheckState.OK, f"well on {count} nodes")


def parse_nodes(text: str, asked: str) -> list[Node]:
    """Parse the answer to CLUSTER NODES. A node has the name that it announces, or its address, or that asked for."""
    return [_node(line.split(), asked) for line in text.splitlines() if line.strip()]


def _node(fields: Sequence[str], asked: str) -> Node:
    address, *names = fields[1].split(",")  # ip:port@bus-port,hostname,key=value
    host, _, port = address.partition("@")[0].rpartition(":")
    ranges = (field.partition("-") for field in fields[8:] if not field.startswith("["))  # [ is a slot that migrates
    return Node(
        id=fields[0],
        host=next((name for name in names if name and "=" not in name), host) or asked,
        port=int(port),
        flags=frozenset(fields[2].split(",")),
        master_id="" if fields[3] == "-" else fields[3],
        linked=fields[7] == "connected",
        slots=tuple((int(first), int(last or first)) for first, _, last in ranges),
    )


def topology_results(where: str, nodes: Sequence[Node]) -> Iterator[CheckResult]:
    """Check that every slot has a live master, and every master a live replica."""
    masters = [node for node in nodes if node.is_master and node.lives]
    dead = [node for node in nodes if not node.lives]
    open_slots = REDIS_CLUSTER_HASH_SLOTS - sum(last - first + 1 for node in masters for first, last in node.slots)
    if open_slots:
        found = f"{open_slots} of {REDIS_CLUSTER_HASH_SLOTS} slots have no master that answers"
        advice = "start the dead nodes, or give their slots to others: redis-cli --cluster fix HOST:PORT"
        yield CheckResult(WHAT, where, CheckState.FAILED, found, advice)
    for node in dead:
        found = f"the cluster cannot reach it ({', '.join(sorted(node.flags - {'myself'}))})"
        advice = f"start it, or remove it: redis-cli --cluster call {where.partition(',')[0]} cluster forget {node.id}"
        yield CheckResult(WHAT, node.where, CheckState.WARNING, found, advice)
    replicas = Counter(node.master_id for node in nodes if node.master_id and node.lives)
    for node in masters:
        if not replicas[node.id]:
            found = "this master has no replica: with it, its buckets are gone until it is back"
            advice = f"add one: redis-cli --cluster add-node NEW:PORT {node.where} --cluster-slave"
            advice += f" --cluster-master-id {node.id}"
            yield CheckResult(WHAT, node.where, CheckState.WARNING, found, advice)
    if len(masters) < 3:
        found = f"{len(masters)} masters: without a majority no replica takes over"
        yield CheckResult(WHAT, where, CheckState.WARNING, found, "use three masters or more")


def bucket_results(where: str, nodes: Sequence[Node], slots: Sequence[int]) -> Iterator[CheckResult]:
    """Check how the buckets are spread over the masters; `slots` has the slot of each bucket."""
    masters = [node for node in nodes if node.is_master]
    if not masters:
        return
    share = {node: sum(map(node.has, slots)) for node in masters}
    text = f"{len(slots)} buckets on {len(masters)} masters: {', '.join(str(count) for count in share.values())}"
    if idle := [node.where for node, count in share.items() if not count]:
        found, advice = f"{text}; none on {', '.join(idle)}", "raise redis.buckets, or move slots"
        yield CheckResult(WHAT, where, CheckState.WARNING, found, f"{advice}: redis-cli --cluster rebalance HOST:PORT")
    elif max(share.values()) * len(masters) > UNEVEN * len(slots):
        advice = "raise redis.buckets, or move slots: redis-cli --cluster rebalance HOST:PORT"
        yield CheckResult(WHAT, where, CheckState.WARNING, f"{text}; uneven", advice)
    else:
        yield CheckResult(WHAT, where, CheckState.OK, text)


def _number_results(where: str, servers: Servers) -> Iterator[CheckResult]:
    """Check that the keys are divided into as many buckets as the settings say."""
    with sync_client(servers.redis, CHECK_TIMEOUT_SECONDS) as client:
        try:
            held, kept = (client.get(key) for key in (BUCKETS_HELD_KEY, BUCKETS_KEY))
        except redis.RedisError:  # reported above
            return
    own = servers.redis["buckets"]
    if held is not None and int(held) != own:
        found = f"processes that run have {int(held)} buckets, and redis.buckets is {own}"
        advice = 'stop them first: "Changing redis.buckets" in deploy/README.md'
        yield CheckResult(WHAT, where, CheckState.FAILED, found, advice)
    elif kept is not None and int(kept) != own:
        found = f"the keys are divided into {int(kept)} buckets, and redis.buckets is {own}"
        yield CheckResult(WHAT, where, CheckState.WARNING, found, "the next start of an ingest process moves them")


def settings_results(node: Node, settings: Mapping[str, str]) -> Iterator[CheckResult]:
    """Check the settings of a node that decide how long an outage of another one lasts."""
    if not settings:
        found = "node timeout and full coverage are not known, as CONFIG is not permitted"
        yield CheckResult(WHAT, node.where, CheckState.OK, found)
    if settings.get("cluster-require-full-coverage") == "yes":
        found = "cluster-require-full-coverage yes: while one master is down, the others refuse everything as well"
        advice = "CONFIG SET cluster-require-full-coverage no on each node, and in redis.conf"
        yield CheckResult(WHAT, node.where, CheckState.WARNING, found, advice)
    timeout = int(settings.get("cluster-node-timeout", 0))
    if timeout > LONGEST_NODE_TIMEOUT_MS:
        found = (
            f"cluster-node-timeout {timeout}: the buckets of a dead master are back after {timeout / 1000 + 1.2:.1f} s"
        )
        advice = f"CONFIG SET cluster-node-timeout {LONGEST_NODE_TIMEOUT_MS} on each node, and in redis.conf"
        yield CheckResult(WHAT, node.where, CheckState.WARNING, found, advice)


def version_of(info: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    """Return name and version of a server by its INFO, as text and as numbers; Valkey calls itself Redis as well."""
    valkey = str(info.get("valkey_version", ""))
    version = valkey or str(info.get("redis_version", "0"))
    return f"{'Valkey' if valkey else 'Redis'} {version}", tuple(int(part) for part in version.split(".")[:2])


def version_results(node: Node, info: Mapping[str, Any]) -> Iterator[CheckResult]:
    """Check that a node has sharded notifications."""
    if not info:
        text = "INFO is not permitted, so its version and memory are not known"
        advice = "permit INFO to see more (ACL SETUSER default +info)"
        yield CheckResult(WHAT, node.where, CheckState.WARNING, text, advice)
        return
    name, version = version_of(info)
    if version >= OLDEST_VERSION:
        yield CheckResult(WHAT, node.where, CheckState.OK, name)
    else:
        oldest = ".".join(map(str, OLDEST_VERSION))
        found = f"{name}; a cluster needs {oldest} or newer, for its sharded notifications"
        yield CheckResult(WHAT, node.where, CheckState.FAILED, found, "upgrade it")


def _node_results(node: Node, client_of: ClientOf, keys: Sequence[str]) -> list[CheckResult]:
    with client_of(node.host, node.port) as client:
        info, settings = _permitted(client.info), _permitted(lambda: client.config_get("cluster-*"))
        results = [*version_results(node, info), *settings_results(node, settings), *memory_results(node.where, info)]
        own = next((key for key in keys if node.is_master and node.has(_slot(key))), "")
        return [*results, rights_result(node.where, client, own)] if own else results


def _unreachable(node: Node, error: redis.RedisError, with_password: bool) -> CheckResult:
    found, advice = error_text(error, with_password)
    if isinstance(error, redis.ConnectionError):
        advice = "let clients reach it, or set cluster-announce-ip and cluster-announce-port to where they can"
    return CheckResult(WHAT, node.where, CheckState.FAILED, found, advice)


def _nodes_of(client_of: ClientOf, host: str, port: int) -> list[Node]:
    with client_of(host, port) as client:
        client.response_callbacks.clear()  # the text as it is
        return parse_nodes(client.execute_command("CLUSTER", "NODES").decode(), host)


def _at_once(call: Callable[[T], R], arguments: Iterable[T]) -> "list[R | redis.RedisError]":
    """Return what calls return or raise, made concurrently: nodes that do not answer cost their timeout once."""

    def tried(argument: T) -> "R | redis.RedisError":
        try:
            return call(argument)
        except redis.RedisError as error:
            return error

    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(tried, arguments))


def _slot(key: str) -> int:
    return key_slot(key.encode())


def _permitted(call: Callable[[], Any]) -> dict[str, Any]:
    """Return the answer to a command of operators; nothing where the user has no permission for it."""
    try:
        return dict(call())
    except redis.exceptions.NoPermissionError:
        return {}
