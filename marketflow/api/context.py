"""Dependencies of the routes. The composition root builds them and passes them on in the state of the lifespan.

The routes use ports only, so they work the same whether ingest runs in this process or in another one.
"""

from collections.abc import Awaitable, Callable
from functools import cached_property

import msgspec
from starlette.requests import HTTPConnection

from marketflow.api.alerting.alert_access import AlertAccess
from marketflow.api.middleware.client_limits import ClientLimits
from marketflow.api.queries.derived.day_statistics import DayStatistics
from marketflow.api.queries.known_holes import KnownHoles
from marketflow.api.queries.names import NameLookup
from marketflow.api.queries.prices import PriceQueries
from marketflow.api.streaming.broadcaster import Broadcaster
from marketflow.cluster.messages import FeedsQuery, FeedsReport
from marketflow.counters import IngestCounters
from marketflow.feeds.reachability import Reachability
from marketflow.health import Health, ModeSwitch
from marketflow.settings.reloading import Changes
from marketflow.stores.ports import HoleReader


class Context(msgspec.Struct, dict=True, frozen=True, eq=False):  # by identity, so that it can be a cache key
    """Dependencies of the routes; lives as long as the application.

    `exchanges` and `symbols` hold the configured spellings. With an empty `token` anyone may switch the mode.
    `health`, `counters` and `ready` never block. `counters` returns None while no ingest process can be
    reached; `feeds` and `reload` raise Unavailable then. `reload` replaces the context: each request has the one of its
    time. `reachability` connects to each exchange of the settings.
    """

    exchanges: tuple[str, ...]
    symbols: tuple[str, ...]
    token: str
    mode: ModeSwitch
    prices: PriceQueries
    health: Callable[[], Health]
    counters: Callable[[], IngestCounters | None]
    feeds: Callable[[FeedsQuery], Awaitable[FeedsReport]]
    alerts: AlertAccess
    reachability: Callable[[], Awaitable[list[Reachability]]]
    holes: HoleReader
    reload: Callable[[], Awaitable[Changes]]
    ready: Callable[[], bool]
    broadcaster: Broadcaster
    clients: ClientLimits = msgspec.field(default_factory=ClientLimits)

    __repr__ = object.__repr__  # without the token

    @cached_property
    def known_holes(self) -> KnownHoles:
        """Says which candles are not complete."""
        return KnownHoles(self.holes)

    @cached_property
    def day_statistics(self) -> DayStatistics:
        """Statistics of the last 24 hours."""
        return DayStatistics(self.prices, self.clients)

    @cached_property
    def names(self) -> NameLookup:
        """Finds configured exchanges and symbols without regard to case."""
        return NameLookup(self.exchanges, self.symbols)


def context_of(request: HTTPConnection) -> Context:
    """Return the context of a request."""
    context: Context = request.scope["state"]["context"]
    return context
