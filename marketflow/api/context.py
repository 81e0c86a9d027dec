"""What the routes work with. The composition root builds one and hands it over through the lifespan's state.

The routes see ports only, so they neither know nor care whether the feeds run in this process or in another one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import msgspec
from msgspec import Meta
from starlette.requests import HTTPConnection

from marketflow.api.answers import Prices
from marketflow.figures import Figures
from marketflow.model import FeedState, Mode

if TYPE_CHECKING:  # the hub sends what is defined here
    from marketflow.streaming.hub import Hub

StoreState = Literal["ok", "down"]


class Health(msgspec.Struct, frozen=True):
    """How the application does."""

    status: Annotated[Literal["ok", "degraded"], Meta(description="`ok` while both stores and every exchange do well.")]
    mode: Mode
    uptime_seconds: Annotated[float, Meta(ge=0, description="Seconds since the start.", examples=[93.015])]
    postgres: Annotated[StoreState, Meta(description="Whether candles can be read and written.")]
    redis: Annotated[StoreState, Meta(description="Whether newest prices can be read and written.")]
    exchanges: Annotated[dict[str, FeedState], Meta(description="How the feed of each exchange does, by its name.")]


class ModeSwitch(Protocol):
    """Knows the mode that runs and changes it."""

    @property
    def current(self) -> Mode:
        """The mode that runs."""
        ...

    async def switch(self, mode: Mode) -> Mode:
        """Run `mode` from now on and return the one that ran before. Concurrent switches queue up.

        Raises:
            Unavailable: the mode cannot be switched now.
        """
        ...


@dataclass(frozen=True, eq=False)  # one is only ever equal to itself, which makes it a key
class Context:
    """What the routes need; lives as long as the application.

    `exchanges` and `symbols` hold the canonical spellings. An empty `token` means that anyone may switch the mode.
    `health`, `figures` and `ready` answer from what is already known and never block. There are no figures while no
    process takes ticks, or none can be heard.
    """

    exchanges: tuple[str, ...]
    symbols: tuple[str, ...]
    token: str = field(repr=False)
    mode: ModeSwitch
    prices: Prices
    health: Callable[[], Health]
    figures: Callable[[], Figures | None]
    ready: Callable[[], bool]
    hub: "Hub"

    @cached_property
    def exchange_named(self) -> Mapping[str, str]:
        """Exchanges by their names in lower case."""
        return {name.lower(): name for name in self.exchanges}

    @cached_property
    def symbol_named(self) -> Mapping[str, str]:
        """Symbols by their names in lower case."""
        return {name.lower(): name for name in self.symbols}


def canonical(asked: str, names: Mapping[str, str]) -> str | None:
    """The configured spelling of a name, None for one that is not configured."""
    # Some letters beyond ASCII have one of ASCII for a lower case.
    return names.get(asked.lower()) if asked.isascii() else None


def context_of(request: HTTPConnection) -> Context:
    """The context that the lifespan put into the state of this request."""
    context: Context = request.scope["state"]["context"]
    return context
