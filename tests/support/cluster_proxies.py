"""The way of one process to the nodes of a Redis Cluster, which can be cut while all others reach them."""

import re
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Self

from tests.support.proxy import Proxy
from tests.support.redis_cluster import ClusterNode, RedisCluster
from tests.support.servers import HOST

_WRITES_SLICES = b"completeness_of"
"""In the script that writes slices."""

_WINDOW_KEY = re.compile(rb":live:(\w+):\w+:window\r\n")


class ClusterProxies:
    """A proxy in front of each node; a process that is given their addresses takes them for the nodes.

    For that they replace the ports of nodes in maps of the slots.
    """

    def __init__(self, cluster: RedisCluster) -> None:
        self._stack = ExitStack()
        ports: dict[bytes, bytes] = {}
        self.written: dict[str, float] = {}
        """When the process has last written slices of an exchange, in seconds of the monotonic clock."""
        self._proxies = {node: _NodeProxy(node.port, ports, self.written) for node in cluster.nodes}
        ports |= {b":%d\r\n" % node.port: b":%d\r\n" % proxy.port for node, proxy in self._proxies.items()}

    def __enter__(self) -> Self:
        for proxy in self._proxies.values():
            self._stack.enter_context(proxy)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def addresses(self) -> str:
        """As redis.nodes has them."""
        return ",".join(f"{HOST}:{proxy.port}" for proxy in self._proxies.values())

    def refuse(self, nodes: Iterable[ClusterNode]) -> None:
        """Refuse connections to these nodes, and reset those that there are."""
        for node in nodes:
            self._proxies[node].refuse()

    def vanish(self, nodes: Iterable[ClusterNode]) -> None:
        """Let nothing through to these nodes or back, without a word."""
        for node in nodes:
            self._proxies[node].vanish()

    def heal(self) -> None:
        """Let everything through again."""
        for proxy in self._proxies.values():
            proxy.heal()


class _NodeProxy(Proxy):
    def __init__(self, target: int, ports: Mapping[bytes, bytes], written: dict[str, float]) -> None:
        self._ports, self._written = ports, written
        super().__init__(target)

    def passed(self, data: bytes, from_client: bool) -> bytes:
        if from_client:
            if _WRITES_SLICES in data:
                self._written |= dict.fromkeys(map(bytes.decode, _WINDOW_KEY.findall(data)), time.monotonic())
        elif b":16383\r\n" in data:  # the end of the last range of a map
            for port, other in self._ports.items():
                data = data.replace(port, other)
        return data
