"""Which trades have been counted, by their ids: venues repeat trades on connecting, and now and then by mistake.

Ids ascend per symbol. All up to the newest one are counted but those in gaps: a lower id is that of a late trade if it
lies in a gap, and a double otherwise. Where ids go up by one, a gap that is not filled within a moment is a hole. Where
ids begin anew (a symbol is listed again, an engine reset), a run of lower ids with newer times begins a new epoch.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from math import inf
from operator import attrgetter
from typing import Protocol, TypeVar

import msgspec

from marketflow.clock import Clock, milliseconds, system_clock

GRACE_SECONDS = 2.0
"""How long trades may be overtaken by later ones before their ids count as missing."""

MOST_GAPS = 256
"""Gaps remembered a symbol, the newest; a late trade of an older one is dropped as a double."""

MOST_TEXTS = 2_000
"""Ids remembered a symbol where they are no numbers."""

MOST_MISSING = 100_000
"""Entries of what is missing that are kept until they are read, the newest."""

EPOCH_TRADES = 10
"""Lower ids in a row that begin a new epoch."""

BEFORE_FIRST = 1_000
"""How far below the first id trades still count: they were overtaken by it."""

MOST_DIGITS = 64
"""A longer id is a text."""


class TradeWithId(Protocol):
    """A trade: id (of several trades the last one's), event time in Unix ms, and how many trades it stands for."""

    @property
    def id(self) -> int | str | None:
        """None where it has none."""
        ...

    @property
    def timestamp(self) -> float | None:
        """None where the exchange does not say it."""
        ...

    @property
    def count(self) -> int:
        """Mostly one."""
        ...


_T = TypeVar("_T", bound=TradeWithId)


class MissingIds(msgspec.Struct, frozen=True):
    """Trades that were not received: those with ids between two that were, or that the venue names as its newest.

    Args:
        symbol: ours.
        after_id, before_id: of the trades before and after them.
        from_ms, to_ms: their event times (Unix ms).
    """

    symbol: str
    after_id: int
    before_id: int
    from_ms: int
    to_ms: int


class _Gap:
    __slots__ = ("first", "found_at", "from_ms", "is_reported", "last", "to_ms")

    def __init__(self, first: int, last: int, from_ms: int, to_ms: int, found_at: float, is_reported: bool) -> None:
        self.first, self.last, self.from_ms, self.to_ms = first, last, from_ms, to_ms
        self.found_at = found_at
        self.is_reported = is_reported


class _Symbol:
    __slots__ = ("gaps", "named", "named_at", "newest", "newest_at", "run", "run_began", "run_newest")

    def __init__(self, newest: int, newest_at: int) -> None:
        self.newest = newest
        self.newest_at = newest_at
        self.gaps: deque[_Gap] = deque(maxlen=MOST_GAPS)
        self.named = -1  # the newest id by the venue, while it is above ours
        self.named_at = 0.0
        self.run = 0  # lower ids in a row with newer times
        self.run_newest = -1  # the newest id when that run began
        self.run_began = (0, 0)  # its first id, and the time of that trade


class TradeIds:
    """The ids of one feed. A symbol is for one thread at a time; what is missing may be read by another one.

    Args:
        reports_missing: whether somebody reads what is missing.
        epoch_trades: how many lower ids in a row, each with a newer time than the last of the old epoch, begin a new
            one. A double has the time of the first, so one is enough where nothing brings back the others.
        monotonic: measures the grace, in seconds.
        clock: this machine's time.
    """

    def __init__(
        self,
        reports_missing: bool = True,
        epoch_trades: int = EPOCH_TRADES,
        monotonic: Callable[[], float] = time.monotonic,
        clock: Clock = system_clock,
    ) -> None:
        self._reports_missing = reports_missing
        self._epoch_trades = epoch_trades
        self._monotonic = monotonic
        self._clock = clock
        self._symbols: dict[str, _Symbol] = {}
        self._texts: dict[str, tuple[set[str], deque[str]]] = {}
        self._counted_until: dict[str, int] = {}
        self._doubles: Counter[str] = Counter()
        self._missing: deque[MissingIds] = deque(
            maxlen=MOST_MISSING
        )  # found early: where gaps are evicted, or ids begin anew
        self._lock = threading.Lock()
        self.epochs = 0
        """How often ids began anew."""
        self.late = 0
        """How many trades came after one with a higher id."""

    @property
    def doubles(self) -> int:
        """How many trades came more than once."""
        return sum(dict(self._doubles).values())  # a copy: the thread of the feed may add a symbol

    @property
    def has_any(self) -> bool:
        """Whether any trade has had an id."""
        return bool(self._symbols or self._texts)

    def doubles_by_symbol(self) -> dict[str, int]:
        """How many of each symbol came more than once."""
        return dict(self._doubles)

    def count_after(self, until: Mapping[str, int]) -> None:
        """Count trades of these symbols after these event times (Unix ms) only: an earlier run has counted others."""
        self._counted_until |= until

    def newest(self, symbol: str) -> tuple[int, int] | None:
        """Id and newest event time (Unix ms) of the newest trade; None before the first one."""
        known = self._symbols.get(symbol)
        return None if known is None else (known.newest, known.newest_at)

    def has(self, symbol: str, newest_id: int) -> bool:
        """Whether no trade is newer than what has come."""
        known = self._symbols.get(symbol)
        return known is not None and known.newest >= newest_id

    def new_of(self, symbol: str, trades: list[_T]) -> list[_T]:
        """Return those of the trades of one of our symbols that count; they count from now on.

        Trades without an id all count. Those that overtook each other are put in the order of their ids.
        """
        if self.take_next(symbol, [trade.id for trade in trades], trades[-1].timestamp):
            return trades
        late = self.late
        new = [trade for trade in trades if trade.id is None or self._counts(symbol, trade.id, trade)]
        if self.late != late:
            new.sort(key=lambda trade: number if (number := _number(trade.id or 0)) is not None else -1)
        return new

    def take_next(self, symbol: str, ids: Sequence[int | str | None], newest_at: float | None) -> bool:
        """Count trades if each is the next one after that before it, which is the usual case; return whether they are.

        Args:
            symbol: ours.
            ids: of the trades.
            newest_at: event time of the last of them (Unix ms).
        """
        known, first = self._symbols.get(symbol), ids[0]
        if known is None or first != known.newest + 1 or ids != [*range(first, first + len(ids))]:
            return False
        known.newest = first + len(ids) - 1
        known.newest_at = max(known.newest_at, int(newest_at or 0))
        return True

    def _counts(self, symbol: str, trade_id: int | str, trade: TradeWithId) -> bool:
        if (at := trade.timestamp) is None:
            return self.is_new(symbol, trade_id, milliseconds(self._clock()), trade.count, is_dated=False)
        return self.is_new(symbol, trade_id, int(at), trade.count)

    def is_new(self, symbol: str, trade_id: int | str, at: int, count: int = 1, is_dated: bool = True) -> bool:
        """Whether a trade counts, and count it from now on.

        Args:
            symbol: ours.
            trade_id: of several trades the last one's.
            at: event time in Unix ms.
            count: how many trades it stands for.
            is_dated: whether the time is the exchange's, and not that of the receipt.
        """
        with self._lock:
            number = _number(trade_id)
            if number is None:
                is_new = self._is_new_text(symbol, str(trade_id))
            else:
                is_new = self._is_new(symbol, number, at, count, is_dated)
        if not is_new:
            self._doubles[symbol] += 1
        return is_new

    def note_newest(self, symbol: str, newest_id: int) -> None:
        """Take notice of the id that the venue names as its newest: one that does not come in time is missing."""
        known = self._symbols.get(symbol)
        if known is None:
            return
        if newest_id <= known.newest:
            known.named = -1
        elif known.named <= known.newest:
            known.named, known.named_at = newest_id, self._monotonic()
        elif self._monotonic() - known.named_at >= GRACE_SECONDS:
            with self._lock:
                now_ms = max(known.newest_at, milliseconds(self._clock()))
                self._add_gap(symbol, known, known.named, now_ms, known.named_at)
                known.newest = known.named

    def lose(self, symbol: str, trade_id: int, at: int, count: int = 1) -> None:
        """Report a trade that came, and could not be counted, as missing."""
        with self._lock:
            last = self._missing[-1] if self._missing else None
            if last is not None and last.symbol == symbol and last.before_id == trade_id - count + 1:
                since, until = min(last.from_ms, at), max(last.to_ms, at)
                self._missing[-1] = MissingIds(symbol, last.after_id, trade_id + 1, since, until)
            else:
                self._missing.append(MissingIds(symbol, trade_id - count, trade_id + 1, at, at))

    def missing(self) -> list[MissingIds]:
        """What has not come within the grace, each once, in the order in which it was found."""
        before = self._monotonic() - GRACE_SECONDS
        with self._lock:
            for symbol, known in self._symbols.items():
                for gap in known.gaps:
                    if gap.found_at <= before:
                        self._report(symbol, gap)
            found = [*self._missing]
            self._missing.clear()
        return found

    def complete_until(self, symbol: str) -> int | None:
        """The event time (Unix ms) until which no id is missing that `missing` has not yet given; None without any."""
        with self._lock:
            if (known := self._symbols.get(symbol)) is None:
                return None
            early = [each.from_ms for each in self._missing if each.symbol == symbol]
            return min([known.newest_at, *early, *(gap.from_ms for gap in known.gaps if not gap.is_reported)])

    # Under the lock

    def _is_new(self, symbol: str, number: int, at: int, count: int, is_dated: bool) -> bool:
        known = self._symbols.get(symbol)
        if known is None:
            if at <= self._counted_until.get(symbol, -inf):
                return False
            known = self._symbols[symbol] = _Symbol(number, at)
            known.gaps.append(_Gap(number - BEFORE_FIRST, number - count, at, at, 0.0, True))  # counts, but is no hole
            return True
        if number > known.newest:
            if number - count > known.newest:
                self._add_gap(symbol, known, number - count, at, self._monotonic())
            known.newest, known.newest_at = number, max(at, known.newest_at)
            return True
        needed = self._epoch_trades if is_dated else EPOCH_TRADES
        return self._fills_gap(symbol, known, number, at, count) or self._begins_epoch(
            symbol, known, number, at, needed
        )

    def _add_gap(self, symbol: str, known: _Symbol, last: int, to_ms: int, found_at: float) -> None:
        """Remember that the ids from the newest one to `last` have not come."""
        if len(known.gaps) == MOST_GAPS:
            self._report(symbol, known.gaps[0])
        from_ms = min(known.newest_at, to_ms)
        known.gaps.append(_Gap(known.newest + 1, last, from_ms, max(from_ms, to_ms), found_at, False))

    def _report(self, symbol: str, gap: _Gap) -> None:
        if self._reports_missing and not gap.is_reported:
            self._missing.append(MissingIds(symbol, gap.first - 1, gap.last + 1, gap.from_ms, gap.to_ms))
        gap.is_reported = True

    def _fills_gap(self, symbol: str, known: _Symbol, number: int, at: int, count: int) -> bool:
        gap = next((each for each in reversed(known.gaps) if each.first <= number <= each.last), None)
        if gap is None or at <= self._counted_until.get(symbol, -inf):
            return False
        known.run = 0
        known.newest_at = max(known.newest_at, at)
        self.late += 1
        gaps = [each for each in known.gaps if each is not gap]
        for first, last in ((gap.first, number - count), (number + 1, gap.last)):
            if first <= last:
                gaps.append(_Gap(first, last, gap.from_ms, gap.to_ms, gap.found_at, gap.is_reported))
        gaps.sort(key=attrgetter("first"))
        known.gaps.clear()
        known.gaps.extend(gaps)
        return True

    def _begins_epoch(self, symbol: str, known: _Symbol, number: int, at: int, needed: int) -> bool:
        """Whether ids have begun anew with a run of trades that this one ends; the others of it are missing."""
        if at <= known.newest_at:
            known.run = 0
            return False
        if known.run == 0 or known.run_newest != known.newest:
            known.run, known.run_newest, known.run_began = 0, known.newest, (number, at)
        known.run += 1
        if known.run < needed:
            return False
        self.epochs += 1
        for gap in known.gaps:
            self._report(symbol, gap)
        first, began_at = known.run_began
        if first < number:
            self._report(symbol, _Gap(first, number - 1, began_at, at, 0.0, False))
        self._symbols[symbol] = _Symbol(number, at)
        return True

    def _is_new_text(self, symbol: str, text: str) -> bool:
        seen, order = self._texts.setdefault(symbol, (set(), deque()))
        if text in seen:
            return False
        seen.add(text)
        order.append(text)
        if len(order) > MOST_TEXTS:
            seen.discard(order.popleft())
        return True


def _number(trade_id: int | str) -> int | None:
    """An id as a number, None for a text that is none."""
    if isinstance(trade_id, int):
        return trade_id
    return int(trade_id) if trade_id.isascii() and trade_id.isdigit() and len(trade_id) <= MOST_DIGITS else None
