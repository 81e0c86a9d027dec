"""The candles of a symbol as a table, newest first, with a candlestick each in the width that is left."""

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from marketflow.cli.watch.candle_client import CandlePanel, ShownCandle
from marketflow.cli.watch.client_state import ClientState
from marketflow.cli.watch.table import Size, headlines, keys_line, price_text, volume_text
from marketflow.cli.watch.view import CandleChoice, View
from marketflow.text import visible

LEAST_STICK_WIDTH = 12
"""Columns below which no candlesticks are drawn."""

MOST_STICK_WIDTH = 60

_PADDING = 2
_HEADINGS = ("time, UTC", "open", "high", "low", "close", "volume")

# Wick, rising body, falling body, and the arrows of both: hollow and filled, so that colour is not all.
_MARKS = ("\u2500", "\u2591", "\u2588", "\u25b2", "\u25bc")
_ASCII_MARKS = ("-", "=", "#", "+", "-")


def render_candles(
    state: ClientState, url: str, size: Size, view: View, choice: CandleChoice, panel: CandlePanel
) -> RenderableType:
    """Render title, health, the candles that fit, and the keys."""
    of_choice = panel.choice == choice
    heading = Text(no_wrap=True, overflow="ellipsis")
    heading.append(visible(choice.symbol), "bold")
    heading.append(f"  {visible(choice.exchange)}  {choice.interval} candles")
    if not of_choice or panel.problem:
        heading.append(f"  {visible(panel.problem) if of_choice else 'loading'}", "yellow")
    lines = [*headlines(state, url), heading]
    # Two more lines: column names and rule; and one for the keys.
    rows = None if size.height is None else max(1, size.height - len(lines) - 3)
    candles = panel.candles[:rows] if of_choice else []
    decimals = state.decimals.get(choice.symbol, 2)
    table = [_table(candles, decimals, size.width, _ASCII_MARKS if view.ascii else _MARKS)] if candles else []
    return Group(*lines, *table, keys_line(view))


def _table(candles: Sequence[ShownCandle], decimals: int, width: int | None, marks: Sequence[str]) -> Table:
    *_, up, down = marks
    rows = [
        (
            _time(each),
            *(price_text(price, decimals) for price in (each.open, each.high, each.low)),
            f"{price_text(each.close, decimals)}{up if _rises(each) else down}",
            volume_text(each.volume),
        )
        for each in candles
    ]
    table = Table(
        box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, padding=(0, _PADDING - 1, 0, 0), pad_edge=False
    )
    used = 0
    for place, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
        used += max(len(heading), *(len(row[place]) for row in rows)) + _PADDING
    room = min(MOST_STICK_WIDTH, (width or 0) - used)
    sticks = room >= LEAST_STICK_WIDTH
    if sticks:
        low, high = min(each.low for each in candles), max(each.high for each in candles)
        table.add_column(Text(f"{price_text(low, decimals)} to {price_text(high, decimals)}"[:room]), no_wrap=True)
    for row, each in zip(rows, candles, strict=True):
        style = "green" if _rises(each) else "red"
        cells = [Text(text, style if place == 4 else "") for place, text in enumerate(row)]
        table.add_row(*cells, *([Text(_stick(each, low, high, room, marks), style)] if sticks else []))
    return table


def _rises(candle: ShownCandle) -> bool:
    return candle.close >= candle.open


def _stick(candle: ShownCandle, low: float, high: float, width: int, marks: Sequence[str]) -> str:
    """Draw a candle on its side: the wick from low to high, the body from open to close."""
    wick, rising, falling, *_ = marks

    def place(price: float) -> int:
        return round((price - low) / (high - low) * (width - 1)) if high > low else 0

    begin, end = sorted((place(candle.open), place(candle.close)))
    cells = [" "] * width
    cells[place(candle.low) : place(candle.high) + 1] = wick * (place(candle.high) - place(candle.low) + 1)
    cells[begin : end + 1] = (rising if _rises(candle) else falling) * (end - begin + 1)
    return "".join(cells).rstrip()


def _time(candle: ShownCandle) -> str:
    """Return month, day, hour and minute: `11-21 05:12`."""
    return visible(f"{candle.time[5:10]} {candle.time[11:16]}")
