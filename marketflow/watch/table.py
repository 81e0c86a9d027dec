"""The market as a table: a row for each symbol, a column for each exchange; as much of it as there is room for."""

from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from marketflow.tables import visible
from marketflow.watch.market import Market, Quote

BRIGHT = timedelta(seconds=0.5)
FADED = timedelta(seconds=1.5)
"""How long a change shines, and how long it is seen at all."""

FRESH = timedelta(seconds=15)
"""How much older than the newest price of its symbol one may be and still be compared with the others."""

LONGEST_PRICE = 1e12
"""From here on a price is written with an exponent."""

_AROUND = 3  # lines above the rows: what runs, how it does, and the names of columns; below them the last one
_GAP = 2
_GOOD = ("ok", "connected", "generated")


class Room(NamedTuple):
    """Columns and lines of a terminal; None is as many as it takes."""

    width: int | None = None
    height: int | None = None


def render(market: Market, url: str, room: Room) -> RenderableType:
    """Everything, so that it fits."""
    lines = [_title(market, url), _health(market)]
    if not market.symbols:
        return Group(*lines)
    rows = len(market.symbols)
    if room.height is not None:
        fitting = max(1, room.height - len(lines) - 3)  # names of columns, a line under them, and what is left out
        rows = min(rows, fitting)
    prices = {symbol: _price_texts(market, symbol) for symbol in market.symbols}
    shown, with_age = _fitting(market, prices, room.width)
    hidden = (len(market.symbols) - rows, len(market.exchanges) - shown)
    table = _table(market, market.symbols[:rows], market.exchanges[:shown], prices, with_age)
    return Group(*lines, table, *([_left_out(*hidden)] if any(hidden) else []))


def _title(market: Market, url: str) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    if market.mode:
        text.append(f"{visible(market.mode)} mode", "bold")
        text.append("  ")
    if market.connected:
        text.append("connected", "green")
    elif market.lost is None:
        text.append("connecting", "yellow")
    else:
        seconds = market.until_next_try()
        when = f"trying again in {seconds:.0f} s" if seconds >= 0.5 else "trying again"
        text.append(f"disconnected: {visible(market.lost.reason)}; {when}", "bold red")
    return text.append(f"  {visible(url)}", "dim")


def _health(market: Market) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    health = market.health
    if health is None:
        return text
    states = {**health.exchanges, "Redis": health.redis, "PostgreSQL": health.postgres}
    for number, (name, state) in enumerate(states.items()):
        text.append("  " if number else "").append(f"{visible(name)} ", "dim")
        good = state in _GOOD
        text.append(visible(state), "dim" if not market.connected else "green" if good else "bold yellow")
    return text


def _price_texts(market: Market, symbol: str) -> dict[str, str]:
    """The prices of a symbol by exchange, all with as many digits behind the point."""
    return {
        exchange: _price_text(quote.price, market.decimals[symbol])
        for exchange in market.exchanges
        if (quote := market.quotes.get((symbol, exchange)))
    }


def _price_text(price: float, decimals: int) -> str:
    return f"{price:,.{decimals}f}" if abs(price) < LONGEST_PRICE else f"{price:.9g}"


def _fitting(market: Market, prices: dict[str, dict[str, str]], width: int | None) -> tuple[int, bool]:
    """How many exchanges there is room for, and whether there is for ages, which are the first to go."""
    everything = len(market.exchanges)
    if width is None:
        return everything, True
    fixed = max(map(len, ["symbol", *market.symbols])) + _SPREAD_WIDTH
    for with_age in (True, False):
        needed, shown = fixed, 0
        for exchange in market.exchanges:
            longest = max((len(texts.get(exchange, "")) for texts in prices.values()), default=0)
            needed += max(len(exchange), longest + (_AGE_WIDTH if with_age else 0)) + _GAP
            shown += needed <= width
        if shown == everything:
            return shown, with_age
    return max(1, shown), False


_AGE_WIDTH = 5
_SPREAD_WIDTH = 2 * _GAP + 12 + 7


def _table(
    market: Market,
    symbols: Sequence[str],
    exchanges: Sequence[str],
    prices: dict[str, dict[str, str]],
    with_age: bool,
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, padding=(0, _GAP, 0, 0), pad_edge=False)
    table.add_column("symbol", no_wrap=True)
    for exchange in exchanges:
        table.add_column(Text(visible(exchange)), justify="right", no_wrap=True)
    table.add_column("spread", justify="right", no_wrap=True, min_width=12)
    table.add_column("%", justify="right", no_wrap=True, min_width=7)
    for symbol in symbols:
        cells = [
            _cell(market, market.quotes.get((symbol, exchange)), prices[symbol].get(exchange, ""), with_age)
            for exchange in exchanges
        ]
        style = "" if market.connected else "dim"
        table.add_row(Text(visible(symbol), style), *cells, *(Text(text, style) for text in _spread(market, symbol)))
    return table


def _cell(market: Market, quote: Quote | None, price: str, with_age: bool) -> Text:
    if quote is None:
        return Text("-" + " " * (_AGE_WIDTH if with_age else 0), "dim")
    text = Text(price, _style(market, quote))
    return text.append(_age_text(market.age(quote)).rjust(_AGE_WIDTH), "dim not bold default") if with_age else text


def _style(market: Market, quote: Quote) -> str:
    if not market.connected:
        return "dim"
    since = market.since(quote)
    if quote.direction == 0 or since > FADED:
        return ""
    colour = "green" if quote.direction > 0 else "red"
    return f"bold {colour}" if since <= BRIGHT else colour


def _age_text(age: timedelta) -> str:
    seconds = int(age.total_seconds())
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def _spread(market: Market, symbol: str) -> tuple[str, str]:
    """Between the highest and the lowest price of all exchanges whose prices are of about the same time."""
    quotes = [quote for exchange in market.exchanges if (quote := market.quotes.get((symbol, exchange)))]
    newest = max((quote.timestamp for quote in quotes), default=None)
    fresh = [quote.price for quote in quotes if newest is not None and newest - quote.timestamp <= FRESH]
    if len(fresh) < 2:
        return "-", "-"
    low, high = min(fresh), max(fresh)
    return _price_text(high - low, market.decimals[symbol]), f"{(high - low) / low * 100:.3f}"


def _left_out(symbols: int, exchanges: int) -> Text:
    parts = [
        f"{count} more {kind}{'s' if count > 1 else ''}"
        for count, kind in ((symbols, "symbol"), (exchanges, "exchange"))
        if count
    ]
    return Text(f"... {' and '.join(parts)}", "dim", no_wrap=True)
