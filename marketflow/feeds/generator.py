"""Synthetic market: a seeded, mean-reverting random walk for each symbol.

Used by test mode, inside the process, and by `marketflow exchange`, over TCP.
"""

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import reactivex as rx
from reactivex import Observable, abc
from reactivex import operators as ops

from marketflow.clock import Clock, milliseconds
from marketflow.feeds.decoder import Decoder, Line, TradeLine
from marketflow.feeds.feed import FeedReport
from marketflow.model import Candles, FeedState

BASE_PRICES = {"BTCUSDT": 67_000.0, "ETHUSDT": 3_400.0, "SOLUSDT": 160.0, "TONUSDT": 5.5, "DOGEUSDT": 0.16}

# Together they keep a walk within 0.25 % of its base, so that independent exchanges look like one market.
_STEP = 0.0001  # standard deviation of one step, as a part of the price
_PULL = 0.004  # part of the way back to the base price at each step
_LONGEST_PAUSE_SECONDS = 0.1
_MEAN_TURNOVER = 300.0  # of a tick, in the quote currency
_SHORTEST_PAUSE_SECONDS = 0.01


def base_price(symbol: str) -> float:
    """The price around which a symbol is traded; without one of its own, one from its name, the same everywhere."""
    return BASE_PRICES.get(symbol) or random.Random(symbol).uniform(1, 1000)  # noqa: S311 - prices are no secrets


class Market:
    """Endless sequence of prices, round-robin over the symbols; the same seed gives the same prices.

    Args:
        symbols: what is traded.
        rate: ticks a second over all symbols.
        seed: None for a random one.
        monotonic: seconds, by which ticks are due.
    """

    def __init__(
        self,
        symbols: Sequence[str],
        rate: float,
        seed: str | int | None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._random = random.Random(seed)  # noqa: S311 - prices are no secrets
        self._quantities = random.Random(seed)  # noqa: S311 - of its own: prices are the same with and without
        self._symbols: Sequence[str] = ()
        self._base: list[float] = []
        self._prices: list[float] = []
        self.take_symbols(symbols)
        self._rate = rate
        self._monotonic = monotonic
        self._began = monotonic()
        self._made = 0

    def take_symbols(self, symbols: Sequence[str]) -> None:
        """Replace the symbols; the walks of those that stay go on."""
        prices = dict(zip(self._symbols, self._prices, strict=True))
        self._symbols, self._base = tuple(symbols), [base_price(symbol) for symbol in symbols]
        self._prices = [
            prices[symbol] if symbol in prices else base * self._random.uniform(0.998, 1.002)
            for symbol, base in zip(self._symbols, self._base, strict=True)
        ]

    @property
    def pause_seconds(self) -> float:
        """How long to wait between two calls of `due`."""
        return min(max(1 / self._rate, _SHORTEST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)

    def due(self, now_ms: int) -> list[Line]:
        """Return the ticks that are due since the previous call at this rate, at most those of one second.

        Args:
            now_ms: the time of the newest of them (Unix ms); the others lie evenly before it.
        """
        elapsed = self._monotonic() - self._began
        total = int(elapsed * self._rate) + 1
        count = min(total - self._made, max(int(self._rate), 1))
        # After a long pause the walk continues from here; the ticks of the pause are skipped.
        skipped = total - self._made - count
        first = self._made + skipped
        self._made = total
        age_ms = [1000 * (elapsed - (first + i) / self._rate) for i in range(count)]
        return [self._tick(first + i, now_ms - int(age_ms[i])) for i in range(count)]

    def _tick(self, number: int, at: int) -> Line:
        i = number % len(self._symbols)
        price, base = self._prices[i], self._base[i]
        price += self._random.gauss(0, _STEP) * price + (base - price) * _PULL
        self._prices[i] = max(price, base / 100)
        price = float(f"{self._prices[i]:.7g}")
        quantity = float(f"{self._quantities.expovariate(price / _MEAN_TURNOVER) + 1e-8:.4g}")
        return TradeLine(self._symbols[i], price, at, quantity, "buy" if self._quantities.random() < 0.5 else "sell")


class GeneratorFeed:
    """The ticks of one synthetic exchange.

    Args:
        exchange: its name.
        symbols: what it trades.
        rate: ticks a second over all symbols.
        seed: of its prices, the same after each start; None for a random one.
        decoder: validates and folds the ticks, like those of any exchange.
        clock: gives ticks their event time.
        scheduler: runs the generator.
    """

    state = FeedState.GENERATED
    absent = ()
    pause_seconds = 0.0

    def __init__(
        self,
        exchange: str,
        symbols: Sequence[str],
        rate: float,
        seed: str | int | None,
        decoder: Decoder,
        clock: Clock,
        scheduler: abc.SchedulerBase,
    ) -> None:
        self.exchange = exchange
        self.rate = rate
        self.place = "the generator"
        self.decoder = decoder
        self._symbols = symbols
        self._seed = seed
        self._market: Market | None = None
        self._clock = clock
        self._scheduler = scheduler
        self._stopped = threading.Event()

    @property
    def connections(self) -> "tuple[GeneratorFeed]":
        """Itself."""
        return (self,)

    @property
    def refusals(self) -> Mapping[str, str]:
        """None: nothing is subscribed to."""
        return {}

    def take_symbols(self, symbols: Mapping[str, str]) -> None:
        """Replace the symbols."""

        def replace(*_: object) -> None:
            self._symbols = tuple(symbols)
            if self._market is not None:
                self._market.take_symbols(self._symbols)
            self.decoder.take_symbols(symbols)

        self.decoder.take_symbols({*symbols, *(series.symbol for series in self.decoder.series)})
        self._scheduler.schedule(replace)  # between two ticks

    def report(self) -> FeedReport:
        """The offset of its clock, which is this machine's."""
        return FeedReport(clock_offset_ms=0)

    def measure_clock(self) -> None:
        """Do nothing: there is no clock to ask for."""

    def doubles_by_symbol(self) -> None:
        """Unknown: ticks have no ids."""

    def batches(self) -> Observable[Candles]:
        """Emit the candles of the ticks that are due, at most 100 times a second."""
        return rx.defer(lambda _: self._generate(self._begin()))

    def stop(self) -> None:
        """Stop generating and complete."""
        self._stopped.set()

    def _begin(self) -> Market:
        self._market = Market(self._symbols, self.rate, self._seed)
        return self._market

    def _generate(self, market: Market) -> Observable[Candles]:
        return rx.timer(0, market.pause_seconds, scheduler=self._scheduler).pipe(
            ops.take_while(lambda _: not self._stopped.is_set()),
            ops.map(lambda _: self.decoder.fold(market.due(milliseconds(self._clock())))),
            ops.filter(bool),
        )
