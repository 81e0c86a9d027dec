"""The state as a table: a row for each symbol, a column for each exchange; cut to the size of the terminal.

The volume of 24 hours has a column where it is known of any symbol.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from marketflow.cli.watch.client_state import ClientState, ShownPrice
from marketflow.text import visible

BRIGHT = timedelta(seconds=0.5)
FADED = timedelta(seconds=1.5)
"""Time after a change for which the price is bold, and for which it is coloured."""

FRESH = timedelta(seconds=15)
"""Age up to which a price counts as current; also the largest difference in age of prices in a spread."""

MAX_FIXED_PRICE = 1e12
"""Prices from here on are written with an exponent."""

_GOOD = ("ok", "connected", "generated")
_GAP = 2
_AGE_WIDTH = 5
_SPREAD_WIDTHS = (12, 7)
_VOLUME = "24h vol"
_VOLUME_WIDTH = 8


class Size(NamedTuple):
    """Columns and lines of the terminal; None is unlimited."""

    width: int | None = None
    height: int | None = None


class _Layout(NamedTuple):
    """Columns of the table that fit."""

    symbols: Sequence[str]
    exchanges: Sequence[str]
    with_ages: bool
    with_spread: bool
    with_volume: bool

    @property
    def width_beside_prices(self) -> int:
        """Width of the columns after those of the exchanges."""
        widths: list[int] = [
            *(_SPREAD_WIDTHS if self.with_spread else ()),
            *([_VOLUME_WIDTH] if self.with_volume else []),
        ]
        return sum(widths) + _GAP * len(widths)


def render(state: ClientState, url: str, size: Size) -> RenderableType:
    """Render title, health and table so that they fit."""
    lines = [_title(state, url), _health(state)]
    if not state.symbols:
        return Group(*lines)
    # Three more lines: column names, rule, and the count of hidden rows and columns.
    rows = len(state.symbols) if size.height is None else max(1, size.height - len(lines) - 3)
    symbols = state.symbols[:rows]
    prices = {symbol: _price_texts(state, symbol) for symbol in symbols}
    known = any(state.volumes.get(symbol) is not None for symbol in state.symbols)
    layout = _layout(symbols, state.exchanges, prices, size.width, known)
    table = _table(state, layout, prices)
    hidden = (len(state.symbols) - len(symbols), len(state.exchanges) - len(layout.exchanges))
    return Group(*lines, table, *([_hidden(*hidden)] if any(hidden) else []))


def _title(state: ClientState, url: str) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    if state.mode:
        text.append(f"{visible(state.mode)} mode  ", "bold")
    if state.connected:
        text.append("connected", "green")
    elif state.lost is None:
        text.append("connecting", "yellow")
    else:
        seconds = state.until_reconnect()
        when = f"trying again in {seconds:.0f} s" if seconds >= 0.5 else "trying again"
        text.append(f"disconnected: {visible(state.lost.reason)}; {when}", "bold red")
    return text.append(f"  {visible(url)}", "dim")


def _health(state: ClientState) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    if (health := state.health) is None:
        return text
    if not state.connected:
        return text.append("feeds and stores: unknown while disconnected", "dim")
    states = {"Redis": health.redis, "PostgreSQL": health.postgres, **health.exchanges}
    # Problems first, so that they are never cut off.
    for name, status in sorted(states.items(), key=lambda each: each[1] in _GOOD):
        text.append(f"{visible(name)} ", "dim")
        text.append(visible(status), "green" if status in _GOOD else "bold yellow").append("  ")
    text.rstrip()
    return text


def _price_texts(state: ClientState, symbol: str) -> dict[str, str]:
    """Return the prices of a symbol by exchange, with the same number of decimals."""
    return {
        exchange: _price_text(shown.price, state.decimals[symbol])
        for exchange in state.exchanges
        if (shown := state.prices.get((symbol, exchange)))
    }


def _price_text(price: float, decimals: int) -> str:
    return f"{price:,.{decimals}f}" if abs(price) < MAX_FIXED_PRICE else f"{price:.9g}"


def _layout(
    symbols: Sequence[str],
    exchanges: Sequence[str],
    prices: dict[str, dict[str, str]],
    width: int | None,
    with_volume: bool,
) -> _Layout:
    """Choose columns: drop ages first, then the volume, then spreads, then the last exchanges, until the table fits."""
    for with_ages, volume, with_spread in (
        (True, with_volume, True),
        (False, with_volume, True),
        (True, False, True),
        (False, False, True),
        (False, False, False),
    ):
        layout = _Layout(symbols, exchanges, with_ages, with_spread, volume)
        fitting = len(exchanges) if width is None else _fitting(layout, prices, width)
        if fitting == len(exchanges):
            break
    return layout._replace(exchanges=exchanges[: max(1, fitting)])


def _fitting(layout: _Layout, prices: dict[str, dict[str, str]], width: int) -> int:
    """Return how many exchanges fit."""
    left = width - max(map(len, ["symbol", *layout.symbols])) - layout.width_beside_prices
    for number, exchange in enumerate(layout.exchanges):
        longest = max(len(texts.get(exchange, "-")) for texts in prices.values())
        left -= _GAP + max(len(exchange), longest + (_AGE_WIDTH if layout.with_ages else 0))
        if left < 0:
            return number
    return len(layout.exchanges)


def _table(state: ClientState, layout: _Layout, prices: dict[str, dict[str, str]]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, padding=(0, _GAP - 1, 0, 0), pad_edge=False
    )
    table.add_column("symbol", no_wrap=True)
    for exchange in layout.exchanges:
        table.add_column(Text(visible(exchange)), justify="right", no_wrap=True)
    if layout.with_spread:
        for name, width in zip(("spread", "%"), _SPREAD_WIDTHS, strict=True):
            table.add_column(name, justify="right", no_wrap=True, min_width=width)
    if layout.with_volume:
        table.add_column(_VOLUME, justify="right", no_wrap=True, min_width=_VOLUME_WIDTH)
    for symbol in layout.symbols:
        style = "" if state.connected else "dim"
        table.add_row(
            Text(visible(symbol), style),
            *(_cell(state, symbol, exchange, prices, layout.with_ages) for exchange in layout.exchanges),
            *(Text(text, style) for text in (_spread(state, symbol) if layout.with_spread else ())),
            *([Text(_volume_text(state.volumes.get(symbol)), style)] if layout.with_volume else []),
        )
    return table


def _cell(state: ClientState, symbol: str, exchange: str, prices: dict[str, dict[str, str]], with_age: bool) -> Text:
    shown = state.prices.get((symbol, exchange))
    if shown is None:
        return Text("-".ljust(1 + with_age * _AGE_WIDTH), "dim")
    age = state.age(shown)
    text = Text()
    text.append(prices[symbol][exchange], _style(state, shown, age))
    if with_age:
        text.append(_age_text(age).rjust(_AGE_WIDTH), "yellow" if state.connected and age > FRESH else "dim")
    return text


def _style(state: ClientState, shown: ShownPrice, age: timedelta) -> str:
    if not state.connected or age > FRESH:
        return "dim"
    since = state.since_change(shown)
    if shown.direction == 0 or since > FADED:
        return ""
    colour = "green" if shown.direction > 0 else "red"
    return f"bold {colour}" if since <= BRIGHT else colour


def _age_text(age: timedelta) -> str:
    seconds = int(age.total_seconds())
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def _spread(state: ClientState, symbol: str) -> tuple[str, str]:
    """Return the difference of the highest and the lowest current price over exchanges, absolute and in percent."""
    current = [shown for exchange in state.exchanges if (shown := state.prices.get((symbol, exchange)))]
    newest = max((shown.timestamp for shown in current), default=None)
    peers = [shown.price for shown in current if newest is not None and newest - shown.timestamp <= FRESH]
    if len(peers) < 2:
        return "-", "-"
    low, high = min(peers), max(peers)
    return _price_text(high - low, state.decimals[symbol]), f"{(high - low) / low * 100:.3f}"


def _volume_text(volume: float | None) -> str:
    """Return an amount in at most eight characters; one that is unknown is no zero."""
    if volume is None:
        return "-"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if volume >= size:
            return f"{volume / size:.2f}{unit}" if volume < 1e15 else f"{volume:.1e}"
    if volume >= 1000 or volume == 0:
        return f"{volume:,.0f}"
    return f"{volume:.5g}" if volume >= 1e-4 else f"{volume:.1e}"


def _hidden(symbols: int, exchanges: int) -> Text:
    hidden = [
        f"{count} more {kind if count == 1 else kind + 's'}"
        for count, kind in ((symbols, "symbol"), (exchanges, "exchange"))
        if count
    ]
    return Text(f"... {' and '.join(hidden)}", "dim", no_wrap=True, overflow="ellipsis")
