"""The table as text: what it shows, and that it fits."""

import io
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from marketflow.api.rendering import rfc3339
from marketflow.api.routes.latest_price import LatestPrice
from marketflow.api.streaming.events import ChangedPrices, Heartbeat, Snapshot
from marketflow.cli.watch.client_state import ClientState
from marketflow.cli.watch.stream_events import Connected, Lost
from marketflow.cli.watch.table import Size, render
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
        self.state = ClientState(lambda: self.now)
        self.symbols, self.exchanges = [*symbols], [*exchanges]
        self.state.apply(Connected())
        self.state.apply(Snapshot(Mode.TEST, self.symbols, self.exchanges, [], self.health()))

    def health(self, redis: StoreState = "ok", **exchanges: FeedState) -> Health:
        return Health("ok", Mode.TEST, 1.0, "ok", redis, dict.fromkeys(self.exchanges, FeedState.GENERATED) | exchanges)

    def put(self, price: float, symbol: str = "BTCUSDT", exchange: str = "exchange1", ago: float = 0) -> None:
        at = self.now - timedelta(seconds=ago)
        self.state.apply(ChangedPrices([LatestPrice(symbol, exchange, price, rfc3339(int(at.timestamp() * 1000)))]))

    def after(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def shown(self, width: int = 100, height: int | None = None, colours: bool = False) -> list[str]:
        size = Size(width, height)
        file = io.StringIO()
        console = Console(
            file=file, width=width, color_system="standard" if colours else None, force_terminal=colours, no_color=False
        )
        console.print(render(self.state, URL, size))
        return file.getvalue().splitlines()

    def row(self, symbol: str = "BTCUSDT", **how: bool) -> str:
        (row,) = (line for line in self.shown(**how) if symbol in line)
        return row


@pytest.fixture
def world() -> World:
    return World()


def test_row_shows_prices_ages_and_spread_of_a_symbol(world: World) -> None:
    world.put(67432.14)
    world.put(67400.5, exchange="exchange2", ago=3)
    lines = world.shown()
    assert lines[0].split() == ["test", "mode", "connected", URL]
    assert lines[1].split() == ["Redis", "ok", "PostgreSQL", "ok", "exchange1", "generated", "exchange2", "generated"]
    assert lines[2].split() == ["symbol", "exchange1", "exchange2", "spread", "%"]
    assert world.row().split() == ["BTCUSDT", "67,432.14", "0s", "67,400.50", "3s", "31.64", "0.047"]
    assert world.row("ETHUSDT").split() == ["ETHUSDT", "-", "-", "-", "-"]


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


def test_stale_price_is_dimmed_and_hidden_of_the_spread(world: World) -> None:
    world.put(1.5)
    world.put(4.5, exchange="exchange2")
    world.after(16)
    world.put(2.5)
    assert "\x1b[2m4.5" in world.row(colours=True)
    assert "\x1b[33m  16s" in world.row(colours=True)
    assert world.row().split()[-2:] == ["-", "-"]


def test_equally_old_prices_have_a_spread(world: World) -> None:
    world.put(1.5, ago=3600)
    world.put(3.0, exchange="exchange2", ago=3610)
    assert world.row().split()[-2:] == ["1.5", "100.000"]


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
    world.state = ClientState(lambda: world.now)
    assert world.shown() == [f"connecting  {URL}", ""]
    world.state.apply(Lost("Connection refused", 1.0))
    assert world.shown() == [f"disconnected: Connection refused; trying again in 1 s  {URL}", ""]


@pytest.mark.parametrize(
    ("width", "heading", "hidden"),
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
def test_narrow_terminal_drops_ages_then_spreads_then_exchanges(width: int, heading: str, hidden: str) -> None:
    world = World(["BTCUSDT", "DOGEUSDT"], ["exchange1", "exchange2", "exchange3"])
    for exchange in world.exchanges:
        world.put(67432.14, exchange=exchange)
        world.put(0.1600185, "DOGEUSDT", exchange)
    lines = world.shown(width)
    assert max(map(len, lines)) <= width
    assert all("…" not in line for line in lines[2:] if width > 5)
    assert lines[2].split() == heading.split()
    assert ("0s" in lines[4]) is (width >= 79)
    assert lines[-1].startswith(hidden or "DOGEUSDT")


@pytest.mark.parametrize(
    ("width", "heading", "ages"),
    [
        (89, "symbol exchange1 exchange2 exchange3 spread % 24h vol", True),
        (88, "symbol exchange1 exchange2 exchange3 spread % 24h vol", False),
        (80, "symbol exchange1 exchange2 exchange3 spread % 24h vol", False),
        (73, "symbol exchange1 exchange2 exchange3 spread %", False),
        (63, "symbol exchange1 exchange2 exchange3", False),
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
