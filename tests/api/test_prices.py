"""/prices over HTTP."""

import pytest

from marketflow.api.routes.prices import ALL
from marketflow.model import Mode
from tests.api.world import NOW, World, series

NOW_TEXT = "2025-11-21T02:00:30.500Z"
EXTREME_AND_AVERAGE = ("highest", "lowest", "average")
KINDS = ("latest", *EXTREME_AND_AVERAGE)


@pytest.fixture
def world() -> World:
    world = World()
    world.trade(10.0, 2_000, series("exchange1"))
    world.trade(40.0, 1_500, series("Exchange2"))
    world.trade(25.0, 1_000, series("exchange1"))
    return world


def test_latest_over_all_exchanges_names_exchange(world: World) -> None:
    assert world.ask("/prices/latest/BTCUSDT").json() == {
        "symbol": "BTCUSDT",
        "exchange": "exchange1",
        "price": 25.0,
        "timestamp": "2025-11-21T02:00:29.500Z",
    }


def test_latest_price_on_one_exchange(world: World) -> None:
    assert world.ask("/prices/latest/Exchange2/BTCUSDT").json() == {
        "symbol": "BTCUSDT",
        "exchange": "Exchange2",
        "price": 40.0,
        "timestamp": "2025-11-21T02:00:29.000Z",
    }


@pytest.mark.parametrize(
    ("path", "exchange", "price", "timestamp"),
    [
        ("highest/BTCUSDT", "Exchange2", 40.0, "2025-11-21T02:00:29.000Z"),
        ("highest/exchange1/BTCUSDT", "exchange1", 25.0, "2025-11-21T02:00:29.500Z"),
        ("lowest/BTCUSDT", "exchange1", 10.0, "2025-11-21T02:00:28.500Z"),
        ("lowest/Exchange2/BTCUSDT", "Exchange2", 40.0, "2025-11-21T02:00:29.000Z"),
    ],
)
def test_extremes_have_exchange_time_and_period(
    world: World, path: str, exchange: str, price: float, timestamp: str
) -> None:
    assert world.ask(f"/prices/{path}?period=1m30s").json() == {
        "symbol": "BTCUSDT",
        "exchange": exchange,
        "price": price,
        "timestamp": timestamp,
        "period": "1m30s",
        "from": "2025-11-21T01:59:00.500Z",
        "to": NOW_TEXT,
    }


@pytest.mark.parametrize(
    ("path", "exchange", "price", "ticks"),
    [("BTCUSDT", None, 25.0, 3), ("exchange1/BTCUSDT", "exchange1", 17.5, 2)],
)
def test_average_is_mean_of_all_ticks(world: World, path: str, exchange: str | None, price: float, ticks: int) -> None:
    assert world.ask(f"/prices/average/{path}?period=3s").json() == {
        "symbol": "BTCUSDT",
        "exchange": exchange,
        "price": price,
        "ticks": ticks,
        "period": "3s",
        "from": "2025-11-21T02:00:27.500Z",
        "to": NOW_TEXT,
    }


@pytest.mark.parametrize("kind", EXTREME_AND_AVERAGE)
def test_without_period_all_ticks_count(world: World, kind: str) -> None:
    world.trade(1.0, 86_400_000 * 3)
    answer = world.ask(f"/prices/{kind}/BTCUSDT").json()
    assert (answer["period"], answer["from"], answer["to"]) == (ALL, "2025-11-18T02:00:30.500Z", NOW_TEXT)


@pytest.mark.parametrize("kind", EXTREME_AND_AVERAGE)
def test_long_period_begins_at_whole_minute(world: World, kind: str) -> None:
    answer = world.ask(f"/prices/{kind}/BTCUSDT?period=24h").json()
    assert (answer["period"], answer["from"], answer["to"]) == ("24h", "2025-11-20T02:00:00.000Z", NOW_TEXT)


@pytest.mark.parametrize("kind", KINDS)
def test_names_match_any_case_and_keep_configured_spelling(world: World, kind: str) -> None:
    answer = world.ask(f"/prices/{kind}/eXCHANGE2/btcUSDt").json()
    assert (answer["exchange"], answer["symbol"]) == ("Exchange2", "BTCUSDT")
    assert world.ask(f"/prices/{kind}/btcusdt").json()["symbol"] == "BTCUSDT"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("nowhere/NOTHING", "unknown_exchange"),
        ("exchange1/NOTHING", "unknown_symbol"),
        ("NOTHING", "unknown_symbol"),
        ("%00", "unknown_symbol"),
        ("exchange1/%FF", "unknown_symbol"),
        ("ETHUSDT", "no_data"),
        ("exchange1/ETHUSDT", "no_data"),
        ("exchange3/BTCUSDT", "no_data"),
    ],
)
def test_unknown_name_or_empty_result_is_404(world: World, kind: str, path: str, code: str) -> None:
    response = world.ask(f"/prices/{kind}/{path}")
    assert (response.status_code, response.json()["code"]) == (404, code)


@pytest.mark.parametrize("kind", EXTREME_AND_AVERAGE)
@pytest.mark.parametrize("query", ["period=", "period", "period=0s", "period=1M", "period=1%20m", "period=1s&period=x"])
def test_invalid_period_is_400(world: World, kind: str, query: str) -> None:
    response = world.ask(f"/prices/{kind}/BTCUSDT?{query}")
    assert (response.status_code, response.json()["code"]) == (400, "invalid_period")


def test_last_of_repeated_periods_counts(world: World) -> None:
    assert world.ask("/prices/average/BTCUSDT?period=x&period=5s").json()["period"] == "5s"


@pytest.mark.parametrize("kind", KINDS)
def test_head_has_status_and_headers_of_get(world: World, kind: str) -> None:
    got, headed = (world.ask(f"/prices/{kind}/BTCUSDT", method) for method in ("GET", "HEAD"))
    assert (headed.status_code, headed.headers) == (got.status_code, got.headers)


@pytest.mark.parametrize("kind", KINDS)
def test_outage_of_both_stores_is_503_without_addresses(world: World, kind: str) -> None:
    world.cache.away = world.archive.away = True
    response = world.ask(f"/prices/{kind}/BTCUSDT")
    assert (response.status_code, response.json()["code"], response.headers["retry-after"]) == (503, "unavailable", "1")
    assert "secret" not in response.text


@pytest.mark.parametrize("kind", KINDS)
def test_outage_of_one_store_causes_no_error(world: World, kind: str) -> None:
    world.trade(5.0, 120_000)
    for store in (world.cache, world.archive):
        store.away = True
        assert world.ask(f"/prices/{kind}/BTCUSDT").status_code == 200
        store.away = False


@pytest.mark.parametrize(
    ("kind", "query"),
    [(kind, query) for kind in KINDS for query in ("?period=1m", "?period=24h", "")
     if kind != "latest" or not query],
)  # fmt: skip
def test_mode_switch_during_price_query_never_mixes_modes(kind: str, query: str) -> None:
    world = World()
    world.trade(1.0, 500)
    world.trade(1.0, 3_600_000)
    for exchange in ("exchange1", "Exchange2"):
        world.trade(99.0, 100, series(exchange, mode=Mode.LIVE))
        world.trade(99.0, 3_500_000, series(exchange, mode=Mode.LIVE))
    world.cache.on_ask = lambda: setattr(world.mode, "current", Mode.LIVE)
    if kind == "latest":
        # The archive then answers, which is read after the switch.
        world.cache.newest_ticks.clear()
    assert world.ask(f"/prices/{kind}/BTCUSDT{query}").json()["price"] == 1.0
    assert world.mode.current is Mode.LIVE


def test_tick_of_clock_ahead_counts_in_period(world: World) -> None:
    world.trade(70.0, -1_500)
    answer = world.ask("/prices/highest/BTCUSDT?period=1s").json()
    assert (answer["price"], answer["timestamp"], answer["to"]) == (
        70.0,
        "2025-11-21T02:00:32.000Z",
        "2025-11-21T02:00:32.000Z",
    )


def test_times_always_have_three_digits_of_milliseconds() -> None:
    for millisecond in (0, 1, 10, 123, 999):
        world = World(now=NOW + millisecond)
        world.trade(1.0, 0)
        timestamp = world.ask("/prices/latest/BTCUSDT").json()["timestamp"]
        assert timestamp.endswith(f".{(500 + millisecond) % 1000:03}Z")
