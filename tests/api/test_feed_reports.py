"""/feeds and /holes: what they answer, and to which query."""

from typing import Any

import pytest

from marketflow.cluster.messages import ExchangeReport, FeedsQuery, FeedsReport, SeriesReport
from marketflow.feeds.reachability import Reachability
from marketflow.model import FeedState, Hole, HoleState, Mode
from marketflow.stores.ports import HoleQuery
from tests.api.description import description
from tests.api.world import NOW, World, series

AT = "2025-11-21T02:00:30.500Z"

REFUSED = ExchangeReport(
    exchange="exchange1",
    state=FeedState.CONNECTING,
    address="wss://example.com/ws",
    ticks_per_second=12.3456,
    doubles=7,
    holes={HoleState.OPEN: 2},
    reconnects=3,
    clock_offset_ms=-120,
    rest_weight_used=40,
    rest_weight_limit=3000,
    error="451: refused by the venue for this location",
    error_at=NOW,
    next_try_at=NOW + 300_000,
    absent=("ETHUSDT",),
    halted=("TONUSDT",),
)
PLAIN = ExchangeReport(
    "Exchange2", FeedState.GENERATED, "the generator", 0.0, None, None, 0, 0, None, None, None, None, None, ()
)
BTC = SeriesReport("exchange1", "BTCUSDT", "connecting", 67123.45, NOW, 20.5, 180.0, 12.3456, 7, {HoleState.OPEN: 2})
ETH = SeriesReport("exchange1", "ETHUSDT", "absent", None, None, None, None, 0.0, 0, {})


def reported(total: int = 2) -> World:
    return World(feeds=FeedsReport(Mode.TEST, (REFUSED, PLAIN), (BTC, ETH), total))


def test_feeds_have_every_exchange_and_series() -> None:
    answer = reported().ask("/feeds")
    assert answer.json() == {
        "mode": "test",
        "exchanges": [
            {
                "exchange": "exchange1",
                "state": "connecting",
                "address": "wss://example.com/ws",
                "ticks_per_second": 12.35,
                "doubles": 7,
                "holes": {"open": 2},
                "reconnects": 3,
                "clock_offset_ms": -120,
                "rest_weight": {"used": 40, "limit": 3000},
                "error": "451: refused by the venue for this location",
                "error_at": AT,
                "next_try_at": "2025-11-21T02:05:30.500Z",
                "absent": ["ETHUSDT"],
                "halted": ["TONUSDT"],
            },
            {
                "exchange": "Exchange2",
                "state": "generated",
                "address": "the generator",
                "ticks_per_second": 0.0,
                "reconnects": 0,
                "clock_offset_ms": 0,
                "absent": [],
                "halted": [],
            }
            | dict.fromkeys(("doubles", "holes", "rest_weight", "error", "error_at", "next_try_at")),
        ],
        "series": [
            {
                "exchange": "exchange1",
                "symbol": "BTCUSDT",
                "state": "connecting",
                "price": 67123.45,
                "timestamp": AT,
                "delay_ms": {"p50": 20.5, "p99": 180.0},
                "ticks_per_second": 12.35,
                "doubles": 7,
                "holes": {"open": 2},
            },
            {
                "exchange": "exchange1",
                "symbol": "ETHUSDT",
                "state": "absent",
                "price": None,
                "timestamp": None,
                "delay_ms": None,
                "ticks_per_second": 0.0,
                "doubles": 0,
                "holes": {},
            },
        ],
        "next_offset": None,
    }
    description().check("GET", "/feeds", answer)


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("", FeedsQuery(500)),
        ("?exchange=EXCHANGE2&symbol=ethusdt", FeedsQuery(500, 0, "Exchange2", "ETHUSDT")),
        ("?limit=2&offset=004", FeedsQuery(2, 4)),
        ("?offset=0", FeedsQuery(500)),
    ],
)
def test_query_of_feeds_is_passed_on(query: str, wanted: FeedsQuery) -> None:
    world = reported()
    assert world.ask(f"/feeds{query}").status_code == 200
    assert world.feed_queries == [wanted]


@pytest.mark.parametrize(("total", "query", "following"), [(5, "", 2), (5, "?offset=2", 4), (5, "?offset=3", None)])
def test_next_offset_leads_to_the_last_page(total: int, query: str, following: int | None) -> None:
    assert reported(total).ask(f"/feeds{query}").json()["next_offset"] == following


def test_offset_beyond_the_end_is_an_empty_page() -> None:
    world = World(feeds=FeedsReport(Mode.TEST, (REFUSED,), (), 2))
    assert world.ask("/feeds?offset=2").json()["next_offset"] is None


@pytest.mark.parametrize("text", ["", "-1", "1.5", "\u0661", "1e3", "1000000000", "x"])
def test_invalid_offset_is_refused(text: str) -> None:
    answer = reported().ask(f"/feeds?offset={text}")
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_offset")


def test_feeds_without_ingest_process_are_unavailable() -> None:
    world = reported()
    world.cache.away = True
    answer = world.ask("/feeds")
    assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (503, "unavailable", "1")


# Holes

HOLE = Hole(series(), 2**70, 2**70 + 5, NOW - 2000, NOW - 500, NOW, NOW + 1, HoleState.GIVEN_UP, "60 trades at most")


def test_holes_have_ids_as_strings() -> None:
    answer = World(missing=[HOLE]).ask("/holes")
    assert answer.json() == {
        "mode": "test",
        "holes": [
            {
                "exchange": "exchange1",
                "symbol": "BTCUSDT",
                "after_id": "1180591620717411303424",
                "before_id": "1180591620717411303429",
                "from": "2025-11-21T02:00:28.500Z",
                "to": "2025-11-21T02:00:30.000Z",
                "state": "given_up",
                "reason": "60 trades at most",
                "found_at": AT,
                "changed_at": "2025-11-21T02:00:30.501Z",
            }
        ],
    }
    description().check("GET", "/holes", answer)


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("", {}),
        ("?exchange=exchange2&symbol=btcusdt", {"exchange": "Exchange2", "symbol": "BTCUSDT"}),
        ("?state=given_up&limit=7", {"state": HoleState.GIVEN_UP, "limit": 7}),
        ("?from=-24h", {"since": NOW - 86_400_000}),
        ("?from=2025-11-21", {"since": 1_763_683_200_000}),
    ],
)
def test_query_of_holes_is_passed_on(query: str, wanted: dict[str, Any]) -> None:
    world = World()
    world.mode.current = Mode.LIVE
    assert world.ask(f"/holes{query}").json() == {"mode": "live", "holes": []}
    assert world.hole_queries == [HoleQuery(Mode.LIVE, 100)._replace(**wanted)]


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("state=Open", 400, "invalid_state"),
        ("state=", 400, "invalid_state"),
        ("limit=1001", 400, "invalid_limit"),
        ("from=yesterday", 400, "invalid_range"),
        ("to=now", 400, "unknown_parameter"),
        ("exchange=nowhere", 404, "unknown_exchange"),
        ("symbol=NOTHING", 404, "unknown_symbol"),
    ],
)
def test_invalid_query_of_holes_is_refused(query: str, status: int, code: str) -> None:
    world = World()
    answer = world.ask(f"/holes?{query}")
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert world.hole_queries == []


def test_holes_without_archive_are_unavailable() -> None:
    world = World()
    world.archive.away = True
    assert world.ask("/holes").json()["code"] == "unavailable"


def test_reachability_has_every_exchange() -> None:
    world = World(
        reachable=[
            Reachability("exchange1", "127.0.0.1:40101", None),
            Reachability("Exchange2", "127.0.0.1:40102", "Connection refused"),
        ]
    )
    answer = world.ask("/feeds/reachability")
    assert answer.json() == {
        "exchanges": [
            {"exchange": "exchange1", "address": "127.0.0.1:40101", "reachable": True, "error": None},
            {
                "exchange": "Exchange2",
                "address": "127.0.0.1:40102",
                "reachable": False,
                "error": "Connection refused",
            },
        ]
    }
    description().check("GET", "/feeds/reachability", answer)
