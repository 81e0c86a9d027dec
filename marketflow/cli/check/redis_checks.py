"""Looks at Redis: whether it answers, may be written to, keeps what is written, and permits what MarketFlow sends.

Whether it permits that is found out without writing: within MULTI, Redis checks each command against the rights of the
user, its role, its memory and its disk before it queues it, and DISCARD then throws the queue away.
"""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import redis

from marketflow.cli.check.data_folder import AS_OWNER, not_running
from marketflow.cli.check.findings import Check, Finding, State, address_text, bytes_text, seconds_text
from marketflow.embedded import EmbeddedRedis
from marketflow.runtime.store_servers import Servers
from marketflow.settings import Settings
from marketflow.stores.redis import keys
from marketflow.stores.redis.connection import TIMEOUT_SECONDS, sync_client

PATIENCE_SECONDS = 2.0
"""How long any one answer is waited for: longer than MarketFlow waits, to tell a slow Redis from one that is away."""

OLDEST_VERSION = (6, 2)
"""The oldest that MarketFlow is tested with."""

FULL_PARTS = 0.9
"""From which part of maxmemory on memory counts as scarce."""

_KEY = "marketflow:{check}:rights"

COMMANDS: list[tuple[str, ...]] = [
    ("GET", _KEY),
    ("MGET", _KEY),
    ("SET", _KEY, "1", "PX", "1"),
    ("DEL", _KEY),
    ("TYPE", _KEY),
    ("EXPIRE", _KEY, "1"),
    ("PEXPIRE", _KEY, "1"),
    ("HSET", _KEY, "price", "1"),
    ("HMGET", _KEY, "price"),
    ("ZADD", _KEY, "1", "1"),
    ("ZCARD", _KEY),
    ("ZCOUNT", _KEY, "0", "1"),
    ("ZRANGE", _KEY, "0", "-1"),
    ("ZRANGEBYSCORE", _KEY, "0", "1"),
    ("ZREMRANGEBYSCORE", _KEY, "0", "1"),
    ("RPUSH", _KEY, "1"),
    ("BLPOP", _KEY, "1"),
    ("PUBLISH", keys.NEWEST_CHANNEL, "1"),
    ("EVAL", "return 1", "1", _KEY),
]
"""What MarketFlow sends, besides SUBSCRIBE and what any client does. Nothing of it is carried out here."""


def redis_check(settings: Settings, servers: Servers) -> Check:
    """A check of the Redis of the settings."""
    embedded = next((server for server in servers.embedded if isinstance(server, EmbeddedRedis)), None)
    if embedded is not None:
        where = "embedded"
        return Check("Redis", where, lambda: not_running(embedded, where) or _look(where, servers.redis))
    where = f"{address_text(settings.redis.host, settings.redis.port)}, database {settings.redis.db}"
    return Check("Redis", where, partial(_look, where, servers.redis))


def _look(where: str, keywords: dict[str, Any]) -> list[Finding]:
    with sync_client(keywords, PATIENCE_SECONDS) as client:
        try:
            client.ping()
            began = time.monotonic()
            client.ping()
            seconds = time.monotonic() - began
            about = _about(client)
            return [judged(where, seconds, about), *_memory(where, about), _rights(where, client)]
        except redis.BusyLoadingError:
            text = "it is still reading its data from disk"
            return [Finding("Redis", where, State.WARNING, text, "wait; MarketFlow would answer from memory meanwhile")]
        except redis.RedisError as error:
            return [Finding("Redis", where, State.FAILED, *_told(error, bool(keywords["password"])))]


def _about(client: "redis.Redis") -> Mapping[str, Any]:
    """INFO, empty where the user may not ask for it."""
    try:
        return client.info()
    except redis.exceptions.NoPermissionError:
        return {}


def judged(where: str, seconds: float, about: Mapping[str, Any]) -> Finding:
    """What to say of a server by the seconds it took to answer, and by INFO: version, role, disk."""

    def finding(state: State, found: str, advice: str) -> Finding:
        return Finding("Redis", where, state, found, advice)

    answered = f"answers in {seconds_text(seconds)}"
    if not about:
        text = f"{answered}; INFO is not permitted, so its version, role and memory are not known"
        return finding(State.WARNING, text, "permit INFO to see more (ACL SETUSER default +info)")
    version = str(about.get("redis_version", "0"))
    text = f"Redis {version}, {answered}"
    if about.get("cluster_enabled"):
        return finding(
            State.FAILED, f"{text}; a node of a cluster, which MarketFlow does not follow", "use a Redis of its own"
        )
    if about.get("role", "master") != "master":
        leader = f"{about.get('master_host')}:{about.get('master_port')}"
        return finding(State.FAILED, f"{text}; a replica of {leader}", f"set redis.host and redis.port to {leader}")
    if about.get("aof_last_write_status", "ok") != "ok" or about.get("rdb_last_bgsave_status", "ok") != "ok":
        return finding(
            State.WARNING, f"{text}; it cannot save to its disk", "see its log, and whether its disk is full"
        )
    if seconds > TIMEOUT_SECONDS:
        limit = seconds_text(TIMEOUT_SECONDS)
        return finding(State.FAILED, f"{text}; MarketFlow gives up after {limit}", "use a Redis that is nearer")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_VERSION:
        oldest = ".".join(map(str, OLDEST_VERSION))
        return finding(State.WARNING, f"{text}; MarketFlow is tested with {oldest} and newer", "upgrade it")
    return finding(State.OK, text, "")


def _memory(where: str, about: Mapping[str, Any]) -> list[Finding]:
    """Whether what is written stays, and whether there is room for more."""
    if not about:
        return []
    used, most, policy = about["used_memory"], about["maxmemory"], about["maxmemory_policy"]
    text = f"{bytes_text(used)} used of {bytes_text(most) if most else 'any amount'}, maxmemory-policy {policy}"
    state, advice = State.OK, ""
    if policy != "noeviction":
        state = State.FAILED if most else State.WARNING
        text += ", which lets prices go" if most else ", which would let prices go under a maxmemory"
        advice = "set maxmemory-policy noeviction in redis.conf (CONFIG SET maxmemory-policy noeviction)"
    elif most and used >= most * FULL_PARTS:
        state = State.FAILED if used >= most else State.WARNING
        advice = "raise maxmemory, or take fewer symbols"
    return [Finding("Redis memory", where, state, text, advice)]


def _rights(where: str, client: "redis.Redis") -> Finding:
    """Whether all commands would be carried out."""
    refused = _refused(client)
    if not refused:
        return Finding("Redis rights", where, State.OK, "everything that MarketFlow sends is permitted")
    names, reason = ", ".join(refused), next(iter(refused.values()))
    text = f"refused: {names} ({reason})"
    if "NOPERM" in reason or "permission" in reason.lower():
        advice = "permit them to the user default, with keys and channels marketflow:* (ACL SETUSER)"
    elif "memory" in reason:
        advice = "raise maxmemory"
    else:
        advice = "see redis.conf and Redis's log"
    return Finding("Redis rights", where, State.FAILED, text, advice)


def _refused(client: "redis.Redis") -> dict[str, str]:
    """The commands that Redis would refuse, each with its reason."""
    refused: dict[str, str] = {}
    connection: Any = client.connection_pool.get_connection()
    try:
        connection.send_command("MULTI")
        connection.read_response()
        for command in COMMANDS:
            try:
                connection.send_command(*command)
                connection.read_response()
            except redis.ResponseError as error:
                refused[command[0]] = str(error)
        connection.send_command("DISCARD")
        connection.read_response()
    finally:
        connection.disconnect()  # which throws the queue away as well
        client.connection_pool.release(connection)
    names = (keys.NEWEST_CHANNEL, keys.SLICES_CHANNEL, keys.MINUTES_CHANNEL, keys.STATE_KEY)
    db = client.get_connection_kwargs().get("db", 0)
    channel: Any
    with client.pubsub() as channel:  # type: ignore[no-untyped-call]
        try:
            channel.subscribe(*(keys.channel(name, db) for name in names))
            channel.get_message(timeout=PATIENCE_SECONDS)
        except redis.ResponseError as error:
            refused["SUBSCRIBE"] = str(error)
    return refused


def _told(error: redis.RedisError, with_password: bool) -> tuple[str, str]:
    """What an error is to a person, and what helps."""
    text = str(error)
    if isinstance(error, redis.AuthenticationError) or "authenticate" in text:
        found = "it refuses the password" if with_password else "it asks for a password, and none is set"
        return found, "set redis.password (MARKETFLOW_REDIS__PASSWORD) to what requirepass is in redis.conf"
    if "DB index" in text:
        return text, "set redis.db to a smaller number"
    if isinstance(error, redis.TimeoutError):
        return text, "see whether it is frozen or overloaded, and whether a firewall is in between"
    if "Permission denied" in text:
        return text, AS_OWNER
    if isinstance(error, redis.ConnectionError):
        return text, "start Redis, or correct redis.host and redis.port; an empty redis.host is the embedded Redis"
    return text, "see whether it is a Redis that listens there"
