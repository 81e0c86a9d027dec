"""The ASGI application of a process that answers requests: its lifespan opens the stores and closes them again."""

import asyncio
import signal
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

from loguru import logger
from msgspec.structs import replace
from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marketflow.api.alerting.alert_access import AlertAccess
from marketflow.api.app import create_app
from marketflow.api.context import Context
from marketflow.api.middleware.client_limits import ClientLimits
from marketflow.api.prepared_answers import PREPARED_ANSWERS
from marketflow.api.queries.known_holes import KnownHoles
from marketflow.api.queries.prices import PriceQueries
from marketflow.api.streaming.broadcaster import Broadcaster
from marketflow.clock import system_clock
from marketflow.cluster.messages import FeedsQuery, FeedsReport
from marketflow.counters import IngestCounters
from marketflow.errors import SettingsError, StartError, Unavailable
from marketflow.feeds.reachability import ReachabilityProbe
from marketflow.health import ModeSwitch
from marketflow.model import Mode
from marketflow.runtime.health_report import HealthReport, Probe
from marketflow.runtime.settings_reload import ReadSettings, SettingsReload
from marketflow.runtime.store_servers import Servers
from marketflow.server.http_protocol import LimitedHttpProtocol
from marketflow.server.system_limits import blocking_threads, limits_in_words
from marketflow.settings import Settings
from marketflow.settings.reloading import Changes
from marketflow.stores.ports import Announcements, CacheReader
from marketflow.stores.postgres.reader import PostgresReader
from marketflow.stores.postgres.request_coalescing import CoalescingReader, end_queries
from marketflow.stores.redis.buckets.bucketed_cache import BucketedCache
from marketflow.tasks import SerialCalls, background, cancel, log_failure

SETTLE_MS = 10_000
"""How long after the allowed lateness a closed minute may take to reach the cache, late ticks included."""

CHANGE_SECONDS = 5.0
"""How long a change of the mode, the settings or a rule waits for earlier ones of its kind."""

RELOAD_SECONDS = 10.0
"""How long a reload waits for the event loop, which a stop may have ended."""


class Readers(NamedTuple):
    """Readers of the cache and of the archive."""

    cache: BucketedCache
    archive: PostgresReader


class AsgiApplication(ABC):
    """An ASGI application. A start that fails for a known reason is logged in one line, without a traceback."""

    def __init__(self, settings: Settings, read: ReadSettings) -> None:
        self.settings = settings
        """The settings at the start."""
        self.settings_reload = SettingsReload(settings, read, self._apply)
        self.reloads = SerialCalls(CHANGE_SECONDS)
        self._state: dict[str, Any] = {}  # of the lifespan; the server copies it for each request
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asgi: ASGIApp = create_app(self._lifespan, settings.http)
        self._refused = False
        self._tasks: list[asyncio.Task[None]] = []
        self.started = asyncio.Event()
        """Set when it has started."""
        self._reloading: set[asyncio.Future[None]] = set()
        self.failed = False
        """Whether the pipeline broke."""
        self.mode: Callable[[], Mode] = lambda: settings.mode
        """Returns the current mode, once started."""
        self.alive: Callable[[], bool] = lambda: True
        """Returns whether the threads beside the event loop make progress; called periodically in the event loop."""
        self.end_streams: Callable[[], None] = lambda: None
        """Ends the open event streams, once started."""
        self.stop_requested = asyncio.Event()
        """Set to stop; a start that is under way is aborted."""
        self.force_stop = asyncio.Event()
        """Set to cut the stop short."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or start and end."""
        if scope["type"] == "lifespan":
            self._state = scope.get("state", {})
            await self._asgi(scope, receive, self._without_traceback(send))
        else:
            await self._asgi(scope, receive, send)

    def _without_traceback(self, send: Send) -> Send:
        async def quiet(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed" and self._refused:
                message = {"type": message["type"]}
            if message["type"] == "lifespan.startup.complete":
                self.started.set()
            await send(message)

        return quiet

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[Mapping[str, Any]]:
        try:
            async with AsyncExitStack() as stack:
                self._loop = asyncio.get_running_loop()
                self._loop.set_default_executor(blocking_threads())
                with limits_in_words():
                    context = await self.start(stack)
                if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # under another server
                    self._loop.add_signal_handler(signal.SIGHUP, self.reload_soon)
                yield {"context": context}
                logger.info("stopping")
            await cancel(*self._tasks)
        except StartError as error:
            self._refused = True
            if self.stop_requested.is_set():
                logger.info("stopped while starting")
                raise
            self.log_start_error(error)
            raise

    def log_start_error(self, error: StartError) -> None:
        """Log why a start failed, line by line: it may quote the end of a server's log."""
        for line in str(error).splitlines():
            logger.error("{}", line)

    def run_until_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a background task that ends after everything else has been closed."""
        task = asyncio.create_task(work)
        task.add_done_callback(log_failure)
        self._tasks.append(task)

    # Reload of the settings

    async def reload(self) -> Changes:
        """Read the settings again and apply the changes; return them.

        Raises:
            SettingsError: they are wrong, and nothing has changed.
            Unavailable: no ingest process answers, or earlier reloads are still under way; nothing has changed.
        """
        return await self.reloads.run(self.settings_reload)

    def reload_soon(self) -> None:
        """Reload, and log what is wrong; for the thread of the loop."""
        task = asyncio.ensure_future(self._reload_or_log())
        task.add_done_callback(log_failure)
        self._reloading.add(task)
        task.add_done_callback(self._reloading.discard)

    async def _reload_or_log(self) -> None:
        try:
            await self.reload()
        except (SettingsError, Unavailable) as error:
            for line in str(error).splitlines():
                logger.error("settings not reloaded: {}", line)

    def _apply(self, settings: Settings) -> None:
        """Apply changed settings; on a thread beside the loop."""
        assert self._loop is not None, "it has started"
        self.ingest_from(settings)
        asyncio.run_coroutine_threadsafe(self._answer_about(settings), self._loop).result(RELOAD_SECONDS)

    @abstractmethod
    def ingest_from(self, settings: Settings) -> None:
        """Apply the exchanges and symbols of changed settings to ingest; on a thread beside the loop."""

    async def _answer_about(self, settings: Settings) -> None:
        """Apply the exchanges and symbols of changed settings to further requests."""
        await self.started.wait()
        before: Context = self._state["context"]
        exchanges = tuple(exchange.name for exchange in settings.exchanges)
        context = replace(before, exchanges=exchanges, symbols=settings.symbols)
        self._state["context"] = context
        self._state[PREPARED_ANSWERS].take_context(context)
        context.broadcaster.take_names(exchanges, settings.symbols)

    @abstractmethod
    async def start(self, stack: AsyncExitStack) -> Context:
        """Build the parts and return what the routes need; the stack closes them in reverse order."""

    # Shared by both kinds

    async def readers(self, stack: AsyncExitStack, servers: Servers) -> "Readers":
        """Connect the reader of the cache; the one of the archive has yet to be opened."""
        settle_ms = self.settings.flow.late_after_ms + SETTLE_MS
        cache = BucketedCache.connect(servers.redis, system_clock, settle_ms, self.settings.flow.minute_ms)
        stack.push_async_callback(cache.close)
        await stack.enter_async_context(background(cache.listen()))
        archive = PostgresReader(servers.postgres)
        stack.push_async_callback(archive.close)
        return Readers(cache, archive)

    async def probe(self, stack: AsyncExitStack, *probes: Probe) -> None:
        """Probe the stores now, and periodically from now on."""
        await asyncio.gather(*(probe.ping_until_known() for probe in probes))
        for probe in probes:
            await stack.enter_async_context(background(probe.ping_periodically()))

    def context(
        self,
        stack: AsyncExitStack,
        mode: ModeSwitch,
        cache: CacheReader,
        announcements: Announcements,
        archive: PostgresReader,
        health: HealthReport,
        counters: Callable[[], IngestCounters | None],
        feeds: Callable[[FeedsQuery], Awaitable[FeedsReport]],
        alerts: AlertAccess,
        ready: Callable[[], bool],
    ) -> Context:
        """Build what the routes need."""
        settings = self.settings
        self.mode = lambda: mode.current
        clients = ClientLimits(settings.http.trusted_proxies)
        prices = PriceQueries(
            cache,
            CoalescingReader(archive, charge=clients.charge),
            system_clock,
            settings.flow.ahead_ms,
            settings.flow.closed_after_ms,
        )
        exchanges = tuple(exchange.name for exchange in settings.exchanges)
        broadcaster = Broadcaster(
            exchanges,
            settings.symbols,
            mode,
            prices,
            health,
            announcements,
            LimitedHttpProtocol.max_connections() // 2,
            settings.http.streams_per_client,
            archive,
            KnownHoles(archive),
        )

        def end_streams() -> None:
            broadcaster.end()
            alerts.events.end()

        self.end_streams = end_streams
        stack.push_async_callback(broadcaster.close)
        stack.push_async_callback(alerts.events.close)
        stack.push_async_callback(end_queries)
        return Context(
            exchanges,
            settings.symbols,
            settings.http.token,
            mode,
            prices,
            health,
            counters,
            feeds,
            alerts,
            ReachabilityProbe(lambda: self.settings_reload.settings.exchanges).results,
            archive,
            self.reload,
            ready,
            broadcaster,
            clients,
        )
