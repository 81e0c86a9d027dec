"""Clients of Redis, synchronous and asynchronous, built in one way: short timeouts and no hidden retries."""

from collections.abc import Mapping, Sequence
from typing import Any

import redis
import redis.asyncio
from hiredis import pack_command
from redis.backoff import NoBackoff

from marketflow.stores.redis import keys
from marketflow.stores.redis.buckets import slot_map
from marketflow.stores.redis.buckets.slot_map import SlotMap

TIMEOUT_SECONDS = 0.25
"""How long the pipeline and a request wait for a connection, and for an answer."""


class CommandPacker:
    """Packs commands by hiredis; redis-py first inspects each argument in Python, which takes three times as long."""

    def pack(self, *command: str | bytes | int | float) -> list[bytes]:
        """Return a command in the protocol of Redis; its name may be several words, as in redis-py."""
        name, *arguments = command
        if isinstance(name, str) and " " in name:
            command = (*name.split(), *arguments)
        return [pack_command(command)]  # type: ignore[arg-type]


def connection_keywords(
    host: str,
    port: int,
    password: str,
    db: int,
    username: str = "",
    tls: bool = False,
    tls_ca: str = "",
    tls_cert: str = "",
    tls_key: str = "",
) -> dict[str, Any]:
    """Keywords for a client of either kind; a `host` that begins with / is the path of a Unix socket."""
    place = {"unix_socket_path": host} if host.startswith("/") else {"host": host, "port": port}
    return {**place, "db": db, **_access(password, username, tls, tls_ca, tls_cert, tls_key)}


def cluster_keywords(nodes: Sequence[tuple[str, int]], buckets: int, *access: Any) -> dict[str, Any]:
    """Keywords for clients of a Redis Cluster, which all share one map of its slots.

    Args:
        nodes: host and port of some nodes.
        buckets: into how many the keys are divided.
        access: password, username, tls, tls_ca, tls_cert and tls_key.
    """
    options = _access(*access)
    return {"slot_map": SlotMap(nodes, options), "buckets": buckets, **options}


def _access(
    password: str, username: str = "", tls: bool = False, tls_ca: str = "", tls_cert: str = "", tls_key: str = ""
) -> dict[str, Any]:
    user = {"username": username} if username else {}
    files = {"ssl_ca_certs": tls_ca, "ssl_certfile": tls_cert, "ssl_keyfile": tls_key}
    ssl = {"ssl": True, "ssl_check_hostname": True, **{name: path for name, path in files.items() if path}}
    return {**user, "password": password or None, **(ssl if tls else {})}


def buckets_of(keywords: Mapping[str, Any]) -> list[keys.Bucket]:
    """The buckets of the Redis to which keywords connect."""
    if "slot_map" in keywords:
        return [keys.Bucket(number) for number in range(keywords["buckets"])]
    return [keys.Bucket(db=keywords.get("db", 0))]


def sync_client(
    keywords: Mapping[str, Any],
    timeout_seconds: float = TIMEOUT_SECONDS,
    max_connections: int | None = None,
    slot: int = keys.CONTROL_SLOT,
) -> "redis.Redis":
    """A client for threads, which connects when first used.

    Args:
        keywords: see connection_keywords and cluster_keywords.
        timeout_seconds: limit of connecting, and of each answer.
        max_connections: one more raises an error; None is no limit.
        slot: on a Redis Cluster, the slot whose current master is used.
    """
    options: dict[str, Any] = {
        "max_connections": max_connections,
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": timeout_seconds,
        "retry": redis.retry.Retry(NoBackoff(), 0),
    }
    if "slot_map" in keywords:
        following = slot_map.FollowingSslConnection if "ssl" in keywords else slot_map.FollowingConnection
        pool = redis.ConnectionPool(connection_class=following, **_following(keywords, slot), **options)
        client = redis.Redis.from_pool(pool)
    else:
        client = redis.Redis(**keywords, **options)
        if "host" in keywords:
            plain = slot_map.PlainSslConnection if "ssl" in keywords else slot_map.PlainConnection
            client.connection_pool.connection_class = plain
    client.connection_pool.connection_kwargs["command_packer"] = CommandPacker()
    return client


def async_client(
    keywords: Mapping[str, Any],
    max_connections: int,
    timeout_seconds: float = TIMEOUT_SECONDS,
    answer_seconds: float | None = None,
    slot: int = keys.CONTROL_SLOT,
) -> "redis.asyncio.Redis":
    """A client for one event loop, which connects when first used.

    Args:
        keywords: see connection_keywords and cluster_keywords.
        max_connections: a call that finds all of them in use waits for one.
        timeout_seconds: limit of that wait, of connecting, and of each answer.
        answer_seconds: limit of each answer, if it differs from `timeout_seconds`.
        slot: on a Redis Cluster, the slot whose current master is used.
    """
    pool = redis.asyncio.BlockingConnectionPool(
        **_pool_keywords(keywords, slot),
        max_connections=max_connections,
        timeout=timeout_seconds,
        socket_timeout=timeout_seconds if answer_seconds is None else answer_seconds,
        socket_connect_timeout=timeout_seconds,
        retry=redis.asyncio.retry.Retry(NoBackoff(), 0),
    )
    return redis.asyncio.Redis.from_pool(pool)


def _following(keywords: Mapping[str, Any], slot: int) -> dict[str, Any]:
    """Keywords of a cluster as those of a pool whose connections follow a slot."""
    return {**{name: value for name, value in keywords.items() if name not in ("buckets", "ssl")}, "slot": slot}


def _pool_keywords(keywords: Mapping[str, Any], slot: int) -> dict[str, Any]:
    """Keywords of a client as those of a pool, which takes the class of its connections instead of `ssl`."""
    if "slot_map" in keywords:
        following = slot_map.AsyncFollowingSslConnection if "ssl" in keywords else slot_map.AsyncFollowingConnection
        return {**_following(keywords, slot), "connection_class": following}
    options = dict(keywords)
    if path := options.pop("unix_socket_path", None):
        return options | {"path": path, "connection_class": redis.asyncio.UnixDomainSocketConnection}
    secure = options.pop("ssl", False)
    plain = slot_map.AsyncPlainSslConnection if secure else slot_map.AsyncPlainConnection
    return options | {"connection_class": plain}
