"""Alerts in PostgreSQL: rules, what they have done, their events, and the deliveries of these; see ddl/0011_alerts.sql.

Every write may be repeated: of a commit whose answer was cut nothing is stored twice.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from marketflow.alerts.alert_model import (
    AlertRule,
    DueDelivery,
    RaisedAlert,
    RuleState,
    StoredRule,
    Webhook,
    receiver_of,
    without_webhook,
)
from marketflow.alerts.watched_rule import SKEW_MS
from marketflow.logs import RateLimit
from marketflow.model import Hole, Mode
from marketflow.stores.ports import ListedRule
from marketflow.stores.postgres.candle_sql import VALID, time_of
from marketflow.stores.postgres.connections.reconnecting_connection import ReconnectingConnection
from marketflow.stores.postgres.holes import FOUND_SINCE, hole_of_row
from marketflow.stores.postgres.rows import to_datetime, to_unix_ms

if TYPE_CHECKING:
    from marketflow.stores.postgres.connections.bounded_connection import BoundedConnection

EVENTS_A_STATEMENT = 500

EXPIRED_AT_ONCE = 10_000
"""Old events that one statement deletes at most."""

_LOCK = 7_364_017_242  # any number, the same in every instance

_RULES = """
select id, origin, rules.rule, webhook, secret, last_event_at, done, created_at
from alert_rules as rules left join alert_webhooks on alert_webhooks.rule = id
left join alert_states on alert_states.rule = id order by number
"""

_PUT_RULE = """
insert into alert_rules (id, origin, rule, receiver)
select * from unnest(%s::text[], %s::text[], %s::text[], %s::text[])
on conflict (id) do update set
    rule = excluded.rule, receiver = excluded.receiver,
    created_at = case when excluded.rule = alert_rules.rule then alert_rules.created_at else now() end
"""

_PUT_WEBHOOK = """
insert into alert_webhooks (rule, webhook, secret)
select * from unnest(%s::text[], %s::text[], %s::text[])
on conflict (rule) do update set webhook = excluded.webhook, secret = excluded.secret
"""

# A rule has one event in a statement. Its state admits it, or another process has stored it already; an event is stored
# with the state, and its delivery with it.
_STORE = f"""
with given as (
    select * from unnest(
        %s::text[], %s::text[], %s::timestamptz[], %s::interval[], %s::bool[], %s::text[], %s::text[]
    ) with ordinality as given (id, rule, time, cooldown, once, event, receiver, place)
), admitted as (
    insert into alert_states as held (rule, last_event_at, done)
    select rule, time, once from given order by rule
    on conflict (rule) do update set last_event_at = excluded.last_event_at, done = excluded.done
    where not held.done and not (
        excluded.last_event_at >= held.last_event_at - interval '{SKEW_MS} ms'
        and excluded.last_event_at
            < held.last_event_at + (select cooldown from given where given.rule = excluded.rule)
    )
    returning rule
), stored as (
    insert into alert_events (id, rule, time, event)
    select id, rule, time, event from given where rule in (select rule from admitted) order by place
    on conflict (id) do nothing
    returning id, number
), delivered as (
    insert into alert_deliveries (event, receiver)
    select id, receiver from given join stored using (id) where receiver <> ''
)
select id, number from stored order by number
"""  # noqa: S608 - put together from constants

_CLOSES = f"""
select wanted.exchange, close.at, close_price from unnest(%(exchanges)s::text[]) as wanted (exchange)
cross join lateral (
    select distinct on (pg_catalog.floor(extract(epoch from timestamp) / %(seconds)s))
           {time_of("close_at")} as at, close_price
    from aggregates
    where exchange = wanted.exchange and pair_name = %(symbol)s and mode = %(mode)s and timestamp >= %(since)s
      and timestamp < timestamptz '2200-01-01 00:00:00+00' and {VALID}
    order by pg_catalog.floor(extract(epoch from timestamp) / %(seconds)s), timestamp desc
) as close
"""  # noqa: S608 - put together from constants

_EXPIRE = f"""
delete from alert_events where id in (
    select id from alert_events where found_at < %s order by found_at limit {EXPIRED_AT_ONCE}
)
"""  # noqa: S608 - put together from constants

_DUE_RECEIVERS = """
select receiver, count(*), min(next_try_at) <= %s from alert_deliveries where state = 'pending' group by receiver
"""

# Claimed for a while, so that no other process posts it as well.
_CLAIM = """
update alert_deliveries as claimed
set next_try_at = %(until)s, attempts = attempts + 1, changed_at = now()
from (
    select event from alert_deliveries
    where receiver = %(receiver)s and state = 'pending' and next_try_at <= %(now)s
    order by next_try_at limit 1 for update skip locked
) as due join alert_events on alert_events.id = due.event
where claimed.event = due.event
returning claimed.event, rule, alert_events.event, attempts - 1, found_at
"""

_FINISH = """
update alert_deliveries set state = finished.state, changed_at = now()
from unnest(%s::text[], %s::text[]) as finished (event, state)
where alert_deliveries.event = finished.event and alert_deliveries.state = 'pending'
"""

_RETRY = "update alert_deliveries set next_try_at = %s, changed_at = now() where event = %s and state = 'pending'"

LISTED_RULES = """
select number, id, origin, rules.rule, receiver, last_event_at, coalesce(done, false)
from alert_rules as rules left join alert_states on alert_states.rule = id
where number > %(after)s order by number limit %(limit)s
"""

LISTED_RULE = """
select number, id, origin, rules.rule, receiver, last_event_at, coalesce(done, false)
from alert_rules as rules left join alert_states on alert_states.rule = id where id = %(id)s
"""

EVENTS_AFTER = "select number, event from alert_events where number > %(after)s order by number limit %(limit)s"

NEWEST_EVENTS = "select number, event from alert_events order by number desc limit %(limit)s"

NEWEST_EVENT = "select coalesce(max(number), int8 '0') from alert_events"


class PostgresAlerts:
    """Reads and writes alerts on one connection; thread-safe.

    Args:
        keywords: of the connection, see connection_keywords.
    """

    def __init__(self, keywords: dict[str, Any]) -> None:
        self._connection = ReconnectingConnection(keywords)
        self._lock = threading.Lock()
        self._limit = RateLimit(60.0)

    def close(self) -> None:
        """Close the connection; a call that is under way fails."""
        self._connection.close()

    # Rules

    def rules(self) -> list[StoredRule]:
        """Return all rules with their secrets, in the order in which they were made.

        Raises:
            Unavailable: PostgreSQL is down, or has no schema yet.
        """
        with self._transaction() as connection:
            rows = connection.execute(_RULES).fetchall()
        found = []
        for id, origin, text, webhook, secret, at, done, made_at in rows:
            try:
                rule = msgspec.json.decode(text, type=AlertRule)
            except msgspec.MsgspecError:
                self._limit.log("rule", "WARNING", f"an alert rule is not understood by this version: rule={id}")
                continue
            if webhook is not None:
                rule = msgspec.structs.replace(rule, webhook=Webhook(webhook, secret))
            state = RuleState(at and to_unix_ms(at), bool(done))
            found.append(StoredRule(id, origin, rule, state, to_unix_ms(made_at)))
        return found

    def configure(self, rules: Sequence[StoredRule]) -> None:
        """Store the rules of the settings in place of those before; what they have done is kept.

        Raises:
            Unavailable: not written, or not confirmed; to be tried again with the same rules.
        """
        with self._transaction() as connection:
            ids = [stored.id for stored in rules]
            connection.execute("delete from alert_rules where origin = 'settings' and id <> all(%s::text[])", [ids])
            _put(connection, rules)

    def put(self, stored: StoredRule) -> None:
        """Store a rule in place of an earlier version of itself, as one that has done nothing.

        Raises:
            Unavailable: not written, or not confirmed.
        """
        with self._transaction() as connection:
            connection.execute("delete from alert_states where rule = %s", [stored.id])
            _put(connection, [stored])

    def delete(self, id: str) -> None:
        """Delete a rule and what it has done; its events stay.

        Raises:
            Unavailable: not written, or not confirmed.
        """
        with self._transaction() as connection:
            connection.execute("delete from alert_rules where id = %s", [id])
            connection.execute("delete from alert_states where rule = %s", [id])

    # Events

    def store(self, raised: Sequence[RaisedAlert]) -> tuple[list[RaisedAlert], int]:
        """Store events; return those that were not yet, and that their rules admit, and the number of the newest event.

        Raises:
            Unavailable: not stored, or not confirmed; to be tried again with the same events.
        """
        added: set[str] = set()
        with self._transaction() as connection:
            # Numbers are given before the commit: a reader that has seen a higher one would miss a lower one.
            connection.execute("select pg_catalog.pg_advisory_xact_lock(%s)", [_LOCK])
            for part in _one_of_each_rule(raised):
                columns = zip(*map(_row, part), strict=True)
                added.update(id for id, _ in connection.execute(_STORE, [list(column) for column in columns]))
            (newest,) = connection.execute(NEWEST_EVENT).fetchone() or (0,)
        return [each for each in raised if each.event.id in added], newest

    def closes(
        self, mode: Mode, exchanges: Sequence[str], symbol: str, since_ms: int, bucket_ms: int
    ) -> list[tuple[str, int, float]]:
        """Return the last closes of minutes in each bucket from a time on (Unix ms): exchange, time and price.

        Raises:
            Unavailable: PostgreSQL is down.
        """
        given = {
            "mode": mode.value,
            "exchanges": list(exchanges),
            "symbol": symbol,
            "since": to_datetime(since_ms),
            "seconds": max(60, bucket_ms // 1000),
        }
        with self._transaction() as connection:
            rows = connection.execute(_CLOSES, given).fetchall()
        return [(exchange, to_unix_ms(at), price) for exchange, at, price in rows]

    def holes_found(self, since_ms: int) -> list[Hole]:
        """Return the holes that were found at a time or later (Unix ms), in this order, whatever became of them.

        Raises:
            Unavailable: PostgreSQL is down.
        """
        with self._transaction() as connection:
            rows = connection.execute(FOUND_SINCE, {"since": to_datetime(since_ms)}, binary=True).fetchall()
        return [hole_of_row(row) for row in rows]

    def expire(self, before_ms: int) -> None:
        """Delete some of the events that were stored before a time (Unix ms).

        Raises:
            Unavailable: PostgreSQL is down.
        """
        with self._transaction() as connection:
            connection.execute(_EXPIRE, [to_datetime(before_ms)])

    # Deliveries

    def receivers(self, now_ms: int) -> dict[str, tuple[int, bool]]:
        """Return the receivers with pending deliveries: how many these are, and whether one is due.

        Raises:
            Unavailable: PostgreSQL is down.
        """
        with self._transaction() as connection:
            rows = connection.execute(_DUE_RECEIVERS, [to_datetime(now_ms)]).fetchall()
        return {receiver: (count, due) for receiver, count, due in rows}

    def claim(self, receiver: str, now_ms: int, until_ms: int) -> DueDelivery | None:
        """Return a due delivery of a receiver, which no other process gets until a time (Unix ms); None without any.

        Raises:
            Unavailable: PostgreSQL is down.
        """
        given = {"receiver": receiver, "now": to_datetime(now_ms), "until": to_datetime(until_ms)}
        with self._transaction() as connection:
            row = connection.execute(_CLAIM, given).fetchone()
        if row is None:
            return None
        event, rule, body, attempts, found_at = row
        return DueDelivery(event, rule, body, attempts, to_unix_ms(found_at))

    def finish(self, states: dict[str, str]) -> None:
        """Record deliveries as acknowledged or given up, by event.

        Raises:
            Unavailable: not recorded, or not confirmed; to be tried again.
        """
        with self._transaction() as connection:
            connection.execute(_FINISH, [[*states], [*states.values()]])

    def retry(self, event: str, at_ms: int) -> None:
        """Make a delivery due again at a time (Unix ms).

        Raises:
            Unavailable: not recorded.
        """
        with self._transaction() as connection:
            connection.execute(_RETRY, [to_datetime(at_ms), event])

    @contextmanager
    def _transaction(self) -> "Iterator[BoundedConnection]":
        with self._lock, self._connection.opened() as connection, connection.pinned():
            yield connection


def _put(connection: "BoundedConnection", rules: Sequence[StoredRule]) -> None:
    rows = [
        (stored.id, stored.origin, _encode(without_webhook(stored.rule)).decode(), receiver_of(stored.rule))
        for stored in rules
    ]
    connection.execute(_PUT_RULE, [list(column) for column in zip(*rows, strict=True)] or [[], [], [], []])
    ids = [stored.id for stored in rules]
    connection.execute("delete from alert_webhooks where rule = any(%s::text[])", [ids])
    hooks = [(stored.id, hook.url, hook.secret) for stored in rules if (hook := stored.rule.webhook) is not None]
    if hooks:
        connection.execute(_PUT_WEBHOOK, [list(column) for column in zip(*hooks, strict=True)])


def _one_of_each_rule(raised: Iterable[RaisedAlert]) -> Iterator[list[RaisedAlert]]:
    """Divide events into parts in which each rule has one, in their order."""
    part: dict[str, RaisedAlert] = {}
    for each in raised:
        if each.event.rule in part or len(part) == EVENTS_A_STATEMENT:
            yield list(part.values())
            part = {}
        part[each.event.rule] = each
    if part:
        yield list(part.values())


def _row(raised: RaisedAlert) -> tuple[Any, ...]:
    event, at, cooldown_ms, once, receiver = raised
    text = _encode(event).decode()
    return event.id, event.rule, to_datetime(at), f"{cooldown_ms} milliseconds", once, text, receiver


_encode = msgspec.json.Encoder().encode


def listed_rule(row: tuple[Any, ...]) -> ListedRule | None:
    """Return the rule of a row of LISTED_RULES; None for one that this version does not understand."""
    number, id, origin, text, receiver, at, done = row
    try:
        rule = msgspec.json.decode(text, type=AlertRule)
    except msgspec.MsgspecError:
        return None
    return ListedRule(number, StoredRule(id, origin, rule, RuleState(at and to_unix_ms(at), done)), receiver)
