"""Alerts with real servers, processes that are killed, and receivers that fail."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psycopg
import pytest

from tests.faults.conftest import StartApplication, through, wait_until_connected
from tests.support.application import Application, ScriptedExchange, exchanges_setting
from tests.support.core_waits import CoreWaits
from tests.support.proxy import Proxy
from tests.support.roles import Roles
from tests.support.servers import wait_until
from tests.support.webhook_receiver import WebhookReceiver

BTC = {"kind": "price", "symbol": "BTCUSDT", "exchange": "exchange1", "cooldown": "0s"}


@pytest.fixture
def receiver() -> Iterator[WebhookReceiver]:
    with WebhookReceiver() as receiver:
        yield receiver


def make(application: Application, **rule: Any) -> str:
    """Make a rule and return its id."""
    made = application.http.post("/alerts", json=BTC | rule)
    assert made.status_code == 201, made.text
    id: str = made.json()["id"]
    return id


def events(application: Application) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [each["event"] for each in application.get("/events/alerts")["events"]]
    return found


def cross(exchange: ScriptedExchange, price: float) -> None:
    """Send a price from below and, in another slice, one at it."""
    exchange.send(price - 1)
    time.sleep(0.25)  # so that both are not one slice, of which the way through it is not known
    exchange.send(price)


@contextmanager
def stream(application: Application, last_id: str | None) -> Iterator[Iterator[dict[str, Any]]]:
    """Follow /stream/alerts; yields what comes as dicts of the fields of an event."""
    headers = {} if last_id is None else {"Last-Event-ID": last_id}
    with httpx.stream("GET", f"{application.http.base_url}/stream/alerts", headers=headers, timeout=20) as response:
        assert response.status_code == 200

        def come() -> Iterator[dict[str, Any]]:
            fields: dict[str, Any] = {}
            for line in response.iter_lines():
                if line:
                    name, _, value = line.partition(": ")
                    fields[name] = value
                else:
                    if fields.get("event") == "alert":
                        yield fields | {"data": json.loads(fields["data"])}
                    fields = {}

        yield come()


def test_rule_with_once_stays_done_after_sigkill(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    receiver: WebhookReceiver,
) -> None:
    application = start(servers)
    make(application, level=100.0, once=True, **receiver.hook)
    cross(exchanges[0], 100.0)
    wait_until(lambda: receiver.acknowledged)
    application.kill()
    application.start()
    wait_until_connected(application, exchanges)
    cross(exchanges[0], 100.0)
    marker = make(application, level=300.0, **receiver.hook)
    cross(exchanges[0], 300.0)
    wait_until(lambda: len(receiver.acknowledged) == 2)
    assert [event["threshold"] for event in events(application)] == [100.0, 300.0]
    assert set(receiver.acknowledged.values()) == {1}
    done = {rule["id"]: rule["done"] for rule in application.get("/alerts")["rules"]}
    assert [done.pop(marker), *done.values()] == [False, True]
    assert all(post.is_signed for post in receiver.posts)
    assert "path-secret" not in application.log
    assert application.stop()[0] == 0


def test_sigkill_between_posts_loses_no_event(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    receiver: WebhookReceiver,
) -> None:
    """After a kill while a receiver delays its answer, only unacknowledged events are posted again."""
    application = start(servers)
    for level in range(100, 110):
        make(application, level=float(level), **receiver.hook)
    receiver.status = 503
    cross(exchanges[0], 120.0)
    exchanges[0].send(90.0)
    wait_until(lambda: len(events(application)) == 10)
    wait_until(lambda: receiver.posts)
    application.kill()
    receiver.status = 204
    application.start()
    stored = {event["id"] for event in events(application)}
    wait_until(lambda: set(receiver.acknowledged) == stored, timeout=60)
    assert set(receiver.acknowledged.values()) == {1}
    assert application.stop()[0] == 0


def test_postgres_outage_delays_events_and_loses_none(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    receiver: WebhookReceiver,
    postgres_proxy: Proxy,
) -> None:
    application = start(through(servers, postgres=postgres_proxy))
    make(application, level=100.0, **receiver.hook)
    cross(exchanges[0], 100.0)
    wait_until(lambda: len(receiver.acknowledged) == 1)
    postgres_proxy.refuse()
    wait_until(lambda: application.get("/health")["postgres"] == "down")
    for _ in range(3):
        cross(exchanges[0], 100.0)
        time.sleep(0.25)
    refused = application.http.post("/alerts", json=BTC | {"level": 1.0})
    assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
    assert len(receiver.posts) == 1
    postgres_proxy.heal()
    wait_until(lambda: application.get("/health")["postgres"] == "ok")
    wait_until(lambda: application.http.get("/events/alerts").status_code == 200)
    wait_until(lambda: len(receiver.acknowledged) >= 4)
    wait_until(lambda: len(events(application)) == len(receiver.acknowledged))
    assert set(receiver.acknowledged.values()) == {1}
    assert application.stop()[0] == 0
    assert "Traceback" not in application.log


def test_stop_does_not_wait_for_a_receiver(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    receiver: WebhookReceiver,
) -> None:
    receiver.before_answer = lambda: time.sleep(9)
    application = start(servers)
    make(application, level=100.0, **receiver.hook)
    cross(exchanges[0], 100.0)
    wait_until(lambda: receiver.posts)
    code, seconds = application.stop()
    assert code == 0
    assert seconds < 5
    assert "Traceback" not in application.log


def test_roles_share_rules_and_events(
    roles: Roles,
    exchanges: list[ScriptedExchange],
    record_property: Callable[[str, object], None],
) -> None:
    """The ingest process evaluates; every API process creates rules, lists them and streams events."""
    feeds, one, other = roles.ingest(), roles.api(), roles.api()
    for api in (one, other):
        wait_until(lambda api=api: api.get("/health")["status"] == "ok")  # type: ignore[misc]
    rule = make(one, level=100.0)
    assert other.get(f"/alerts/{rule}")["rule"]["level"] == 100.0
    with stream(other, None) as live, stream(one, "0") as from_the_start:
        wait_until(lambda: "/stream/alerts" in json.dumps(other.get("/openapi.json")["paths"]))
        time.sleep(0.5)  # until the stream without an id has begun after the newest event
        began = time.monotonic()
        cross(exchanges[0], 100.0)
        event = next(live)
        record_property("seconds from a crossing to the stream of another process", time.monotonic() - began)
        assert event["data"] == next(from_the_start)["data"]
        assert (event["data"]["rule"], event["data"]["mode"]) == (rule, "live")
    with stream(one, event["id"]) as resumed:
        cross(exchanges[0], 100.0)
        following = next(resumed)
        assert following["data"]["direction"] == "up"
        assert int(following["id"]) == int(event["id"]) + 1
    deleted = other.http.delete(f"/alerts/{rule}")
    assert (deleted.status_code, deleted.json()) == (200, {"id": rule})
    assert one.http.get(f"/alerts/{rule}").status_code == 404
    assert one.http.put(f"/alerts/{rule}", json=BTC | {"level": 1}).json()["code"] == "unknown_rule"
    feeds.stop()
    assert one.http.post("/alerts", json=BTC | {"level": 1}).status_code == 503


def test_standby_that_takes_over_evaluates_and_stores_once(
    roles: Roles, broadcasting: list[ScriptedExchange], postgres_db: dict[str, Any]
) -> None:
    exchange = broadcasting[0]
    roles.settings["EXCHANGES"] = exchanges_setting(exchange)
    first = roles.ingest()
    api = roles.api()
    rule = make_when_possible(api, level=100.0, cooldown="0s")
    second = roles.ingest()
    wait_until(lambda: second.stands_by() and len(exchange.clients) == 2)
    cross(exchange, 100.0)
    wait_until(lambda: len(events(api)) == 1)
    first.kill()
    wait_until(second.takes_ticks)
    cross(exchange, 100.0)
    wait_until(lambda: [event["rule"] for event in events(api)].count(rule) >= 2)
    with psycopg.connect(**postgres_db) as connection:
        (total, ids) = connection.execute("select count(*), count(distinct id) from alert_events").fetchone() or (0, 1)
    assert total == ids


def make_when_possible(api: Application, **rule: Any) -> str:
    """Create a rule once the ingest process accepts it."""

    def made() -> str:
        answer = api.http.post("/alerts", json=BTC | rule)
        return str(answer.json()["id"]) if answer.status_code == 201 else ""

    return wait_until(made)


def test_rule_changes_on_a_hanging_postgres_delay_nothing_else(
    start: StartApplication, servers: dict[str, object], exchanges: list[ScriptedExchange], postgres_proxy: Proxy
) -> None:
    application = start(through(servers, postgres=postgres_proxy))
    make(application, level=1.0)
    postgres_proxy.stall()
    answers: list[tuple[int, str]] = []

    def change(number: int) -> None:
        with httpx.Client(base_url=application.http.base_url, timeout=30.0) as client:
            answer = client.post("/alerts", json=BTC | {"level": 10.0 + number})
            answers.append((answer.status_code, answer.json().get("code", "")))

    changes = [threading.Thread(target=change, args=(number,)) for number in range(40)]
    for each in changes:
        each.start()
    wait_until(lambda: len(answers) >= 1, timeout=20)
    with CoreWaits.of_tests() as waits:
        for method, path in (("GET", "/feeds"), ("POST", "/mode/test"), ("POST", "/reload"), ("POST", "/mode/live")):
            began = time.monotonic()
            answer = application.http.request(method, path)
            assert answer.status_code == 200, answer.text
            assert waits.seconds_since(began) < 1.0, path
    for each in changes:
        each.join(30)
    assert answers == [(503, "unavailable")] * 40
    code, seconds = application.stop()
    assert code == 0
    assert seconds < 5
    assert "Traceback" not in application.log
