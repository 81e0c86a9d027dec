"""Input of `marketflow watch`: events of the stream, and changes of the connection."""

import msgspec

from marketflow.api.streaming.events import EVENT_NAMES, ChangedMode, ChangedPrices, Heartbeat, Snapshot
from marketflow.health import Health


class Connected(msgspec.Struct, frozen=True):
    """The stream is connected, for the first time or again."""


class Lost(msgspec.Struct, frozen=True):
    """The stream ended or could not be opened: the reason, and the seconds until the next attempt."""

    reason: str
    pause_seconds: float


StreamEvent = Snapshot | ChangedPrices | ChangedMode | Health | Heartbeat
WatchEvent = StreamEvent | Connected | Lost

_TYPES: dict[str, type[StreamEvent]] = {
    EVENT_NAMES[kind]: kind for kind in (Snapshot, ChangedPrices, ChangedMode, Health, Heartbeat)
}


def decode(event: str, data: str) -> StreamEvent | None:
    """Decode an event of the stream; None for one with another name.

    Raises:
        msgspec.DecodeError: the data does not match the type of the event.
    """
    kind = _TYPES.get(event)
    return msgspec.json.decode(data, type=kind) if kind else None
