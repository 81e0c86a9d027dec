"""The market as a table: a row for each symbol, a column for each exchange; as much of it as there is room for."""

from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from marketflow.cli.watch.market import Market, Quote
from marketflow.text import visible

BRIGHT = timedelta(seconds=0.5)
FADED = timedelta(seconds=1.5)
"""How long a change shines, and how long it is seen at all."""

FRESH = timedelta(seconds=15)
"""Up to which age a price counts as one of now; also how much older than its peers it may be to be compared."""

LONGEST_PRICE = 1e12
"""From here on a price is written with an exponent."""

_GOOD = ("ok", "connected", "generated")
_GAP = 2
_AGE_WIDTH = 5
_SPREAD_WIDTHS = (12, 7)


class Room(NamedTuple):
    """Columns and lines of a terminal; None is as many as it takes."""

    width: int | None = None
    height: int | None = None


class _Layout(NamedTuple):
    """What there is room for."""

    symbols: Sequence[str]
    exchanges: Sequence[str]
    with_ages: bool
    with_spread: bool


def render(market: Market, url: str, room: Room) -> RenderableType:
    """Everything, so that it fits."""
    lines = [_title(market, url), _health(market)]
    if not market.symbols:
        return Group(*lines)
    # Below them the names of columns and a rule; at the end, what is left out.
    rows = len(market.symbols) if room.height is None else max(1, room.height - len(lines) - 3)
    symbols = market.symbols[:rows]
    prices = {symbol: _price_texts(market, symbol) for symbol in symbols}
    layout = _layout(symbols, market.exchanges, prices, room.width)
    table = _table(market, layout, prices)
    hidden = (len(market.symbols) - len(symbols), len(market.exchanges) - len(layout.exchanges))
    return Group(*lines, table, *([_left_out(*hidden)] if any(hidden) else []))


def _title(market: Market, url: str) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    if market.mode:
        text.append(f"{visible(market.mode)} mode  ", "bold")
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
    if (health := market.health) is None:
        return text
    if not market.connected:
        return text.append("feeds and stores: unknown while disconnected", "dim")
    states = {"Redis": health.redis, "PostgreSQL": health.postgres, **health.exchanges}
    for name, state in sorted(states.items(), key=lambda each: each[1] in _GOOD):  # what is wrong is never cut off
        text.append(f"{visible(name)} ", "dim")
        text.append(visible(state), "green" if state in _GOOD else "bold yellow").append("  ")
    text.rstrip()
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


def _layout(
    symbols: Sequence[str], exchanges: Sequence[str], prices: dict[str, dict[str, str]], width: int | None
) -> _Layout:
    """All of it; else without ages, or without spreads as well; at last as many exchanges as there is room for."""
    for with_ages, with_spread in ((True, True), (False, True), (False, False)):
        fitting = len(exchanges)
        if width is not None:
            fitting = _fitting(symbols, exchanges, prices, width, with_ages, with_spread)
        if fitting == len(exchanges):
            break
    return _Layout(symbols, exchanges[: max(1, fitting)], with_ages, with_spread)


def _fitting(
    symbols: Sequence[str],
    exchanges: Sequence[str],
    prices: dict[str, dict[str, str]],
    width: int,
    with_ages: bool,
    with_spread: bool,
) -> int:
    """How many exchanges there is room for."""
    left = width - max(map(len, ["symbol", *symbols]))
    if with_spread:
        left -= sum(_SPREAD_WIDTHS) + _GAP * len(_SPREAD_WIDTHS)
    for number, exchange in enumerate(exchanges):
        longest = max(len(texts.get(exchange, "-")) for texts in prices.values())
        left -= _GAP + max(len(exchange), longest + (_AGE_WIDTH if with_ages else 0))
        if left < 0:
            return number
    return len(exchanges)


def _table(market: Market, layout: _Layout, prices: dict[str, dict[str, str]]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, padding=(0, _GAP - 1, 0, 0), pad_edge=False
    )
    table.add_column("symbol", no_wrap=True)
    for exchange in layout.exchanges:
        table.add_column(Text(visible(exchange)), justify="right", no_wrap=True)
    if layout.with_spread:
        for name, width in zip(("spread", "%"), _SPREAD_WIDTHS, strict=True):
            table.add_column(name, justify="right", no_wrap=True, min_width=width)
    for symbol in layout.symbols:
        style = "" if market.connected else "dim"
        table.add_row(
            Text(visible(symbol), style),
            *(_cell(market, symbol, exchange, prices, layout.with_ages) for exchange in layout.exchanges),
            *(Text(text, style) for text in (_spread(market, symbol) if layout.with_spread else ())),
        )
    return table


def _cell(market: Market, symbol: str, exchange: str, prices: dict[str, dict[str, str]], with_age: bool) -> Text:
    quote = market.quotes.get((symbol, exchange))
    if quote is None:
        return Text("-".ljust(1 + with_age * _AGE_WIDTH), "dim")
    age = market.age(quote)
    text = Text()
    text.append(prices[symbol][exchange], _style(market, quote, age))
    if with_age:
        text.append(_age_text(age).rjust(_AGE_WIDTH), "yellow" if market.connected and age > FRESH else "dim")
    return text


def _style(market: Market, quote: Quote, age: timedelta) -> str:
    if not market.connected or age > FRESH:
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
    peers = [quote.price for quote in quotes if newest is not None and newest - quote.timestamp <= FRESH]
    if len(peers) < 2:
        return "-", "-"
    low, high = min(peers), max(peers)
    return _price_text(high - low, market.decimals[symbol]), f"{(high - low) / low * 100:.3f}"


def _left_out(symbols: int, exchanges: int) -> Text:
    hidden = [
        f"{count} more {kind if count == 1 else kind + 's'}"
        for count, kind in ((symbols, "symbol"), (exchanges, "exchange"))
        if count
    ]
    return Text(f"... {' and '.join(hidden)}", "dim", no_wrap=True, overflow="ellipsis")
