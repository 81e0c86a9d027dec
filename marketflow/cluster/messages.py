"""How the feeds do, in the words that travel between processes."""

from typing import TypeVar

import msgspec

from marketflow.counters import IngestCounters
from marketflow.model import FeedState, Mode

_T = TypeVar("_T")


class IngestState(msgspec.Struct, frozen=True):
    """What the process that takes ticks knows of itself. `exchanges` is by exchange name.

    `stalled` names branches of its flow that have work and finish none. `clock_offsets_ms` is by exchange name, of
    those whose clock is wrong.
    """

    mode: Mode
    exchanges: dict[str, FeedState]
    cache_complete: bool
    archive_available: bool
    stalled: tuple[str, ...] = ()
    clock_offsets_ms: dict[str, int] = {}


class Published(msgspec.Struct, frozen=True, rename={"counters": "figures"}):
    """A state as it is published: of which run, the how manieth of that run by a number that grows, and when.

    The counters are those of that moment; an earlier version does not tell any.
    """

    run: str
    number: int
    at: int
    state: IngestState
    counters: IngestCounters | None = None


class Reply(msgspec.Struct, frozen=True):
    """The answer to a command: the mode before, and the state that has come of it."""

    previous: Mode
    published: Published


encode = msgspec.json.Encoder().encode


def decode(data: bytes | None, kind: type[_T]) -> _T | None:
    """What was encoded, None where there is nothing that this version can read."""
    if not data:
        return None
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError:
        return None


def mode_of(data: bytes | None) -> Mode | None:
    """The value of MODE_KEY."""
    return Mode(data.decode()) if data in [mode.value.encode() for mode in Mode] else None
