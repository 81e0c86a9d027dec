"""Alerts on a real PostgreSQL: what is stored once, however often it is written."""

import asyncio
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import psycopg
import pytest

from marketflow.alerts.alert_model import RaisedAlert, RuleState, StaleRule, StoredRule
from marketflow.alerts.watched_rule import WatchedRule
from marketflow.model import Mode, Slot, Tick, candle_of
from marketflow.resources import resource
from marketflow.stores.postgres.alert_store import PostgresAlerts
from marketflow.stores.postgres.reader import PostgresReader
from marketflow.stores.postgres.rows import connection_keywords
from marketflow.stores.postgres.writer import PostgresWriter
from tests.alerts.rules import BTC, START, candles_of, evaluator_of, rule_of, stored

HOOK: dict[str, Any] = {"webhook": {"url": "https://hooks.example.com/T0/secret-path", "secret": "sixteen-characters"}}


@pytest.fixture
def place(postgres_db: dict[str, Any]) -> dict[str, Any]:
    """A database with the schema."""
    with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 10)) as archive:
        archive.write({})
    return postgres_db


@pytest.fixture
def store(place: dict[str, Any]) -> Iterator[PostgresAlerts]:
    with closing(PostgresAlerts(connection_keywords(**place))) as alerts:
        yield alerts


def rows(place: dict[str, Any], query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(**place) as connection:
        return connection.execute(query).fetchall()


def read(store: PostgresAlerts) -> list[StoredRule]:
    """Return the rules without when they were made."""
    return [each._replace(made_at=0) for each in store.rules()]


def raised(rule: StoredRule, at: int = START) -> RaisedAlert:
    """Return the event of a price rule of level 100 at a time."""
    rules = evaluator_of(rule._replace(state=RuleState()))
    rules.evaluate(candles_of(99, at=at - 1000), at)
    (found,) = rules.evaluate(candles_of(101, at=at), at)
    return found


def test_rules_are_read_as_they_were_stored(store: PostgresAlerts) -> None:
    rules = [
        stored("a", level=1.5, name="first \u20ac"),
        stored("b", level=2, once=True, **HOOK),
        StoredRule("c", "api", rule_of(kind="stale")),
    ]
    for rule in rules:
        store.put(rule)
    assert read(store) == rules
    store.put(stored("b", level=3))
    store.delete("a")
    assert [each.rule for each in store.rules()] == [rule_of(level=3), rule_of(kind="stale")]


def test_id_that_is_no_text_of_the_database_is_unknown(store: PostgresAlerts, place: dict[str, Any]) -> None:
    store.put(StoredRule("a", "api", StaleRule()))

    async def ask() -> list[bool]:
        reader = PostgresReader(connection_keywords(**place))
        await reader.open()
        try:
            return [await reader.alert_rule(id) is not None for id in ("a", "b", "\0", "a\0", "\u20ac", "\ufffd")]
        finally:
            await reader.close()

    assert asyncio.run(ask()) == [True, False, False, False, False, False]


def test_rule_is_as_old_as_its_last_change(store: PostgresAlerts, place: dict[str, Any]) -> None:
    """What happened before it was made is no event of it, whichever process reads it first."""
    store.configure([stored("a", level=1)])
    rows(place, "update alert_rules set created_at = created_at - interval '1 hour' returning 1")
    (old,) = store.rules()
    store.configure([stored("a", level=1)])
    assert store.rules() == [old]
    store.put(stored("a", level=2))
    (changed,) = store.rules()
    assert changed.made_at > old.made_at + 3_000_000
    assert not WatchedRule(changed).admits(changed.made_at - 1)
    assert WatchedRule(changed).admits(changed.made_at)


def test_configured_rules_replace_those_before(store: PostgresAlerts) -> None:
    first, second = (StoredRule(f"s{n}", "settings", rule_of(level=n + 100)) for n in (0, 1))
    mine = stored("mine", level=100)
    store.put(mine)
    store.configure([first, second])
    store.store([raised(first)])
    store.configure([first])
    assert read(store) == [mine, first._replace(state=RuleState(START, False))]
    store.configure([])
    assert read(store) == [mine]


def test_event_is_stored_once(store: PostgresAlerts, place: dict[str, Any]) -> None:
    event = raised(stored("a", level=100, **HOOK))
    assert store.store([event]) == ([event], 1)
    assert store.store([event]) == ([], 1)
    assert rows(place, "select number, id, rule from alert_events") == [(1, event.event.id, "a")]
    receivers = rows(place, "select event, receiver, state from alert_deliveries")
    assert receivers == [(event.event.id, "https://hooks.example.com", "pending")]


def test_events_keep_their_order_and_their_cooldown(store: PostgresAlerts, place: dict[str, Any]) -> None:
    """Also those of one rule in one batch, as after an outage, and those of a second evaluator."""
    rule, other = stored("a", level=100, cooldown="1s"), stored("b", level=100)
    events = [raised(rule), raised(other), raised(rule, START + 500), raised(rule, START + 1500)]
    added, newest = store.store(events)
    assert added == [events[0], events[1], events[3]]
    assert [id for (id,) in rows(place, "select id from alert_events order by number")] == [
        each.event.id for each in added
    ]
    assert newest == rows(place, "select max(number) from alert_events")[0][0]


def test_rule_with_once_has_one_stored_event(store: PostgresAlerts) -> None:
    rule = stored("a", level=100, once=True)
    store.put(rule)
    first, second = raised(rule), raised(rule, START + 10_000)
    assert store.store([first])[0] == [first]
    assert store.store([second])[0] == []
    assert read(store) == [rule._replace(state=RuleState(START, True))]
    store.put(rule)  # anew
    assert read(store) == [rule]
    assert store.store([second])[0] == [second]


def test_clock_set_back_does_not_silence_a_rule(store: PostgresAlerts) -> None:
    rule = stored("a", level=100, cooldown="1s")
    ahead, now = raised(rule, START + 3_600_000), raised(rule)
    store.store([ahead])
    assert store.store([now])[0] == [now]


def test_delivery_is_claimed_by_one_process(store: PostgresAlerts, place: dict[str, Any]) -> None:
    event = raised(stored("a", level=100, **HOOK))
    store.store([event])
    receiver, now = "https://hooks.example.com", 4 * 10**12
    with closing(PostgresAlerts(connection_keywords(**place))) as other:
        assert store.receivers(now) == {receiver: (1, True)}
        claimed = store.claim(receiver, now, now + 30_000)
        assert claimed is not None
        assert (claimed.event, claimed.rule, claimed.attempts) == (event.event.id, "a", 0)
        assert other.claim(receiver, now, now + 30_000) is None
        assert other.receivers(now) == {receiver: (1, False)}
        again = other.claim(receiver, now + 30_000, now + 60_000)  # the first one was killed
        assert again is not None
        assert again.attempts == 1
        store.finish({event.event.id: "acknowledged"})
        other.retry(event.event.id, now)
        assert other.claim(receiver, now + 10**6, now + 10**7) is None
        assert other.receivers(now) == {}


def test_old_events_expire_with_their_deliveries(store: PostgresAlerts, place: dict[str, Any]) -> None:
    store.store([raised(stored("a", level=100, **HOOK))])
    store.expire(START)
    assert len(rows(place, "select from alert_deliveries")) == 1
    store.expire(4 * 10**12)
    assert rows(place, "select from alert_events union all select from alert_deliveries") == []


def test_closes_are_the_last_of_each_bucket(store: PostgresAlerts, place: dict[str, Any]) -> None:
    rows = {
        Slot(BTC, START + minute * 60_000): candle_of(Tick(100.0 + minute, START + minute * 60_000 + 500, 0))
        for minute in range(-10, 10)
    }
    with closing(PostgresWriter(connection_keywords(**place), resource("ddl"), 10)) as archive:
        archive.write(rows)
    found = store.closes(Mode.TEST, ["exchange1", "exchange2"], "BTCUSDT", START, 300_000)
    assert found[-1] == ("exchange1", START + 9 * 60_000 + 500, 109.0)
    assert len(found) in (2, 3)
    assert all(exchange == "exchange1" and at >= START for exchange, at, _ in found)
    assert len(store.closes(Mode.TEST, ["exchange1"], "BTCUSDT", START, 100)) == 10
    assert store.closes(Mode.LIVE, ["exchange1"], "BTCUSDT", START, 300_000) == []


def test_rule_of_a_later_version_is_left_out(store: PostgresAlerts, place: dict[str, Any], log: list[str]) -> None:
    store.put(stored("a", level=100))
    with psycopg.connect(**place, autocommit=True) as connection:
        connection.execute(
            "insert into alert_rules (id, origin, rule, receiver) values ('b', 'api', %s, '')", ['{"kind":"moon"}']
        )
    assert [each.id for each in store.rules()] == ["a"]
    assert any("rule=b" in line for line in log)


@pytest.mark.parametrize("more", ["", ", insert, update, delete"])
def test_readers_of_minutes_may_not_read_secrets(place: dict[str, Any], more: str) -> None:
    """Of roles that were given their rights before the tables were made, also by default privileges."""
    with psycopg.connect(**place, autocommit=True) as owner:
        name = f"reader_of_{place['dbname']}"
        owner.execute(f"create role {name}")
        try:
            owner.execute(f"grant select{more} on aggregates, aggregates_daily to {name}")
            owner.execute(f"alter default privileges grant select{more} on tables to {name}")
            owner.execute("drop table alert_deliveries, alert_events, alert_states, alert_webhooks, alert_rules")
            owner.execute((resource("ddl") / "0011_alerts.sql").read_text())
            rights = owner.execute(
                "select tables, privilege from unnest(array['alert_rules', 'alert_webhooks', 'alert_states',"
                " 'alert_events', 'alert_deliveries']) as tables,"
                " unnest(array['select', 'insert', 'update', 'delete']) as privilege"
                " where has_table_privilege(%s, tables, privilege)",
                [name],
            ).fetchall()
        finally:
            owner.execute(f"drop owned by {name}; drop role {name}")
    tables = {"alert_rules", "alert_webhooks", "alert_states", "alert_events", "alert_deliveries"}
    reading = {(table, "select") for table in tables - {"alert_webhooks"}}
    all_rights = {(table, right) for table in tables for right in ("select", "insert", "update", "delete")}
    assert set(rights) == (all_rights if more else reading)
