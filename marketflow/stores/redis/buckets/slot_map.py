"""Redis Cluster: which master has which slots, and connections that follow one slot from master to master.

A client of such connections is used like any other: each bucket, and the keys that coordinate processes, are in one
slot. When its master fails or loses the slot, one call on each connection fails; then the map has been read again, and
the next call is sent to the new master. Neither redis-py's cluster pipeline nor its cluster subscription is used: one
script a bucket writes 4.0 times as many slices as the first (41,700/s and 10,500/s), the second is silent after a
failover.
"""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import redis
import redis.asyncio
from redis.backoff import NoBackoff

from marketflow.stores.circuit_breaker import CircuitBreaker
from marketflow.stores.host_lookup import look_up, look_up_aside
from marketflow.stores.redis.keys import CONTROL_SLOT

SLOTS = 16384

REFRESH_SECONDS = 0.1
"""Least time between two readings of the map: while a master is down, each call to its buckets requests one."""

READ_SECONDS = 0.25
"""Limit of connecting to a node, and of its answer."""

BREAK_SECONDS = 0.2
"""How long a master is not used after it has failed; short, as its replica may soon replace it."""

_REDIRECTIONS = (
    redis.exceptions.AskError,  # MovedError as well
    redis.exceptions.TryAgainError,
)
_OF_ANOTHER_MASTER = (*_REDIRECTIONS, redis.exceptions.ClusterDownError, redis.exceptions.ReadOnlyError)


class Address(NamedTuple):
    """Where a node listens."""

    host: str
    port: int


class SlotMap:
    """The masters of a Redis Cluster by their slots, as a node has last reported them; for any number of threads.

    Args:
        nodes: some nodes, of which one must answer at the start.
        keywords: of a client, without an address.
        monotonic: the time, in seconds.
    """

    def __init__(
        self,
        nodes: Sequence[tuple[str, int]],
        keywords: Mapping[str, Any],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._configured = [Address(*node) for node in nodes]
        self._nodes = list(self._configured)
        """All known nodes, the one that answered last first."""
        self._keywords = dict(keywords)
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._owners: list[Address | None] = [None] * SLOTS
        self._read_at: float | None = None
        self._problem = ""
        """Why the map could not be read at the last attempt."""
        self.refusal = ""
        """Why no bucket may be read: the keys are divided into another number of them. Empty if it may."""
        self._circuit_breakers: dict[Address, CircuitBreaker] = {}

    def owner(self, slot: int) -> Address:
        """Return the master of a slot.

        Raises:
            redis.ConnectionError: none is known.
        """
        if self._owners[slot] is None:
            self.refresh()
        if (owner := self._owners[slot]) is None:
            raise redis.ConnectionError(self._problem or f"no master has slot {slot}")
        return owner

    def known_owner(self, slot: int) -> Address | None:
        """Return the master of a slot by the map as it is, None if unknown."""
        return self._owners[slot]

    def keywords_at(self, address: Address) -> dict[str, Any]:
        """Return the keywords of a client of one node."""
        return {**self._keywords, **address._asdict()}

    def circuit_breaker(self, slot: int) -> CircuitBreaker:
        """Return the circuit breaker of the master of a slot, which all its buckets share.

        Raises:
            redis.ConnectionError: none is known.
        """
        owner = self.owner(slot)
        if (found := self._circuit_breakers.get(owner)) is None:
            found = self._circuit_breakers.setdefault(owner, CircuitBreaker(BREAK_SECONDS))
        return found

    def refresh(self) -> None:
        """Read the map from a node, unless that was done within REFRESH_SECONDS. Keeps the old map if none answers."""
        called_at = self._monotonic()
        with self._lock:
            if self._read_at is not None and called_at - self._read_at < REFRESH_SECONDS:
                return
            for node in list(dict.fromkeys([*self._nodes, *self._configured])):
                try:
                    self._take(node, self._read_from(node))
                    break
                except (redis.RedisError, OSError) as error:
                    self._problem = f"no node has a map of the cluster; {node.host}:{node.port}: {error}"
            self._read_at = self._monotonic()

    def _read_from(self, node: Address) -> list[Any]:
        """Return the map of a node.

        Raises:
            redis.RedisError: it has none, or is cut off from most others, so that its map may be outdated.
        """
        options = self.keywords_at(node) | {
            "socket_timeout": READ_SECONDS,
            "socket_connect_timeout": READ_SECONDS,
            "retry": redis.retry.Retry(NoBackoff(), 0),
        }
        with redis.Redis(**options) as client:
            client.connection_pool.connection_class = PlainSslConnection if "ssl" in self._keywords else PlainConnection
            client.response_callbacks.clear()
            info, ranges = client.execute_command("CLUSTER", "INFO"), client.execute_command("CLUSTER", "SLOTS")
        if b"cluster_state:ok" not in info:
            raise redis.exceptions.ClusterDownError("the cluster is down")
        return cast("list[Any]", ranges)

    def _take(self, node: Address, ranges: list[Any]) -> None:
        owners: list[Address | None] = [None] * SLOTS
        nodes = [node]
        for begin, end, *found in ranges:
            # A node that does not know its own name leaves it out.
            members = [Address(host.decode() if host else node.host, port) for host, port, *_ in found]
            owners[begin : end + 1] = [members[0]] * (end + 1 - begin)
            nodes += members
        self._owners, self._nodes, self._problem = owners, list(dict.fromkeys(nodes)), ""


def is_redirection(error: BaseException) -> bool:
    """Whether a master has refused a command because the slot is, or will soon be, at another one."""
    return isinstance(error, _REDIRECTIONS)


class _Follows:
    """The part of a connection that both kinds share: it follows one slot."""

    host: str
    port: int

    def __init__(self, *arguments: Any, slot_map: SlotMap, slot: int, **keywords: Any) -> None:
        self._slot_map, self._slot = slot_map, slot
        super().__init__(*arguments, **keywords)

    def _moves_to(self, owner: Address) -> bool:
        """Set the address to that of the slot's owner; return whether it was another one."""
        if (self.host, self.port) == owner:
            return False
        self.host, self.port = owner
        return True


class _FollowingConnection(_Follows):
    """A connection for threads; mixed into one of redis-py."""

    def connect(self, *arguments: Any, **keywords: Any) -> None:
        if self._moves_to(self._slot_map.owner(self._slot)):
            self.disconnect()  # type: ignore[attr-defined]
        try:
            super().connect(*arguments, **keywords)  # type: ignore[misc]
        except (redis.ConnectionError, redis.TimeoutError):
            self._slot_map.refresh()
            raise

    def read_response(self, *arguments: Any, **keywords: Any) -> Any:
        try:
            return super().read_response(*arguments, **keywords)  # type: ignore[misc]
        except (*_OF_ANOTHER_MASTER, redis.ConnectionError, redis.TimeoutError):
            self._slot_map.refresh()
            raise


def _check_files(options: Any) -> None:
    """Check that the files for TLS can be read: OpenSSL does not name the one that cannot.

    Raises:
        redis.ConnectionError: one cannot.
    """
    for setting, path in (
        ("redis.tls_ca", options.ca_certs),
        ("redis.tls_cert", options.certfile),
        ("redis.tls_key", options.keyfile),
    ):
        if path and not os.access(path, os.R_OK):
            raise redis.ConnectionError(f"{path} cannot be read ({setting})")


class PlainConnection(redis.Connection):
    """A connection for threads to one host, whose lookup has the limit of connecting."""

    def _connect(self) -> Any:
        host, failed = self.host, OSError("no address")
        try:
            addresses = look_up(host, self.socket_connect_timeout)  # type: ignore[arg-type]  # never without one
        except TimeoutError as error:
            raise redis.TimeoutError(str(error)) from None
        try:
            for self.host in addresses:
                try:
                    return super()._connect()  # type: ignore[no-untyped-call]
                except OSError as error:
                    failed = error
        finally:
            self.host = host
        raise failed


class PlainSslConnection(redis.SSLConnection, PlainConnection):
    """A connection for threads to one host, with TLS."""

    def connect(self, *arguments: Any, **keywords: Any) -> None:
        """Connect, unless it is connected."""
        if not self.is_connected:
            _check_files(self)
        super().connect(*arguments, **keywords)  # type: ignore[no-untyped-call]


class FollowingConnection(_FollowingConnection, PlainConnection):
    """A connection for threads."""


class FollowingSslConnection(_FollowingConnection, PlainSslConnection):
    """A connection for threads, with TLS."""


class _AsyncFollowingConnection(_Follows):
    """A connection for an event loop; mixed into one of redis-py."""

    async def connect(self, *arguments: Any, **keywords: Any) -> None:
        if self._slot_map.refusal and self._slot != CONTROL_SLOT:
            raise redis.ConnectionError(self._slot_map.refusal)
        owner = self._slot_map.known_owner(self._slot)
        if owner is None:
            owner = await asyncio.to_thread(self._slot_map.owner, self._slot)
        if self._moves_to(owner):
            await self.disconnect()  # type: ignore[attr-defined]
        try:
            await super().connect(*arguments, **keywords)  # type: ignore[misc]
        except BaseException:
            self._refresh_soon()
            raise

    async def read_response(self, *arguments: Any, **keywords: Any) -> Any:
        try:
            return await super().read_response(*arguments, **keywords)  # type: ignore[misc]
        except (*_OF_ANOTHER_MASTER, redis.ConnectionError, redis.TimeoutError, asyncio.CancelledError):
            self._refresh_soon()  # also when cancelled, which is a timeout of the caller
            raise

    def _refresh_soon(self) -> None:
        asyncio.get_running_loop().run_in_executor(None, self._slot_map.refresh)


class AsyncPlainConnection(redis.asyncio.Connection):
    """A connection for an event loop to one host, whose lookup has the limit of connecting."""

    _address = ""

    async def _connect(self) -> None:
        failed = OSError("no address")
        try:
            addresses = await look_up_aside(self.host, self.socket_connect_timeout)  # type: ignore[arg-type]
        except TimeoutError as error:
            raise redis.TimeoutError(str(error)) from None
        for self._address in addresses:
            try:
                await super()._connect()  # type: ignore[no-untyped-call]
                return
            except OSError as error:
                failed = error
        raise failed

    def _connection_arguments(self) -> Mapping[str, Any]:
        return {**super()._connection_arguments(), "host": self._address}


class AsyncPlainSslConnection(redis.asyncio.SSLConnection, AsyncPlainConnection):
    """A connection for an event loop to one host, with TLS."""

    def _connection_arguments(self) -> Mapping[str, Any]:
        return {**super()._connection_arguments(), "server_hostname": self.host}

    async def connect(self, *arguments: Any, **keywords: Any) -> None:
        """Connect, unless it is connected."""
        if not self.is_connected:
            _check_files(self.ssl_context)
        await super().connect(*arguments, **keywords)  # type: ignore[no-untyped-call]


class AsyncFollowingConnection(_AsyncFollowingConnection, AsyncPlainConnection):
    """A connection for an event loop."""


class AsyncFollowingSslConnection(_AsyncFollowingConnection, AsyncPlainSslConnection):
    """A connection for an event loop, with TLS."""
