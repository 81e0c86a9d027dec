"""What the screen shows of the state, and how keys change it: selection, order, scrolling, candles of a symbol."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from marketflow.api.queries.boundaries import INTERVALS as GRIDS
from marketflow.cli.watch.client_state import ClientState
from marketflow.cli.watch.keyboard import Key
from marketflow.model import REFERENCE

INTERVALS = tuple(GRIDS)


class Order(StrEnum):
    """Order of the rows."""

    CONFIGURED = "as configured"
    SYMBOL = "symbol"
    GAP = "gap"
    VOLUME = "24h vol"


@dataclass(frozen=True)
class CandleChoice:
    """Candles to show: of a symbol, on an exchange or of the reference price, of an interval."""

    symbol: str
    exchange: str
    interval: str


@dataclass
class View:
    """What is shown; `page` is the number of rows of the last painting, by which Page Up and Page Down move.

    Args:
        ascii: whether the terminal shows ASCII only.
    """

    ascii: bool = False
    order: Order = Order.CONFIGURED
    reverse: bool = False
    selected: str = ""
    first_row: int = 0
    first_exchange: int = 0
    page: int = 1
    candles: CandleChoice | None = None
    _actions: dict[Key, Callable[[ClientState], None]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._actions = {
            Key.UP: lambda state: self._select(state, -1),
            Key.DOWN: lambda state: self._select(state, 1),
            Key.PAGE_UP: lambda state: self._select(state, -self.page),
            Key.PAGE_DOWN: lambda state: self._select(state, self.page),
            Key.HOME: lambda state: self._select(state, -len(state.symbols)),
            Key.END: lambda state: self._select(state, len(state.symbols)),
            Key.LEFT: lambda state: self._move(state, -1),
            Key.RIGHT: lambda state: self._move(state, 1),
            Key.ENTER: self._open,
            Key.ESCAPE: self._close,
            Key.SORT: self._sort,
            Key.REVERSE: self._reverse,
            Key.INTERVAL: self._next_interval,
        }

    def press(self, key: Key, state: ClientState) -> None:
        """Change the view as a key means; keys without a meaning here change nothing."""
        if key in self._actions:
            self._actions[key](state)

    def symbols(self, state: ClientState) -> list[str]:
        """Return all symbols in the chosen order; those of which the value is unknown come last."""
        known = list(state.symbols)
        if self.order is Order.SYMBOL:
            known.sort(reverse=self.reverse)
        elif self.order is Order.CONFIGURED:
            known = known[::-1] if self.reverse else known
        else:
            values = {symbol: self._value(state, symbol) for symbol in known}
            sign = 1 if self.reverse else -1  # the greatest first
            known.sort(key=lambda symbol: (values[symbol] is None, sign * (values[symbol] or 0.0)))
        return known

    def rows(self, state: ClientState, height: int | None) -> list[str]:
        """Return the symbols of as many rows, scrolled so that the selected one is among them."""
        symbols = self.symbols(state)
        if symbols and self.selected not in symbols:
            self.selected = symbols[0]
        if height is None:
            return symbols
        self.page = max(1, height)
        if symbols:
            place = symbols.index(self.selected)
            self.first_row = max(min(self.first_row, place), place - self.page + 1)
        self.first_row = max(0, min(self.first_row, len(symbols) - self.page))
        return symbols[self.first_row : self.first_row + self.page]

    def exchanges(self, state: ClientState) -> Sequence[str]:
        """Return the exchanges from the first one that is shown on."""
        self.first_exchange = max(0, min(self.first_exchange, len(state.exchanges) - 1))
        return state.exchanges[self.first_exchange :]

    def _value(self, state: ClientState, symbol: str) -> float | None:
        if self.order is Order.VOLUME:
            return state.volumes.get(symbol)
        gap = state.gap(symbol)
        return gap.basis_points if gap else None

    def _select(self, state: ClientState, step: int) -> None:
        symbols = self.symbols(state)
        if not symbols:
            return
        place = symbols.index(self.selected) if self.selected in symbols else 0
        self.selected = symbols[max(0, min(len(symbols) - 1, place + step))]
        if self.candles:
            self.candles = CandleChoice(self.selected, self.candles.exchange, self.candles.interval)

    def _move(self, state: ClientState, step: int) -> None:
        """Move by an exchange: the columns of the table, or whose candles are shown (the reference's come first)."""
        if self.candles is None:
            self.first_exchange = max(0, min(self.first_exchange + step, len(state.exchanges) - 1))
            return
        choices = [REFERENCE, *state.exchanges]
        place = choices.index(self.candles.exchange) if self.candles.exchange in choices else 0
        chosen = choices[(place + step) % len(choices)]
        self.candles = CandleChoice(self.candles.symbol, chosen, self.candles.interval)

    def _open(self, state: ClientState) -> None:
        """Show the candles of the selected symbol, at first those of the reference price."""
        self.rows(state, None)
        if self.selected and self.candles is None:
            self.candles = CandleChoice(self.selected, REFERENCE, INTERVALS[0])

    def _close(self, state: ClientState) -> None:
        self.candles = None

    def _sort(self, state: ClientState) -> None:
        orders = list(Order)
        if self.candles is None:
            self.order, self.reverse = orders[(orders.index(self.order) + 1) % len(orders)], False

    def _reverse(self, state: ClientState) -> None:
        if self.candles is None:
            self.reverse = not self.reverse

    def _next_interval(self, state: ClientState) -> None:
        if self.candles is not None:
            place = INTERVALS.index(self.candles.interval)
            following = INTERVALS[(place + 1) % len(INTERVALS)]
            self.candles = CandleChoice(self.candles.symbol, self.candles.exchange, following)
