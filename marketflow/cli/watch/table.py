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

from marketflow.cli.watch.client_state import FRESH, ClientState, ShownPrice
from marketflow.cli.watch.view import View
from marketflow.text import visible

BRIGHT = timedelta(seconds=0.5)
FADED = timedelta(seconds=1.5)
"""Time after a change for which the price is bold, and for which it is coloured."""

MAX_FIXED_PRICE = 1e12
"""Prices from here on are written with an exponent."""

_GOOD = ("ok", "connected", "generated", "halted")
_PADDING = 2
_AGE_WIDTH = 5
_GAP_HEADINGS = ("gap bp", "buy on", "sell on")
_GAP_WIDTH = 8
_VOLUME = "24h vol"
_VOLUME_WIDTH = 8
_ARROWS = {1: "\N{BLACK UP-POINTING TRIANGLE}", -1: "\N{BLACK DOWN-POINTING TRIANGLE}"}
_ASCII_ARROWS = {1: "+", -1: "-"}


class Size(NamedTuple):
    """Columns and lines of the terminal; None is unlimited."""

    width: int | None = None
    height: int | None = None


class _Layout(NamedTuple):
    """Columns of the table that fit."""

    symbols: Sequence[str]
    exchanges: Sequence[str]
    arrows: dict[int, str]
    with_ages: bool
    with_volume: bool
    gap_widths: Sequence[int]
    """Widths of the gap in basis points, of where to buy and of where to sell; of as many as are shown."""

    @property
    def width_beside_prices(self) -> int:
        """Width of the columns after those of the exchanges."""
        widths = [*self.gap_widths, *([_VOLUME_WIDTH] if self.with_volume else [])]
        return sum(widths) + _PADDING * len(widths)


def render(state: ClientState, url: str, size: Size, view: View | None = None) -> RenderableType:
    """Render title, health and table so that they fit; with a view its arrows, its part of the table and its keys."""
    lines = headlines(state, url)
    if not state.symbols:
        return Group(*lines, *([keys_line(view)] if view else []))
    # Three more lines: column names, rule, and which rows and columns are shown. One for the keys, if it fits.
    rows = None if size.height is None else size.height - len(lines) - 3
    footer = []
    if view is not None and (rows is None or rows > 2):
        footer = [keys_line(view)]
        rows = None if rows is None else rows - 1
    rows = None if rows is None else max(1, rows)
    symbols = view.rows(state, rows) if view else state.symbols[:rows]
    exchanges = view.exchanges(state) if view else state.exchanges
    prices = {symbol: _price_texts(state, symbol) for symbol in symbols}
    known = any(state.volumes.get(symbol) is not None for symbol in state.symbols)
    arrows = {} if view is None else _ASCII_ARROWS if view.ascii else _ARROWS
    layout = _layout(state, symbols, exchanges, arrows, prices, size.width, known)
    table = _table(state, layout, prices, view.selected if view else "")
    hidden = (len(state.symbols) - len(symbols), len(state.exchanges) - len(layout.exchanges))
    if any(hidden):
        footer.insert(0, _shown(state, view, layout) if view else _hidden(*hidden))
    return Group(*lines, table, *footer)


def headlines(state: ClientState, url: str) -> list[Text]:
    """Return the lines above the table: mode and connection, then feeds and stores."""
    return [_title(state, url), _health(state)]


def keys_line(view: View) -> Text:
    """Return the line with the keys that mean something in a view."""
    up_down, left_right = ("up/down", "left/right") if view.ascii else ("\u2191\u2193", "\u2190\u2192")
    if view.candles:
        keys = [("Esc", "prices"), (up_down, "symbol"), (left_right, "exchange"), ("i", "interval")]
    else:
        order = f"sort: {view.order}{', reversed' if view.reverse else ''}"
        keys = [(up_down, "select"), ("Enter", "candles"), ("s", order), ("r", "reverse"), (left_right, "exchanges")]
    text = Text(no_wrap=True, overflow="ellipsis")
    for key, meaning in [("q", "quit"), *keys]:
        text.append(key, "bold").append(f" {meaning}  ", "dim")
    text.rstrip()
    return text


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
        exchange: price_text(shown.price, state.decimals[symbol])
        for exchange in state.exchanges
        if (shown := state.prices.get((symbol, exchange)))
    }


def price_text(price: float, decimals: int) -> str:
    """Return a price with these decimals, or a huge one with an exponent."""
    return f"{price:,.{decimals}f}" if abs(price) < MAX_FIXED_PRICE else f"{price:.9g}"


def _layout(
    state: ClientState,
    symbols: Sequence[str],
    exchanges: Sequence[str],
    arrows: dict[int, str],
    prices: dict[str, dict[str, str]],
    width: int | None,
    with_volume: bool,
) -> _Layout:
    """Choose columns until the table fits.

    Dropped are first ages, then the volume, then where to buy and to sell, then the gap, and then the last exchanges.
    """
    names = max(map(len, state.exchanges), default=0)
    gap = (_GAP_WIDTH, *(max(names, len(heading)) for heading in _GAP_HEADINGS[1:]))
    for with_ages, volume, gap_widths in (
        (True, with_volume, gap),
        (False, with_volume, gap),
        (True, False, gap),
        (False, False, gap),
        (False, False, gap[:1]),
        (False, False, ()),
    ):
        layout = _Layout(symbols, exchanges, arrows, with_ages, volume, gap_widths)
        fitting = len(exchanges) if width is None else _fitting(layout, prices, width)
        if fitting == len(exchanges):
            break
    return layout._replace(exchanges=exchanges[: max(1, fitting)])


def _fitting(layout: _Layout, prices: dict[str, dict[str, str]], width: int) -> int:
    """Return how many exchanges fit."""
    left = width - max(map(len, ["symbol", *layout.symbols])) - layout.width_beside_prices
    beside = bool(layout.arrows) + (_AGE_WIDTH if layout.with_ages else 0)
    for number, exchange in enumerate(layout.exchanges):
        longest = max(len(texts.get(exchange, "-")) for texts in prices.values())
        left -= _PADDING + max(len(exchange), longest + beside)
        if left < 0:
            return number
    return len(layout.exchanges)


def _table(state: ClientState, layout: _Layout, prices: dict[str, dict[str, str]], selected: str) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, padding=(0, _PADDING - 1, 0, 0), pad_edge=False
    )
    table.add_column("symbol", no_wrap=True)
    for exchange in layout.exchanges:
        table.add_column(Text(visible(exchange)), justify="right", no_wrap=True)
    for heading, width in zip(_GAP_HEADINGS, layout.gap_widths, strict=False):
        table.add_column(heading, justify="right", no_wrap=True, min_width=width)
    if layout.with_volume:
        table.add_column(_VOLUME, justify="right", no_wrap=True, min_width=_VOLUME_WIDTH)
    for symbol in layout.symbols:
        style = "" if state.connected else "dim"
        table.add_row(
            Text(visible(symbol), "reverse" if symbol == selected else style),
            *(_cell(state, symbol, exchange, prices, layout) for exchange in layout.exchanges),
            *(Text(visible(text), style) for text in _gap(state, symbol)[: len(layout.gap_widths)]),
            *([Text(volume_text(state.volumes.get(symbol)), style)] if layout.with_volume else []),
        )
    return table


def _cell(state: ClientState, symbol: str, exchange: str, prices: dict[str, dict[str, str]], layout: _Layout) -> Text:
    shown = state.prices.get((symbol, exchange))
    if shown is None:
        return Text("-".ljust(1 + bool(layout.arrows) + layout.with_ages * _AGE_WIDTH), "dim")
    age = state.age(shown)
    style = _style(state, shown, age)
    text = Text()
    text.append(prices[symbol][exchange], style)
    if layout.arrows:
        # After the colour has faded, and without colours, it still says where the last change went.
        text.append(layout.arrows.get(shown.direction, " "), style or "dim")
    if layout.with_ages:
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


def _gap(state: ClientState, symbol: str) -> tuple[str, str, str]:
    """Return the gap between the exchanges in basis points, where to buy and where to sell."""
    gap = state.gap(symbol)
    if gap is None:
        return "-", "-", "-"
    points = gap.basis_points
    text = f"{points:,.1f}" if points < 99_999.95 else f"{points:.1e}"
    return text, gap.buy_on or "-", gap.sell_on or "-"


def volume_text(volume: float | None) -> str:
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


def _shown(state: ClientState, view: View, layout: _Layout) -> Text:
    """Return which of the symbols and of the exchanges are shown."""
    parts = [
        f"{kind} {first + 1}-{first + shown} of {total}"
        for kind, first, shown, total in (
            ("symbols", view.first_row, len(layout.symbols), len(state.symbols)),
            ("exchanges", view.first_exchange, len(layout.exchanges), len(state.exchanges)),
        )
        if shown < total
    ]
    return Text(", ".join(parts), "dim", no_wrap=True, overflow="ellipsis")
