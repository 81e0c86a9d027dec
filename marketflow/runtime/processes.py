"""The composition root: builds everything from the settings, and closes it in reverse order.

`marketflow`, `python -m marketflow` and `uvicorn marketflow.app:app` serve the same application. Order of a start: the
port is bound, the data folder claimed, the embedded servers started, and only then ticks are taken; so a second
instance gives up before it has touched anything.

`marketflow --role ingest` and `--role api` are its two halves in processes of their own.
"""

import asyncio
import signal
import socket
from contextlib import AsyncExitStack, ExitStack
from functools import partial

from loguru import logger

from marketflow import __version__
from marketflow.api.context import Context
from marketflow.api.middleware import request_metrics
from marketflow.api.middleware.allowed_hosts import is_loopback
from marketflow.clock import system_clock
from marketflow.cluster import lease
from marketflow.cluster.leader import Leader
from marketflow.cluster.lease import Lease
from marketflow.cluster.remote_control import RemoteFeeds
from marketflow.errors import StartError, Unavailable
from marketflow.logs import Outage
from marketflow.model import Mode
from marketflow.pipeline.state import StateReader
from marketflow.resources import resource
from marketflow.runtime.engine import Engine
from marketflow.runtime.ingest_role import Turns
from marketflow.runtime.lifespan import Application
from marketflow.runtime.probes import HealthReport, Probe
from marketflow.runtime.store_servers import as_soon_as, find_servers, running_servers
from marketflow.server.connection_limits import raise_file_limit
from marketflow.server.http_connection import LimitedConnection
from marketflow.server.service_notification import Supervisor, supervisor
from marketflow.server.uvicorn_server import Server, bind, bind_each, ignore_signals, place_of
from marketflow.server.workers import Parent, Workers
from marketflow.settings import Settings
from marketflow.stores.fallback import FallbackReader
from marketflow.tasks import background


def serve(settings: Settings) -> int:
    """Run everything until SIGINT or SIGTERM; gives the exit code. A second signal makes the end a quick one.

    Raises:
        StartError: the port cannot be bound.
    """
    raise_file_limit(LimitedConnection.MAX_CONNECTIONS)
    return _serve(Everything(settings), settings, bind(settings.http.host, settings.http.port), supervisor())


def serve_api(settings: Settings, workers: int = 1) -> int:
    """Answer requests, in so many processes, about the ticks that others take; otherwise as `serve`."""
    raise_file_limit(LimitedConnection.MAX_CONNECTIONS)
    if workers == 1:
        return _serve(_ApiHalf(settings), settings, bind(settings.http.host, settings.http.port), supervisor())
    listeners = bind_each(settings.http.host, settings.http.port, workers)

    def work(number: int, parent: Parent) -> int:
        request_metrics.share(folder, number)
        for other in {*listeners} - {listeners[number]}:
            other.close()
        return _serve(_ApiHalf(settings), settings, listeners[number], parent, parent.gone)

    with ExitStack() as stack:
        folder = stack.enter_context(request_metrics.shared_folder())
        for listener in listeners:
            stack.enter_context(listener)
        Workers(workers, work, supervisor()).run()
    return 0


def serve_feeds(settings: Settings) -> int:
    """Take ticks, or stand by while another process does; otherwise as `serve`, but without a port."""
    code = asyncio.run(_FeedsHalf(settings, supervisor()).run())
    ignore_signals()
    return code


def _serve(
    application: Application,
    settings: Settings,
    listener: socket.socket,
    told: Supervisor,
    orphaned: int | None = None,
) -> int:
    place = place_of(listener)
    beating: list[asyncio.Task[None]] = []

    def started() -> None:
        if not is_loopback(settings.http.host) and not settings.http.token:
            logger.warning("whoever can reach {} can switch the mode: set http.token", settings.http.host)
        logger.info("MarketFlow {} answers on http://{} in {} mode", __version__, place, application.mode())
        told.ready(f"answers on http://{place}")
        beating.append(asyncio.create_task(told.beat_while(application.alive)))

    def stopping() -> None:
        told.stopping()
        application.end_streams()

    debug = settings.log.level in ("TRACE", "DEBUG")
    server = Server(application, debug, application.told.set, application.force.set, started, stopping, orphaned)
    return 0 if server.serve_until_told(listener) and not application.failed else 1


class Everything(Application):
    """Feeds and API in one process."""

    async def start(self, stack: AsyncExitStack) -> Context:
        """Open the stores, start the flow, and give the routes what they work with."""
        settings = self.settings
        servers = await stack.enter_async_context(running_servers(settings, self.told, self.force))
        readers = await self.readers(stack, servers)

        engine = Engine(
            settings, servers.redis, servers.postgres, resource("ddl"), system_clock, settings.mode, self._flow_broke
        )
        client = lease.connect(servers.redis)
        stack.callback(client.close)
        holder = Leader(Lease(client), client, engine.state, engine.counters, engine.switch)
        stack.push_async_callback(asyncio.to_thread, holder.close)
        self.alive = engine.is_alive
        stack.push_async_callback(self._stop, engine)
        stack.callback(holder.listen_no_more)
        await asyncio.to_thread(engine.start)
        holder.start()

        redis_probe = Probe(readers.cache, lambda: engine.cache_complete)
        postgres_probe = Probe(readers.archive, lambda: engine.archive.available)
        await self.probe(stack, redis_probe, postgres_probe)

        return self.context(
            _OwnMode(engine),
            FallbackReader(readers.near_cache, StateReader(engine.memory), lambda: engine.cache_complete),
            readers.near_cache,
            readers.archive,
            HealthReport(
                engine.feed_states,
                postgres_probe,
                redis_probe,
                lambda: engine.flow.branches.stalled,
                engine.clock_offsets_ms,
            ),
            engine.counters,
            lambda: engine.running,
        )

    async def _stop(self, engine: Engine) -> None:
        async with as_soon_as(self.force, partial(asyncio.to_thread, engine.force)):
            await asyncio.to_thread(engine.stop)

    def _flow_broke(self) -> None:
        """Ask the server to end: whoever supervises this process starts another."""
        self.failed = True
        signal.raise_signal(signal.SIGTERM)


class _OwnMode:
    """The mode of the feeds in this process; switched here, whatever Redis does."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def current(self) -> Mode:
        return self._engine.modes.current

    async def switch(self, mode: Mode) -> Mode:
        return await asyncio.to_thread(self._engine.switch, mode)


class _ApiHalf(Application):
    """The API alone: prices from the stores, everything else from the process that takes ticks. Starts no servers."""

    async def start(self, stack: AsyncExitStack) -> Context:
        settings = self.settings
        servers = find_servers(settings)
        readers = await self.readers(stack, servers)

        feeds = RemoteFeeds(servers.redis, [exchange.name for exchange in settings.exchanges], settings.mode)
        stack.push_async_callback(feeds.close)
        try:
            await feeds.ask()  # before the first request, which is about a mode
        except Unavailable as error:
            logger.warning("the feeds cannot be asked yet, {} mode is assumed: {}", settings.mode, error)
        await stack.enter_async_context(background(feeds.follow()))

        redis_probe = Probe(
            readers.cache,
            lambda: feeds.state is None or feeds.state.cache_complete,
            Outage("Redis cannot be used", "Redis can be used again"),
        )
        postgres_probe = Probe(
            readers.archive,
            lambda: feeds.state is None or feeds.state.archive_available,
            Outage("PostgreSQL cannot be used", "PostgreSQL can be used again"),
        )
        await self.probe(stack, redis_probe, postgres_probe)

        return self.context(
            feeds,
            readers.near_cache,
            readers.near_cache,
            readers.archive,
            HealthReport(feeds.feed_states, postgres_probe, redis_probe, lambda: feeds.stalled, feeds.clock_offsets_ms),
            lambda: feeds.counters,
            lambda: redis_probe.answers or postgres_probe.answers,
        )


class _FeedsHalf:
    """The feeds alone: no port, told to end by signals only."""

    def __init__(self, settings: Settings, told: Supervisor) -> None:
        self._settings = settings
        self._supervisor = told
        self._told = asyncio.Event()
        self._force = asyncio.Event()
        self._failed = False

    async def run(self) -> int:
        """Run until told to end; gives the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup would have it
                loop.add_signal_handler(number, self._tell)
        try:
            return await self._run(loop)
        except StartError:
            if not self._told.is_set():
                raise
            return 0  # the start was given up

    async def _run(self, loop: asyncio.AbstractEventLoop) -> int:
        async with running_servers(self._settings, self._told, self._force) as servers:

            def flow_broke() -> None:
                loop.call_soon_threadsafe(self._flow_broke)

            turns = Turns(self._settings, servers, flow_broke, self._supervisor)
            running = asyncio.create_task(asyncio.to_thread(turns.run))
            told = asyncio.create_task(self._told.wait())
            await asyncio.wait({running, told}, return_when=asyncio.FIRST_COMPLETED)
            self._supervisor.stopping()
            turns.stop()
            async with as_soon_as(self._force, partial(asyncio.to_thread, turns.force)):
                await running
        return 1 if self._failed else 0

    def _tell(self) -> None:
        """Stop in good order. A second signal says that there is no time for it."""
        if self._told.is_set():
            logger.warning("told a second time: stopping at once")
            self._force.set()
        else:
            logger.info("stopping")
            self._told.set()

    def _flow_broke(self) -> None:
        """Ask for the end: whoever supervises this process starts another."""
        self._failed = True
        self._told.set()
