"""Locates Redis and PostgreSQL: external servers, or embedded ones that live as long as the application."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

from loguru import logger

from marketflow.embedded import EmbeddedPostgres, EmbeddedRedis, claim
from marketflow.embedded.guardian import guardian
from marketflow.embedded.ownership import refuse_unreachable
from marketflow.errors import StartError
from marketflow.settings import Settings
from marketflow.settings.schema import ROOT_DATA_DIR, user_data_dir
from marketflow.stores.postgres import rows
from marketflow.stores.redis import connection
from marketflow.stores.redis.buckets.bucket_count import refuse_other_number
from marketflow.tasks import background

KILL_SECONDS = 0.5
"""How long the embedded servers may take to stop once a shutdown is forced."""

RESTART_SECONDS = 1.0
"""Least time between two starts of a server that dies again and again."""

EmbeddedServer = EmbeddedRedis | EmbeddedPostgres


class Servers(NamedTuple):
    """Connection keywords of both stores, and the embedded servers.

    Nothing connects to PostgreSQL before `postgres_started` is set, which it is at once for an external server.
    """

    redis: dict[str, Any]
    postgres: dict[str, Any]
    embedded: list[EmbeddedServer]
    postgres_started: threading.Event


def find_servers(settings: Settings) -> Servers:
    """Return the connection keywords of both stores. Starts and changes nothing."""
    access = _fields(settings.redis, "password", "username", "tls", "tls_ca", "tls_cert", "tls_key")
    if settings.redis.nodes:
        redis_at = connection.cluster_keywords(settings.redis.addresses, settings.redis.bucket_count, *access)
    else:
        password, *others = access
        redis_at = connection.connection_keywords(
            settings.redis.host, settings.redis.port, password, settings.redis.db, *others
        )
    postgres_at = rows.connection_keywords(
        *_fields(
            settings.postgres,
            "host",
            "port",
            "user",
            "password",
            "dbname",
            "sslmode",
            "sslrootcert",
            "schema",
            "prepared_statements",
        )
    )
    embedded: list[EmbeddedServer] = []
    if settings.redis.is_embedded:
        embedded.append(embedded_redis := EmbeddedRedis(settings.data_dir / "redis"))
        redis_at = connection.connection_keywords(embedded_redis.socket_path, 0, "", 0)
    if not settings.postgres.host:
        embedded.append(embedded_postgres := EmbeddedPostgres(settings.data_dir / "postgres"))
        postgres_at = rows.connection_keywords(
            **embedded_postgres.keywords, password="", schema=settings.postgres.schema
        )
    started = threading.Event()
    if settings.postgres.host:
        started.set()
    return Servers(redis_at, postgres_at, embedded, started)


@asynccontextmanager
async def running_servers(
    settings: Settings,
    stop_requested: asyncio.Event,
    force_stop: asyncio.Event,
    on_failure: Callable[[StartError], None] | None = None,
) -> AsyncIterator[Servers]:
    """Start the embedded servers, restart those that die, and stop them afterwards: quickly once `force_stop` is set.

    Where the keys of a Redis Cluster are in use with another number of buckets, the start is refused. A start that is
    under way when `stop_requested` is set is aborted. With `on_failure` the block runs while PostgreSQL starts, which
    takes a second the first time and minutes after a crash; `on_failure` is called if that fails.

    Raises:
        StartError: an embedded server cannot be started, another one has the data folder, or the start is refused.
    """
    with ExitStack() as stack:
        _log_old_data(settings)
        if not settings.postgres.host:
            refuse_unreachable(settings.data_dir)
        if settings.redis.is_embedded or not settings.postgres.host:
            stack.enter_context(claim(settings.data_dir))
        servers = find_servers(settings)
        try:
            async with (
                when_set(stop_requested, partial(_stop, servers.embedded)),
                when_set(force_stop, partial(_kill, servers.embedded)),
            ):
                redis = await _start(servers, EmbeddedRedis)
                # Only now: side by side, its start and the import of psycopg delayed the first price by a fifth.
                starting = asyncio.create_task(_start(servers, EmbeddedPostgres))
                starting.add_done_callback(lambda task: task.cancelled() or task.exception())  # raised where awaited
                if on_failure is None:
                    await starting
            if settings.redis.nodes:
                await asyncio.to_thread(refuse_other_number, servers.redis)
            if stop_requested.is_set():
                raise StartError("stop requested while starting")
            # They end before the servers stop, also after a failure in the block: they would restart them.
            async with background(_supervise(redis)), background(_supervise_started(starting, on_failure)):
                yield servers
        finally:
            servers.postgres_started.set()  # ends all waits for it
            async with when_set(force_stop, partial(_kill, servers.embedded)):
                await _stop(servers.embedded)


def _log_old_data(settings: Settings) -> None:
    """Warn if data of an earlier version are in its default folder, which for root was in root's home."""
    if settings.data_dir != ROOT_DATA_DIR or ROOT_DATA_DIR.exists():
        return
    old = user_data_dir()
    with suppress(OSError):
        if (old / "postgres").exists():
            logger.warning("data of an earlier version are in {} and are not used: move them to {}", old, ROOT_DATA_DIR)


async def _stop(servers: Sequence[EmbeddedServer]) -> None:
    """Stop them for good, also against a restart that is under way in a thread."""
    await _in_threads(server.stop for server in servers)


async def _kill(servers: Sequence[EmbeddedServer]) -> None:
    """Kill servers that have not stopped within KILL_SECONDS; both recover from that at the next start."""
    await asyncio.sleep(KILL_SECONDS)
    for server in servers:
        if server.process is not None:
            await asyncio.to_thread(server.process.end, ())


async def _start(servers: Servers, kind: type[EmbeddedServer]) -> list[EmbeddedServer]:
    """Start the servers of a kind, and return them."""
    started = [server for server in servers.embedded if isinstance(server, kind)]
    await _in_threads(server.revive for server in started)
    if kind is EmbeddedPostgres:
        servers.postgres_started.set()
    return started


async def _supervise_started(
    starting: "asyncio.Task[list[EmbeddedServer]]", on_failure: Callable[[StartError], None] | None
) -> None:
    try:
        started = await starting
    except StartError as error:
        if on_failure is not None:
            on_failure(error)
    except Exception as error:  # a bug, by which this process would be degraded for ever
        if on_failure is not None:
            on_failure(StartError(f"the embedded PostgreSQL cannot be started: {error}"))
        raise
    else:
        await _supervise(started)


async def _supervise(servers: Sequence[EmbeddedServer]) -> None:
    """Restart servers that die, and their watcher; their store is unavailable meanwhile."""
    while servers:
        if all(server.running for server in servers):
            pids = [server.process.pid for server in servers if server.process is not None]
            await _wait_for_an_end([*pids, *guardian.watcher_pids])
        for server in servers:
            if not server.running:
                logger.error("the embedded {} has died; starting it again", server.title)
                with suppress(StartError):  # retried in a second
                    await asyncio.to_thread(server.revive)
        await asyncio.to_thread(guardian.keep)
        await asyncio.sleep(RESTART_SECONDS)


async def _wait_for_an_end(pids: Iterable[int]) -> None:
    """Wait until one of these child processes has ended; RESTART_SECONDS where the kernel does not report that."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    opened: list[int] = []
    limit: float | None = None
    try:
        for pid in pids:
            try:
                opened.append(os.pidfd_open(pid))
            except OSError:  # an old kernel, or a process that has been reaped
                limit = RESTART_SECONDS
        for descriptor in opened:
            loop.add_reader(descriptor, ended.set)
        with suppress(TimeoutError):
            async with asyncio.timeout(limit):
                await ended.wait()
    finally:
        for descriptor in opened:
            loop.remove_reader(descriptor)
            os.close(descriptor)


@asynccontextmanager
async def when_set(event: asyncio.Event, act: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Run `act` once an event is set, if that is while the block runs."""

    async def wait_and_act() -> None:
        await event.wait()
        await act()

    async with background(wait_and_act()):
        yield


async def _in_threads(calls: Iterable[Callable[[], None]]) -> None:
    """Make blocking calls concurrently and wait for all, then raise the first exception."""
    results = await asyncio.gather(*map(asyncio.to_thread, calls), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


def _fields(section: object, *names: str) -> list[Any]:
    return [getattr(section, name) for name in names]
