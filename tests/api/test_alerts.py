"""/alerts: rules made, changed and deleted by the process that ingests, and their events."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from marketflow.alerts.alert_model import AlertEvent, PriceRule, RuleState, StaleRule, Webhook
from marketflow.api.alerting.event_feed import EventFeed
from marketflow.errors import Unavailable
from marketflow.stores.ports import NumberedEvent
from tests.alerts.rules import START, candles_of, evaluator_of, stored
from tests.api.world import MemoryAlerts, World

SECRET = "sixteen-characters"
HOOK = {"url": "https://hooks.example.com/T0/secret-path", "secret": SECRET}
CHANGE = {"kind": "change", "symbol": "BTCUSDT", "percent": 1, "period": "1m"}
PRICE = {"kind": "price", "symbol": "btcusdt", "exchange": "exchange2", "level": 70000, "direction": "up"}


def send(world: World, method: str, path: str, body: object) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return world.ask(path, method, {"Authorization": "Bearer plain"}, content)


def events(count: int) -> list[AlertEvent]:
    rules = evaluator_of(stored("mine", level=100))
    rules.evaluate(candles_of(99), START)
    prices = [101, 99] * count
    found = [rules.evaluate(candles_of(price, at=START + 100 * n), START) for n, price in enumerate(prices, 1)]
    return [each.event for batch in found for each in batch][:count]


def test_rule_is_made_with_the_configured_spelling() -> None:
    world = World()
    made = send(world, "POST", "/alerts", PRICE | {"once": True, "cooldown": "5m", "webhook": HOOK})
    assert made.status_code == 201
    rule = {"kind": "price", "symbol": "BTCUSDT", "exchange": "Exchange2", "level": 70000.0, "direction": "up"}
    assert made.json() == {
        "number": None,
        "id": "made",
        "origin": "api",
        "rule": rule | {"once": True, "cooldown": "5m"},
        "receiver": "https://hooks.example.com",
        "done": False,
        "last_event_at": None,
    }
    assert world.alerts.changes[0].rule is not None
    assert world.alerts.changes[0].rule.webhook == Webhook(**HOOK)


def test_no_answer_has_a_webhook_or_its_secret() -> None:
    world = World()
    send(world, "POST", "/alerts", {"kind": "stale", "webhook": HOOK})
    for path in ("/alerts", "/alerts/made"):
        text = world.ask(path).text
        assert "https://hooks.example.com" in text
        assert "secret-path" not in text
        assert SECRET not in text
    assert SECRET not in repr(world.alerts.changes)
    assert "secret-path" not in repr(world.alerts.changes)


def test_rules_are_listed_by_page_with_what_they_have_done() -> None:
    world = World()
    world.alerts.add("a", PriceRule(symbol="BTCUSDT", level=1.0), "settings", RuleState(START, True))
    world.alerts.add("b", StaleRule(exchange="exchange1"))
    first = world.ask("/alerts?limit=1").json()
    assert [(rule["id"], rule["origin"], rule["done"], rule["last_event_at"]) for rule in first["rules"]] == [
        ("a", "settings", True, "2025-11-21T01:54:00.000Z")
    ]
    second = world.ask(f"/alerts?limit=5&after={first['next_after']}").json()
    assert [rule["rule"] for rule in second["rules"]] == [{"kind": "stale", "exchange": "exchange1"}]
    assert second["next_after"] is None
    assert world.ask("/alerts/b").json()["id"] == "b"


def test_rule_is_replaced_and_deleted() -> None:
    world = World()
    world.alerts.add("a", PriceRule(symbol="BTCUSDT", level=1.0))
    assert send(world, "PUT", "/alerts/a", {"kind": "gap", "symbol": "ETHUSDT", "basis_points": 7}).status_code == 200
    assert world.ask("/alerts/a").json()["rule"] == {"kind": "gap", "symbol": "ETHUSDT", "basis_points": 7.0}
    assert send(world, "DELETE", "/alerts/a", b"").json() == {"id": "a"}
    assert world.ask("/alerts").json() == {"rules": [], "next_after": None}


@pytest.mark.parametrize(("method", "path"), [("POST", "/alerts"), ("PUT", "/alerts/a"), ("DELETE", "/alerts/a")])
def test_changes_of_rules_need_the_token(method: str, path: str) -> None:
    world = World(token="plain")
    world.alerts.add("a", StaleRule())
    refused = world.ask(path, method, {"Authorization": "Bearer wrong"}, b'{"kind":"stale"}')
    assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
    assert world.alerts.changes == []
    assert send(world, method, path, {"kind": "stale"}).status_code in (200, 201)


def test_reading_rules_needs_no_token() -> None:
    world = World(token="plain")
    assert [world.ask(path).status_code for path in ("/alerts", "/events/alerts")] == [200, 200]


def test_configured_rule_cannot_be_changed() -> None:
    world = World()
    world.alerts.add("s", StaleRule(), "settings")
    for method in ("PUT", "DELETE"):
        refused = send(world, method, "/alerts/s", {"kind": "stale"})
        assert (refused.status_code, refused.json()["code"]) == (409, "configured_rule")


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (b"", "invalid_rule", "it is empty"),
        (b"\xff", "invalid_rule", "malformed"),
        (b'{"kind":"stale","name":"\xff"}', "invalid_rule", "it is not UTF-8"),
        (b'{"kind":', "invalid_rule", "it is incomplete JSON"),
        (b"[" * 5000, "invalid_rule", "rule"),
        (b"[]", "invalid_rule", "a rule is an object"),
        ({"kind": "moon"}, "invalid_rule", "`kind` must be one of price, change, gap, stale, hole"),
        ({}, "invalid_rule", "`kind` is missing, which must be one of price, change"),
        (PRICE | {"direction": "sideways"}, "invalid_rule", "`direction` must be one of up, down, either"),
        (CHANGE | {"period": "7m"}, "invalid_rule", "`period` must be one of 10s, 30s, 1m"),
        (CHANGE | {"percent": -1}, "invalid_rule", "`percent` must be a number above 0"),
        (PRICE | {"once": "yes"}, "invalid_rule", "`once` must be true or false"),
        ({"kind": "stale", "exchange": 1}, "invalid_rule", "`exchange` must be the name"),
        ({"kind": "gap", "symbol": "X" * 33, "basis_points": 1}, "invalid_rule", "`symbol` must be the name"),
        (PRICE | {"level": 0}, "invalid_rule", "`level` must be a number above 0 and up to 1e12"),
        (PRICE | {"level": "1"}, "invalid_rule", "`level` must be a number above 0"),
        (PRICE | {"moon": 1}, "invalid_rule", "a rule of this kind has no key `moon`."),
        (PRICE | {"dirction": "up"}, "invalid_rule", "has no key `dirction`; did you mean `direction`."),
        (
            PRICE | {"webhook": HOOK | {"uri": ""}},
            "invalid_rule",
            "`webhook.uri`; did you mean `webhook.url`.",
        ),
        (PRICE | {"cooldown": "1w"}, "invalid_rule", "`cooldown` must be a whole number with s, m, h or d"),
        (PRICE | {"cooldown": "1m\n"}, "invalid_rule", "line feed"),
        (PRICE | {"name": "a\0b"}, "invalid_rule", "`name` must be a text of at most 100 characters"),
        (PRICE | {"webhook": {"url": HOOK["url"]}}, "invalid_rule", "`webhook.secret` is missing"),
        (PRICE | {"webhook": HOOK | {"secret": "short"}}, "invalid_rule", "`webhook.secret` must be a text of 16"),
        (PRICE | {"webhook": HOOK | {"secret": f"{SECRET}\n"}}, "invalid_rule", "line feed"),
        (
            PRICE | {"webhook": HOOK | {"url": "file:///etc/passwd"}},
            "invalid_rule",
            "`webhook.url` must be http:// or https://",
        ),
        (PRICE | {"webhook": HOOK | {"url": "https://hooks..example.com/"}}, "invalid_rule", "webhook"),
        (PRICE | {"webhook": HOOK | {"url": f"https://{'a' * 64}.example.com/"}}, "invalid_rule", "webhook"),
        (PRICE | {"webhook": HOOK | {"url": f"{HOOK['url']}\n"}}, "invalid_rule", "line feed"),
        (
            PRICE | {"webhook": "https://hooks.example.com/***"},
            "invalid_rule",
            "`webhook` must be an object",
        ),
        (PRICE | {"symbol": "NOTHING"}, "unknown_symbol", "symbol"),
        (PRICE | {"exchange": "nowhere"}, "unknown_exchange", "exchange"),
        ({"kind": "stale", "exchange": "reference"}, "unknown_exchange", "exchange"),
    ],
)
def test_wrong_rules_are_refused(body: Any, code: str, words: str) -> None:
    world = World()
    refused = send(world, "POST", "/alerts", body)
    assert (refused.status_code, refused.json()["code"]) == (404 if code.startswith("unknown") else 400, code)
    assert words in refused.json()["detail"]
    assert world.alerts.changes == []


def test_change_without_a_store_is_503() -> None:
    world = World()
    world.alerts.refusal = "unavailable"
    assert send(world, "POST", "/alerts", {"kind": "stale"}).status_code == 503
    world.alerts.away = True
    assert send(world, "POST", "/alerts", {"kind": "stale"}).status_code == 503


def test_events_are_the_newest_or_those_after_a_number() -> None:
    world = World()
    world.alerts.stored = events(5)
    newest = world.ask("/events/alerts?limit=2").json()
    assert [each["number"] for each in newest["events"]] == [4, 5]
    assert newest["next_after"] == 5
    event = world.ask("/events/alerts?after=1&limit=1").json()["events"][0]["event"]
    assert (event["rule"], event["kind"], event["direction"], event["value"]) == ("mine", "price", "down", 99.0)
    assert world.ask("/events/alerts?after=5").json() == {"events": [], "next_after": None}


# The stream


async def first(feed: EventFeed, after: int | None, count: int, store: MemoryAlerts | None = None) -> list[int]:
    """Return the numbers of the first events after a number; adds the last one once the feed is followed."""
    numbers: list[int] = []
    async with asyncio.timeout(10):
        async for batch in feed.follow(after, 0.05):
            numbers += [event.number for event in batch]
            if len(numbers) >= count:
                break
            if store is not None and not batch:
                store.stored = events(len(store.stored) + 1)
                store = None
    return numbers


def test_stream_continues_after_the_last_event_id() -> None:
    store = MemoryAlerts()
    store.stored = events(5)
    assert asyncio.run(first(EventFeed(store, lambda: len(store.stored)), 2, 3)) == [3, 4, 5]


def test_stream_without_an_id_begins_with_the_next_event() -> None:
    store = MemoryAlerts()
    store.stored = events(5)
    assert asyncio.run(first(EventFeed(store, lambda: len(store.stored)), None, 1, store)) == [6]


def test_stream_finds_events_of_an_unknown_ingest_process() -> None:
    store = MemoryAlerts()
    assert asyncio.run(first(EventFeed(store, lambda: 0), None, 1, store)) == [1]


def test_followers_share_what_is_read() -> None:
    store = MemoryAlerts()
    store.stored = events(1)
    queries = 0
    read = store.alert_events

    async def counted(after: int, limit: int) -> list[NumberedEvent]:
        nonlocal queries
        queries += 1
        return await read(after, limit)

    store.alert_events = counted  # type: ignore[method-assign]

    async def follow_all() -> None:
        feed = EventFeed(store, lambda: len(store.stored))
        following = [asyncio.create_task(first(feed, None, 3)) for _ in range(50)]
        await asyncio.sleep(0.3)
        for count in (2, 3, 4):
            store.stored = events(count)
            await asyncio.sleep(0.2)
        assert await asyncio.gather(*following) == [[2, 3, 4]] * 50
        await feed.close()

    asyncio.run(follow_all())
    assert queries <= 7


def test_outage_of_the_store_delays_the_stream() -> None:
    store = MemoryAlerts()
    store.stored = events(2)

    async def over_an_outage() -> list[int]:
        feed = EventFeed(store, lambda: len(store.stored))
        following = asyncio.create_task(first(feed, 0, 3))
        await asyncio.sleep(0.2)
        store.away = True
        store.stored = events(3)
        await asyncio.sleep(0.3)
        with pytest.raises(Unavailable):
            await store.newest_alert_event()
        store.away = False
        return await following

    assert asyncio.run(over_an_outage()) == [1, 2, 3]


def test_streams_end_with_the_application() -> None:
    async def ended() -> None:
        feed = EventFeed(MemoryAlerts(), lambda: 0)

        async def follow() -> None:
            async for _ in feed.follow(None, 10.0):
                pass

        following = asyncio.create_task(follow())
        await asyncio.sleep(0.2)
        feed.end()
        async with asyncio.timeout(1):
            await following

    asyncio.run(ended())
