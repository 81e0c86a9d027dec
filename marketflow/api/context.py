"""What the routes work with. The composition root builds one and hands it over through the lifespan's state.

The routes see ports only, so they neither know nor care whether the feeds run in this process or in another one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from starlette.requests import HTTPConnection

from marketflow.api.middleware.client_limits import ClientLimits
from marketflow.api.queries.names import NameLookup
from marketflow.api.queries.prices import PriceQueries
from marketflow.api.streaming.hub import Hub
from marketflow.counters import IngestCounters
from marketflow.health import Health, ModeSwitch


@dataclass(frozen=True, eq=False)  # one is only ever equal to itself, which makes it a key
class Context:
    """What the routes need; lives as long as the application.

    `exchanges` and `symbols` hold the canonical spellings. An empty `token` means that anyone may switch the mode.
    `health`, `counters` and `ready` answer from what is already known and never block. There are no counters while no
    process takes ticks, or none can be heard.
    """

    exchanges: tuple[str, ...]
    symbols: tuple[str, ...]
    token: str = field(repr=False)
    mode: ModeSwitch
    prices: PriceQueries
    health: Callable[[], Health]
    counters: Callable[[], IngestCounters | None]
    ready: Callable[[], bool]
    hub: Hub
    clients: ClientLimits = field(default_factory=ClientLimits)

    @cached_property
    def names(self) -> NameLookup:
        """Finds exchanges and symbols by what a client calls them."""
        return NameLookup(self.exchanges, self.symbols)


def context_of(request: HTTPConnection) -> Context:
    """The context that the lifespan put into the state of this request."""
    context: Context = request.scope["state"]["context"]
    return context
