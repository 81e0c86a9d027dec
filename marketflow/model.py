"""Tick, candle, series: the types of market data.

A tick is a candle of one tick, candles merge, and every response is read from a candle: the latest price is its close,
the average its total over its ticks. Merging is associative and commutative and has an identity (no candle), so the
result does not depend on how ticks are batched, on which thread they are folded, or in which order they arrive.

Ticks of the same millisecond are ordered by arrival, which each carries as its `sequence`; a candle keeps the sequences
of its first and last tick. Without them open and close would depend on the batches.

Times are Unix milliseconds (`*_at`), sequences Unix nanoseconds of the receipt.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Final, Literal, NamedTuple, TypeVar

import msgspec
from msgspec.structs import replace

_Key = TypeVar("_Key")

SLICE_MS = 100
"""Length of a slice, the shortest tumbling window. A minute is a whole number of slices."""

SECOND_MS = 1_000

NANOSECONDS_PER_MS = 1_000_000

FIRST_RECEIPT_MS = 10**11
"""A sequence from before this time (Unix ms, 1973) is no time of receipt: rows have none."""

MINUTE_MS = 60_000
"""Length of a minute, which a row stands for. Where a test shortens it, then to a divisor of this one, so that what is
trimmed by whole minutes of this length still holds whole ones of the other."""


class Mode(StrEnum):
    """Source of ticks: the synthetic generator or the exchanges. Their data never mix."""

    TEST = "test"
    LIVE = "live"

    # An enumeration's own hash is Python code, and every key of a candle is hashed with it.
    __hash__ = str.__hash__


class FeedState(StrEnum):
    """State of the feed of an exchange."""

    CONNECTED = "connected"
    CONNECTING = "connecting"
    STALE = "stale"
    HALTED = "halted"
    GENERATED = "generated"


FINE_STATES = frozenset({FeedState.CONNECTED, FeedState.GENERATED, FeedState.HALTED})
"""Those in which nothing is wrong with a feed: what its venue does not trade cannot come."""


class HoleState(StrEnum):
    """What became of a hole: `absent` at the venue, or `given_up` because its trades cannot be fetched any more."""

    OPEN = "open"
    FILLED = "filled"
    ABSENT = "absent"
    GIVEN_UP = "given_up"


class Series(NamedTuple):
    """One symbol on one exchange in one mode."""

    mode: Mode
    exchange: str
    symbol: str


class Slot(NamedTuple):
    """One slice or minute of one series, by its start (Unix ms)."""

    series: Series
    start: int


class TimeRange(NamedTuple):
    """From `since` to before `until`, Unix ms."""

    since: int
    until: int


class Tick(NamedTuple):
    """One price of one series. `at` is the exchange's clock in Unix ms, `sequence` the order of arrival."""

    price: float
    at: int
    sequence: int

    @property
    def order(self) -> tuple[int, int]:
        """Sorts ticks by event time, then by arrival."""
        return self.at, self.sequence

    @property
    def order_of_receipt(self) -> tuple[int, int]:
        """Sorts ticks of several exchanges by event time, but none after its receipt, then by arrival.

        By event time alone an exchange whose clock is ahead would have the newest price until the others catch up.
        """
        received_at = self.sequence // NANOSECONDS_PER_MS
        return min(self.at, received_at) if received_at > FIRST_RECEIPT_MS else self.at, self.sequence


class Hole(msgspec.Struct, frozen=True):
    """Trades of a series that were not received: those with ids between two that were.

    Args:
        series: of the trades.
        after_id, before_id: ids of the received trades before and after it.
        from_ms, to_ms: their event times (Unix ms).
        found_at, changed_at: when it was found, and came into this state (Unix ms).
        state: what became of it.
        reason: why, in words.
    """

    series: Series
    after_id: int
    before_id: int
    from_ms: int
    to_ms: int
    found_at: int
    changed_at: int
    state: HoleState = HoleState.OPEN
    reason: str = ""


REFERENCE: Final = "reference"
"""Stands for an exchange where the median over all exchanges is meant; none can have this name."""

Source = Literal["ticks", "venue"]
"""What a candle is made of: ticks, or the venue's own candle."""


class Amounts(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What was traded: volumes in base units, turnovers in quote units; of buyers as takers; None is unknown."""

    volume: float
    turnover: float | None
    buy_volume: float | None
    buy_turnover: float | None


class VenueValues(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A minute as the venue's own candle has it; None is what the venue does not say."""

    open: float
    high: float
    low: float
    close: float
    volume: float | None
    turnover: float | None
    ticks: int | None


class Candle(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The summary of one or more ticks of one series.

    `open` and `close` belong to the first and last tick by (event time, arrival); `high_at` and `low_at` are the
    event times at which the extremes were first reached. `version` is raised by every correction of a closed candle; of
    a merged one it counts those of all parts. `amounts` is None, unknown, where a part has no quantity.

    One from the venue's own candle (`source`) has the venue's number of trades as `ticks`, and its vwap as the mean of
    them; 0 ticks and a `total` of 0 where the venue does not say both. `verified` says whether the venue's own candle
    is the same, as far as that is known, and `venue` what it is where it differs.
    """

    open: float
    high: float
    low: float
    close: float
    total: float
    ticks: int
    first_at: int
    last_at: int
    high_at: int
    low_at: int
    first_sequence: int
    last_sequence: int
    version: int = 1
    amounts: Amounts | None = None
    source: Source = "ticks"
    verified: bool | None = None
    venue: VenueValues | None = None

    @property
    def completeness(self) -> float:
        """Compares versions of the same slot, see `more_complete`."""
        return self.ticks + 0.5 if self.source == "ticks" else self.ticks

    @property
    def average(self) -> float | None:
        """Mean price of all ticks, clamped to [low, high] against rounding; None where their number is unknown."""
        return min(max(self.total / self.ticks, self.low), self.high) if self.ticks else None

    @property
    def vwap(self) -> float | None:
        """Mean price of what was traded, clamped to [low, high]; None where that is unknown or nothing."""
        if self.amounts is None or self.amounts.turnover is None or not self.amounts.volume:
            return None
        return min(max(self.amounts.turnover / self.amounts.volume, self.low), self.high)

    @property
    def newest(self) -> Tick:
        """The last tick."""
        return Tick(self.close, self.last_at, self.last_sequence)


Candles = dict[Slot, Candle]
"""Candles by slot: the item of every stream. The empty dict is the identity of `merge_all`."""


def candle_of(tick: Tick) -> Candle:
    """Return the candle of one tick."""
    price, at, sequence = tick
    return Candle(price, price, price, price, price, 1, at, at, at, at, sequence, sequence)


def merge(a: Candle, b: Candle) -> Candle:
    """Return the candle of the ticks of both. Associative and commutative; `total` up to rounding."""
    # By (event time, sequence), and extremes by when they were reached: as tuples it takes half as long again.
    first, last, high, low = a, b, a, a
    if b.first_at < a.first_at or (b.first_at == a.first_at and b.first_sequence < a.first_sequence):
        first = b
    if a.last_at > b.last_at or (a.last_at == b.last_at and a.last_sequence > b.last_sequence):
        last = a
    if b.high > a.high or (b.high == a.high and b.high_at < a.high_at):
        high = b
    if b.low < a.low or (b.low == a.low and b.low_at < a.low_at):
        low = b
    return Candle(
        first.open,
        high.high,
        low.low,
        last.close,
        a.total + b.total,
        a.ticks + b.ticks,
        first.first_at,
        last.last_at,
        high.high_at,
        low.low_at,
        first.first_sequence,
        last.last_sequence,
        a.version + b.version - 1,
        None if a.amounts is None or b.amounts is None else sum_of_amounts(a.amounts, b.amounts),
        a.source if b.source == "ticks" else b.source,
        a.verified if a.verified is b.verified else _both_verified(a.verified, b.verified),
    )


def sum_of_amounts(a: Amounts, b: Amounts) -> Amounts:
    """What was traded in both."""
    if a.turnover is None or b.turnover is None:
        return Amounts(a.volume + b.volume, None, None, None)
    volume, turnover = a.volume + b.volume, a.turnover + b.turnover
    if a.buy_volume is None or b.buy_volume is None or a.buy_turnover is None or b.buy_turnover is None:
        return Amounts(volume, turnover, None, None)
    return Amounts(volume, turnover, a.buy_volume + b.buy_volume, a.buy_turnover + b.buy_turnover)


_EXACT_TO_EIGHT_DECIMALS = 2.0**24
"""Beyond, floats are so far apart that a sum with noise often is a number of eight decimals, too."""


def rounded(amount: float) -> float:
    """A sum of decimals without the noise of its additions: 0.3, and not 0.30000000000000004.

    One that is a number of eight decimals, as venues say amounts, has no noise, and keeps its digits: up to 16.
    """
    if amount < _EXACT_TO_EIGHT_DECIMALS and round(amount, 8) == amount:
        return amount
    return float(f"{amount:.14g}")


def _both_verified(a: bool | None, b: bool | None) -> bool | None:
    """Verified if both are, not if either is known not to be, else unknown."""
    return False if a is False or b is False else None


def more_complete(a: Candle, b: Candle) -> Candle:
    """The better of two versions of the same slot: the one with more ticks; of as many, that made of ticks; the second.

    Every store keeps candles by this rule, which makes writing one twice, late or out of order harmless. The `version`
    is the greater of both: what is made anew, of slices or a venue's trades, does not know of earlier corrections.
    """
    better, other = (a, b) if a.completeness > b.completeness else (b, a)
    return better if better.version >= other.version else replace(better, version=other.version)


def merge_into(target: dict[_Key, Candle], batch: Mapping[_Key, Candle]) -> None:
    """Merge `batch` into `target`, key by key."""
    if target.keys().isdisjoint(batch.keys()):  # as of many series, in a third of the time
        target.update(batch)
        return
    for key, candle in batch.items():
        held = target.get(key)
        target[key] = candle if held is None else merge(held, candle)


def put_more_complete(target: dict[_Key, Candle], key: _Key, candle: Candle) -> None:
    """Put a version of a slot into `target`, unless a more complete one is there."""
    held = target.get(key)
    target[key] = candle if held is None else more_complete(held, candle)


def merge_all(batches: Iterable[Mapping[_Key, Candle]]) -> dict[_Key, Candle]:
    """Merge all batches; the result grows with the number of slots, not of ticks."""
    merged: dict[_Key, Candle] = {}
    for batch in batches:
        merge_into(merged, batch)
    return merged


def slice_start(at: int) -> int:
    """Start of the slice that holds an event time (Unix ms)."""
    return at - at % SLICE_MS


def minute_start(at: int, minute_ms: int = MINUTE_MS) -> int:
    """Start of the minute that holds an event time (Unix ms)."""
    return at - at % minute_ms
