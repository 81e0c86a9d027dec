"""The ASGI application of a process that answers requests: its lifespan opens the stores and closes them again."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

from loguru import logger
from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marketflow.api.alerting.alert_access import AlertAccess
from marketflow.api.app import create_app
from marketflow.api.context import Context
from marketflow.api.middleware.client_limits import ClientLimits
from marketflow.api.queries.known_holes import KnownHoles
from marketflow.api.queries.prices import PriceQueries
from marketflow.api.streaming.broadcaster import Broadcaster
from marketflow.clock import system_clock
from marketflow.cluster.messages import FeedsQuery, FeedsReport
from marketflow.counters import IngestCounters
from marketflow.errors import StartError
from marketflow.feeds.reachability import ReachabilityProbe
from marketflow.health import ModeSwitch
from marketflow.model import Mode
from marketflow.runtime.health_report import HealthReport, Probe
from marketflow.runtime.store_servers import Servers
from marketflow.server.http_protocol import LimitedHttpProtocol
from marketflow.settings import Settings
from marketflow.stores.ports import Announcements, CacheReader
from marketflow.stores.postgres.reader import PostgresReader
from marketflow.stores.postgres.request_coalescing import CoalescingReader
from marketflow.stores.redis.near_cache import NearCache
from marketflow.stores.redis.reader import RedisReader
from marketflow.tasks import background, cancel, log_failure

SETTLE_MS = 10_000
"""How long after the allowed lateness a closed minute may take to reach the cache, late ticks included."""


class Readers(NamedTuple):
    """Readers of the stores: the cache, the near cache that follows its announcements, and the archive."""

    cache: RedisReader
    near_cache: NearCache
    archive: PostgresReader


class AsgiApplication(ABC):
    """An ASGI application. A start that fails for a known reason is logged in one line, without a traceback."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._asgi: ASGIApp = create_app(self._lifespan, settings.http)
        self._refused = False
        self._tasks: list[asyncio.Task[None]] = []
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
                yield {"context": await self.start(stack)}
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

    @abstractmethod
    async def start(self, stack: AsyncExitStack) -> Context:
        """Build the parts and return what the routes need; the stack closes them in reverse order."""

    # Shared by both kinds

    async def readers(self, stack: AsyncExitStack, servers: Servers) -> "Readers":
        """Connect the reader of the cache; the one of the archive has yet to be opened."""
        settle_ms = self.settings.flow.late_after_ms + SETTLE_MS
        cache = RedisReader.connect(servers.redis, system_clock, settle_ms, self.settings.flow.minute_ms)
        stack.push_async_callback(cache.close)
        near_cache = NearCache(cache, servers.redis, system_clock, self.settings.flow.minute_ms)
        stack.push_async_callback(near_cache.close)
        await stack.enter_async_context(background(near_cache.listen()))
        archive = PostgresReader(servers.postgres)
        stack.push_async_callback(archive.close)
        return Readers(cache, near_cache, archive)

    async def probe(self, stack: AsyncExitStack, *probes: Probe) -> None:
        """Probe the stores now, and periodically from now on."""
        await asyncio.gather(*(probe.ask_until_known() for probe in probes))
        for probe in probes:
            await stack.enter_async_context(background(probe.ask_periodically()))

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
            ReachabilityProbe(lambda: settings.exchanges).results,
            archive,
            ready,
            broadcaster,
            clients,
        )
