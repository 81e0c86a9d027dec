"""The table as text: what it shows, and that it fits."""

import io
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console, RenderableType

from marketflow.api.rendering import rfc3339
from marketflow.api.streaming.events import ChangedPrices, Heartbeat, Snapshot, StreamPrice
from marketflow.cli.watch.candle_client import CandlePanel, ShownCandle
from marketflow.cli.watch.candle_table import render_candles
from marketflow.cli.watch.client_state import ClientState
from marketflow.cli.watch.keyboard import Key
from marketflow.cli.watch.stream_events import Connected, Lost
from marketflow.cli.watch.table import Size, render
from marketflow.cli.watch.view import CandleChoice, Order, View
from marketflow.health import Health, StoreState
from marketflow.model import FeedState, Mode

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
URL = "http://127.0.0.1:8080"


class World:
    """A state, and a clock that the test sets."""

    def __init__(
        self, symbols: Iterable[str] = ("BTCUSDT", "ETHUSDT"), exchanges: Iterable[str] = ("exchange1", "exchange2")
    ) -> None:
        self.now = NOON
        self.state = ClientState(lambda: self.now, lambda: self.now.timestamp())
        self.symbols, self.exchanges = [*symbols], [*exchanges]
        self.state.apply(Connected())
        self.state.apply(Snapshot(Mode.TEST, self.symbols, self.exchanges, [], self.health()))

    def health(self, redis: StoreState = "ok", **exchanges: FeedState) -> Health:
        return Health("ok", Mode.TEST, 1.0, "ok", redis, dict.fromkeys(self.exchanges, FeedState.GENERATED) | exchanges)

    def put(self, price: float, symbol: str = "BTCUSDT", exchange: str = "exchange1", ago: float = 0) -> None:
        at = self.now - timedelta(seconds=ago)
        self.state.apply(ChangedPrices([StreamPrice(symbol, exchange, price, rfc3339(int(at.timestamp() * 1000)))]))

    def after(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def shown(
        self, width: int = 100, height: int | None = None, colours: bool = False, view: View | None = None
    ) -> list[str]:
        return printed(render(self.state, URL, Size(width, height), view), width, colours)

    def row(self, symbol: str = "BTCUSDT", **how: Any) -> str:
        (row,) = (line for line in self.shown(**how) if symbol in line)
        return row


def printed(shown: RenderableType, width: int, colours: bool = False) -> list[str]:
    file = io.StringIO()
    console = Console(
        file=file, width=width, color_system="standard" if colours else None, force_terminal=colours, no_color=False
    )
    console.print(shown)
    return file.getvalue().splitlines()


@pytest.fixture
def world() -> World:
    return World()


def test_row_shows_prices_ages_and_gap_of_a_symbol(world: World) -> None:
    world.put(67432.14)
    world.put(67400.5, exchange="exchange2", ago=3)
    lines = world.shown()
    assert lines[0].split() == ["test", "mode", "connected", URL]
    assert lines[1].split() == ["Redis", "ok", "PostgreSQL", "ok", "exchange1", "generated", "exchange2", "generated"]
    assert lines[2].split() == ["symbol", "exchange1", "exchange2", "gap", "bp", "buy", "on", "sell", "on"]
    assert world.row().split() == ["BTCUSDT", "67,432.14", "0s", "67,400.50", "3s", "4.7", "exchange2", "exchange1"]
    assert world.row("ETHUSDT").split() == ["ETHUSDT", "-", "-", "-", "-", "-"]


def test_prices_of_any_magnitude_are_aligned(world: World) -> None:
    world.put(0.00001)
    world.put(1e-9, "ETHUSDT")
    assert world.row().split()[1] == "0.00001"
    assert world.row("ETHUSDT").split()[1] == "0.000000001"
    world.put(1e100)
    assert world.row().split()[1] == "1e+100"
    world.put(12.5)
    assert world.row().split()[1] == "12.50000"
    assert world.row().index("12.50000") + 8 == world.row("ETHUSDT").index("0.000000001") + 11


@pytest.mark.parametrize(
    ("ago", "age"), [(59.9, "59s"), (60, "1m"), (3599, "59m"), (3600, "1h"), (86_400, "1d"), (86_400 * 597, "597d")]
)
def test_age_is_shown_in_its_largest_unit(world: World, ago: float, age: str) -> None:
    world.put(1.5, ago=ago)
    assert world.row().split()[2] == age


def test_changed_price_is_highlighted_and_fades(world: World) -> None:
    world.put(1.5)
    assert "\x1b[32m" not in world.row(colours=True)
    world.put(2.5)
    assert "\x1b[1;32m2.5" in world.row(colours=True)
    world.after(1)
    assert "\x1b[32m2.5" in world.row(colours=True)
    world.put(2.25)
    assert "\x1b[1;31m2.25" in world.row(colours=True)
    world.after(2)
    assert "31m" not in world.row(colours=True)


def test_stale_price_is_dimmed_and_in_no_gap(world: World) -> None:
    world.put(1.5)
    world.put(4.5, exchange="exchange2")
    world.after(16)
    world.put(2.5)
    assert "\x1b[2m4.5" in world.row(colours=True)
    assert "\x1b[33m  16s" in world.row(colours=True)
    assert world.row().split()[-3:] == ["-", "-", "-"]


@pytest.mark.parametrize(
    ("second", "gap"),
    [
        (1.5, ["0.0", "-", "-"]),
        (1.50015, ["1.0", "exchange1", "exchange2"]),
        (1.2, ["2,500.0", "exchange2", "exchange1"]),
        (1e9, ["6.7e+12", "exchange1", "exchange2"]),
    ],
)
def test_gap_says_where_to_buy_and_where_to_sell(world: World, second: float, gap: list[str]) -> None:
    world.put(1.5)
    world.put(second, exchange="exchange2")
    assert world.row().split()[-3:] == gap


def test_equally_old_prices_have_a_gap(world: World) -> None:
    world.put(1.5, ago=3600)
    world.put(3.0, exchange="exchange2", ago=3610)
    assert world.row().split()[-3:] == ["10,000.0", "exchange1", "exchange2"]


def test_problems_come_first_and_are_not_green(world: World) -> None:
    world.state.apply(world.health(redis="down", exchange2=FeedState.STALE))
    _, line, *_ = world.shown()
    assert line.split() == ["Redis", "down", "exchange2", "stale", "PostgreSQL", "ok", "exchange1", "generated"]
    _, line, *_ = world.shown(colours=True)
    assert "\x1b[1;33mdown" in line
    assert "\x1b[32mgenerated" in line


def test_lost_connection_is_shown_and_all_prices_are_dimmed(world: World) -> None:
    world.put(1.5)
    world.put(2.5)
    world.state.apply(Lost("Connection refused", 4.0))
    world.after(1)
    assert world.shown()[0].startswith("test mode  disconnected: Connection refused; trying again in 3 s")
    assert world.shown()[1] == "feeds and stores: unknown while disconnected"
    assert "\x1b[2m2.5   1s" in world.row(colours=True).replace("\x1b[0m\x1b[2m", "")
    colours = {code for line in world.shown(colours=True)[1:] for code in ("31m", "32m", "33m") if code in line}
    assert colours == set()
    world.after(3)
    assert "trying again  http" in world.shown()[0]


def test_first_connection_attempt_is_shown() -> None:
    world = World()
    world.state = ClientState(lambda: world.now, lambda: world.now.timestamp())
    assert world.shown() == [f"connecting  {URL}", ""]
    world.state.apply(Lost("Connection refused", 1.0))
    assert world.shown() == [f"disconnected: Connection refused; trying again in 1 s  {URL}", ""]


ALL = "symbol exchange1 exchange2 exchange3 gap bp buy on sell on"


@pytest.mark.parametrize(
    ("width", "heading", "hidden"),
    [
        (88, ALL, ""),
        (87, ALL, ""),
        (72, "symbol exchange1 exchange2 exchange3 gap bp", ""),
        (51, "symbol exchange1 exchange2 exchange3 gap bp", ""),
        (50, "symbol exchange1 exchange2 exchange3", ""),
        (41, "symbol exchange1 exchange2 exchange3", ""),
        (40, "symbol exchange1 exchange2", "... 1 more exchange"),
        (29, "symbol exchange1", "... 2 more exchanges"),
        (5, "\u2026 e\u2026", "..."),
    ],
)
def test_narrow_terminal_drops_ages_then_gaps_then_exchanges(width: int, heading: str, hidden: str) -> None:
    world = World(["BTCUSDT", "DOGEUSDT"], ["exchange1", "exchange2", "exchange3"])
    for exchange in world.exchanges:
        world.put(67432.14, exchange=exchange)
        world.put(0.1600185, "DOGEUSDT", exchange)
    lines = world.shown(width)
    assert max(map(len, lines)) <= width
    assert all("\u2026" not in line for line in lines[2:] if width > 5)
    assert lines[2].split() == heading.split()
    assert ("0s" in lines[4]) is (width >= 88)
    assert lines[-1].startswith(hidden or "DOGEUSDT")


@pytest.mark.parametrize(
    ("width", "heading", "ages"),
    [
        (98, f"{ALL} 24h vol", True),
        (97, f"{ALL} 24h vol", False),
        (83, f"{ALL} 24h vol", False),
        (82, ALL, False),
        (72, "symbol exchange1 exchange2 exchange3 gap bp", False),
        (50, "symbol exchange1 exchange2 exchange3", False),
    ],
)
def test_known_volume_has_a_column_where_it_fits(width: int, heading: str, ages: bool) -> None:
    world = World(["BTCUSDT", "DOGEUSDT"], ["exchange1", "exchange2", "exchange3"])
    for exchange in world.exchanges:
        world.put(67432.14, exchange=exchange)
        world.put(0.1600185, "DOGEUSDT", exchange)
    world.state.volumes = {"BTCUSDT": 12_345.678, "DOGEUSDT": None}
    lines = world.shown(width)
    assert max(map(len, lines)) <= width
    assert lines[2].split() == heading.split()
    assert ("0s" in lines[4]) is ages
    if "vol" in heading:
        assert [line.split()[-1] for line in lines[4:]] == ["12,346", "-"]


def test_volumes_of_another_mode_are_not_shown(world: World) -> None:
    world.put(1.5)
    world.state.volumes = {"BTCUSDT": 5.0}
    assert world.row().split()[-1] == "5"
    world.state.apply(Snapshot(Mode.LIVE, world.symbols, world.exchanges, [], world.health()))
    assert "24h" not in world.shown()[2]


@pytest.mark.parametrize(
    ("volume", "text"),
    [
        *((0.0, "0"), (1e-7, "1.0e-07"), (0.00123456, "0.0012346"), (12.5, "12.5"), (999.99999, "1000")),
        *((123_456.7, "123,457"), (1_234_567.0, "1.23M"), (1e9, "1.00B"), (5e14, "500.00T"), (1e100, "1.0e+100")),
    ],
)
def test_volume_of_any_magnitude_is_short(world: World, volume: float, text: str) -> None:
    world.put(1.5)
    world.state.volumes = {"BTCUSDT": volume}
    assert world.row().split()[-1] == text


@pytest.mark.parametrize(("height", "rows"), [(105, 100), (104, 99), (24, 19), (6, 1), (1, 1)])
def test_table_shows_the_rows_that_fit_and_counts_the_rest(height: int, rows: int) -> None:
    world = World(f"S{number:03}USDT" for number in range(100))
    for symbol in world.symbols:
        world.put(1.5, symbol)
    lines = world.shown(height=height)
    assert [line.split()[0] for line in lines[4 : 4 + rows]] == world.symbols[:rows]
    assert len(lines) <= max(height, 6)
    if rows < 100:
        assert lines[-1] == ("... 1 more symbol" if rows == 99 else f"... {100 - rows} more symbols")


def test_control_characters_from_the_server_are_escaped() -> None:
    hostile = "\x1b]0;a\x07[red]"
    world = World([hostile], [hostile])
    world.state.apply(Heartbeat("2026-11-21T12:00:00.000Z"))
    world.state.apply(world.health(redis=hostile))  # type: ignore[arg-type]
    world.put(1.5, hostile, hostile)
    shown = "\n".join(world.shown(200))
    world.state.apply(Lost(hostile, 1.0))
    shown += "\n".join(world.shown(200))
    assert {"\x1b", "\x07"}.isdisjoint(shown)
    assert shown.count("[red]") >= 6


# --- On a screen


def many(symbols: int, exchanges: int = 2) -> World:
    world = World((f"S{number:02}USDT" for number in range(symbols)), (f"exchange{n + 1}" for n in range(exchanges)))
    for number, symbol in enumerate(world.symbols):
        for place, exchange in enumerate(world.exchanges):
            world.put(100.0 + place * (number * 7 % 10), symbol, exchange)
    return world


def press(view: View, world: World, *keys: Key) -> None:
    for key in keys:
        view.press(key, world.state)


@pytest.mark.parametrize("ascii", [False, True])
def test_arrow_says_where_the_last_change_went(world: World, ascii: bool) -> None:
    up, down = ("+", "-") if ascii else ("\u25b2", "\u25bc")
    view = View(ascii=ascii)
    world.put(1.5)
    assert " 1.5    0s" in world.row(view=view)
    world.put(2.5)
    assert f"2.5{up}   0s" in world.row(view=view)
    assert f"\x1b[1;32m2.5{up}" in world.row(view=view, colours=True).replace("\x1b[0m\x1b[1;32m", "")
    world.put(2.25)
    world.after(5)
    assert f"2.25{down}   5s" in world.row(view=view)
    assert "31m" not in world.row(view=view, colours=True)
    assert "\u25b2" not in world.row()  # nothing has changed where the table is printed once


@pytest.mark.parametrize("width", range(30, 120, 7))
def test_arrows_keep_the_table_within_the_terminal(width: int) -> None:
    world = many(3, 4)
    for exchange in world.exchanges:
        world.put(123.25, "S00USDT", exchange)
    lines = world.shown(width, view=View())
    assert max(map(len, lines)) <= width
    assert all("\u2026" not in line for line in lines[2:-1])


@pytest.mark.parametrize("height", [6, 7, 8, 9, 24, 30])
def test_keys_are_shown_and_frame_fits_the_terminal(height: int) -> None:
    lines = many(20).shown(height=height, view=View())
    assert len(lines) <= height
    if height >= 8:
        assert lines[-1].startswith("q quit  \u2191\u2193 select  Enter candles  s sort: as configured  r reverse")
    ascii_lines = many(20).shown(height=24, view=View(ascii=True))
    assert ascii_lines[-1].startswith("q quit  up/down select")


def test_rows_scroll_with_the_selected_symbol() -> None:
    world, view = many(50), View()

    def rows() -> list[str]:
        return [line.split()[0] for line in world.shown(height=14, view=view) if line.startswith("S")]

    assert rows() == world.symbols[:8]
    assert world.shown(height=14, view=view)[-2] == "symbols 1-8 of 50"
    assert "\x1b[7mS00USDT" in "".join(world.shown(height=14, view=view, colours=True))
    press(view, world, *[Key.DOWN] * 8)
    assert rows() == world.symbols[1:9]
    press(view, world, Key.UP)
    assert rows() == world.symbols[1:9]
    press(view, world, Key.PAGE_DOWN)
    assert rows() == world.symbols[8:16]
    assert world.shown(height=14, view=view)[-2] == "symbols 9-16 of 50"
    press(view, world, Key.END, Key.DOWN)
    assert (rows(), view.selected) == (world.symbols[-8:], "S49USDT")
    press(view, world, Key.PAGE_UP)
    assert view.selected == "S41USDT"
    press(view, world, Key.HOME, Key.UP)
    assert (rows(), view.selected) == (world.symbols[:8], "S00USDT")
    world.state.apply(Snapshot(Mode.TEST, ["NEWUSDT"], world.exchanges, [], world.health()))
    world.shown(height=14, view=view)
    assert view.selected == "NEWUSDT"


def test_exchanges_scroll_to_the_side() -> None:
    world, view = many(2, 9), View()
    first = world.shown(60, view=view)
    assert first[2].split() == ["symbol", "exchange1", "exchange2", "exchange3", "exchange4"]
    assert first[-2] == "exchanges 1-4 of 9"
    press(view, world, Key.RIGHT, Key.RIGHT)
    assert world.shown(60, view=view)[2].split()[1:3] == ["exchange3", "exchange4"]
    press(view, world, *[Key.RIGHT] * 20)
    assert world.shown(60, view=view)[2].split()[1] == "exchange9"
    press(view, world, *[Key.LEFT] * 20)
    assert world.shown(60, view=view) == first


def test_rows_are_sorted_by_the_chosen_column() -> None:
    world, view = World(["B", "A", "D", "C"]), View()
    for symbol, price in {"A": 101.0, "B": 103.0, "C": 102.0}.items():
        world.put(100.0, symbol)
        world.put(price, symbol, "exchange2")
    world.state.volumes = {"A": 5.0, "B": None, "C": 1.0, "D": 9.0}
    found = {}
    for _ in Order:
        forwards = "".join(view.symbols(world.state))
        press(view, world, Key.REVERSE)
        found[view.order] = forwards, "".join(view.symbols(world.state))
        assert f"s sort: {view.order}, reversed" in world.shown(120, view=view)[-1]
        press(view, world, Key.SORT)
    assert view.order is Order.CONFIGURED
    # What is unknown comes last in both directions.
    assert found == {
        Order.CONFIGURED: ("BADC", "CDAB"),
        Order.SYMBOL: ("ABCD", "DCBA"),
        Order.GAP: ("BCAD", "ACBD"),
        Order.VOLUME: ("DACB", "CADB"),
    }


CANDLES = [
    ShownCandle("2026-11-21T12:01:00.000Z", 100.0, 110.0, 100.0, 108.0, 1234.5),
    ShownCandle("2026-11-21T12:00:00.000Z", 100.0, 104.0, 90.0, 95.0),
]


def test_candles_of_the_selected_symbol_are_drawn() -> None:
    world, view = many(3), View()
    press(view, world, Key.DOWN, Key.ENTER)
    choice = CandleChoice("S01USDT", "reference", "1m")
    assert view.candles == choice

    def shown(panel: CandlePanel, width: int = 100, height: int = 24) -> list[str]:
        return printed(render_candles(world.state, URL, Size(width, height), view, choice, panel), width)

    assert shown(CandlePanel())[2] == "S01USDT  reference  1m candles  loading"
    lines = shown(CandlePanel(choice, CANDLES))
    assert lines[2] == "S01USDT  reference  1m candles"
    assert lines[3].split() == ["time,", "UTC", "open", "high", "low", "close", "volume", "90", "to", "110"]
    assert lines[5].split()[:7] == ["11-21", "12:01", "100", "110", "100", "108\u25b2", "1,234"]
    assert lines[6].split()[:7] == ["11-21", "12:00", "100", "104", "90", "95\u25bc", "-"]
    rising, falling = (line[lines[3].index("90") :] for line in lines[5:7])
    half = (len(rising) - 1) // 2
    assert rising.strip() == "\u2591" * rising.count("\u2591") + "\u2500" * rising.count("\u2500")
    assert abs(len(rising) - len(rising.lstrip()) - half) <= 1
    assert falling.startswith("\u2500")
    assert {*falling.strip()} == {"\u2500", "\u2588"}
    assert lines[-1].startswith("q quit  Esc prices  \u2191\u2193 symbol  \u2190\u2192 exchange  i interval")
    for width in range(20, 120, 9):
        assert max(map(len, shown(CandlePanel(choice, CANDLES), width))) <= width
    for height in (7, 8, 24):
        assert len(shown(CandlePanel(choice, CANDLES * 20), 100, height)) == height
    assert shown(CandlePanel(choice, [], "no candles yet"))[2].endswith("  no candles yet")


def test_keys_choose_symbol_exchange_and_interval_of_candles() -> None:
    world, view = many(3), View()
    press(view, world, Key.INTERVAL, Key.ESCAPE)  # nothing is chosen yet
    press(view, world, Key.ENTER, Key.DOWN, Key.RIGHT, Key.INTERVAL)
    assert view.candles == CandleChoice("S01USDT", "exchange1", "3m")
    press(view, world, Key.RIGHT, Key.RIGHT, Key.SORT, Key.REVERSE, Key.ENTER)
    assert view.candles == CandleChoice("S01USDT", "reference", "3m")
    press(view, world, Key.LEFT)
    assert view.candles == CandleChoice("S01USDT", "exchange2", "3m")
    press(view, world, Key.ESCAPE, Key.LEFT)
    assert view == View(selected="S01USDT", page=view.page)
