"""What a watcher knows of the market: what all messages so far add up to."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from marketflow.cli.watch.messages import (
    ChangedMode,
    ChangedPrices,
    Connected,
    Health,
    Heartbeat,
    Lost,
    Message,
    Price,
    Snapshot,
)

MOST_DECIMALS = 10


def utc_now() -> datetime:
    """The clock of this machine."""
    return datetime.now(UTC)


@dataclass(frozen=True)
class Quote:
    """A newest price: whether it is above (1) or below (-1) the one before it, and when that was seen, by our clock."""

    price: float
    timestamp: datetime
    direction: int
    changed_at: datetime


class Market:
    """The newest price of each series, the mode, the health and the state of the connection.

    Args:
        now: the time by the clock of this machine.
    """

    def __init__(self, now: Callable[[], datetime] = utc_now) -> None:
        self._now = now
        self._ahead = timedelta()  # the server's clock, of ours
        self.mode = ""
        self.symbols: list[str] = []
        self.exchanges: list[str] = []
        self.quotes: dict[tuple[str, str], Quote] = {}
        """By symbol and exchange."""
        self.decimals: dict[str, int] = {}
        """How many digits behind the point the prices of a symbol have had."""
        self.health: Health | None = None
        self.connected = False
        self.lost: Lost | None = None
        """What became of the last connection; None while there is one."""
        self._lost_at = now()
        self.version = 0
        """Grows with each message."""

    def take(self, message: Message) -> list[Price]:
        """Take a message, and give the prices that are news."""
        self.version += 1
        match message:
            case Connected():
                self.connected, self.lost = True, None
            case Lost():
                self.connected, self.lost, self._lost_at = False, message, self._now()
            case Snapshot():
                return self._replace(message)
            case ChangedPrices():
                return self._put(message.prices)
            case ChangedMode():
                self.mode = message.mode
                self.quotes, self.decimals = {}, {}
            case Health():
                self.health = message
            case Heartbeat():
                self._ahead = message.timestamp - self._now()
        return []

    def age(self, quote: Quote) -> timedelta:
        """How old a price is, by the clock of the server."""
        return max(timedelta(), self._now() + self._ahead - quote.timestamp)

    def since(self, quote: Quote) -> timedelta:
        """How long ago a price was seen to change."""
        return self._now() - quote.changed_at

    def until_next_try(self) -> float:
        """Seconds until a lost connection is tried again."""
        pause = self.lost.pause_seconds if self.lost else 0.0
        return max(0.0, pause - (self._now() - self._lost_at).total_seconds())

    def _replace(self, snapshot: Snapshot) -> list[Price]:
        if snapshot.mode != self.mode:
            self.quotes, self.decimals = {}, {}
        self.mode, self.health = snapshot.mode, snapshot.health
        self.symbols, self.exchanges = snapshot.symbols, snapshot.exchanges
        told = {(price.symbol, price.exchange) for price in snapshot.prices}
        self.quotes = {series: quote for series, quote in self.quotes.items() if series in told}
        return self._put(snapshot.prices)

    def _put(self, prices: Iterable[Price]) -> list[Price]:
        return [price for price in prices if self._is_news(price)]

    def _is_news(self, told: Price) -> bool:
        series = told.symbol, told.exchange
        before = self.quotes.get(series)
        if before and (before.price, before.timestamp) == (told.price, told.timestamp):
            return False
        if before and before.price == told.price:
            self.quotes[series] = Quote(told.price, told.timestamp, before.direction, before.changed_at)
            return True
        direction = 0 if before is None else 1 if told.price > before.price else -1
        self.quotes[series] = Quote(told.price, told.timestamp, direction, self._now())
        self.decimals[told.symbol] = max(self.decimals.get(told.symbol, 0), _decimals(told.price))
        return True


def _decimals(price: float) -> int:
    exponent = Decimal(repr(price)).normalize().as_tuple().exponent
    return min(MOST_DECIMALS, max(0, -exponent)) if isinstance(exponent, int) else 0
