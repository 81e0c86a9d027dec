"""Which trades have been counted, by their ids: venues repeat trades on connecting, and now and then by mistake.

Ids ascend per symbol, on most venues by one. So the newest id and the gaps below it tell doubles from trades that come
out of order, in little memory however many trades there are. A trade that stands for several has the id of the last.
Where ids begin anew (a symbol is listed again, an engine reset), a run of lower ids with newer times begins an epoch.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple, cast

from marketflow.feeds.decoder import TradeLine

BEFORE_THE_FIRST = 2_000
"""Ids below the first one that may still come, out of order."""

MOST_GAPS = 200
"""Gaps remembered per symbol; what is in an older one counts as a double."""

EPOCH_TRADES = 10
"""Lower ids in a row, each with a newer time than the last of the old epoch, that begin a new one."""


class Gap(NamedTuple):
    """Ids that have not come, both included."""

    first: int
    last: int


class _Symbol:
    """The ids of one symbol in one epoch."""

    __slots__ = ("epoch_run", "gaps", "newest_at", "newest_id")

    def __init__(self, first_id: int) -> None:
        self.gaps = [Gap(first_id - BEFORE_THE_FIRST, first_id - 1)]  # ascending
        self.newest_id = first_id - 1
        self.newest_at = 0
        self.epoch_run = 0

    def take(self, first: int, last: int) -> bool:
        """Take the ids of a trade; return whether the last one has not come before."""
        if last > self.newest_id:
            if first > self.newest_id + 1:
                self.gaps.append(Gap(self.newest_id + 1, first - 1))
                del self.gaps[:-MOST_GAPS]
            self.newest_id = last
            return True
        at = bisect_left(self.gaps, last, key=lambda gap: gap.last)
        if at == len(self.gaps) or self.gaps[at].first > last:
            return False
        gap = self.gaps[at]
        parts = (Gap(gap.first, min(first, last) - 1), Gap(last + 1, gap.last))
        self.gaps[at : at + 1] = [part for part in parts if part.first <= part.last]
        return True


class TradeIds:
    """The ids of one feed; for one thread at a time."""

    def __init__(self) -> None:
        self._symbols: dict[str, _Symbol] = {}
        self._doubles: Counter[str] = Counter()
        self.epochs = 0
        """How often ids began anew."""

    @property
    def doubles(self) -> int:
        """How many trades came more than once."""
        return self._doubles.total()

    def doubles_by_symbol(self, ours: Mapping[str, str]) -> dict[str, int]:
        """How many of each symbol came more than once, by our name of it; `ours` is by the venue's."""
        return {ours[symbol]: count for symbol, count in self._doubles.copy().items() if symbol in ours}

    def newest_id(self, symbol: str) -> int | None:
        """The newest id that has come."""
        known = self._symbols.get(symbol)
        return None if known is None else known.newest_id

    def has(self, symbol: str, newest_id: int) -> bool:
        """Whether no trade is newer than what has come."""
        known = self._symbols.get(symbol)
        return known is not None and known.newest_id >= newest_id

    def new_of(self, symbol: str, trades: list[TradeLine]) -> list[TradeLine]:
        """Return those of the trades of a symbol that count, by ascending id; they count from now on.

        Trades without an id all count.
        """
        first = trades[0].id
        if not isinstance(first, int):
            return trades
        if (known := self._symbols.get(symbol)) is None:
            known = self._symbols[symbol] = _Symbol(first - trades[0].count + 1)
        # The usual case: one after the other, and none is missing.
        if first == known.newest_id + 1:
            ids = [trade.id for trade in trades]
            if ids == [*range(first, first + len(ids))]:
                known.newest_id = first + len(ids) - 1
                known.newest_at = max(known.newest_at, trades[-1].timestamp or 0)
                known.epoch_run = 0
                return trades
        new = [trade for trade in trades if self._is_new(symbol, trade)]
        new.sort(key=lambda trade: cast("int", trade.id))
        return new

    def _is_new(self, symbol: str, trade: TradeLine) -> bool:
        known = self._symbols[symbol]
        last, at = cast("int", trade.id), trade.timestamp or 0
        if not known.take(last - trade.count + 1, last):
            known.epoch_run = known.epoch_run + 1 if at > known.newest_at and last < known.newest_id else 0
            if known.epoch_run < EPOCH_TRADES:
                self._doubles[symbol] += 1
                return False
            known = self._symbols[symbol] = _Symbol(last)
            known.take(last, last)
            self.epochs += 1
        if last == known.newest_id:
            known.epoch_run = 0
        known.newest_at = max(known.newest_at, at)
        return True
