"""Which trades have been counted, by their ids: venues repeat trades on connecting, and now and then by mistake.

Ids ascend per symbol. A set of the newest ids tells doubles from trades that come out of order; what is older than all
of it is a double. Where ids begin anew (a symbol is listed again, an engine reset), a run of lower ids with newer times
begins a new epoch.
"""

from collections import deque

from marketflow.feeds.venues.venue import Trade

REMEMBERED = 2_000
"""Ids remembered a symbol."""

EPOCH_TRADES = 10
"""Lower ids in a row, each with a newer time than the last of the old epoch, that begin a new one."""


class _Symbol:
    __slots__ = ("epoch_run", "highest", "newest_at", "order", "seen")

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.order: deque[int] = deque()
        self.highest = -1
        self.newest_at = 0
        self.epoch_run = 0


class TradeIds:
    """The ids of one feed; for one thread at a time."""

    def __init__(self) -> None:
        self._symbols: dict[str, _Symbol] = {}
        self.doubles = 0
        self.epochs = 0
        """How often ids began anew."""

    def has(self, symbol: str, newest_id: int) -> bool:
        """Whether no trade is newer than what has come."""
        known = self._symbols.get(symbol)
        return known is not None and known.highest >= newest_id

    def is_new(self, trade: Trade) -> bool:
        """Whether a trade counts, and count it from now on; without an id it always does."""
        if trade.id is None:
            return True
        known = self._symbols.setdefault(trade.symbol, _Symbol())
        if trade.id in known.seen or (known.order and trade.id < known.highest - REMEMBERED):
            if trade.at <= known.newest_at or trade.id >= known.highest:
                known.epoch_run = 0
                self.doubles += 1
                return False
            known.epoch_run += 1
            if known.epoch_run < EPOCH_TRADES:
                self.doubles += 1
                return False
            known = self._symbols[trade.symbol] = _Symbol()
            self.epochs += 1
        known.seen.add(trade.id)
        known.order.append(trade.id)
        if len(known.order) > REMEMBERED:
            known.seen.discard(known.order.popleft())
        if trade.id > known.highest:
            known.highest, known.epoch_run = trade.id, 0
        known.newest_at = max(known.newest_at, trade.at)
        return True
