"""The table as text: what it shows, and that it fits."""

import io
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from marketflow.cli.watch.market import Market
from marketflow.cli.watch.messages import ChangedPrices, Connected, Health, Heartbeat, Lost, Price, Snapshot
from marketflow.cli.watch.table import Room, render

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
URL = "http://127.0.0.1:8080"


class World:
    """A market, and a clock that goes as told."""

    def __init__(
        self, symbols: Iterable[str] = ("BTCUSDT", "ETHUSDT"), exchanges: Iterable[str] = ("exchange1", "exchange2")
    ) -> None:
        self.now = NOON
        self.market = Market(lambda: self.now)
        self.symbols, self.exchanges = [*symbols], [*exchanges]
        self.market.take(Connected())
        self.market.take(Snapshot("test", self.symbols, self.exchanges, [], self.health()))

    def health(self, redis: str = "ok", **exchanges: str) -> Health:
        return Health("test", "ok", redis, dict.fromkeys(self.exchanges, "generated") | exchanges)

    def put(self, price: float, symbol: str = "BTCUSDT", exchange: str = "exchange1", ago: float = 0) -> None:
        at = self.now - timedelta(seconds=ago)
        self.market.take(ChangedPrices([Price(symbol, exchange, price, at)]))

    def after(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def shown(self, width: int = 100, height: int | None = None, colours: bool = False) -> list[str]:
        room = Room(width, height)
        file = io.StringIO()
        console = Console(
            file=file, width=width, color_system="standard" if colours else None, force_terminal=colours, no_color=False
        )
        console.print(render(self.market, URL, room))
        return file.getvalue().splitlines()

    def row(self, symbol: str = "BTCUSDT", **how: bool) -> str:
        (row,) = (line for line in self.shown(**how) if symbol in line)
        return row


@pytest.fixture
def world() -> World:
    return World()


def test_a_row_has_the_prices_of_a_symbol_with_their_ages_and_the_spread(world: World) -> None:
    world.put(67432.14)
    world.put(67400.5, exchange="exchange2", ago=3)
    lines = world.shown()
    assert lines[0].split() == ["test", "mode", "connected", URL]
    assert lines[1].split() == ["Redis", "ok", "PostgreSQL", "ok", "exchange1", "generated", "exchange2", "generated"]
    assert lines[2].split() == ["symbol", "exchange1", "exchange2", "spread", "%"]
    assert world.row().split() == ["BTCUSDT", "67,432.14", "0s", "67,400.50", "3s", "31.64", "0.047"]
    assert world.row("ETHUSDT").split() == ["ETHUSDT", "-", "-", "-", "-"]


def test_numbers_of_any_size_are_written_and_stand_below_each_other(world: World) -> None:
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
def test_ages_have_one_unit(world: World, ago: float, age: str) -> None:
    world.put(1.5, ago=ago)
    assert world.row().split()[2] == age


def test_a_change_shines_and_fades(world: World) -> None:
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


def test_a_stale_price_is_grey_its_age_is_not_and_it_has_no_part_in_the_spread(world: World) -> None:
    world.put(1.5)
    world.put(4.5, exchange="exchange2")
    world.after(16)
    world.put(2.5)
    assert "\x1b[2m4.5" in world.row(colours=True)
    assert "\x1b[33m  16s" in world.row(colours=True)
    assert world.row().split()[-2:] == ["-", "-"]


def test_what_is_old_everywhere_is_still_compared(world: World) -> None:
    world.put(1.5, ago=3600)
    world.put(3.0, exchange="exchange2", ago=3610)
    assert world.row().split()[-2:] == ["1.5", "100.000"]


def test_what_is_not_well_comes_first_and_is_not_green(world: World) -> None:
    world.market.take(world.health(redis="down", exchange2="stale"))
    _, line, *_ = world.shown()
    assert line.split() == ["Redis", "down", "exchange2", "stale", "PostgreSQL", "ok", "exchange1", "generated"]
    _, line, *_ = world.shown(colours=True)
    assert "\x1b[1;33mdown" in line
    assert "\x1b[32mgenerated" in line


def test_a_lost_connection_is_said_and_all_is_grey(world: World) -> None:
    world.put(1.5)
    world.put(2.5)
    world.market.take(Lost("Connection refused", 4.0))
    world.after(1)
    assert world.shown()[0].startswith("test mode  disconnected: Connection refused; trying again in 3 s")
    assert world.shown()[1] == "feeds and stores: unknown while disconnected"
    assert "\x1b[2m2.5   1s" in world.row(colours=True).replace("\x1b[0m\x1b[2m", "")
    colours = {code for line in world.shown(colours=True)[1:] for code in ("31m", "32m", "33m") if code in line}
    assert colours == set()
    world.after(3)
    assert "trying again  http" in world.shown()[0]


def test_before_there_is_a_connection_it_says_what_it_does() -> None:
    world = World()
    world.market = Market(lambda: world.now)
    assert world.shown() == [f"connecting  {URL}", ""]
    world.market.take(Lost("Connection refused", 1.0))
    assert world.shown() == [f"disconnected: Connection refused; trying again in 1 s  {URL}", ""]


@pytest.mark.parametrize(
    ("width", "heading", "left_out"),
    [
        (79, "symbol exchange1 exchange2 exchange3 spread %", ""),
        (78, "symbol exchange1 exchange2 exchange3 spread %", ""),
        (63, "symbol exchange1 exchange2 exchange3", ""),
        (41, "symbol exchange1 exchange2 exchange3", ""),
        (40, "symbol exchange1 exchange2", "... 1 more exchange"),
        (29, "symbol exchange1", "... 2 more exchanges"),
        (5, "… e…", "..."),
    ],
)
def test_ages_then_spreads_then_exchanges_give_way_to_a_narrow_terminal(
    width: int, heading: str, left_out: str
) -> None:
    world = World(["BTCUSDT", "DOGEUSDT"], ["exchange1", "exchange2", "exchange3"])
    for exchange in world.exchanges:
        world.put(67432.14, exchange=exchange)
        world.put(0.1600185, "DOGEUSDT", exchange)
    lines = world.shown(width)
    assert max(map(len, lines)) <= width
    assert all("…" not in line for line in lines[2:] if width > 5)
    assert lines[2].split() == heading.split()
    assert ("0s" in lines[4]) is (width >= 79)
    assert lines[-1].startswith(left_out or "DOGEUSDT")


@pytest.mark.parametrize(("height", "rows"), [(105, 100), (104, 99), (24, 19), (6, 1), (1, 1)])
def test_as_many_rows_as_fit_and_how_many_more_there_are(height: int, rows: int) -> None:
    world = World(f"S{number:03}USDT" for number in range(100))
    for symbol in world.symbols:
        world.put(1.5, symbol)
    lines = world.shown(height=height)
    assert [line.split()[0] for line in lines[4 : 4 + rows]] == world.symbols[:rows]
    assert len(lines) <= max(height, 6)
    if rows < 100:
        assert lines[-1] == ("... 1 more symbol" if rows == 99 else f"... {100 - rows} more symbols")


def test_what_a_server_says_can_drive_no_terminal() -> None:
    hostile = "\x1b]0;a\x07[red]"
    world = World([hostile], [hostile])
    world.market.take(Heartbeat(NOON))
    world.market.take(world.health(redis=hostile))
    world.put(1.5, hostile, hostile)
    shown = "\n".join(world.shown(200))
    world.market.take(Lost(hostile, 1.0))
    shown += "\n".join(world.shown(200))
    assert {"\x1b", "\x07"}.isdisjoint(shown)
    assert shown.count("[red]") >= 6
