"""What a watcher is told: the events of the stream, by their names, and what becomes of the connection."""

from datetime import datetime

import msgspec


class Price(msgspec.Struct, frozen=True):
    """The newest tick of a series."""

    symbol: str
    exchange: str
    price: float
    timestamp: datetime


class Health(msgspec.Struct, frozen=True):
    """How the application does, as GET /health tells; its states are words to show."""

    mode: str
    postgres: str
    redis: str
    exchanges: dict[str, str]


class Snapshot(msgspec.Struct, frozen=True):
    """All that there is to know; replaces whatever was told before."""

    mode: str
    symbols: list[str]
    exchanges: list[str]
    prices: list[Price]
    health: Health


class ChangedPrices(msgspec.Struct, frozen=True):
    """The newest price of each series that has changed."""

    prices: list[Price]


class ChangedMode(msgspec.Struct, frozen=True):
    """Another mode runs; a snapshot of it follows."""

    mode: str


class Heartbeat(msgspec.Struct, frozen=True):
    """A sign of life, with the server's clock."""

    timestamp: datetime


class Connected(msgspec.Struct, frozen=True):
    """The stream begins, or goes on."""


class Lost(msgspec.Struct, frozen=True):
    """The stream has ended or could not be had; why, and in how many seconds it is tried again."""

    reason: str
    pause_seconds: float


Message = Snapshot | ChangedPrices | ChangedMode | Health | Heartbeat | Connected | Lost

_EVENTS: dict[str, type[Message]] = {
    "snapshot": Snapshot,
    "prices": ChangedPrices,
    "mode": ChangedMode,
    "health": Health,
    "heartbeat": Heartbeat,
}


def decode(event: str, data: str) -> Message | None:
    """The message that an event carries; None for one of another name, which says nothing to a watcher.

    Raises:
        msgspec.DecodeError: it is not what MarketFlow sends.
    """
    kind = _EVENTS.get(event)
    return msgspec.json.decode(data, type=kind) if kind else None
