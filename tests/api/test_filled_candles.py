"""`fill=previous`: candles without ticks are flat ones at the close before, and never beyond what is on record."""

from itertools import groupby, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from marketflow.api.queries.boundaries import INTERVALS
from marketflow.api.queries.candles import SETTLED_MS
from marketflow.model import MINUTE_MS, Amounts, Hole, HoleState
from tests.api.test_candles import MINUTE
from tests.api.world import NOW, World, series


def world_with(*minutes_ago: int) -> World:
    """Return a world with a tick in some minutes before the running one; its price is their number."""
    world = World()
    for ago in sorted(minutes_ago, reverse=True):
        world.trade(float(ago + 1), ago * MINUTE_MS)
    return world


def candles(world: World, query: str) -> list[dict[str, Any]]:
    answer = world.ask(f"/candles/BTCUSDT?fill=previous&{query}")
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["candles"]
    return found


def ago(candle: dict[str, Any]) -> int:
    hours, minutes = int(candle["time"][11:13]), int(candle["time"][14:16])
    return (2 - hours) * 60 - minutes


def shown(world: World, query: str) -> list[tuple[int, float, bool]]:
    return [(ago(each), each["close"], each["filled"]) for each in candles(world, query)]


def test_gap_is_filled_with_flat_candles_of_the_close_before() -> None:
    world = world_with(25, 22)
    *_, filled, last = candles(world, "limit=2")
    assert filled == {
        "time": "2025-11-21T01:37:00.000Z",
        **dict.fromkeys(("open", "high", "low", "close"), 26.0),
        **dict.fromkeys(("average", "volume", "turnover", "vwap", "buy_volume", "buy_turnover")),
        "ticks": 0,
        "closed": True,
        "version": 1,
        "source": "ticks",
        "complete": None,
        "verified": None,
        "venue": None,
        "filled": True,
    }
    assert (last["close"], last["ticks"], last["filled"]) == (23.0, 1, False)
    assert world.ask("/klines/BTCUSDT?limit=2&fill=previous").json()[0] == [
        *(MINUTE - 23 * MINUTE_MS, "26.0", "26.0", "26.0", "26.0", None, MINUTE - 22 * MINUTE_MS - 1, None, 0),
        *(None, None, "0"),
    ]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", [(25, 26.0, False), (24, 26.0, True), (23, 26.0, True), (22, 23.0, False)]),
        ("limit=3", [(24, 26.0, True), (23, 26.0, True), (22, 23.0, False)]),
        ("from=-30m", [(25, 26.0, False), (24, 26.0, True), (23, 26.0, True), (22, 23.0, False)]),
        ("from=-30m&limit=2", [(25, 26.0, False), (24, 26.0, True)]),
        ("from=-25m", [(24, 26.0, True), (23, 26.0, True), (22, 23.0, False)]),
        ("from=-25m&to=-23m", [(24, 26.0, True), (23, 26.0, True)]),
        ("from=-25m&to=-24m", [(24, 26.0, True)]),
        ("to=-23m", [(25, 26.0, False), (24, 26.0, True), (23, 26.0, True)]),
        ("to=-23m&limit=1", [(23, 26.0, True)]),
        ("from=-20m", []),
        ("from=-40m&to=-30m", []),
        ("to=-26m", []),
    ],
)
def test_only_gaps_between_candles_on_record_are_filled(query: str, expected: list[tuple[int, float, bool]]) -> None:
    assert shown(world_with(25, 22), query) == expected


@given(
    st.sets(st.integers(0, 40), max_size=8).map(sorted),
    st.sampled_from([1, 2, 3, 50]),
    st.one_of(st.none(), st.integers(1, 45)),
    st.one_of(st.none(), st.integers(0, 45)),
    st.sampled_from(["1m", "3m", "5m"]),
)
@settings(max_examples=60)
def test_filled_range_is_a_part_of_the_whole_series(
    minutes: list[int], limit: int, since: int | None, until: int | None, interval: str
) -> None:
    world = world_with(*minutes)
    if since is not None and until is not None and since <= until:
        since, until = until + 1, since
    whole = candles(world, f"limit=1000&interval={interval}")
    starts = [each["time"] for each in whole]
    query = f"limit={limit}&interval={interval}"
    query += "" if since is None else f"&from={NOW - since * MINUTE_MS}"
    query += "" if until is None else f"&to={NOW - until * MINUTE_MS}"
    within = [
        each
        for each in whole
        if (since is None or at_of(each) >= NOW - since * MINUTE_MS)
        and (until is None or at_of(each) < NOW - until * MINUTE_MS)
    ]
    expected = within[-limit:] if since is None else within[:limit]
    assert candles(world, query) == expected
    steps = {at_of(b) - at_of(a) for a, b in pairwise(whole)}
    assert steps <= {INTERVALS[interval].length_ms}
    assert starts == sorted(starts)


def at_of(candle: dict[str, Any]) -> int:
    return MINUTE - ago(candle) * MINUTE_MS


@pytest.mark.parametrize(("touching", "volume"), [(False, 0.0), (True, None)])
def test_filled_volume_is_zero_where_amounts_are_known(touching: bool, volume: float | None) -> None:
    world = world_with(25, 22)
    for stored in (world.archive.minutes, world.cache.minutes):
        for slot, candle in stored.items():
            stored[slot] = structs.replace(candle, amounts=Amounts(1.5, 3.0, None, None))
    if touching:
        at = MINUTE - 24 * MINUTE_MS + 1000
        world.missing = [Hole(series(), 5, 9, at, at + 1000, NOW, NOW, HoleState.ABSENT)]
    filled = candles(world, "")[1]
    assert (filled["volume"], filled["turnover"], filled["buy_volume"]) == (volume, volume, None)
    assert (filled["ticks"], filled["vwap"], filled["complete"]) == (0, None, False if touching else None)


def test_filled_months_keep_their_lengths() -> None:
    world = World()
    for days in (0, 100):
        world.trade(1.0 + days, days * 24 * 60 * MINUTE_MS)
    found = candles(world, "interval=1M")
    assert [(each["time"][:10], each["filled"]) for each in found] == [
        ("2025-08-01", False),
        ("2025-09-01", True),
        ("2025-10-01", True),
        ("2025-11-01", False),
    ]


def test_open_end_of_a_past_range_is_not_cached() -> None:
    """A later tick will fill it."""
    since, until = NOW - 40 * MINUTE_MS, NOW - SETTLED_MS - MINUTE_MS
    query = f"/candles/BTCUSDT?from={since}&to={until}&fill=previous"
    assert "etag" not in world_with(30, 22).ask(query).headers
    assert "etag" in world_with(30, 22, 5).ask(query).headers


def test_filled_candles_of_an_exchange_are_its_own() -> None:
    world = world_with(25, 22)
    world.trade(7.0, 24 * MINUTE_MS, series("Exchange2"))
    one = world.ask("/candles/exchange1/BTCUSDT?fill=previous").json()["candles"]
    assert [is_filled for is_filled, _ in groupby(one, key=lambda each: each["filled"])] == [False, True, False]
    reference = world.ask("/candles/reference/BTCUSDT?fill=previous").json()["candles"]
    assert [each["close"] for each in reference] == [26.0, 7.0, 7.0, 23.0]


def test_unknown_fill_is_400() -> None:
    answer = World().ask("/candles/BTCUSDT?fill=zero")
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_fill")
