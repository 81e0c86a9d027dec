"""The composition root: builds everything from the settings, and closes it in reverse order.

`marketflow`, `python -m marketflow` and `uvicorn marketflow.app:app` serve the same application. Order of a start: the
port is bound, the data folder claimed, the embedded servers started, and only then ticks are taken; so a second
instance gives up before it has touched anything.
"""

import asyncio
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from loguru import logger
from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marketflow import __version__, logs
from marketflow.api.answers import Prices
from marketflow.api.application import create_app
from marketflow.api.connections import LimitedConnection, max_open_files, raise_file_limit
from marketflow.api.context import Context
from marketflow.api.protection import is_loopback
from marketflow.clock import system_clock
from marketflow.engine import Engine
from marketflow.errors import SettingsError, StartError
from marketflow.flow.memory import MemoryReader
from marketflow.probes import HealthReport, Probe
from marketflow.resources import resource
from marketflow.settings import Settings, load
from marketflow.stores import redis, rows
from marketflow.stores.embedded import EmbeddedPostgres, EmbeddedRedis, claim
from marketflow.stores.fallback import Fallback
from marketflow.stores.mirror import Mirror
from marketflow.stores.postgres_reader import PostgresReader
from marketflow.stores.redis_reader import RedisReader
from marketflow.stores.shared import Shared

SETTLE_MS = 10_000
"""How long after its grace a minute may take to be in the cache, late ticks included."""

CONNECTIONS_CLOSE_SECONDS = 1
"""How long running requests may take once the application is to end."""

KILL_SECONDS = 0.5
"""How long the embedded servers may take to end once there is no patience left."""

BACKLOG = 2048
"""How many connections may wait to be accepted; fewer where the process may not open four times as many files."""


def serve(settings: Settings) -> int:
    """Run everything until SIGINT or SIGTERM; gives the exit code. A second signal makes the end a quick one.

    Raises:
        StartError: the port cannot be bound.
    """
    raise_file_limit()
    listener = _bind(settings.http.host, settings.http.port)
    application = _Application(settings)
    debug = settings.log.level in ("TRACE", "DEBUG")
    config = uvicorn.Config(
        application,
        http=LimitedConnection,
        ws="none",
        backlog=min(BACKLOG, max_open_files() // 4),
        log_config=None,
        log_level="debug" if debug else "warning",
        access_log=debug,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=CONNECTIONS_CLOSE_SECONDS,
    )
    server = _Server(config, settings, application.hurry.set)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup would have it
        signal.signal(signal.SIGHUP, server.handle_exit)
    with listener, suppress(SystemExit):  # uvicorn's own exit code for a start that fails is not ours
        server.run(sockets=[listener])
    return 0 if server.started and not application.failed else 1


def __getattr__(name: str) -> Any:
    """`app`, for uvicorn: made when asked for, so that nothing else that imports this module reads settings."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        settings = load()
    except SettingsError as error:
        sys.stderr.write(f"marketflow: {error}\n")
        raise SystemExit(2) from None
    logs.setup(settings.log.level, settings.log.format)
    return _Application(settings)


class _Application:
    """The ASGI application. A start that fails for a known reason is told in one line, not with a traceback."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._asgi: ASGIApp = create_app(self._lifespan, settings.http.host, settings.http.allowed_hosts)
        self._refused = False
        self.failed = False
        self.hurry = asyncio.Event()
        """Set when the end must not take its time any more."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._asgi(scope, receive, self._without_traceback(send))
        else:
            await self._asgi(scope, receive, send)

    def _without_traceback(self, send: Send) -> Send:
        async def quiet(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed" and self._refused:
                message = {"type": message["type"]}
            await send(message)

        return quiet

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[Mapping[str, Any]]:
        try:
            async with AsyncExitStack() as stack:
                yield {"context": await self._start(stack)}
                logger.info("stopping")
        except StartError as error:
            self._refused = True
            for line in str(error).splitlines():  # the end of a server's log may be among them
                logger.error("{}", line)
            raise

    async def _start(self, stack: AsyncExitStack) -> Context:
        settings = self._settings
        redis_at, postgres_at = await stack.enter_async_context(_servers(settings, self.hurry))

        settle_ms = settings.flow.late_after_ms + SETTLE_MS
        cache = RedisReader.connect(redis_at, system_clock, settle_ms, settings.flow.minute_ms)
        stack.push_async_callback(cache.close)
        mirror = Mirror(cache, redis_at, system_clock, settings.flow.minute_ms)
        stack.push_async_callback(mirror.close)
        stack.callback(asyncio.create_task(mirror.listen()).cancel)
        archive = PostgresReader(postgres_at)
        stack.push_async_callback(archive.close)
        await archive.open()

        engine = Engine(settings, redis_at, postgres_at, resource("ddl"), system_clock, self._flow_broke)
        stack.push_async_callback(self._stop, engine)
        await asyncio.to_thread(engine.start)

        redis_probe = Probe(cache, lambda: engine.cache.complete)
        postgres_probe = Probe(archive, lambda: engine.archive.available)
        await asyncio.gather(redis_probe.ask(), postgres_probe.ask())
        for probe in (redis_probe, postgres_probe):
            stack.callback(asyncio.create_task(probe.ask_for_ever()).cancel)

        return Context(
            exchanges=tuple(exchange.name for exchange in settings.exchanges),
            symbols=settings.symbols,
            token=settings.http.token,
            mode=engine.modes,
            prices=Prices(
                Fallback(mirror, MemoryReader(engine.memory), lambda: engine.cache.complete),
                Shared(archive),
                system_clock,
                settings.flow.ahead_ms,
            ),
            health=HealthReport(lambda: engine.modes.current, engine.feeds.__getitem__, postgres_probe, redis_probe),
            ready=lambda: engine.running,
        )

    async def _stop(self, engine: Engine) -> None:
        async with _as_soon_as(self.hurry, partial(asyncio.to_thread, engine.hurry)):
            await asyncio.to_thread(engine.stop)

    def _flow_broke(self) -> None:
        """Ask the server to end: whoever supervises this process starts another."""
        self.failed = True
        signal.raise_signal(signal.SIGTERM)


class _Server(uvicorn.Server):
    """uvicorn's server, which would end the process by the signal that stopped it: here that is exit code 0."""

    def __init__(self, config: uvicorn.Config, settings: Settings, hurry: Callable[[], None]) -> None:
        super().__init__(config)
        self._settings = settings
        self._hurry = hurry

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop in good order. A second signal says that there is no time for it."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop; at once, when told a second time, but never without ending what the application has begun."""
        forcing = asyncio.create_task(self._force_when_told())
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves it out then
            await self.lifespan.shutdown()
        forcing.cancel()

    async def _force_when_told(self) -> None:
        while not self.force_exit:  # noqa: ASYNC110 - set by a signal handler, which may do no more than that
            await asyncio.sleep(0.05)
        logger.warning("told a second time: stopping at once")
        self._hurry()
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say where."""
        await super().startup(sockets)
        if self.started and not is_loopback(self._settings.http.host) and not self._settings.http.token:
            logger.warning("whoever can reach {} can switch the mode: set http.token", self._settings.http.host)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            logger.info("MarketFlow {} answers on http://{} in {} mode", __version__, place, self._settings.mode)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartError(f"http.host = {host!r}: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # At once: a port that is only bound may still be bound by another process as well.
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise StartError(f"cannot listen on {host}:{port} (http.host, http.port): {error.strerror}") from error
    return listener


@asynccontextmanager
async def _servers(settings: Settings, hurry: asyncio.Event) -> AsyncIterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Connection keywords of Redis and PostgreSQL, those without a host started here.

    Raises:
        StartError: an embedded server cannot be started, or another MarketFlow has the data folder.
    """
    redis_at = redis.connection_keywords(*_fields(settings.redis, "host", "port", "password", "db"))
    postgres_at = rows.connection_keywords(
        *_fields(settings.postgres, "host", "port", "user", "password", "dbname", "sslmode")
    )
    servers: list[EmbeddedRedis | EmbeddedPostgres] = []
    with ExitStack() as stack:
        if not (settings.redis.host and settings.postgres.host):
            data_dir = stack.enter_context(claim(settings.data_dir))
        if not settings.redis.host:
            servers.append(embedded_redis := EmbeddedRedis(data_dir / "redis"))
            redis_at = redis.connection_keywords(embedded_redis.socket_path, 0, "", 0)
        if not settings.postgres.host:
            servers.append(embedded_postgres := EmbeddedPostgres(data_dir / "postgres"))
            postgres_at = rows.connection_keywords(**embedded_postgres.keywords, password="")
        try:
            await _in_threads(server.start for server in servers)
            supervision = asyncio.create_task(_supervise(servers))
            try:
                yield redis_at, postgres_at
            finally:  # before the servers stop, also when what was built on them failed: it would start them again
                supervision.cancel()
        finally:
            async with _as_soon_as(hurry, partial(_kill, servers)):
                await _in_threads(server.stop for server in servers)


async def _kill(servers: Sequence[EmbeddedRedis | EmbeddedPostgres]) -> None:
    """End by force what takes its time to stop; both servers recover from that at the next start."""
    await asyncio.sleep(KILL_SECONDS)
    for server in servers:
        if server.process is not None:
            await asyncio.to_thread(server.process.end, ())


async def _supervise(servers: Sequence[EmbeddedRedis | EmbeddedPostgres]) -> None:
    """Start a server again that has died; until then it is a store that is away like any other."""
    while True:
        await asyncio.sleep(1.0)
        for server in servers:
            if not server.running:
                logger.error("the embedded {} has died; starting it again", server.title)
                with suppress(StartError):  # tried again in a second
                    await asyncio.to_thread(server.start)


@asynccontextmanager
async def _as_soon_as(told: asyncio.Event, act: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Act once an event is set, if that is while the block runs."""

    async def wait_and_act() -> None:
        await told.wait()
        await act()

    acting = asyncio.create_task(wait_and_act())
    try:
        yield
    finally:
        acting.cancel()


async def _in_threads(calls: Iterable[Callable[[], None]]) -> None:
    """Make blocking calls side by side and wait for all, then raise what the first of them raised."""
    results = await asyncio.gather(*map(asyncio.to_thread, calls), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


def _fields(section: object, *names: str) -> list[Any]:
    return [getattr(section, name) for name in names]
