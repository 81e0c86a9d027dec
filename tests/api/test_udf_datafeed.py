"""/udf by TradingView's documentation of UDF: what its charts ask, and how they read the answers."""

import json
from typing import Any

import pytest
from msgspec import structs

from marketflow.api.queries.boundaries import DAY_MS
from marketflow.api.routes.charting.udf_datafeed import RESOLUTIONS
from marketflow.model import MINUTE_MS, Amounts
from tests.api.world import EXCHANGES, NOW, SYMBOLS, World, series

MINUTE_S = (NOW - 30_500) // 1000


@pytest.fixture
def world() -> World:
    """Ticks in the running minute, 1, 2 and 10 minutes ago, and two days ago, on two exchanges that differ by 10."""
    world = World()
    for price, age_ms in ((5.0, 2 * DAY_MS), (1.0, 10 * MINUTE_MS), (2.0, 2 * MINUTE_MS), (3.0, MINUTE_MS), (4.0, 100)):
        world.trade(price, age_ms)
        world.trade(price + 10, age_ms, series("Exchange2"))
    return world


def ask(world: World, path: str) -> Any:
    answer = world.ask(f"/udf/{path}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_config_offers_search_time_and_all_resolutions(world: World) -> None:
    config = ask(world, "config")
    assert config["supported_resolutions"] == ["1", "3", "5", "15", "30", "60", "240", "1D", "1W", "1M"]
    # One of both must be true.
    assert (config["supports_search"], config["supports_group_request"], config["supports_time"]) == (True, False, True)
    assert [each["value"] for each in config["exchanges"]] == ["", "reference", *EXCHANGES]
    assert [each["value"] for each in config["symbols_types"]] == ["", "crypto"]


def test_time_is_unix_seconds_as_text(world: World) -> None:
    answer = world.ask("/udf/time")
    assert (answer.text, answer.headers["content-type"]) == (str(NOW // 1000), "text/plain; charset=utf-8")


@pytest.mark.parametrize(
    ("name", "ticker", "exchange"),
    [
        ("BTCUSDT", "BTCUSDT", "reference"),
        ("btcusdt", "BTCUSDT", "reference"),
        ("reference:BTCUSDT", "BTCUSDT", "reference"),
        ("exchange2:btcusdt", "Exchange2:BTCUSDT", "Exchange2"),
    ],
)
def test_symbol_is_resolved_by_name_or_ticker(world: World, name: str, ticker: str, exchange: str) -> None:
    found = ask(world, f"symbols?symbol={name}")
    assert "s" not in found  # its presence is an error to the charts
    assert (found["name"], found["ticker"], found["exchange"]) == ("BTCUSDT", ticker, exchange)
    assert (found["session"], found["timezone"], found["minmov"], found["format"]) == ("24x7", "Etc/UTC", 1, "price")
    assert found["has_intraday"]
    assert found["has_daily"]
    assert found["has_weekly_and_monthly"]
    assert set(found["intraday_multipliers"]) < set(found["supported_resolutions"]) == {*RESOLUTIONS}
    assert ask(world, f"symbols?symbol={found['ticker']}") == found


@pytest.mark.parametrize(("price", "scale"), [(67123.4, 100), (4.0, 10**5), (0.1587, 10**6), (0.00001234, 10**10)])
def test_price_scale_has_six_digits(price: float, scale: int) -> None:
    world = World()
    world.trade(price, 100)
    assert ask(world, "symbols?symbol=BTCUSDT")["pricescale"] == scale


@pytest.mark.parametrize("query", ["", "symbol=NOTHING", "symbol=nowhere:BTCUSDT", "symbol=exchange1:"])
def test_unknown_symbol_is_an_error_in_the_form_of_udf(world: World, query: str) -> None:
    for path in ("symbols?", "history?resolution=1&from=0&to=1&"):
        found = ask(world, path + query)
        assert (found["s"], "No such" in found["errmsg"]) == ("error", True)


@pytest.mark.parametrize(
    ("query", "tickers"),
    [
        ("query=btc&limit=3", ["BTCUSDT", "exchange1:BTCUSDT", "Exchange2:BTCUSDT"]),
        ("query=eth&exchange=exchange2&type=crypto", ["Exchange2:ETHUSDT"]),
        ("query=Exchange2:E&limit=30", ["Exchange2:ETHUSDT"]),
        ("query=USDT&exchange=reference", [*SYMBOLS]),
        ("query=btc&type=stock", []),
        ("query=doge", []),
    ],
)
def test_search_finds_symbols_by_part_exchange_and_type(world: World, query: str, tickers: list[str]) -> None:
    found = ask(world, f"search?{query}")
    assert [each["ticker"] for each in found] == tickers
    assert all(set(each) == {"symbol", "full_name", "description", "exchange", "ticker", "type"} for each in found)


def test_history_has_bars_from_the_range(world: World) -> None:
    query = f"history?symbol=exchange1:BTCUSDT&resolution=1&from={MINUTE_S - 120}&to={MINUTE_S + 60}"
    times = [MINUTE_S - 120, MINUTE_S - 60, MINUTE_S]
    prices = {name: [2.0, 3.0, 4.0] for name in "ohlc"}
    assert ask(world, query) == {"s": "ok", "t": times, **prices}
    # `to` is not part of the range.
    assert ask(world, query.replace(f"to={MINUTE_S + 60}", f"to={MINUTE_S}"))["t"] == times[:2]


def test_countback_has_priority_over_from(world: World) -> None:
    query = f"history?symbol=exchange1:BTCUSDT&resolution=1&from={MINUTE_S - 60}&to={MINUTE_S}&countback"
    assert ask(world, f"{query}=3")["c"] == [1.0, 2.0, 3.0]
    assert ask(world, f"{query}=4")["c"] == [5.0, 1.0, 2.0, 3.0]
    assert ask(world, f"{query}=999999")["c"] == [5.0, 1.0, 2.0, 3.0]


def test_symbol_alone_is_the_reference_price(world: World) -> None:
    query = f"history?symbol=BTCUSDT&resolution=1&from=0&to={MINUTE_S + 60}&countback=1"
    assert ask(world, query)["c"] == [9.0]


def test_volume_is_there_where_all_are_known(world: World) -> None:
    query = f"history?symbol=exchange1:BTCUSDT&resolution=1D&from=0&to={MINUTE_S + 60}&countback=1"
    assert "v" not in ask(world, query)
    for stored in (world.archive.minutes, world.cache.minutes, world.cache.slices):
        for slot, candle in stored.items():
            stored[slot] = structs.replace(candle, amounts=Amounts(1.5, 3.0, None, None))
    assert ask(world, query)["v"] == [6.0]


def test_range_without_bars_names_the_bar_before_it(world: World) -> None:
    query = f"history?symbol=exchange1:BTCUSDT&resolution=1&from={MINUTE_S - 480}&to={MINUTE_S - 300}"
    assert ask(world, query) == {"s": "no_data", "nextTime": MINUTE_S - 600}
    assert ask(world, f"history?symbol=ETHUSDT&resolution=1&from=0&to={MINUTE_S}") == {"s": "no_data"}
    assert ask(world, "history?symbol=BTCUSDT&resolution=1&from=0&to=1&countback=5") == {"s": "no_data"}


@pytest.mark.parametrize("resolution", [*RESOLUTIONS, "D", "W", "M"])
def test_every_resolution_is_answered_without_countback(world: World, resolution: str) -> None:
    found = ask(world, f"history?symbol=BTCUSDT&resolution={resolution}&from=0&to={MINUTE_S + 60}")
    assert (found["s"], found["c"][-1]) == ("ok", 9.0)
    assert found["t"] == sorted(found["t"])
    assert len({len(found[name]) for name in "tohlc"}) == 1
    assert json.dumps(found)


@pytest.mark.parametrize(
    "query",
    [
        "resolution=2&from=0&to=1",
        "resolution=1S&from=0&to=1",
        "from=0&to=1",
        "resolution=1&from=0",
        "resolution=1&to=1",
        "resolution=1&from=x&to=1",
        "resolution=1&from=0&to=1763690400000",
        "resolution=1&from=0&to=1&countback=0",
        "resolution=1&from=0&to=1&countback=-1",
        "resolution=1&from=0&to=" + "9" * 5000,
    ],
)
def test_wrong_history_request_is_an_error_in_the_form_of_udf(world: World, query: str) -> None:
    found = ask(world, f"history?symbol=BTCUSDT&{query}")
    assert (found["s"], bool(found["errmsg"])) == ("error", True)
