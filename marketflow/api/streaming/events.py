"""What clients are told: the events, and their forms on the wire, made once for all who are told the same."""

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta
from sse_starlette import ServerSentEvent

from marketflow.api.openapi.operation import Exchange, Symbol
from marketflow.api.rendering import Time
from marketflow.api.routes.latest_price import LatestPrice
from marketflow.health import Health
from marketflow.model import Mode


class Snapshot(msgspec.Struct, frozen=True):
    """All that there is to know; replaces whatever was told before."""

    mode: Mode
    symbols: Annotated[list[Symbol], Meta(description="Those of the subscription, in configured order.")]
    exchanges: Annotated[list[Exchange], Meta(description="Those of the subscription, in configured order.")]
    prices: Annotated[list[LatestPrice], Meta(description="The newest price of each series that has one.")]
    health: Health


class ChangedPrices(msgspec.Struct, frozen=True):
    """The newest price of every series that has changed since the last event."""

    prices: list[LatestPrice]


class ChangedMode(msgspec.Struct, frozen=True):
    """Another mode runs from now on; a snapshot of it follows."""

    mode: Mode
    previous: Mode


class Heartbeat(msgspec.Struct, frozen=True):
    """A sign of life."""

    timestamp: Annotated[Time, Meta(description="By the clock of the server.")]


class End(msgspec.Struct, frozen=True):
    """The server ends; nothing comes after it."""

    reason: Literal["shutdown"]


class Subscribed(msgspec.Struct, frozen=True):
    """What is subscribed from now on; a snapshot of it follows."""

    symbols: list[Symbol]
    exchanges: list[Exchange]
    series: list[tuple[Exchange, Symbol]]


class Refused(msgspec.Struct, frozen=True):
    """A message of the client that could not be acted on."""

    code: str
    detail: str


EVENTS: dict[type[msgspec.Struct], str] = {
    Snapshot: "snapshot",
    ChangedPrices: "prices",
    ChangedMode: "mode",
    Health: "health",
    Heartbeat: "heartbeat",
    End: "end",
    Subscribed: "subscribed",
    Refused: "error",
}
"""The names of the events, by what they carry."""


class Message(NamedTuple):
    """One event: its name, the id by which a client can go on after it (none: nothing), and its data as JSON."""

    event: str
    id: str
    data: bytes


def message(data: msgspec.Struct, position: str = "") -> Message:
    """The event that carries `data`."""
    return Message(EVENTS[type(data)], position, msgspec.json.encode(data))


class Batch:
    """Events that are sent in one go."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.messages = messages

    @property
    def is_last(self) -> bool:
        """Whether nothing comes after it."""
        return self.messages[-1].event == EVENTS[End]

    @cached_property
    def server_sent(self) -> bytes:
        """As server-sent events."""
        return b"".join(
            ServerSentEvent(data.decode(), event=event, id=position, sep="\n").encode()
            for event, position, data in self.messages
        )

    @cached_property
    def texts(self) -> list[str]:
        """As messages of a WebSocket."""
        return [
            msgspec.json.encode(
                {"event": event, **({"id": position} if position else {}), "data": msgspec.Raw(data)}
            ).decode()
            for event, position, data in self.messages
        ]
