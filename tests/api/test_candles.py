"""/candles over HTTP."""

import pytest

from marketflow.api.queries.candles import SETTLED_MS
from marketflow.api.rendering import rfc3339
from marketflow.api.routes.charting.candle_values import MAX_AGE_SECONDS
from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS, Hole, HoleState, Mode
from marketflow.stores.ports import HoleQuery
from tests.api.world import NOW, World, series

HOUR_MS = 60 * MINUTE_MS
MINUTE = NOW - 30_500  # 2025-11-21T02:00:00Z, where a minute and an hour begin

WITHOUT_QUANTITIES = dict.fromkeys(("volume", "turnover", "vwap", "buy_volume", "buy_turnover"))
MADE_OF_TICKS = {"source": "ticks", "complete": None, "verified": None, "venue": None, "filled": False}


@pytest.fixture
def world() -> World:
    """Two exchanges with ticks of the running minute, the one before, an hour ago and two days ago."""
    world = World()
    for price, age_ms in ((9.0, 48 * HOUR_MS), (3.0, HOUR_MS), (10.0, 60_000), (14.0, 55_000), (12.0, 20_000)):
        world.trade(price, age_ms, series("exchange1"))
    for price, age_ms in ((8.0, 50_000), (20.0, 20_500), (11.0, 100)):
        world.trade(price, age_ms, series("Exchange2"))
    return world


def test_candles_on_one_exchange_have_all_fields(world: World) -> None:
    assert world.ask("/candles/EXCHANGE1/btcusdt?limit=2").json() == {
        "symbol": "BTCUSDT",
        "exchange": "exchange1",
        "interval": "1m",
        "candles": [
            {
                "time": "2025-11-21T01:59:00.000Z",
                "open": 10.0,
                "high": 14.0,
                "low": 10.0,
                "close": 14.0,
                "average": 12.0,
                "ticks": 2,
                **WITHOUT_QUANTITIES,
                "closed": True,
                "version": 1,
                **MADE_OF_TICKS,
            },
            {
                "time": "2025-11-21T02:00:00.000Z",
                "open": 12.0,
                "high": 12.0,
                "low": 12.0,
                "close": 12.0,
                "average": 12.0,
                "ticks": 1,
                **WITHOUT_QUANTITIES,
                "closed": False,
                "version": 1,
                **MADE_OF_TICKS,
            },
        ],
    }


def hole(name: str, from_ms: int, to_ms: int) -> Hole:
    return Hole(series(name), 5, 9, from_ms, to_ms, NOW, NOW, HoleState.ABSENT)


@pytest.mark.parametrize(
    ("exchange", "from_ms", "to_ms", "complete"),
    [
        ("exchange1", MINUTE - 1, MINUTE, [False, False]),
        ("exchange1", MINUTE - 30_000, MINUTE - 1, [False, None]),
        ("exchange1", MINUTE, MINUTE, [None, False]),
        ("exchange1", MINUTE - 2 * HOUR_MS, NOW, [False, False]),
        ("exchange1", MINUTE - 2 * HOUR_MS, MINUTE - 60_001, [None, None]),
        ("Exchange2", MINUTE - 1, MINUTE, [None, None]),
    ],
)
def test_candle_that_a_hole_touches_is_not_complete(
    world: World, exchange: str, from_ms: int, to_ms: int, complete: list[bool | None]
) -> None:
    world.missing = [hole(exchange, from_ms, to_ms)]
    candles = world.ask("/candles/exchange1/BTCUSDT?limit=2").json()["candles"]
    assert [each["complete"] for each in candles] == complete
    assert [each["complete"] for each in world.ask("/candles/BTCUSDT?limit=2").json()["candles"]][-1] is (
        False if to_ms >= MINUTE else None
    )
    assert world.hole_queries[0].unfilled


def test_candles_are_answered_while_holes_are_unavailable(world: World) -> None:
    async def failing(wanted: HoleQuery) -> list[Hole]:
        raise Unavailable("down")

    world.holes = failing  # type: ignore[method-assign]
    assert world.ask("/candles/exchange1/BTCUSDT?limit=1").json()["candles"][0]["complete"] is None


def test_candles_over_all_exchanges_are_merged(world: World) -> None:
    answer = world.ask("/candles/BTCUSDT?interval=1h&limit=2").json()
    assert answer["exchange"] is None
    assert [[each[name] for name in ("open", "high", "low", "close", "ticks")] for each in answer["candles"]] == [
        [3.0, 14.0, 3.0, 8.0, 4],
        [20.0, 20.0, 11.0, 11.0, 3],
    ]


def test_format_array_is_an_alias_of_klines(world: World) -> None:
    for path in ("BTCUSDT", "exchange1/BTCUSDT", "reference/BTCUSDT"):
        arrays = world.ask(f"/candles/{path}?interval=5m&format=array&fill=previous")
        assert arrays.json() == world.ask(f"/klines/{path}?interval=5m&fill=previous").json()
        assert len(arrays.json()) > 2


def test_candles_without_ticks_are_absent(world: World) -> None:
    times = [each["time"] for each in world.ask("/candles/exchange1/BTCUSDT?interval=15m").json()["candles"]]
    assert times == [f"2025-11-{at}:00.000Z" for at in ("19T02:00", "21T01:00", "21T01:45", "21T02:00")]
    assert world.ask("/candles/ETHUSDT").json()["candles"] == []


def test_running_candle_has_newest_tick_before_its_slice(world: World) -> None:
    world.trade(99.0, 10)
    world.cache.slices.clear()
    (candle,) = world.ask("/candles/exchange1/BTCUSDT?limit=1").json()["candles"]
    assert (candle["close"], candle["closed"]) == (99.0, False)


@pytest.mark.parametrize(
    ("query", "times"),
    [
        ("from=2025-11-21T01:00:00Z", ["01:00", "01:59", "02:00"]),
        ("from=2025-11-21T01:00:00.001Z", ["01:59", "02:00"]),
        ("from=2025-11-21T02:00:00%2B01:00", ["01:00", "01:59", "02:00"]),
        (f"from={MINUTE - HOUR_MS}", ["01:00", "01:59", "02:00"]),
        (f"from={MINUTE - HOUR_MS}&limit=2", ["01:00", "01:59"]),
        (f"to={MINUTE}&limit=2", ["01:00", "01:59"]),
        (f"to={MINUTE + 1}&limit=2", ["01:59", "02:00"]),
        (f"from={MINUTE}&to={MINUTE + 1}", ["02:00"]),
        ("from=2030-01-01T00:00:00Z", []),
        ("to=2000-01-01t00:00:00.5z", []),
        ("from=0&to=1", []),
        (f"from={MINUTE}&to=99999999999999", ["02:00"]),
        ("from=2025-11-21", ["01:00", "01:59", "02:00"]),
        ("from=-90m&to=now", ["01:00", "01:59", "02:00"]),
        ("from=-31m", ["01:59", "02:00"]),
        ("limit=1&limit=2", ["01:59", "02:00"]),
    ],
)
def test_range_holds_candles_that_open_within_it(world: World, query: str, times: list[str]) -> None:
    response = world.ask(f"/candles/exchange1/BTCUSDT?{query}")
    assert [each["time"][11:16] for each in response.json()["candles"]] == times
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("query", "code"),
    [
        *((f"interval={text}", "invalid_interval") for text in ("", "2m", "1H", "1W", "60s", "1m%00")),
        *(
            (f"limit={text}", "invalid_limit")
            for text in ("", "0", "1001", "-1", "1.0", "x", "9" * 5000, "%D9%A1", "0" * 4400)
        ),
        *((f"format={text}", "invalid_format") for text in ("", "csv", "Array")),
        ("from=2&to=2", "invalid_range"),
        ("from=3&to=2", "invalid_range"),
        *(
            (f"{name}={text}", "invalid_range")
            for name in ("from", "to")
            for text in (
                *("", "yesterday", "-1", "1e3", "1.5", "9" * 16, "2025-11-21T02:00:00", "%D9%A1", "0" * 4400 + "1"),
                *(str(MINUTE // 1000), str(MINUTE * 1000), str(MINUTE * 1_000_000), "-", "-1w", "now-1h"),
                *("2025-13-01T00:00:00Z", "2025-02-30T00:00:00Z", "2025-11-21T25:00:00Z", "2025-11-21T02:00:00+01:00"),
            )
        ),
    ],
)
def test_invalid_parameter_is_400_with_its_code(world: World, query: str, code: str) -> None:
    response = world.ask(f"/candles/BTCUSDT?{query}")
    assert (response.status_code, response.json()["code"]) == (400, code)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("nowhere/NOTHING?limit=0", "unknown_exchange"),
        ("exchange1/NOTHING?limit=0", "unknown_symbol"),
        ("NOTHING?limit=0", "unknown_symbol"),
    ],
)
def test_unconfigured_name_is_404_with_its_code(world: World, path: str, code: str) -> None:
    response = world.ask(f"/candles/{path}")
    assert (response.status_code, response.json()["code"]) == (404, code)


# HTTP caching


def test_settled_range_is_cacheable_and_revalidated_by_etag(world: World) -> None:
    path = f"/candles/BTCUSDT?interval=1h&from={MINUTE - 72 * HOUR_MS}&to={MINUTE - HOUR_MS}"
    first = world.ask(path)
    assert first.headers["cache-control"] == f"max-age={MAX_AGE_SECONDS}"
    assert [each["closed"] for each in first.json()["candles"]] == [True]
    tag = first.headers["etag"]
    assert tag.startswith('W/"')
    for known in (tag, tag.removeprefix("W/"), f'"other", {tag}', "*"):
        again = world.ask(path, headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert again.headers["cache-control"] == first.headers["cache-control"]
    assert world.ask(path, headers={"If-None-Match": '"other"'}).json() == first.json()
    assert world.ask(f"{path}&format=array").headers["etag"] != tag

    world.trade(4.0, 47 * HOUR_MS)
    assert world.ask(path, headers={"If-None-Match": tag}).status_code == 200
    world.mode.current = Mode.LIVE
    assert world.ask(path, headers={"If-None-Match": tag}).json()["candles"] == []


@pytest.mark.parametrize(
    ("query", "cacheable"),
    [
        (f"from=0&to={NOW - SETTLED_MS - 30_500}", True),
        (f"from=0&to={NOW - SETTLED_MS + 30_000}", False),
        (f"from=0&to={MINUTE - HOUR_MS}&interval=1d", False),  # the running day opens in it
        (f"from=0&to={MINUTE - 3 * HOUR_MS}&interval=1d", True),
        (f"to={MINUTE - 72 * HOUR_MS}", False),
        ("from=0", False),
        ("", False),
    ],
)
def test_range_that_may_change_is_not_cacheable(world: World, query: str, cacheable: bool) -> None:
    headers = world.ask(f"/candles/BTCUSDT?{query}", headers={"If-None-Match": "*"}).headers
    assert (headers["cache-control"] != "no-store", "etag" in headers) == (cacheable, cacheable)


# Outages


@pytest.mark.parametrize("interval", ["1m", "15m", "1h", "4h", "1d"])
def test_redis_outage_serves_rows_with_last_minutes_open(world: World, interval: str) -> None:
    whole = world.ask(f"/candles/exchange1/BTCUSDT?interval={interval}").json()["candles"]
    world.cache.away = True
    answered = world.ask(f"/candles/exchange1/BTCUSDT?interval={interval}").json()["candles"]
    assert {each["time"] for each in answered} <= {each["time"] for each in whole}
    assert sum(each["ticks"] for each in answered) == 4  # all but the tick of the running minute
    assert not answered[-1]["closed"]
    assert answered[0] == whole[0]


def test_archive_outage_serves_one_day_from_cache(world: World) -> None:
    del world.cache.minutes[next(slot for slot in world.cache.minutes if slot.start < NOW - 24 * HOUR_MS)]
    world.archive.away = True
    answer = world.ask("/candles/exchange1/BTCUSDT?interval=1h").json()["candles"]
    assert [(each["time"][11:16], each["ticks"], each["closed"]) for each in answer] == [
        ("01:00", 3, True),
        ("02:00", 1, False),
    ]
    answer = world.ask(f"/candles/exchange1/BTCUSDT?from={MINUTE - HOUR_MS}").json()["candles"]
    assert [each["time"][11:16] for each in answer] == ["01:00", "01:59", "02:00"]
    # A candle that began before the cached minutes may lack ticks.
    (day,) = world.ask("/candles/exchange1/BTCUSDT?interval=1d").json()["candles"]
    assert (day["ticks"], day["closed"]) == (4, False)


@pytest.mark.parametrize(
    "query",
    [
        f"from={MINUTE - 25 * HOUR_MS}",
        f"from={MINUTE - 72 * HOUR_MS}&to={MINUTE - 48 * HOUR_MS}",
        f"to={MINUTE - 48 * HOUR_MS}",
    ],
)
def test_archive_outage_makes_older_candles_503(world: World, query: str) -> None:
    world.archive.away = True
    response = world.ask(f"/candles/BTCUSDT?{query}")
    assert (response.status_code, response.json()["code"]) == (503, "unavailable")


def test_candle_query_reads_only_stores_of_its_range(world: World) -> None:
    world.archive.away = True
    assert len(world.ask(f"/candles/BTCUSDT?from={MINUTE - MINUTE_MS}").json()["candles"]) == 2
    world.archive.away, world.cache.away = False, True
    assert len(world.ask(f"/candles/BTCUSDT?to={MINUTE - 2 * HOUR_MS}").json()["candles"]) == 1


@pytest.mark.parametrize(("cache_away", "archive_away"), [(True, True), (False, True), (True, False)])
def test_empty_result_during_outage_is_503(*, cache_away: bool, archive_away: bool) -> None:
    world = World()
    world.cache.away, world.archive.away = cache_away, archive_away
    response = world.ask("/candles/BTCUSDT")
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert "secret" not in response.text


@pytest.mark.parametrize("interval", ["1m", "1h", "1d"])
def test_mode_switch_during_candle_query_never_mixes_modes(interval: str) -> None:
    world = World()
    for price, mode in ((1.0, Mode.TEST), (99.0, Mode.LIVE)):
        for age_ms in (500, 100_000, HOUR_MS, 30 * HOUR_MS):
            world.trade(price, age_ms, series(mode=mode))
    world.cache.on_ask = lambda: setattr(world.mode, "current", Mode.LIVE)
    answer = world.ask(f"/candles/BTCUSDT?interval={interval}").json()
    assert {each[name] for each in answer["candles"] for name in ("open", "high", "low", "close")} == {1.0}
    assert world.mode.current is Mode.LIVE


@pytest.mark.parametrize(
    ("interval", "length"), [("1m", 60_000), ("5m", 300_000), ("1h", HOUR_MS), ("1d", 24 * HOUR_MS)]
)
def test_candle_is_closed_once_no_tick_can_change_it(interval: str, length: int) -> None:
    """A tick is accepted up to 5 s late (flow.max_clock_skew_seconds), and written within half a second."""
    world = World()
    start = MINUTE - MINUTE % length
    for after_end, closed in ((-1, False), (0, False), (2_000, False), (5_000, False), (5_499, False), (5_500, True)):
        world.now = start + length + after_end
        world.trade(10.0, world.now - start - 1)
        (candle,) = (
            each
            for each in world.ask(f"/candles/BTCUSDT?interval={interval}&limit=2").json()["candles"]
            if each["time"] == rfc3339(start)
        )
        assert candle["closed"] is closed, after_end
