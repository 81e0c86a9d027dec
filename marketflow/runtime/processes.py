"""The composition root: builds each kind of process from the settings, and closes its parts in reverse order.

Three kinds: both roles in one process (`marketflow`, `uvicorn marketflow.app:app`), the API role (`--role api`) and the
ingest role (`--role ingest`). A start binds the port, then locks the data folder, then starts the embedded servers, and
only then ingests: a second instance fails before it has changed anything.
"""

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from loguru import logger

from marketflow import __version__, logs
from marketflow.api.alerting.alert_access import AlertAccess
from marketflow.api.context import Context
from marketflow.api.middleware import request_metrics
from marketflow.clock import system_clock
from marketflow.cluster.member import POLL_ANSWER_SECONDS, Member
from marketflow.cluster.messages import RuleChange, RuleChanged
from marketflow.cluster.shard_table import ShardTable, connect
from marketflow.errors import StartError, Unavailable
from marketflow.feeds.cpu.pacing import Pacing
from marketflow.logs import Outage
from marketflow.model import Mode
from marketflow.resources import resource
from marketflow.runtime.asgi_application import CHANGE_SECONDS, AsgiApplication
from marketflow.runtime.health_report import HealthReport, Probe, WriterStatus
from marketflow.runtime.local_announcements import LocalAnnouncements
from marketflow.runtime.settings_reload import ReadSettings
from marketflow.runtime.state_reader import StateReader
from marketflow.runtime.store_servers import Servers, find_servers, running_servers, when_set
from marketflow.server.connection_limits import raise_file_limit
from marketflow.server.hangup import Hangup
from marketflow.server.http_protocol import LimitedHttpProtocol
from marketflow.server.listeners import bind, bind_each, place_of
from marketflow.server.service_notification import Supervisor, supervisor
from marketflow.server.system_limits import blocking_threads, limits_in_words, refuse_low_limits
from marketflow.server.uvicorn_server import Server, ignore_signals
from marketflow.settings import Settings
from marketflow.settings.reloading import Changes
from marketflow.stores.fallback import FallbackReader
from marketflow.stores.postgres.reader import PostgresReader
from marketflow.tasks import SerialCalls, background, cancel
from marketflow.text import is_loopback

if TYPE_CHECKING:  # what one of the roles alone needs is imported where it starts
    from marketflow.runtime.engine import Engine
    from marketflow.server.workers import Parent

NEWEST_PAUSE_SECONDS = 0.02
"""Pause between writes of newest ticks where the API has them from memory, so that ticks of three exchanges at 100
ticks/s share one. Other processes see them in Redis that much later."""


def serve(settings: Settings, read: ReadSettings) -> NoReturn:
    """Run both roles until SIGINT or SIGTERM, and end the process with the exit code. A second signal forces the end.

    SIGHUP reloads the settings by `read`.

    Raises:
        StartError: the port cannot be bound.
    """
    refuse_low_limits()
    raise_file_limit(LimitedHttpProtocol.MAX_CONNECTIONS)
    _end(_serve(BothRoles(settings, read), settings, bind(settings.http.host, settings.http.port), supervisor()))


def serve_api(settings: Settings, read: ReadSettings, workers: int = 1) -> NoReturn:
    """Run the API role in `workers` processes; otherwise as `serve`."""
    raise_file_limit(LimitedHttpProtocol.MAX_CONNECTIONS)
    if workers == 1:
        _end(_serve(ApiRole(settings, read), settings, bind(settings.http.host, settings.http.port), supervisor()))
    from marketflow.server.workers import Workers

    listeners = bind_each(settings.http.host, settings.http.port, workers)

    def work(number: int, parent: "Parent") -> int:
        request_metrics.share(folder, number)
        for other in {*listeners} - {listeners[number]}:
            other.close()
        return _serve(ApiRole(settings, read), settings, listeners[number], parent, parent.gone)

    with ExitStack() as stack:
        folder = stack.enter_context(request_metrics.shared_folder())
        for listener in listeners:
            stack.enter_context(listener)
        Workers(workers, work, supervisor()).run()
    _end(0)


def serve_ingest(settings: Settings, read: ReadSettings) -> NoReturn:
    """Run the ingest role with the shards that are free; otherwise as `serve`, but without a port."""
    refuse_low_limits()
    with limits_in_words():
        code = asyncio.run(IngestRole(settings, read, supervisor()).run())
    ignore_signals()
    _end(code)


def _end(code: int) -> NoReturn:
    """End the process once its log is written: Python would free all candles, 0.4 s of CPU with 15,000 series."""
    logs.flush()
    os._exit(code)


def _serve(
    application: AsgiApplication,
    settings: Settings,
    listener: socket.socket,
    notified: Supervisor,
    orphaned: int | None = None,
) -> int:
    place = place_of(listener)

    def started() -> None:
        if not is_loopback(settings.http.host) and not settings.http.token:
            logger.warning("anyone who can reach {} can switch the mode: set http.token", settings.http.host)
        logger.info("MarketFlow {} answers on http://{} in {} mode", __version__, place, application.mode())
        notified.ready(f"answers on http://{place}")
        application.run_until_stopped(notified.beat_while(lambda: application.alive()))

    def stopping() -> None:
        notified.stopping()
        application.end_streams()

    debug = settings.log.level in ("TRACE", "DEBUG")
    server = Server(
        application,
        debug,
        application.stop_requested.set,
        application.force_stop.set,
        started,
        stopping,
        orphaned,
        application.reload_soon,
    )
    with limits_in_words():  # of the loop as well, which starts one more thread to end the others
        return 0 if server.serve_until_stopped(listener) and not application.failed else 1


class BothRoles(AsgiApplication):
    """Ingest and API in one process. The first price does not wait for PostgreSQL, but readiness does."""

    _archive_known = False
    """Whether PostgreSQL has answered a ping, or counts as down."""

    async def start(self, stack: AsyncExitStack) -> Context:
        """Open the stores, start the pipeline, and return what the routes need."""
        settings = self.settings
        # Imported while this process waits for the embedded Redis to start.
        importing = asyncio.create_task(asyncio.to_thread(import_module, "marketflow.runtime.engine"))
        servers = await stack.enter_async_context(
            running_servers(settings, self.stop_requested, self.force_stop, self._start_failed)
        )
        readers = await self.readers(stack, servers)
        await importing
        from marketflow.runtime.engine import Engine

        run_began, announcements = system_clock(), LocalAnnouncements(asyncio.get_running_loop(), readers.cache)
        engine = Engine(
            settings,
            servers.redis,
            servers.postgres,
            resource("ddl"),
            system_clock,
            settings.mode,
            self._pipeline_failed,
            announce_newest=announcements.publish,
            newest_pause_seconds=NEWEST_PAUSE_SECONDS,
            archive_started=servers.postgres_started,
            pacing=Pacing.of_event_loop(),
        )
        # Periods include the latest price, which Redis gets a moment later.
        readers.cache.take_newest_in_process(engine.window_state.newest_of)
        client, commands = connect(servers.redis), connect(servers.redis, POLL_ANSWER_SECONDS)
        stack.callback(client.close)
        stack.callback(commands.close)
        table = ShardTable(client, settings.shards.names, takes_all=True)
        self._reconfigure = engine.reconfigure
        member = Member(table, commands, engine, engine.feed_status.report, self.settings_reload, None)
        self._table = table
        self.alive = engine.is_alive
        stack.push_async_callback(self._stop, engine, servers)
        stack.push_async_callback(asyncio.to_thread, member.leave)
        await asyncio.to_thread(engine.start)
        member.start()

        alerts = AlertAccess(
            _OwnRules(engine).change,
            readers.archive,
            lambda: engine.alerts.newest_event,
        )
        loop = asyncio.get_running_loop()

        def wake_streams() -> None:
            loop.call_soon_threadsafe(alerts.events.wake)

        engine.alerts.on_stored = wake_streams
        postgres_probe = Probe(readers.archive, lambda: engine.archive.available)
        await stack.enter_async_context(
            background(self._follow_archive(servers, readers.archive, engine, postgres_probe))
        )

        return self.context(
            stack,
            _OwnMode(engine, member),
            FallbackReader(readers.cache, StateReader(engine.window_state), lambda: engine.cache_complete, run_began),
            announcements,
            readers.archive,
            HealthReport(
                engine.feed_states,
                postgres_probe,
                WriterStatus(lambda: engine.cache_complete),
                lambda: engine.pipeline.branches.stalled,
                engine.clock_offsets_ms,
                engine.feed_status.problems,
                unavailable_symbols=lambda: engine.cache.unavailable(self.settings.symbols),
            ),
            engine.counters,
            lambda query: asyncio.to_thread(engine.feed_status.report, query),
            alerts,
            lambda: engine.running and self._archive_known,
        )

    def ingest_from(self, settings: Settings) -> None:
        """Reconfigure the engine."""
        self._reconfigure(settings)
        self._table.shards = settings.shards.names

    async def _follow_archive(self, servers: Servers, archive: PostgresReader, engine: "Engine", probe: Probe) -> None:
        """Open the archive once PostgreSQL has been started, and probe it from then on."""
        await asyncio.to_thread(servers.postgres_started.wait)
        await archive.open()
        await asyncio.to_thread(engine.wait_for_archive)
        await probe.ping_until_known()
        self._archive_known = True
        await probe.ping_periodically()

    def _start_failed(self, error: StartError) -> None:
        """Stop the server with exit code 1: the embedded PostgreSQL cannot be started."""
        self.log_start_error(error)
        self._pipeline_failed()

    async def _stop(self, engine: "Engine", servers: Servers) -> None:
        if not servers.postgres_started.is_set():
            engine.abandon_archive()  # no row can be written; Redis keeps them for the next start
        async with when_set(self.force_stop, partial(asyncio.to_thread, engine.force_stop)):
            await asyncio.to_thread(engine.stop)

    def _pipeline_failed(self) -> None:
        """Stop the server with exit code 1; the service manager restarts it."""
        self.failed = True
        signal.raise_signal(signal.SIGTERM)


class _OwnMode:
    """The mode of the pipeline in this process; switched without Redis."""

    def __init__(self, engine: "Engine", member: Member) -> None:
        self._engine = engine
        self._member = member
        self._switches = SerialCalls(CHANGE_SECONDS)

    @property
    def current(self) -> Mode:
        return self._engine.modes.current

    async def switch(self, mode: Mode) -> Mode:
        return await self._switches.run(partial(self._member.switch, mode))


class _OwnRules:
    """Changes of alert rules by the engine in this process; each waits for PostgreSQL."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._changes = SerialCalls(CHANGE_SECONDS)

    async def change(self, change: RuleChange) -> RuleChanged:
        try:
            return await self._changes.run(partial(self._engine.change_rule, change))
        except Unavailable:
            return RuleChanged(change.id, "unavailable")


class ApiRole(AsgiApplication):
    """The API alone: prices from the stores, all else from the ingest process. Starts no embedded servers."""

    async def start(self, stack: AsyncExitStack) -> Context:
        """Open the stores, follow the ingest process, and return what the routes need."""
        from marketflow.cluster.remote_control import RemoteIngest

        settings = self.settings
        servers = find_servers(settings)
        readers = await self.readers(stack, servers)
        await readers.archive.open()

        self._remote = feeds = RemoteIngest(servers.redis, _names_of(settings), settings.mode)
        stack.push_async_callback(feeds.close)
        try:
            await feeds.poll()  # before the first request, which depends on the mode
        except Unavailable as error:
            logger.warning("the ingest process is unreachable, assuming {} mode: {}", settings.mode, error)
        await stack.enter_async_context(background(feeds.follow()))
        await stack.enter_async_context(background(self._follow_reloads()))

        redis_probe = Probe(
            readers.cache,
            lambda: feeds.last_state.cache_complete,
            Outage("Redis cannot be used", "Redis can be used again"),
        )
        postgres_probe = Probe(
            readers.archive,
            lambda: feeds.last_state.archive_available,
            Outage("PostgreSQL cannot be used", "PostgreSQL can be used again"),
        )
        await self.probe(stack, redis_probe, postgres_probe)

        return self.context(
            stack,
            feeds,
            readers.cache,
            readers.cache,
            readers.archive,
            HealthReport(
                feeds.feed_states,
                postgres_probe,
                redis_probe,
                lambda: feeds.last_state.stalled,
                lambda: feeds.last_state.clock_offsets_ms,
                lambda: feeds.last_state.feeds,
                feeds.shards,
                lambda: readers.cache.unavailable(self.settings.symbols),
            ),
            lambda: feeds.counters,
            feeds.feeds,
            AlertAccess(feeds.change_rule, readers.archive, lambda: feeds.last_state.newest_alert_event),
            lambda: redis_probe.answers or postgres_probe.answers,
        )

    async def reload(self) -> Changes:
        """Reload the settings of the ingest processes, then those of this one; return what has changed there.

        Raises:
            SettingsError: those of one process are wrong; see RemoteIngest.reload.
            Unavailable: no ingest process answers, or earlier reloads are still under way; what ingest processes have
                applied nevertheless is applied here, too.
        """
        await self.reloads.run(self.settings_reload.check)
        changes = await self._remote.reload()
        own = await super().reload()
        return changes.with_restart(own.needs_restart)

    def ingest_from(self, settings: Settings) -> None:
        """Replace the names of the exchanges: another process ingests."""
        self._remote.exchanges = _names_of(settings)

    async def _follow_reloads(self) -> None:
        """Reload the settings when an ingest process has: the request may have been to another API process."""
        while True:
            await self._remote.reloaded.wait()
            self._remote.reloaded.clear()
            await self.started.wait()
            await asyncio.to_thread(self.settings_reload.or_log)


def _names_of(settings: Settings) -> list[str]:
    return [exchange.name for exchange in settings.exchanges]


class IngestRole:
    """Ingest alone: no port; stopped by signals only."""

    def __init__(self, settings: Settings, read: ReadSettings, notified: Supervisor) -> None:
        self._settings = settings
        self._read = read
        self._hangup = Hangup()
        self._supervisor = notified
        self._stop_requested = asyncio.Event()
        self._force_stop = asyncio.Event()
        self._failed = False
        self._reload: Callable[[], None] = lambda: None  # during a start the settings have just been read

    async def run(self) -> int:
        """Run until a signal or a failure; return the exit code."""
        loop = asyncio.get_running_loop()
        loop.set_default_executor(blocking_threads())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                handler = self._on_hangup if number is signal.SIGHUP else self._on_signal
                loop.add_signal_handler(number, handler)
        try:
            return await self._run(loop)
        except StartError:
            if not self._stop_requested.is_set():
                raise
            return 0  # the start was aborted

    async def _run(self, loop: asyncio.AbstractEventLoop) -> int:
        async with running_servers(self._settings, self._stop_requested, self._force_stop) as servers:
            from marketflow.runtime.sharded_engine import ShardedEngine  # no other role needs it

            def pipeline_failed() -> None:
                loop.call_soon_threadsafe(self._pipeline_failed)

            engine = ShardedEngine(self._settings, self._read, servers, pipeline_failed, self._supervisor)
            self._reload = engine.reload.or_log
            running = asyncio.create_task(asyncio.to_thread(engine.run))
            requested = asyncio.create_task(self._stop_requested.wait())
            async with background(self._supervisor.beat_while(engine.is_alive)):
                await asyncio.wait({running, requested}, return_when=asyncio.FIRST_COMPLETED)
            await cancel(requested)
            self._supervisor.stopping()
            engine.stop()
            async with when_set(self._force_stop, partial(asyncio.to_thread, engine.force_stop)):
                await running
        return 1 if self._failed else 0

    def _on_hangup(self) -> None:
        """Reload the settings, or stop if the terminal was closed."""
        if self._hangup.is_of_terminal:
            self._on_signal()
        else:
            asyncio.get_running_loop().run_in_executor(None, self._reload)

    def _on_signal(self) -> None:
        """Request a stop; force it at the second signal."""
        if self._stop_requested.is_set():
            logger.warning("second signal: stopping at once")
            self._force_stop.set()
        else:
            logger.info("stopping")
            self._stop_requested.set()

    def _pipeline_failed(self) -> None:
        """Request a stop with exit code 1; the service manager restarts it."""
        self._failed = True
        self._stop_requested.set()
