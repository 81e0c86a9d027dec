"""Health checks of Redis: it answers, takes and keeps writes, and permits the commands that MarketFlow sends.

Permissions are tested without writing: within MULTI, Redis checks each command against the user's rights, its role,
memory and disk before it queues it, and DISCARD then drops the queue.
"""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import redis

from marketflow.cli.check.check_result import Check, CheckResult, CheckState, bytes_text, seconds_text
from marketflow.cli.check.data_folder_checks import AS_OWNER, results_if_stopped
from marketflow.embedded import EmbeddedRedis
from marketflow.runtime.store_servers import Servers
from marketflow.settings import Settings
from marketflow.stores.redis import keys
from marketflow.stores.redis.connection import TIMEOUT_SECONDS, sync_client
from marketflow.text import host_port

CHECK_TIMEOUT_SECONDS = 2.0
"""Timeout of each command: longer than the server's, to distinguish a slow Redis from an unreachable one."""

OLDEST_VERSION = (6, 2)
"""Oldest version that MarketFlow is tested with."""

SCARCE_MEMORY_RATIO = 0.9
"""Share of maxmemory from which the check warns."""

_KEY = "marketflow:{check}:rights"

COMMANDS: list[tuple[str, ...]] = [
    ("GET", _KEY),
    ("SET", _KEY, "1", "PX", "1"),
    ("DEL", _KEY),
    ("TYPE", _KEY),
    ("EXPIRE", _KEY, "1"),
    ("PEXPIRE", _KEY, "1"),
    ("HSET", _KEY, "price", "1"),
    ("HMGET", _KEY, "price"),
    ("HGETALL", _KEY),
    ("HDEL", _KEY, "price"),
    ("EXISTS", _KEY),
    ("TIME",),
    ("ZADD", _KEY, "1", "1"),
    ("ZCARD", _KEY),
    ("ZCOUNT", _KEY, "0", "1"),
    ("ZRANGE", _KEY, "0", "-1"),
    ("ZRANGEBYSCORE", _KEY, "0", "1"),
    ("ZREMRANGEBYSCORE", _KEY, "0", "1"),
    ("RPUSH", _KEY, "1"),
    ("BLPOP", _KEY, "1"),
    ("PUBLISH", keys.PLAIN.newest_channel, "1"),
    ("EVAL", "return 1", "1", _KEY),
]
"""Commands of MarketFlow, besides SUBSCRIBE and those of any client. They are queued here, never executed."""

CLUSTER_COMMANDS: list[tuple[str, ...]] = [("SPUBLISH", _KEY, "1"), ("CLUSTER", "SLOTS"), ("CLUSTER", "INFO")]
"""Commands that MarketFlow sends to a cluster alone, besides SSUBSCRIBE."""


def redis_check(settings: Settings, servers: Servers) -> Check:
    """Return the checks of the Redis of the settings."""
    embedded = next((server for server in servers.embedded if isinstance(server, EmbeddedRedis)), None)
    if embedded is not None:
        where = "embedded"
        return Check("Redis", where, lambda: results_if_stopped(embedded, where) or _check(where, servers.redis))
    where = f"{host_port(settings.redis.host, settings.redis.port)}, database {settings.redis.db}"
    return Check("Redis", where, partial(_check, where, servers.redis))


def _check(where: str, keywords: dict[str, Any]) -> list[CheckResult]:
    with sync_client(keywords, CHECK_TIMEOUT_SECONDS) as client:
        try:
            client.ping()
            began = time.monotonic()
            client.ping()
            seconds = time.monotonic() - began
            info = _info(client)
            return [
                server_result(where, seconds, info, _user(client)),
                *memory_results(where, info),
                rights_result(where, client),
            ]
        except redis.BusyLoadingError:
            text = "still loading its data from disk"
            return [
                CheckResult("Redis", where, CheckState.WARNING, text, "wait; MarketFlow answers from memory meanwhile")
            ]
        except redis.RedisError as error:
            return [CheckResult("Redis", where, CheckState.FAILED, *error_text(error, bool(keywords["password"])))]


def _info(client: "redis.Redis") -> Mapping[str, Any]:
    """Return INFO; empty where the user has no permission for it, or the server has renamed it."""
    try:
        return client.info()
    except redis.exceptions.NoPermissionError:
        return {}
    except redis.ResponseError as error:
        if "unknown command" in str(error):
            return {}
        raise


def _user(client: "redis.Redis") -> str:
    return client.get_connection_kwargs().get("username") or "default"


def server_result(where: str, seconds: float, info: Mapping[str, Any], user: str = "default") -> CheckResult:
    """Return the result for a server by its response time in seconds, and by INFO: version, role, disk."""

    def result(state: CheckState, found: str, advice: str) -> CheckResult:
        return CheckResult("Redis", where, state, found, advice)

    answered = f"answers in {seconds_text(seconds)}"
    if not info:
        text = f"{answered}; INFO is not permitted, so its version, role and memory are not known"
        advice = f"permit INFO to see more (ACL SETUSER {user} +info, and no rename-command of it in redis.conf)"
        return result(CheckState.WARNING, text, advice)
    version = str(info.get("redis_version", "0"))
    text = f"Redis {version}, {answered}"
    if info.get("cluster_enabled"):
        return result(
            CheckState.FAILED,
            f"{text}; a node of a Redis Cluster",
            'set redis.nodes to its nodes, such as ["HOST:PORT"], instead of redis.host',
        )
    if info.get("role", "master") != "master":
        leader = f"{info.get('master_host')}:{info.get('master_port')}"
        return result(CheckState.FAILED, f"{text}; a replica of {leader}", f"set redis.host and redis.port to {leader}")
    if info.get("aof_last_write_status", "ok") != "ok" or info.get("rdb_last_bgsave_status", "ok") != "ok":
        return result(
            CheckState.WARNING, f"{text}; it cannot save to disk", "see its log, and check whether its disk is full"
        )
    if seconds > TIMEOUT_SECONDS:
        limit = seconds_text(TIMEOUT_SECONDS)
        return result(CheckState.FAILED, f"{text}; MarketFlow's timeout is {limit}", "use a Redis closer to MarketFlow")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_VERSION:
        oldest = ".".join(map(str, OLDEST_VERSION))
        return result(CheckState.WARNING, f"{text}; MarketFlow is tested with {oldest} and newer", "upgrade it")
    return result(CheckState.OK, text, "")


def memory_results(where: str, info: Mapping[str, Any]) -> list[CheckResult]:
    """Check that Redis evicts nothing, and has memory left."""
    if not info:
        return []
    used, most, policy = info["used_memory"], info["maxmemory"], info["maxmemory_policy"]
    text = f"{bytes_text(used)} used of {bytes_text(most) if most else 'any amount'}, maxmemory-policy {policy}"
    state, advice = CheckState.OK, ""
    if policy != "noeviction":
        state = CheckState.FAILED if most else CheckState.WARNING
        text += ", which evicts prices" if most else ", which would evict prices under a maxmemory"
        advice = "set maxmemory-policy noeviction in redis.conf (CONFIG SET maxmemory-policy noeviction)"
    elif most and used >= most * SCARCE_MEMORY_RATIO:
        state = CheckState.FAILED if used >= most else CheckState.WARNING
        advice = "raise maxmemory, or configure fewer symbols"
    return [CheckResult("Redis memory", where, state, text, advice)]


def rights_result(where: str, client: "redis.Redis", cluster_key: str = "") -> CheckResult:
    """Check that Redis would execute all commands.

    Args:
        where: for the result.
        client: of the server, or of a node of a cluster.
        cluster_key: a key of this node, with which it is asked for a cluster's commands as well.
    """
    refused = _refused(client, cluster_key)
    if not refused:
        return CheckResult("Redis rights", where, CheckState.OK, "all commands of MarketFlow are permitted")
    names, reason = ", ".join(refused), next(iter(refused.values())).partition(", with args")[0]
    text = f"refused: {names} ({reason})"
    if "NOPERM" in reason or "permission" in reason.lower():
        advice = f"permit them to the user {_user(client)}, with keys and channels marketflow:* (ACL SETUSER)"
    elif "unknown command" in reason:
        advice = "remove rename-command of them from redis.conf; a user with few rights protects as well (ACL SETUSER)"
    elif "memory" in reason:
        advice = "raise maxmemory"
    else:
        advice = "see redis.conf and Redis's log"
    return CheckResult("Redis rights", where, CheckState.FAILED, text, advice)


def _refused(client: "redis.Redis", cluster_key: str) -> dict[str, str]:
    """Return the commands that Redis would refuse, each with its reason."""
    commands = [*COMMANDS, *(CLUSTER_COMMANDS if cluster_key else ())]
    refused: dict[str, str] = {}
    connection: Any = client.connection_pool.get_connection()
    try:
        connection.send_command("MULTI")
        connection.read_response()
        for command in commands:
            try:
                connection.send_command(*(cluster_key or part if part == _KEY else part for part in command))
                connection.read_response()
            except redis.ResponseError as error:
                refused[" ".join(command) if command[0] == "CLUSTER" else command[0]] = str(error)
        connection.send_command("DISCARD")
        connection.read_response()
    finally:
        connection.disconnect()  # which drops the queue as well
        client.connection_pool.release(connection)
    names = (keys.PLAIN.newest_channel, keys.PLAIN.slices_channel, keys.PLAIN.minutes_channel)
    db = client.get_connection_kwargs().get("db", 0)
    channel: Any
    with client.pubsub() as channel:  # type: ignore[no-untyped-call]
        try:
            channel.subscribe(*(keys.channel(name, db) for name in names))
            channel.get_message(timeout=CHECK_TIMEOUT_SECONDS)
        except redis.ResponseError as error:
            refused["SUBSCRIBE"] = str(error)
    if cluster_key:
        with client.pubsub() as channel:  # type: ignore[no-untyped-call]
            try:
                channel.ssubscribe(cluster_key)
                channel.get_message(timeout=CHECK_TIMEOUT_SECONDS)
            except redis.ResponseError as error:
                refused["SSUBSCRIBE"] = str(error)
    return refused


def error_text(error: redis.RedisError, with_password: bool) -> tuple[str, str]:
    """Return text and advice for an error."""
    text = str(error)
    if isinstance(error, redis.AuthenticationError) or "authenticate" in text:
        found = "it refuses the password" if with_password else "it asks for a password, and none is set"
        return found, "set redis.password (MARKETFLOW_REDIS__PASSWORD) to what requirepass is in redis.conf"
    if "DB index" in text:
        return text, "set redis.db to a smaller number"
    if isinstance(error, redis.TimeoutError):
        return text, "check whether it is frozen or overloaded, and whether a firewall is in between"
    if "Permission denied" in text:
        return text, AS_OWNER
    if isinstance(error, redis.ConnectionError):
        return text, "start Redis, or correct redis.host and redis.port; an empty redis.host is the embedded Redis"
    return text, "check whether the server there is a Redis"
