"""A real Redis Cluster of six nodes (three masters, a replica of each) on 127.0.0.1, and what can go wrong with it.

It needs a redis-server of 7.0 or later: in the folder that REDIS_PROGRAMS names, or on PATH. The
embedded one is older.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import pytest
import redis

from tests.support.bus_proxy import BusProxy
from tests.support.servers import HOST, RedisServer, free_port, wait_until

MASTERS = 3
SLOTS = 16384
NODE_TIMEOUT_MS = 1000
REDIS_PROGRAMS = "REDIS_PROGRAMS"


def redis_program(name: str) -> str | None:
    """The path of redis-server or redis-cli of 7.0 or later; None where there is none."""
    folder = os.environ.get(REDIS_PROGRAMS)
    found = shutil.which(name, path=folder)
    if found is None:
        return None
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    parts = re.search(r"(?:v=|redis-cli |valkey-cli )(\d+)\.", version)
    return found if parts is not None and int(parts[1]) >= 7 else None


class ClusterNode(RedisServer):
    """One node of the cluster."""

    def __init__(self, folder: Path, program: str, node_timeout_ms: int = NODE_TIMEOUT_MS, **options: str) -> None:
        super().__init__(folder, persistent=False, password=options.pop("requirepass", ""))
        self.bus_port = self.announced_bus_port = free_port()
        self.meet_port = self.port
        """By which other nodes begin to know it."""
        self._program = program
        self._options = {
            "cluster-enabled": "yes",
            "cluster-port": str(self.bus_port),
            "cluster-node-timeout": str(node_timeout_ms),
            "cluster-require-full-coverage": "no",
            "cluster-allow-reads-when-down": "no",
            "repl-diskless-sync-delay": "0",
        } | options

    def command(self) -> list[str]:
        """The command line, with a server that knows sharded notifications."""
        return [self._program, *super().command()[1:]]

    def server_options(self) -> dict[str, str]:
        """Those of a node."""
        return super().server_options() | self._options

    def announce_bus(self, port: int) -> None:
        """Have other nodes reach the bus by another port."""
        self.announced_bus_port = port
        self._options["cluster-announce-bus-port"] = str(port)

    def use_tls(self, key: Path, certificate: Path) -> None:
        """Take TLS on a port of its own from clients, and use nothing else between the nodes."""
        self.meet_port = free_port()
        self._options |= {
            "tls-port": str(self.meet_port),
            "tls-key-file": str(key),
            "tls-cert-file": str(certificate),
            "tls-ca-cert-file": str(certificate),
            "tls-auth-clients": "no",
            "tls-cluster": "yes",
            "tls-replication": "yes",
        }

    @property
    def address(self) -> str:
        """As redis.nodes has it."""
        return f"{self.host}:{self.port}"

    @property
    def name(self) -> str:
        """The id by which the cluster knows it."""
        return str(self.call("CLUSTER", "MYID"))

    def call(self, *command: str | int) -> Any:
        """The reply to a command; texts instead of bytes."""
        (reply,) = self.calls(command)
        return reply

    def calls(self, *commands: Sequence[str | int]) -> list[Any]:
        """The replies to commands, on one connection."""
        with self.client(decode_responses=True) as client:
            client.response_callbacks.clear()
            return [client.execute_command(*command) for command in commands]


class RedisCluster:
    """Six nodes.

    Args:
        folder: of their data.
        node_timeout_ms: after which a node that does not answer counts as failed.
        options: of redis-server, for all nodes.
    """

    _proxies: tuple[BusProxy, ...] = ()
    _cut_off: tuple[ClusterNode, str] | None = None
    """A node and its name."""

    def __init__(self, folder: Path, node_timeout_ms: int = NODE_TIMEOUT_MS, **options: str) -> None:
        program = redis_program("redis-server")
        if program is None:
            pytest.skip("there is no redis-server of 7.0 or later, neither on PATH nor in the folder of REDIS_PROGRAMS")
        folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        self.nodes = [
            ClusterNode(folder / f"node{number}", program, node_timeout_ms, **options) for number in range(2 * MASTERS)
        ]

    @property
    def addresses(self) -> list[str]:
        """Those of all nodes, as redis.nodes has them."""
        return [node.address for node in self.nodes]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def use_bus_proxies(self) -> None:
        """Allow `cut_off`; before the start."""
        self._proxies = tuple(BusProxy(node.bus_port, partial(self._is_cut, node)) for node in self.nodes)
        for node, proxy in zip(self.nodes, self._proxies, strict=True):
            node.announce_bus(proxy.port)

    def start(self) -> None:
        """Start all nodes and make a cluster of them."""
        _each(ClusterNode.start, self.nodes)
        self._join()

    def restore(self) -> None:
        """Make it what it was at the start, whatever a test has left of it; empty."""
        for node in self.nodes:
            if not node.running:
                node.start()
        if len(self.masters()) == MASTERS:
            self.wait_until_whole()
            self.flushall()
        else:  # whose slots another one has: of two, none is replaced when it fails
            self.flushall()
            _each(lambda node: node.call("CLUSTER", "RESET", "HARD"), self.nodes)
            self._join()

    def _join(self) -> None:
        """Make a cluster of nodes that are in none."""
        first, masters = self.nodes[0], self.nodes[:MASTERS]
        bounds = [SLOTS * number // MASTERS for number in range(MASTERS + 1)]
        for number, node in enumerate(masters):
            node.call("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            node.call("CLUSTER", "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
        for node in self.nodes[1:]:
            first.call("CLUSTER", "MEET", HOST, node.meet_port, node.announced_bus_port)
        wait_until(
            lambda: all(len(_known(node.call("CLUSTER", "NODES"))) == len(self.nodes) for node in self.nodes), 20
        )
        for master, replica in zip(masters, self.nodes[MASTERS:], strict=True):
            name = master.name
            wait_until(lambda: _answered(replica, "CLUSTER", "REPLICATE", name), 20)  # noqa: B023 - called at once
        self.wait_until_whole()

    def stop(self) -> None:
        """Stop all nodes."""
        _each(ClusterNode.resume, [node for node in self.nodes if node.running])
        _each(ClusterNode.stop, self.nodes)
        for proxy in self._proxies:
            proxy.close()

    def wait_until_whole(self, seconds: float = 30.0) -> None:
        """Wait until all nodes run, agree on three masters of all slots, and each has a replica in step."""
        wait_until(self._is_whole, seconds, "the cluster is not whole")

    def wait_until_settled(self, seconds: float = 10.0) -> None:
        """Wait until all nodes agree on who has which slots, also where a master is left without any."""

        def agree() -> bool:
            views = [sorted((a, b, master[1]) for a, b, master, *_ in n.call("CLUSTER", "SLOTS")) for n in self.nodes]
            return all(view == views[0] for view in views)

        wait_until(agree, seconds, "the nodes do not agree")

    def masters(self) -> list[ClusterNode]:
        """The nodes that own slots now, by the view of a node that answers."""
        ports = {port for _, _, port in self.slot_ranges()}
        return [node for node in self.nodes if node.port in ports]

    def slot_ranges(self) -> list[tuple[int, int, int]]:
        """Ranges of slots (first, last) and the port of their master."""
        for node in self.nodes:
            if node.running and not (self._cut_off and node is self._cut_off[0]):
                try:
                    return [(begin, end, master[1]) for begin, end, master, *_ in node.call("CLUSTER", "SLOTS")]
                except redis.RedisError:
                    continue
        raise AssertionError("no node answers")

    def owner_of(self, key: str) -> ClusterNode:
        """The master of a key."""
        slot = redis.crc.key_slot(key.encode())
        port = next(port for begin, end, port in self.slot_ranges() if begin <= slot <= end)
        return next(node for node in self.nodes if node.port == port)

    def replicas_of(self, master: ClusterNode) -> list[ClusterNode]:
        """The running replicas of a master."""
        name = master.name
        return [node for node in self.nodes if node is not master and node.running and _master_of(node) == name]

    def client(self) -> "redis.RedisCluster":
        """A client of the whole cluster, for tests to look at keys; close it (it is a context manager)."""
        node = next(node for node in self.nodes if node.running)
        return redis.RedisCluster(host=node.host, port=node.port, socket_timeout=2.0, password=node.password or None)

    def flushall(self) -> None:
        """Empty every master."""
        for node in self.masters():
            node.call("FLUSHALL")

    # Faults

    @contextmanager
    def killed(self, node: ClusterNode) -> Iterator[None]:
        """SIGKILL a node; it starts again after the block, and the cluster is whole then."""
        node.kill()
        try:
            yield
        finally:
            node.start()
            self.wait_until_whole()

    @contextmanager
    def frozen(self, node: ClusterNode) -> Iterator[None]:
        """Stop a node by SIGSTOP: its connections stay open, and it counts as failed after the node timeout."""
        node.pause()
        try:
            yield
        finally:
            node.resume()
            self.wait_until_whole()

    @contextmanager
    def cut_off(self, node: ClusterNode) -> Iterator[None]:
        """Cut a node off from the bus of all others, see `use_bus_proxies`; clients and its replica still reach it."""
        self._cut_off = (node, node.name)
        for proxy in self._proxies:
            proxy.cut_links()
        try:
            yield
        finally:
            self._cut_off = None
            self.wait_until_whole()

    def _is_cut(self, node: ClusterNode, sender: str) -> bool:
        return self._cut_off is not None and (node is self._cut_off[0] or sender == self._cut_off[1])

    def failover(self, master: ClusterNode) -> ClusterNode:
        """Have a replica take the place of a master that is alive; return the new master."""
        replica = self.replicas_of(master)[0]
        replica.call("CLUSTER", "FAILOVER")
        wait_until(lambda: replica in self.masters() and master not in self.masters(), 20)
        self.wait_until_whole()
        return replica

    def reshard(self, source: ClusterNode, target: ClusterNode, slots: int) -> None:
        """Move slots from a master to another by `redis-cli --cluster reshard`, while both serve."""
        program = redis_program("redis-cli")
        if program is None:
            pytest.skip("there is no redis-cli of 7.0 or later")
        command = [
            program, "--cluster", "reshard", source.address, "--cluster-from", source.name, "--cluster-to", target.name,
            "--cluster-slots", str(slots), "--cluster-yes", "--cluster-pipeline", "100",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    # Views

    def _is_whole(self) -> bool:
        try:
            seen = [
                node.calls(("CLUSTER", "INFO"), ("CLUSTER", "NODES"), ("INFO", "replication")) for node in self.nodes
            ]
        except (redis.RedisError, OSError):
            return False
        served = all("cluster_state:ok" in info and f"cluster_slots_ok:{SLOTS}" in info for info, _, _ in seen)
        complete = len(self.masters()) == MASTERS and all(len(_known(nodes)) == len(self.nodes) for _, nodes, _ in seen)
        agreed = all(_roles(nodes) == _roles(seen[0][1]) for _, nodes, _ in seen)
        return served and complete and agreed and all(_in_step(replication) for _, _, replication in seen)


def _known(nodes: str) -> list[str]:
    """The lines of CLUSTER NODES of nodes that a node can reach."""
    return [line for line in nodes.splitlines() if not re.search(r"handshake|noaddr|fail", line.split()[2])]


def _roles(nodes: str) -> dict[str, tuple[str, ...]]:
    """Of each node its role, its master and its slots, by the lines of CLUSTER NODES."""
    fields = [line.split() for line in nodes.splitlines()]
    return {each[0]: (each[2].replace("myself,", ""), each[3], *sorted(each[8:])) for each in fields}


def _in_step(info: str) -> bool:
    """Whether a node is a master with a replica, or a replica that has its master's data."""
    if "role:master" in info:
        return re.search(r"slave\d+:.*state=online", info) is not None
    return "master_link_status:up" in info and "master_sync_in_progress:0" in info


def _master_of(node: ClusterNode) -> str | None:
    own = next(line.split() for line in cast("str", node.call("CLUSTER", "NODES")).splitlines() if "myself" in line)
    return None if own[3] == "-" else own[3]


def _answered(node: ClusterNode, *command: str) -> bool:
    try:
        node.call(*command)
    except redis.ResponseError:  # it does not know the other yet
        return False
    return True


def _each(act: Callable[[ClusterNode], object], nodes: Iterable[ClusterNode]) -> None:
    with ThreadPoolExecutor(2 * MASTERS) as threads:
        list(threads.map(act, nodes))
