"""Messages between processes, in JSON: the published state, commands and replies."""

from typing import Literal, TypeVar

import msgspec

from marketflow.alerts.alert_model import AlertRule
from marketflow.counters import IngestCounters
from marketflow.health import FeedProblem
from marketflow.model import FeedState, HoleState, Mode
from marketflow.settings.reloading import Changes

_T = TypeVar("_T")


class IngestState(msgspec.Struct, frozen=True):
    """State of the ingest process.

    `exchanges` is by exchange name. `stalled` names branches of the pipeline that have work and finish none.
    `clock_offsets_ms` is by exchange name, for exchanges whose clock is wrong; `feeds`, for those with a problem.
    `newest_alert_event` is the number of the newest alert event that it has stored, 0 before the first one.
    `reloads` counts the reloads of the settings since the start: API processes reload when it changes.
    """

    mode: Mode
    exchanges: dict[str, FeedState]
    cache_complete: bool
    archive_available: bool
    stalled: tuple[str, ...] = ()
    clock_offsets_ms: dict[str, int] = {}
    feeds: dict[str, FeedProblem] = {}
    newest_alert_event: int = 0
    reloads: int = 0


class ShardState(msgspec.Struct, frozen=True):
    """A shard in its owner or its standby, and the event time of its newest tick there (Unix ms).

    A standby is warm once it has the ticks that the owner has, or cold where it cannot have them.
    """

    state: Literal["owner", "warm", "cold", "connecting"]
    newest_at: int | None = None


class Published(msgspec.Struct, frozen=True):
    """A published state of a run, with an ascending number within the run and the time (Unix ms).

    The counters and shards are of the same moment.
    """

    run: str
    number: int
    at: int
    state: IngestState
    counters: IngestCounters | None = None
    shards: dict[str, ShardState] = {}

    @property
    def owned(self) -> list[str]:
        """The shards that this process has begun to own."""
        return [shard for shard, each in self.shards.items() if each.state == "owner"]


RELOAD = "reload"
"""A command: read the settings again."""


class ReloadReply(msgspec.Struct, frozen=True):
    """The reply to RELOAD: what has changed, or what is wrong with the settings, one problem a line."""

    changes: Changes | None
    problem: str


class AlertMark(msgspec.Struct, frozen=True):
    """How far the leader has evaluated alerts, for the next leader.

    All events of slices before `until` (Unix ms) of the mode are stored. `stale` is since when (Unix ms) each stale
    feed has been stale; its events are stored, or about to be.
    """

    until: int
    mode: Mode
    stale: dict[str, int] = {}


class FeedsQuery(msgspec.Struct, frozen=True):
    """A command: report the series of the current mode, in order of exchange and symbol; None is any."""

    limit: int
    offset: int = 0
    exchange: str | None = None
    symbol: str | None = None


class RuleChange(msgspec.Struct, frozen=True):
    """A command: create, replace or delete the alert rule with this id."""

    operation: Literal["create", "replace", "delete"]
    id: str
    rule: AlertRule | None = None


class RuleChanged(msgspec.Struct, frozen=True):
    """The reply to a RuleChange: the id of the rule; `code` is why nothing was changed, empty if it was."""

    id: str
    code: str = ""


class ExchangeReport(msgspec.Struct, frozen=True):
    """The feed of an exchange; None is unknown. Times are in Unix ms; the error is the last one, however old."""

    exchange: str
    state: FeedState
    address: str
    ticks_per_second: float
    doubles: int | None
    holes: dict[HoleState, int] | None
    reconnects: int
    clock_offset_ms: int | None
    rest_weight_used: int | None
    rest_weight_limit: int | None
    error: str | None
    error_at: int | None
    next_try_at: int | None
    absent: tuple[str, ...]
    halted: tuple[str, ...] = ()


class SeriesReport(msgspec.Struct, frozen=True):
    """One series; None is unknown. `price` and `at` (Unix ms) are of its newest tick, rate and delays of a minute."""

    exchange: str
    symbol: str
    state: str
    price: float | None
    at: int | None
    delay_p50_ms: float | None
    delay_p99_ms: float | None
    ticks_per_second: float
    doubles: int | None
    holes: dict[HoleState, int] | None


class FeedsReport(msgspec.Struct, frozen=True):
    """The reply to a FeedsQuery: the exchanges, a page of their series, and the number of all of them."""

    mode: Mode
    exchanges: tuple[ExchangeReport, ...]
    series: tuple[SeriesReport, ...]
    total: int


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
