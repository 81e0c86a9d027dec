"""What every MarketFlow that answers requests is: an ASGI application that opens what it needs and closes it again."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

from loguru import logger
from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marketflow.api.app import create_app
from marketflow.api.context import Context
from marketflow.api.middleware.client_limits import ClientLimits
from marketflow.api.queries.prices import PriceQueries
from marketflow.api.streaming.hub import Hub
from marketflow.clock import system_clock
from marketflow.counters import IngestCounters
from marketflow.errors import StartError
from marketflow.health import ModeSwitch
from marketflow.model import Mode
from marketflow.runtime.probes import HealthReport, Probe
from marketflow.runtime.store_servers import Servers
from marketflow.server.http_connection import LimitedConnection
from marketflow.settings import Settings
from marketflow.stores.ports import Announcements, CacheReader
from marketflow.stores.postgres.reader import PostgresReader
from marketflow.stores.postgres.request_coalescing import CoalescingReader
from marketflow.stores.redis.near_cache import NearCache
from marketflow.stores.redis.reader import RedisReader
from marketflow.tasks import background

SETTLE_MS = 10_000
"""How long after its grace a minute may take to be in the cache, late ticks included."""


class Readers(NamedTuple):
    """What reads the stores: the cache, the same by what its writer announces, and the archive."""

    cache: RedisReader
    near_cache: NearCache
    archive: PostgresReader


class Application(ABC):
    """An ASGI application. A start that fails for a known reason is told in one line, not with a traceback."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._asgi: ASGIApp = create_app(self._lifespan, settings.http)
        self._refused = False
        self.failed = False
        self.mode: Callable[[], Mode] = lambda: settings.mode
        """The mode that runs, once it has started."""
        self.alive: Callable[[], bool] = lambda: True
        """Whether what runs beside the event loop does; asked time and again, in the event loop."""
        self.end_streams: Callable[[], None] = lambda: None
        """Ends what would go on for ever, once it has started."""
        self.told = asyncio.Event()
        """Set when it is told to stop; a start that is under way is given up then."""
        self.force = asyncio.Event()
        """Set when the end must not take its time any more."""

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
        except StartError as error:
            self._refused = True
            if self.told.is_set():
                logger.info("stopped while starting")
                raise
            for line in str(error).splitlines():  # the end of a server's log may be among them
                logger.error("{}", line)
            raise

    @abstractmethod
    async def start(self, stack: AsyncExitStack) -> Context:
        """Build everything; what is to be closed in the end goes to the stack."""

    # What all kinds are built from

    async def readers(self, stack: AsyncExitStack, servers: Servers) -> "Readers":
        """What reads the two stores."""
        settle_ms = self.settings.flow.late_after_ms + SETTLE_MS
        cache = RedisReader.connect(servers.redis, system_clock, settle_ms, self.settings.flow.minute_ms)
        stack.push_async_callback(cache.close)
        near_cache = NearCache(cache, servers.redis, system_clock, self.settings.flow.minute_ms)
        stack.push_async_callback(near_cache.close)
        await stack.enter_async_context(background(near_cache.listen()))
        archive = PostgresReader(servers.postgres)
        stack.push_async_callback(archive.close)
        await archive.open()
        return Readers(cache, near_cache, archive)

    async def probe(self, stack: AsyncExitStack, *probes: Probe) -> None:
        """Ask the stores how they are, now and from now on."""
        await asyncio.gather(*(probe.ask_first() for probe in probes))
        for probe in probes:
            await stack.enter_async_context(background(probe.ask_for_ever()))

    def context(
        self,
        mode: ModeSwitch,
        cache: CacheReader,
        announcements: Announcements,
        archive: PostgresReader,
        health: HealthReport,
        counters: Callable[[], IngestCounters | None],
        ready: Callable[[], bool],
    ) -> Context:
        """What the routes work with."""
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
        hub = Hub(
            exchanges,
            settings.symbols,
            mode,
            prices,
            health,
            announcements,
            LimitedConnection.most() // 2,
            settings.http.streams_per_client,
        )
        self.end_streams = hub.end
        return Context(
            exchanges, settings.symbols, settings.http.token, mode, prices, health, counters, ready, hub, clients
        )
