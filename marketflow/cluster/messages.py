"""Messages between processes, in JSON: the published state, commands and replies."""

from typing import TypeVar

import msgspec

from marketflow.counters import IngestCounters
from marketflow.model import FeedState, Mode

_T = TypeVar("_T")


class IngestState(msgspec.Struct, frozen=True):
    """State of the ingest process.

    `exchanges` is by exchange name. `stalled` names branches of the pipeline that have work and finish none.
    `clock_offsets_ms` is by exchange name, for exchanges whose clock is wrong.
    """

    mode: Mode
    exchanges: dict[str, FeedState]
    cache_complete: bool
    archive_available: bool
    stalled: tuple[str, ...] = ()
    clock_offsets_ms: dict[str, int] = {}


class Published(msgspec.Struct, frozen=True, rename={"counters": "figures"}):
    """A published state: of which run, its ascending number within that run, and the time (Unix ms).

    The counters are of the same moment; an earlier version publishes none. In JSON they are `figures`, so that versions
    can be mixed while they are replaced.
    """

    run: str
    number: int
    at: int
    state: IngestState
    counters: IngestCounters | None = None


class Reply(msgspec.Struct, frozen=True):
    """The reply to a command: the previous mode and the new state."""

    previous: Mode
    published: Published


encode = msgspec.json.Encoder().encode


def decode(data: bytes | None, kind: type[_T]) -> _T | None:
    """Decode a message; return None if there is none or this version cannot read it."""
    if not data:
        return None
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError:
        return None


def mode_of(data: bytes | None) -> Mode | None:
    """Decode the value of MODE_KEY."""
    return Mode(data.decode()) if data in [mode.value.encode() for mode in Mode] else None
