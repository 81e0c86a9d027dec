"""Counters of the ingest process since its start, as other processes read them.

They travel with its published state: prometheus_client's multi-process mode needs a folder that all processes share,
which two machines do not, and an endpoint of its own would give the ingest role a port.
"""

import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import msgspec

from marketflow.model import HoleState

DELAY_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Bounds of the histogram in seconds, from an idle partition to an outage."""


class Delays(msgspec.Struct, frozen=True):
    """Histogram of delays: `counts[i]` are above `bounds[i - 1]` and at most `bounds[i]` (seconds).

    The last count is of those above all bounds; `total` is the sum in seconds.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class ExchangeCounters(msgspec.Struct, frozen=True):
    """Counters of one exchange in both modes.

    `last_tick_at` is the time of receipt (Unix ms) in the current mode, `holes` their number in the current mode by
    state, `trade_delay` the delay from event to receipt, `verified` how many minutes were compared with the venue's
    candles, by result. Earlier versions have no more than `last_tick_at`.
    """

    ticks: int
    rejected: dict[str, int]
    timestamps_replaced: int
    reconnects: int
    last_tick_at: int | None
    doubles: int = 0
    holes: dict[HoleState, int] = {}
    trade_delay: Delays | None = None
    verified: dict[str, int] = {}


class AlertCounters(msgspec.Struct, frozen=True):
    """Counters of alerts: stored events by kind, posts by result, and what waits or was dropped."""

    events: dict[str, int] = {}
    events_pending: int = 0
    events_dropped: int = 0
    deliveries: dict[str, int] = {}
    deliveries_pending: int = 0


class IngestCounters(msgspec.Struct, frozen=True):
    """All counters; `exchanges` is by exchange name."""

    exchanges: dict[str, ExchangeCounters]
    tick_to_cache: Delays
    ticks_too_late: int
    cache_errors: int
    archive_errors: int
    rows_written: int
    rows_refused: int
    rows_pending: int
    rows_dropped: int
    given_up: int
    stalls: dict[str, int] = {}
    """Number of stalls of the branches of the pipeline, by name."""
    alerts: AlertCounters = AlertCounters()
    shards_owned: dict[str, bool] = {}
    """Whether each shard has an owner that can be reached; known where several processes may ingest."""
    shards_standby: dict[str, bool] = {}
    """Whether each shard has a standby that could take over at once."""
    shard_takeovers: int = 0
    """How often the owner of a shard was gone and replaced."""


def merged_counters(
    counters: Sequence[IngestCounters], owners: Mapping[str, Sequence[IngestCounters]]
) -> IngestCounters:
    """Return the sums over several processes.

    Args:
        counters: of all processes.
        owners: those of the owners of the shards of each exchange; other processes receive its ticks as well.
    """
    of_exchange = {name: [each.exchanges[name] for each in of if name in each.exchanges] for name, of in owners.items()}
    exchanges: dict[str, ExchangeCounters] = {name: reduce(plus, each) for name, each in of_exchange.items() if each}
    total: IngestCounters = reduce(plus, (msgspec.structs.replace(each, exchanges={}) for each in counters))
    return msgspec.structs.replace(total, exchanges=exchanges)


def plus(one: Any, other: Any) -> Any:
    """Return the sum of two counters or parts of them, field by field; the later of two times, what is known of two."""
    match one, other:
        case (None, only) | (only, None):
            return only
        case dict(), dict():
            return one | {key: plus(one.get(key), value) for key, value in other.items()}
        case Delays(), Delays():
            counts = tuple(map(sum, zip(one.counts, other.counts, strict=False)))
            return Delays(one.bounds, counts, one.total + other.total) if one.bounds == other.bounds else other
        case ((ExchangeCounters() | AlertCounters() | IngestCounters()), _):
            fields = {name: plus(getattr(one, name), getattr(other, name)) for name in one.__struct_fields__}
            if isinstance(one, ExchangeCounters):
                fields["last_tick_at"] = max(filter(None, (one.last_tick_at, other.last_tick_at)), default=None)
            return type(one)(**fields)
    return one + other


class DelayCounter:
    """Thread-safe histogram of delays."""

    def __init__(self, bounds: tuple[float, ...] = DELAY_BOUNDS) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0
        self._lock = threading.Lock()

    def count(self, delays: Iterable[float]) -> None:
        """Count delays (seconds); negative ones, after the clock was set back, count as 0."""
        with self._lock:
            for delay in delays:
                self._counts[bisect_left(self._bounds, delay)] += 1
                self._total += max(delay, 0.0)

    def so_far(self) -> Delays:
        """Return the histogram."""
        with self._lock:
            return Delays(self._bounds, tuple(self._counts), self._total)
