"""A simulated market: the generator's prices with quantities, sides and ids, and minutes from before its start.

One order in ten is filled by two or three others at once: as many trades of one time, price and side. A minute of the
history is computed from the seed, the symbol and its own start alone, so another start of the simulator has the same.
"""

import random
import time
from collections.abc import Callable, Sequence
from decimal import Decimal
from math import sin, tau

import msgspec

from marketflow.feeds.decoder import Line, TradeLine
from marketflow.feeds.generator import Market, base_price
from marketflow.feeds.simulated.listings import Listed
from marketflow.feeds.simulated.trade_book import MinuteFold, exact
from marketflow.feeds.venues.venue import Trade
from marketflow.model import MINUTE_MS

IDS_A_MS = 100
"""Ids begin at the time times this, and go up by one: above those of an earlier start at any rate up to 100,000."""

IDS_SINCE_MS = 1_577_836_800_000
"""2020-01-01, so that ids stay below 2^53 for long."""

_STEP_MS = 500
"""Of the trades before the start."""

SWING = 0.002
"""How far prices go from the base price, as a part of it."""

_PERIODS_MINUTES = (1440.0, 377.0, 61.0)
"""Of the waves that a price is the sum of."""


class MarketTrades:
    """Makes the trades that are due, and those of some time before the start.

    Args:
        listed: what is traded.
        rate: trades a second over all symbols.
        seed: None for another walk each time.
        now_ms: the time of the start.
        before_ms: for how long before it there are trades.
        ids_above: added to all ids.
        monotonic: seconds, by which trades are due.
    """

    def __init__(
        self,
        listed: Sequence[Listed],
        rate: float,
        seed: int | None,
        now_ms: int,
        before_ms: int = 0,
        ids_above: int = 0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._native = {each.base + each.quote: each.native for each in listed}
        self._seconds: Callable[[], float] = lambda: 0.0
        self._market = Market(tuple(self._native), rate, seed, lambda: self._seconds())
        self._random = random.Random(seed)  # noqa: S311 - orders are no secrets
        self._newest = dict.fromkeys(self._native.values(), 0)
        self._ahead = dict.fromkeys(self._newest, 0)
        self.pause_seconds = self._market.pause_seconds
        earlier = [
            trade for after_ms in range(0, before_ms, _STEP_MS) for trade in self._made(now_ms - before_ms, after_ms)
        ]
        first_id = ids_above + (now_ms - IDS_SINCE_MS) * IDS_A_MS
        above = {symbol: first_id - newest for symbol, newest in self._newest.items()}
        self.earlier = [msgspec.structs.replace(each, id=(each.id or 0) + above[each.symbol]) for each in earlier]
        """The trades before the start."""
        self._newest = dict.fromkeys(self._newest, first_id)
        began = monotonic() - before_ms / 1000
        self._seconds = lambda: monotonic() - began

    def _made(self, since_ms: int, after_ms: int) -> list[Trade]:
        self._seconds = lambda: after_ms / 1000
        return self.due(since_ms + after_ms)

    def due(self, now_ms: int) -> list[Trade]:
        """The trades since the previous call, ascending by time and, of a symbol, by id."""
        made: list[Trade] = []
        for line in self._market.due(now_ms):
            symbol = self._native[line.symbol]
            if self._ahead[symbol]:
                self._ahead[symbol] -= 1  # so that the rate stays that of trades
                continue
            count = self._random.choice((2, 3)) if self._random.random() < 0.1 else 1
            self._ahead[symbol] = count - 1
            for _ in range(count):
                self._newest[symbol] += 1
                made.append(_trade(symbol, line, now_ms, self._newest[symbol]))
        return made


def _trade(symbol: str, line: Line, now_ms: int, number: int) -> Trade:
    assert isinstance(line, TradeLine)
    quantity = max(round(line.quantity or 0.0, 8), 1e-8)
    return Trade(symbol, line.price, quantity, line.timestamp or now_ms, number, line.side or "buy")


class PriceHistory:
    """The minutes that begin within a time before the start of the market.

    Args:
        listed: the instruments.
        seed: of the market.
        began: the start of the market's first minute, Unix ms.
        length_ms: how far back there are minutes.
        trades_a_minute: about how many there are in one.
    """

    def __init__(
        self, listed: list[Listed], seed: int | None, began: int, length_ms: int, trades_a_minute: float
    ) -> None:
        self._seed, self._trades_a_minute = seed, max(1.0, trades_a_minute)
        self._from, self._until = began - length_ms, began
        self._price = {
            each.native: _waves(base_price(each.base + each.quote), f"{seed}:{each.native}") for each in listed
        }

    def minute(self, symbol: str, start: int) -> MinuteFold | None:
        """The candle of a minute; None outside the history."""
        if not self._from <= start < self._until:
            return None
        chance = random.Random(f"{self._seed}:{symbol}:{start}")  # noqa: S311 - prices are no secrets
        price = self._price[symbol]
        ends = price(start), price(start + MINUTE_MS)
        high, low = max(ends) * (1 + chance.random() * 0.0004), min(ends) * (1 - chance.random() * 0.0004)
        opened, closed, high, low = (float(f"{each:.7g}") for each in (*ends, high, low))
        count = max(1, round(self._trades_a_minute * chance.uniform(0.5, 1.5)))
        fold = MinuteFold(start, exact(opened), exact(high), exact(low), exact(closed), count=count)
        fold.volume = exact(max(round(count * chance.uniform(200, 400) / opened, 8), 1e-8))
        fold.turnover = _rounded(fold.volume * exact(round(sum(ends) / 2, 8)))
        fold.buy_volume = _rounded(fold.volume * exact(round(chance.uniform(0.3, 0.7), 6)))
        fold.buy_turnover = _rounded(fold.turnover * fold.buy_volume / fold.volume)
        return fold


def _rounded(number: Decimal) -> Decimal:
    return number.quantize(Decimal("1e-8"))


def _waves(base: float, seed: str) -> Callable[[int], float]:
    chance = random.Random(seed)  # noqa: S311
    waves = [(period * MINUTE_MS, chance.uniform(0, tau), chance.uniform(0.2, 1.0)) for period in _PERIODS_MINUTES]
    total = sum(size for *_, size in waves)

    def price(at: int) -> float:
        return base * (1 + SWING / total * sum(size * sin(tau * at / period + phase) for period, phase, size in waves))

    return price
