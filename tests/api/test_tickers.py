"""/tickers and /market: 24 hours of each series and symbol, from one query for all clients."""

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from marketflow import __version__
from marketflow.api.middleware.client_limits import ClientLimits
from marketflow.api.problems import NoData
from marketflow.api.queries.boundaries import DAY_MS, INTERVALS
from marketflow.api.queries.derived.day_statistics import DayStatistics
from marketflow.errors import QuotaExceeded
from marketflow.model import MINUTE_MS, Mode, minute_start
from tests.api.world import EXCHANGES, NOW, SYMBOLS, World, client_of, series

HOUR_MS = 60 * MINUTE_MS
ALL = [series(exchange, symbol) for symbol in SYMBOLS for exchange in EXCHANGES]


@pytest.fixture
def world() -> World:
    """Two exchanges that rose by a tenth, one with a gap of 50, and a third that began an hour ago."""
    world = World()
    for exchange, first in (("exchange1", 100.0), ("Exchange2", 150.0)):
        world.trade(1000.0, DAY_MS + 10 * MINUTE_MS, series(exchange))
        world.trade(first, DAY_MS - MINUTE_MS, series(exchange))
        world.trade(first * 1.5, 5 * HOUR_MS, series(exchange))
        world.trade(round(first * 1.1, 2), 2000, series(exchange))
    world.trade(900.0, HOUR_MS, series("exchange3"))
    world.trade(800.0, 1000, series("exchange3"))
    return world


def test_tickers_have_24_hours_of_each_series(world: World) -> None:
    answer = world.ask("/tickers").json()
    first, second, third = answer["series"]
    assert (answer["mode"], answer["from"]) == ("test", "2025-11-20T02:00:00.000Z")
    assert first == {
        "symbol": "BTCUSDT",
        "exchange": "exchange1",
        "open": 100.0,
        "high": 150.0,
        "low": 100.0,
        "last": 110.0,
        "change": 10.0,
        "change_percent": 10.0,
        "volume": None,
        "turnover": None,
        "ticks": 3,
        "from": "2025-11-20T02:01:30.500Z",
        "to": "2025-11-21T02:00:28.500Z",
    }
    assert (second["exchange"], second["change"], third["change_percent"]) == ("Exchange2", 15.0, -11.1111)


def test_change_has_the_digits_of_the_prices() -> None:
    world = World()
    world.trade(60_000.1, DAY_MS - MINUTE_MS)
    world.trade(60_000.45, 1000)
    answer = world.ask("/tickers").json()
    assert (answer["series"][0]["change"], answer["symbols"][0]["change"]) == (0.35, 0.35)


def test_symbol_changes_by_the_exchanges_of_the_whole_day(world: World) -> None:
    (symbol,) = world.ask("/tickers").json()["symbols"]
    assert (symbol["symbol"], symbol["exchanges"], symbol["ticks"]) == ("BTCUSDT", 2, 8)
    assert [symbol[name] for name in ("open", "last", "high", "low")] == [125.0, 137.5, 900.0, 100.0]
    assert (symbol["change"], symbol["change_percent"]) == (12.5, 10.0)


def test_tickers_are_chosen_by_symbols(world: World) -> None:
    world.trade(5.0, 1000, series("exchange1", "ETHUSDT"))
    for query, expected in (("", {"BTCUSDT", "ETHUSDT"}), ("?symbols=ethusdt", {"ETHUSDT"}), ("?symbols=", {*SYMBOLS})):
        answer = world.ask(f"/tickers{query}").json()
        for part in ("symbols", "series"):
            assert {each["symbol"] for each in answer[part]} == expected
    answer = world.ask("/tickers?symbols=BTCUSDT,NOTHING")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_symbol")


def test_market_has_all_that_a_program_begins_with(world: World) -> None:
    answer = world.ask("/market").json()
    assert (answer["version"], answer["mode"], answer["time"]) == (__version__, "test", "2025-11-21T02:00:30.500Z")
    assert (answer["exchanges"], answer["intervals"]) == ([*EXCHANGES], [*INTERVALS])
    assert answer["symbols"] == [
        {"symbol": "BTCUSDT", "price": 137.5, "change": 12.5, "change_percent": 10.0},
        {"symbol": "ETHUSDT", "price": None, "change": None, "change_percent": None},
    ]
    assert [(each["exchange"], each["price"], each["change"]) for each in answer["prices"]] == [
        ("exchange1", 110.0, 10.0),
        ("Exchange2", 165.0, 15.0),
        ("exchange3", 800.0, -100.0),
    ]


@pytest.mark.parametrize("away", ["cache", "archive"])
def test_outage_of_one_store_leaves_what_the_other_has(world: World, away: str) -> None:
    getattr(world, away).away = True
    answer = world.ask("/tickers")
    assert answer.status_code == 200
    assert answer.json()["series"][0]["symbol"] == "BTCUSDT"
    assert world.ask("/market").json()["prices"]


def test_market_without_ticks_is_empty() -> None:
    tickers, market = (World().ask(path).json() for path in ("/tickers", "/market"))
    assert (tickers["symbols"], tickers["series"], market["prices"]) == ([], [], [])


def test_modes_have_statistics_of_their_own(world: World) -> None:
    world.mode.current = Mode.LIVE
    world.trade(7.0, 1000, series(mode=Mode.LIVE))
    (only,) = world.ask("/tickers").json()["series"]
    assert only["last"] == 7.0


@given(st.lists(st.tuples(st.sampled_from(ALL), st.integers(0, 26 * HOUR_MS), st.integers(1, 9)), max_size=40))
@settings(max_examples=60)
def test_statistics_equal_the_summary_of_24_hours(trades: list[Any]) -> None:
    world = World()
    for one, age_ms, price in sorted(trades, key=lambda trade: (-trade[1], trade[2])):
        world.trade(float(price), age_ms, one)
    context = world.context()
    since = minute_start(NOW - DAY_MS)
    if not any(NOW - age_ms >= since for _, age_ms, _ in trades):
        return
    found = asyncio.run(context.day_statistics.read(ALL))
    assert found == asyncio.run(context.prices.summary(ALL, DAY_MS))


def test_equal_requests_are_one_query_and_hours_are_kept(world: World) -> None:
    clock = [0.0]
    context = world.context()
    statistics = DayStatistics(context.prices, context.clients, lambda: clock[0])

    async def read_often() -> list[int]:
        counts = []
        for clock[0] in (0.0, 0.5, 2.0, 4.0, 13.0):
            before = world.archive.queries
            await asyncio.gather(*(statistics.read(ALL) for _ in range(50)))
            counts.append(world.archive.queries - before)
        return counts

    # Both edges; the hours between them are read at first, and again after ten seconds.
    assert asyncio.run(read_often()) == [3, 0, 2, 2, 3]


def test_statistics_are_charged_to_the_client_that_causes_them(world: World) -> None:
    context = replace(world.context(), clients=ClientLimits(monotonic=lambda: 0.0))

    async def ask() -> list[int]:
        async with client_of(context) as client:
            first = await client.get("/tickers")
            context.clients._rows.take("127.0.0.1", 1e9)
            cached = await client.get("/market")
            context.day_statistics._days._tasks.clear()
            return [first.status_code, cached.status_code, (await client.get("/tickers")).status_code]

    assert asyncio.run(ask()) == [200, 200, 429]


def test_one_client_over_its_limit_fails_no_other(world: World) -> None:
    context = replace(world.context(), clients=ClientLimits(monotonic=lambda: 0.0))

    async def both() -> tuple[object, object]:
        async def read(client: str) -> object:
            context.clients.attribute_to({"client": (client, 1), "headers": []})
            return await context.day_statistics.read(ALL)

        context.clients._rows.take("10.0.0.1", 1e9)
        poor, rich = asyncio.create_task(read("10.0.0.1")), asyncio.create_task(read("10.0.0.2"))
        return await asyncio.gather(poor, rich, return_exceptions=True)

    poor, rich = asyncio.run(both())
    assert isinstance(poor, QuotaExceeded)
    assert not isinstance(rich, BaseException)


def test_client_reads_a_thousand_series_again_after_two_seconds() -> None:
    """As a program that begins with GET /market and goes on with GET /tickers, on 200 exchanges."""

    async def read() -> None:
        now = 0.0
        clients = ClientLimits(monotonic=lambda: now)
        day = DayStatistics(World().context().prices, clients, lambda: now)
        many = [series(f"exchange{number}", f"COIN{number % 5}") for number in range(1000)]
        clients.attribute_to({"client": ("10.0.0.1", 1), "headers": []})
        with pytest.raises(NoData):
            await day.read(many)
        now = 2.0
        with pytest.raises(NoData):
            await day.read(many)
        now = 3.1
        with pytest.raises(QuotaExceeded):
            await day.read(many)

    asyncio.run(read())
