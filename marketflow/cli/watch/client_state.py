"""The client's copy of the stream's state: a snapshot with all later events applied."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from marketflow.api.routes.latest_price import LatestPrice
from marketflow.api.streaming.events import ChangedMode, ChangedPrices, Heartbeat, Snapshot
from marketflow.cli.watch.stream_events import Connected, Lost, WatchEvent
from marketflow.health import Health

MAX_DECIMALS = 10

FRESH = timedelta(seconds=15)
"""Age up to which a price counts as current; also the largest difference in age of prices that are compared."""


def utc_now() -> datetime:
    """Return the time by the clock of this machine."""
    return datetime.now(UTC)


@dataclass(frozen=True)
class ShownPrice:
    """The newest price of a series.

    Args:
        price: the price.
        timestamp: its event time.
        direction: 1 if the last change was upwards, -1 if downwards, 0 before the first change.
        changed_at: when the last change was received (monotonic, s).
    """

    price: float
    timestamp: datetime
    direction: int
    changed_at: float


@dataclass(frozen=True)
class Gap:
    """The difference of the highest and the lowest current price of a symbol.

    Args:
        basis_points: the difference in 1/10,000 of the lowest price.
        buy_on: the exchange with the lowest price; empty where all prices are the same.
        sell_on: the exchange with the highest price; empty where all prices are the same.
    """

    basis_points: float
    buy_on: str
    sell_on: str


class ClientState:
    """The newest price of each series, the mode, the health and the state of the connection.

    Args:
        now: returns the time by the clock of this machine.
        monotonic: measures durations, in seconds.
    """

    def __init__(self, now: Callable[[], datetime] = utc_now, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._monotonic = monotonic
        self._server_ahead = timedelta()
        self.mode = ""
        self.symbols: list[str] = []
        self.exchanges: list[str] = []
        self.prices: dict[tuple[str, str], ShownPrice] = {}
        """By symbol and exchange."""
        self.decimals: dict[str, int] = {}
        """The most decimals that a price of the symbol has had."""
        self.volumes: dict[str, float | None] = {}
        """What was traded of each symbol in the last 24 hours, in the base currency; None is unknown."""
        self.health: Health | None = None
        self.connected = False
        self.lost: Lost | None = None
        """How the last connection was lost; None while connected."""
        self._lost_at = monotonic()

    def apply(self, event: WatchEvent) -> list[LatestPrice]:
        """Apply an event, and return the prices that differ from those stored."""
        match event:
            case Connected():
                self.connected, self.lost = True, None
            case Lost():
                self.connected, self.lost, self._lost_at = False, event, self._monotonic()
            case Snapshot():
                return self._replace(event)
            case ChangedPrices():
                return self._put(event.prices)
            case ChangedMode():
                self.mode = event.mode
                self.prices, self.decimals, self.volumes = {}, {}, {}
            case Health():
                self.health = event
            case Heartbeat():
                self._server_ahead = datetime.fromisoformat(event.timestamp) - self._now()
        return []

    def server_now(self) -> datetime:
        """Return the time by the clock of the server, as far as that is known."""
        return self._now() + self._server_ahead

    def age(self, price: ShownPrice) -> timedelta:
        """Return the age of a price by the clock of the server."""
        return max(timedelta(), self.server_now() - price.timestamp)

    def since_change(self, price: ShownPrice) -> timedelta:
        """Return the time since the last change of a price was received."""
        return timedelta(seconds=self._monotonic() - price.changed_at)

    def gap(self, symbol: str) -> Gap | None:
        """Return the gap between the exchanges of a symbol; None with fewer than two prices of the same time."""
        shown = {exchange: price for exchange in self.exchanges if (price := self.prices.get((symbol, exchange)))}
        newest = max((price.timestamp for price in shown.values()), default=None)
        peers = {name: each.price for name, each in shown.items() if newest and newest - each.timestamp <= FRESH}
        if len(peers) < 2:
            return None
        low, high = min(peers, key=peers.__getitem__), max(peers, key=peers.__getitem__)
        if peers[low] == peers[high]:
            return Gap(0.0, "", "")
        return Gap((peers[high] - peers[low]) / peers[low] * 10_000, low, high)

    def until_reconnect(self) -> float:
        """Return the seconds until the next attempt to connect."""
        pause = self.lost.pause_seconds if self.lost else 0.0
        return max(0.0, pause - (self._monotonic() - self._lost_at))

    def _replace(self, snapshot: Snapshot) -> list[LatestPrice]:
        if snapshot.mode != self.mode:
            self.prices, self.decimals, self.volumes = {}, {}, {}
        self.mode, self.health = snapshot.mode, snapshot.health
        self.symbols, self.exchanges = snapshot.symbols, snapshot.exchanges
        present = {(price.symbol, price.exchange) for price in snapshot.prices}
        self.prices = {series: price for series, price in self.prices.items() if series in present}
        return self._put(snapshot.prices)

    def _put(self, prices: Iterable[LatestPrice]) -> list[LatestPrice]:
        return [price for price in prices if self._put_one(price)]

    def _put_one(self, latest: LatestPrice) -> bool:
        """Store a price, and return whether it differs from the stored one."""
        series, timestamp = (latest.symbol, latest.exchange), datetime.fromisoformat(latest.timestamp)
        before = self.prices.get(series)
        if before and (before.price, before.timestamp) == (latest.price, timestamp):
            return False
        if before and before.price == latest.price:
            self.prices[series] = ShownPrice(latest.price, timestamp, before.direction, before.changed_at)
            return True
        direction = 0 if before is None else 1 if latest.price > before.price else -1
        self.prices[series] = ShownPrice(latest.price, timestamp, direction, self._monotonic())
        self.decimals[latest.symbol] = max(self.decimals.get(latest.symbol, 0), _decimals(latest.price))
        return True


def _decimals(price: float) -> int:
    exponent = Decimal(repr(price)).normalize().as_tuple().exponent
    return min(MAX_DECIMALS, max(0, -exponent)) if isinstance(exponent, int) else 0
