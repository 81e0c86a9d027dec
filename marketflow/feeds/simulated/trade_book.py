"""The trades of a simulated venue, and the minutes they fold to: what its REST side answers from.

A minute is the floor of the trade's own time; within it trades are ordered by id. Sums are exact (Decimal). Trades are
kept for an hour and up to a number, minutes for a day, so memory is bounded.
"""

import threading
import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from operator import attrgetter

from marketflow.feeds.venues.venue import Trade
from marketflow.model import MINUTE_MS

KEPT_MS = 3_600_000
"""How long trades are kept."""

KEPT_TRADES = 100_000
"""Trades kept a symbol."""

KEPT_MINUTES = 1440

_id = attrgetter("id")


def exact(number: float) -> Decimal:
    """The number that the shortest decimal text of a float states."""
    return Decimal(repr(number))


def digits(number: Decimal | float) -> str:
    """A number as a venue writes it: plain, with eight decimal places, and more where it has them."""
    value = number if isinstance(number, Decimal) else exact(number)
    text = f"{value:.8f}"
    return text if Decimal(text) == value else f"{value:f}"


@dataclass(slots=True)
class MinuteFold:
    """The candle of one minute.

    Args:
        start: of the minute, Unix ms.
        open, high, low, close: prices; open is that of the lowest id, close that of the highest.
        volume, turnover: in base and quote units.
        buy_volume, buy_turnover: the part of it in which the taker bought.
        count: the number of trades.
        first_id, last_id: of them.
    """

    start: int
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal = Decimal(0)
    turnover: Decimal = Decimal(0)
    buy_volume: Decimal = Decimal(0)
    buy_turnover: Decimal = Decimal(0)
    count: int = 0
    first_id: int = -1
    last_id: int = -1

    @property
    def end(self) -> int:
        """Its last millisecond."""
        return self.start + MINUTE_MS - 1

    @classmethod
    def flat(cls, start: int, price: Decimal) -> "MinuteFold":
        """The candle of a minute without trades."""
        return cls(start, price, price, price, price)

    def add(self, trade: Trade) -> None:
        """Fold one more trade in."""
        price, quantity = exact(trade.price), exact(trade.quantity)
        number = trade.id or 0
        if not self.count or number < self.first_id:
            self.open, self.first_id = price, number
        if not self.count or number > self.last_id:
            self.close, self.last_id = price, number
        self.high, self.low = max(self.high, price), min(self.low, price)
        self.volume += quantity
        self.turnover += price * quantity
        if trade.side == "buy":
            self.buy_volume += quantity
            self.buy_turnover += price * quantity
        self.count += 1


def minute_of(at: int) -> int:
    """The start of the minute that holds a time in Unix ms."""
    return at - at % MINUTE_MS


def singles(trade: Trade) -> list[Trade]:
    """The trades that one report stands for, ascending; the quantity is shared out, the sum is kept."""
    if trade.count == 1 or trade.id is None:
        return [trade]
    part = round(trade.quantity / trade.count, 8)
    last = float(exact(trade.quantity) - (trade.count - 1) * exact(part))
    parts = (
        [part] * (trade.count - 1) + [last] if part > 0 and last > 0 else [trade.quantity / trade.count] * trade.count
    )
    first = trade.id - trade.count + 1
    return [
        Trade(trade.symbol, trade.price, quantity, trade.at, first + number, trade.side)
        for number, quantity in enumerate(parts)
    ]


class SymbolBook:
    """The trades of one symbol, ascending by id, each once, and their minutes."""

    def __init__(self, before: Callable[[int], MinuteFold | None], began: int | None) -> None:
        self._before, self._began = before, began
        self._trades: list[Trade] = []
        self._minutes: dict[int, MinuteFold] = {}
        self._lock = threading.Lock()

    def add(self, trade: Trade) -> None:
        """Keep a trade, unless its id is there."""
        with self._lock:
            trades = self._trades
            if trades and trade.id is not None and trade.id <= (trades[-1].id or 0):
                at = bisect_left(trades, trade.id, key=_id)
                if trades[at].id == trade.id:
                    return
                insort(trades, trade, key=_id)
            else:
                trades.append(trade)
            price, start = exact(trade.price), minute_of(trade.at)
            self._minutes.setdefault(start, MinuteFold.flat(start, price)).add(trade)
            self._drop_old(trades[-1].at)

    def _drop_old(self, newest: int) -> None:
        trades = self._trades
        if len(trades) > KEPT_TRADES + 1000 or (len(trades) > 1000 and trades[999].at < newest - KEPT_MS):
            del trades[:1000]
        while len(self._minutes) > KEPT_MINUTES:
            del self._minutes[min(self._minutes)]

    @property
    def newest(self) -> Trade | None:
        """The trade of the highest id."""
        return self._trades[-1] if self._trades else None

    def last(self, limit: int) -> list[Trade]:
        """The newest trades, ascending."""
        return self.below(None, limit)

    def below(self, number: int | None, limit: int, above: int = -1) -> list[Trade]:
        """The newest trades whose id is below `number` (None: any) and above `above`, ascending."""
        with self._lock:
            end = len(self._trades) if number is None else bisect_left(self._trades, number, key=_id)
            start = bisect_left(self._trades, above + 1, key=_id)
            return self._trades[max(start, end - limit) : end] if end > start else []

    def since_id(self, number: int, limit: int) -> list[Trade]:
        """The oldest trades from an id on, ascending."""
        with self._lock:
            start = bisect_left(self._trades, number, key=_id)
            return self._trades[start : start + limit]

    def between(self, since: int, until: int) -> list[Trade]:
        """The trades of a range of times in Unix ms, both included, ascending by id."""
        with self._lock:
            return [trade for trade in self._trades if since <= trade.at <= until]

    def minutes(self, since: int, until: int) -> list[MinuteFold]:
        """The minutes with trades that start from `since` to before `until`, ascending."""
        found = (self._minute(start) for start in self._starts(since, until))
        return [minute for minute in found if minute is not None]

    def minutes_without_gaps(self, since: int, until: int) -> list[MinuteFold]:
        """The same, with a flat candle at the last close for each minute without trades after the first with some."""
        close = self._close_before(since)
        rows = []
        for start in self._starts(since, until):
            minute = self._minute(start)
            if minute is None and close is not None:
                minute = MinuteFold.flat(start, close)
            if minute is not None:
                rows.append(minute)
                close = minute.close
        return rows

    @property
    def first_minute(self) -> int | None:
        """The start of the oldest minute."""
        return self._began if self._began is not None else min(self._minutes, default=None)

    def _starts(self, since: int, until: int) -> range:
        first = self.first_minute
        return range(0) if first is None else range(max(minute_of(since + MINUTE_MS - 1), first), until, MINUTE_MS)

    def _minute(self, start: int) -> MinuteFold | None:
        return self._minutes.get(start) or self._before(start)

    def _close_before(self, since: int) -> Decimal | None:
        first = minute_of(since + MINUTE_MS - 1)
        known = (
            self._minute(start) for start in range(first - MINUTE_MS, first - KEPT_MINUTES * MINUTE_MS, -MINUTE_MS)
        )
        return next((minute.close for minute in known if minute is not None), None)


class TradeBook:
    """The trades of all symbols of a venue.

    Args:
        symbols: the venue's names.
        before: the candle of a minute (its start) before the first trade, by symbol; None for none.
        began: the oldest such minute.
        lag_seconds: how long after a trade was added it can be seen: venues answer by REST later than they stream.
        monotonic: measures that.
    """

    def __init__(
        self,
        symbols: Iterable[str],
        before: Callable[[str, int], MinuteFold | None] = lambda symbol, start: None,
        began: int | None = None,
        lag_seconds: float = 0.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._symbols = {symbol: SymbolBook(partial(before, symbol), began) for symbol in symbols}
        self._waiting: deque[tuple[float, Trade]] = deque()
        self._monotonic = monotonic
        self.lag_seconds = lag_seconds

    def add(self, trade: Trade) -> None:
        """Keep a trade of a symbol that is listed; a report of several is kept as that number of trades."""
        if self.lag_seconds:
            self._waiting.append((self._monotonic() + self.lag_seconds, trade))
        else:
            self._keep(trade)

    def of(self, symbol: str) -> SymbolBook | None:
        """The trades of a symbol as far as they can be seen; None for one that is not listed."""
        while self._waiting and self._waiting[0][0] <= self._monotonic():
            self._keep(self._waiting.popleft()[1])
        return self._symbols.get(symbol)

    def _keep(self, trade: Trade) -> None:
        for each in singles(trade):
            self._symbols[trade.symbol].add(each)
