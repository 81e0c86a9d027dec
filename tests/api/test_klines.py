"""/klines over HTTP: the arrays of Binance, by path and by the parameters of Binance."""

import pytest
from msgspec import structs

from marketflow.model import MINUTE_MS, REFERENCE, Amounts, Slot, minute_start
from tests.api.test_candles import HOUR_MS, MINUTE
from tests.api.world import World, series


@pytest.fixture
def world() -> World:
    """Two exchanges: with ticks an hour ago, in the minute before and in the running one."""
    world = World()
    for price, age_ms in ((3.0, HOUR_MS), (10.0, 60_000), (14.0, 55_000), (20.0, 20_500)):
        world.trade(price, age_ms)
    world.trade(1e-7, 50, series("Exchange2"))
    return world


def test_klines_are_arrays_in_the_order_of_binance(world: World) -> None:
    assert world.ask("/klines/BTCUSDT?interval=5m&limit=1").json() == [
        [MINUTE, "20.0", "20.0", "0.0000001", "0.0000001", None, MINUTE + 299_999, None, 2, None, None, "0"]
    ]


def test_klines_have_amounts_that_are_known(world: World) -> None:
    slot = Slot(series(), minute_start(world.now - HOUR_MS))
    amounts = Amounts(2.5, 7.5, None, None)
    world.archive.minutes[slot] = structs.replace(world.archive.minutes[slot], amounts=amounts)
    kline = world.ask("/klines/exchange1/BTCUSDT").json()[0]
    assert (kline[5], kline[7], kline[8], kline[9], kline[10]) == ("2.5", "7.5", 1, None, None)


@pytest.mark.parametrize(
    ("by_binance", "by_path"),
    [
        ("symbol=btcusdt", "BTCUSDT?"),
        ("symbol=BTCUSDT&exchange=EXCHANGE2&interval=3m", "Exchange2/BTCUSDT?interval=3m"),
        ("symbol=BTCUSDT&exchange=reference", f"{REFERENCE}/BTCUSDT?"),
        (f"symbol=BTCUSDT&startTime={MINUTE - MINUTE_MS}", f"BTCUSDT?from={MINUTE - MINUTE_MS}"),
        (f"symbol=BTCUSDT&endTime={MINUTE - MINUTE_MS}&limit=1", f"BTCUSDT?to={MINUTE - MINUTE_MS + 1}&limit=1"),
        (f"symbol=BTCUSDT&startTime={MINUTE}&endTime={MINUTE}", f"BTCUSDT?from={MINUTE}"),
    ],
)
def test_klines_take_the_parameters_of_binance(world: World, by_binance: str, by_path: str) -> None:
    answer = world.ask(f"/klines?{by_binance}")
    assert answer.json() == world.ask(f"/klines/{by_path}").json()
    assert answer.status_code == 200
    assert answer.json()


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("", 404, "unknown_symbol"),
        ("symbol=NOTHING", 404, "unknown_symbol"),
        ("symbol=BTCUSDT&exchange=nowhere", 404, "unknown_exchange"),
        ("symbol=BTCUSDT&interval=1H", 400, "invalid_interval"),
        ("symbol=BTCUSDT&startTime=2&endTime=1", 400, "invalid_range"),
        ("symbol=BTCUSDT&startTime=x", 400, "invalid_range"),
        ("symbol=BTCUSDT&limit=1001", 400, "invalid_limit"),
        ("symbol=BTCUSDT&from=1", 400, "unknown_parameter"),
    ],
)
def test_wrong_parameters_of_binance_have_their_code(world: World, query: str, status: int, code: str) -> None:
    answer = world.ask(f"/klines?{query}")
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_klines_of_a_past_range_have_an_etag(world: World) -> None:
    path = f"/klines/BTCUSDT?from={MINUTE - 2 * HOUR_MS}&to={MINUTE - HOUR_MS // 2}"
    tag = world.ask(path).headers["etag"]
    assert world.ask(path, headers={"If-None-Match": tag}).status_code == 304
