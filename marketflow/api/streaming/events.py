"""Events of the stream: what the server sends and `marketflow watch` decodes."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from marketflow.api.openapi.operation import Exchange, Symbol
from marketflow.api.rendering import Time
from marketflow.api.routes.latest_price import LatestPrice
from marketflow.health import Health
from marketflow.model import Mode


class Snapshot(msgspec.Struct, frozen=True):
    """The whole state of a subscription; replaces all earlier events."""

    mode: Mode
    symbols: Annotated[list[Symbol], Meta(description="Those of the subscription, in configured order.")]
    exchanges: Annotated[list[Exchange], Meta(description="Those of the subscription, in configured order.")]
    prices: Annotated[list[LatestPrice], Meta(description="The newest price of each series that has one.")]
    health: Health


class ChangedPrices(msgspec.Struct, frozen=True):
    """The newest price of every series that has changed since the last event."""

    prices: list[LatestPrice]


class ChangedMode(msgspec.Struct, frozen=True):
    """The mode was switched; a snapshot of the new mode follows."""

    mode: Mode
    previous: Mode


class Heartbeat(msgspec.Struct, frozen=True):
    """The connection is alive; sent at a fixed interval."""

    timestamp: Annotated[Time, Meta(description="Clock of the server.")]


class End(msgspec.Struct, frozen=True):
    """The server shuts down; no event follows."""

    reason: Literal["shutdown"]


class Subscribed(msgspec.Struct, frozen=True):
    """The subscription was changed to these series; their snapshot follows."""

    symbols: list[Symbol]
    exchanges: list[Exchange]
    series: list[tuple[Exchange, Symbol]]


class Rejected(msgspec.Struct, frozen=True):
    """A message of the client was rejected."""

    code: str
    detail: str


EVENT_NAMES: dict[type[msgspec.Struct], str] = {
    Snapshot: "snapshot",
    ChangedPrices: "prices",
    ChangedMode: "mode",
    Health: "health",
    Heartbeat: "heartbeat",
    End: "end",
    Subscribed: "subscribed",
    Rejected: "error",
}
"""Names of the events by their type."""
