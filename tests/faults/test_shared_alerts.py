"""Alerts of three ingest processes: every rule works whatever process owns its exchange, and whichever is killed."""

import itertools
import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from typing import Any, TypeVar

import pytest

from marketflow.model import Hole, Mode, Series
from marketflow.settings.shards import LEAD
from marketflow.stores.postgres.holes import PostgresHoles
from marketflow.stores.postgres.rows import connection_keywords
from marketflow.stores.redis import keys
from tests.faults.test_alerts import BTC, events
from tests.support.application import Application, ScriptedExchange, now_ms
from tests.support.proxy import Proxy
from tests.support.redis_cluster import RedisCluster
from tests.support.roles import IngestProcess, Roles
from tests.support.servers import RedisServer, wait_until
from tests.support.webhook_receiver import WebhookReceiver

FLIP_SECONDS = 0.4
"""Between two crossings, so that no two are in one slice, and the order of those of different exchanges is clear."""

LOW, HIGH = 99.0, 101.0

HELD_SECONDS = 11.0
"""How long prices stay as they are so that each is that of the period before: the shortest one has ten seconds."""


@pytest.fixture
def receiver() -> Iterator[WebhookReceiver]:
    with WebhookReceiver() as receiver:
        yield receiver


class Flips:
    """Prices of exchanges, each of which crosses 100 in turn; every exchange sends all the time.

    Args:
        exchanges: odd in number, so that the reference price is one of theirs.
        is_stamped: whether ticks have the exchange's own time.
    """

    def __init__(self, exchanges: Sequence[ScriptedExchange], is_stamped: bool = True) -> None:
        self._exchanges = exchanges
        self._is_stamped = is_stamped
        self._turn = itertools.cycle(range(len(exchanges)))
        self.prices = [LOW] * len(exchanges)
        self.crossings = [0] * len(exchanges)
        self.of_reference = 0

    def send(self) -> None:
        for exchange, price in zip(self._exchanges, self.prices, strict=True):
            if self._is_stamped:
                exchange.send(price)
            else:
                exchange.send_raw(b'{"symbol":"BTCUSDT","price":%f}\n' % price)

    def sending(self) -> Sequence[ScriptedExchange]:
        """Send; return the exchanges, which detect lost connections by that."""
        self.run(0)
        return self._exchanges

    def run(self, flips: int) -> None:
        """Cross `flips` times, one exchange after the other."""
        for _ in range(flips):
            self._pause()
            before, number = self._reference, next(self._turn)
            self.prices[number] = HIGH if self.prices[number] == LOW else LOW
            self.crossings[number] += 1
            self.of_reference += self._reference != before
        self._pause()

    def hold(self) -> None:
        """Send prices that cross no level for HELD_SECONDS."""
        end = time.monotonic() + HELD_SECONDS
        while time.monotonic() < end:
            self._pause()

    def _pause(self) -> None:
        end = time.monotonic() + FLIP_SECONDS
        while time.monotonic() < end:
            self.send()
            time.sleep(0.05)

    @property
    def _reference(self) -> float:
        return sorted(self.prices)[len(self.prices) // 2]


_Process = TypeVar("_Process", bound=Application)


def owner_of(redis_db: RedisServer | RedisCluster, shard: str, processes: Sequence[_Process]) -> _Process | None:
    """Return the process that owns a shard."""
    with redis_db.client() as client:
        table: Any = client.get(keys.SHARDS_KEY)
    rows = json.loads(table)["rows"] if table else {}
    owner = rows.get(shard, {}).get("owner", "")
    return next((each for each in processes if f"/{each.process.pid}/" in owner), None)


NAMES = ("exchange1", "exchange2", "exchange3")


def wait_until_spread(
    redis_db: RedisServer | RedisCluster, processes: Sequence[IngestProcess], shards: Sequence[str] = NAMES
) -> None:
    """Wait until each of three processes owns one exchange."""
    wait_until(
        lambda: {id(owner_of(redis_db, each, processes)) for each in shards} == {id(each) for each in processes},
        timeout=20,
    )


class Alerting:
    """Three ingest processes and an API, with a rule for each exchange.

    Args:
        exchanges: three; all of BTCUSDT.
    """

    def __init__(
        self,
        roles: Roles,
        redis_db: RedisServer | RedisCluster,
        exchanges: Sequence[ScriptedExchange],
        is_stamped: bool = True,
    ) -> None:
        self._redis_db = redis_db
        self.processes, self.api = [roles.ingest() for _ in range(3)], roles.api()
        wait_until_spread(redis_db, self.processes)
        self.flips = Flips(exchanges, is_stamped)
        clients = [2 if is_stamped else 1] * 3
        wait_until(lambda: [len(exchange.clients) for exchange in self.flips.sending()] == clients, timeout=20)

    def make(self, **fields: Any) -> str:
        """Make a price rule of level 100, unless said otherwise, and return its id; None leaves a field out."""
        rule = {name: value for name, value in (BTC | {"level": 100.0} | fields).items() if value is not None}

        def made() -> str:
            answer = self.api.http.post("/alerts", json=rule)
            assert answer.status_code in (201, 503), answer.text
            return str(answer.json()["id"]) if answer.status_code == 201 else ""

        return wait_until(made)

    def owner(self, shard: str) -> IngestProcess:
        found = owner_of(self._redis_db, shard, self.processes)
        assert found is not None, shard
        return found

    def counts(self, rules: Sequence[str]) -> list[int]:
        of_each = [event["rule"] for event in events(self.api)]
        return [of_each.count(rule) for rule in rules]

    def assert_counts(self, rules: Sequence[str], expected: Sequence[int]) -> None:
        with suppress(AssertionError):  # which would not say what is missing
            wait_until(lambda: sum(self.counts(rules)) >= sum(expected), timeout=20)
        self.flips.run(0)
        assert self.counts(rules) == list(expected)

    def assert_alternate(self, rule: str) -> None:
        found = sorted((event["timestamp"], event["direction"]) for event in events(self.api) if event["rule"] == rule)
        assert all(one != other for (_, one), (_, other) in itertools.pairwise(found)), found


@pytest.mark.parametrize("victim", ["lead", "owner", "frozen lead"])
def test_killed_process_neither_misses_nor_doubles_a_crossing(
    roles: Roles,
    broadcasting: list[ScriptedExchange],
    redis_db: RedisServer,
    receiver: WebhookReceiver,
    victim: str,
) -> None:
    one = Alerting(roles, redis_db, broadcasting)
    rules = [one.make(exchange=f"exchange{n}", **receiver.hook) for n in (1, 2, 3)]
    rules += [one.make(exchange="reference"), one.make(kind="gap", basis_points=100.0, exchange=None, level=None)]
    once = one.make(exchange="exchange2", once=True)
    cooling = one.make(exchange="exchange3", cooldown="1h")
    one.flips.run(6)
    lead = one.owner(LEAD)
    if victim == "frozen lead":
        lead.process.send_signal(signal.SIGSTOP)
        one.flips.run(8)
        lead.process.send_signal(signal.SIGCONT)
        one.flips.run(4)
    else:
        killed = lead if victim == "lead" else next(each for each in one.processes if each is not lead)
        killed.kill()
        one.flips.run(12)
    of_gap = sum(one.flips.crossings) // 3  # all three are low or high after every third one
    one.assert_counts([*rules, once, cooling], [*one.flips.crossings, one.flips.of_reference, of_gap, 1, 1])
    for rule in rules[:4]:
        one.assert_alternate(rule)
    wait_until(lambda: len(receiver.acknowledged) == sum(one.flips.crossings))
    assert set(receiver.acknowledged.values()) == {1}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("victim", ["lead", "owner", "frozen lead"])
def test_killed_process_neither_misses_nor_doubles_a_change(
    roles: Roles, broadcasting: list[ScriptedExchange], redis_db: RedisServer, victim: str
) -> None:
    """Prices rise while there is no leader or no owner: the next leader compares them with those of before."""
    one = Alerting(roles, redis_db, broadcasting)
    change = {"kind": "change", "level": None, "percent": 1.5, "period": "10s"}
    rules = [one.make(**change, exchange=exchange) for exchange in (*NAMES, "reference")]
    one.flips.hold()
    lead = one.owner(LEAD)
    if victim == "frozen lead":
        lead.process.send_signal(signal.SIGSTOP)
    else:
        killed = lead if victim == "lead" else next(each for each in one.processes if each is not lead)
        killed.kill()
    one.flips.run(3)
    wait_until(lambda: one.flips.sending() and (victim == "owner" or one.owner(LEAD) is not lead))
    if victim == "frozen lead":
        lead.process.send_signal(signal.SIGCONT)
    one.flips.hold()
    one.flips.run(3)
    one.assert_counts(rules, [2] * 4)  # one up and one down


def test_killed_leader_with_cold_standbys_doubles_no_crossing(
    roles: Roles,
    broadcasting: list[ScriptedExchange],
    redis_db: RedisServer,
) -> None:
    """Only ticks of its own exchange until that has another owner are lost, with their crossings."""
    one = Alerting(roles, redis_db, broadcasting, is_stamped=False)
    rules = [one.make(exchange=f"exchange{n}") for n in (1, 2, 3)]
    one.flips.run(6)
    lead = one.owner(LEAD)
    lost = [one.owner(f"exchange{n}") is lead for n in (1, 2, 3)]
    lead.kill()
    one.flips.run(13)
    expected = [0 if is_lost else count for is_lost, count in zip(lost, one.flips.crossings, strict=True)]
    wait_until(lambda: all(map(int.__ge__, one.counts(rules), expected)), timeout=20, message=f"{expected}")
    one.flips.run(3)
    for rule, is_lost, count, crossings in zip(rules, lost, one.counts(rules), one.flips.crossings, strict=True):
        one.assert_alternate(rule)
        assert (count <= crossings and count % 2 == crossings % 2) if is_lost else count in (crossings - 1, crossings)


def test_redis_outage_neither_misses_nor_doubles_a_crossing(
    roles: Roles,
    broadcasting: list[ScriptedExchange],
    redis_db: RedisServer,
    redis_proxy: Proxy,
) -> None:
    """Ticks that the leader receives itself raise events at once, others when Redis is back."""
    roles.settings["REDIS__PORT"] = redis_proxy.port
    one = Alerting(roles, redis_db, broadcasting)
    rules = [one.make(exchange=f"exchange{n}") for n in (1, 2, 3)]
    one.flips.run(3)
    redis_proxy.refuse()
    one.flips.run(9)
    redis_proxy.heal()
    one.flips.run(6)
    one.assert_counts(rules, one.flips.crossings)
    for rule in rules:
        one.assert_alternate(rule)


@pytest.mark.cluster
def test_killed_master_neither_misses_nor_doubles_a_crossing(
    roles: Roles,
    broadcasting: list[ScriptedExchange],
    redis_cluster: RedisCluster,
) -> None:
    """The master that is killed has the bucket of the symbol, whose slices are late then."""
    single = {name: value for name, value in roles.settings.items() if not name.startswith("REDIS__")}
    roles.settings = single | {"REDIS__NODES": redis_cluster.addresses[0]}
    one = Alerting(roles, redis_cluster, broadcasting)
    rules = [one.make(exchange=f"exchange{n}") for n in (1, 2, 3)]
    one.flips.run(3)
    bucket = keys.Bucket(keys.bucket_of("BTCUSDT", 16))
    with redis_cluster.killed(redis_cluster.owner_of(bucket.series_key)):
        one.flips.run(12)
        one.assert_counts(rules, one.flips.crossings)
    for rule in rules:
        one.assert_alternate(rule)


def test_stale_feed_is_an_event_once_over_the_death_of_the_leader(
    roles: Roles,
    broadcasting: list[ScriptedExchange],
    redis_db: RedisServer,
) -> None:
    roles.settings["FLOW__STALE_AFTER_SECONDS"] = 3
    one = Alerting(roles, redis_db, broadcasting)
    lead = one.owner(LEAD)
    foreign = next(n for n in (1, 2, 3) if one.owner(f"exchange{n}") is not lead)
    rule = one.make(kind="stale", level=None, exchange=f"exchange{foreign}", symbol=None)
    broadcasting[foreign - 1].close()
    wait_until(lambda: one.counts([rule]) == [1], timeout=20)
    lead.kill()
    began = time.monotonic()
    wait_until(lambda: one.owner(LEAD) is not lead, timeout=10)
    other = one.make(level=100.0, exchange="reference")
    wait_until(lambda: time.monotonic() - began > 8, timeout=10)
    assert one.counts([rule, other]) == [1, 0]
    broadcasting[foreign - 1].open()


@pytest.mark.parametrize("victim", ["lead", "frozen lead"])
def test_killed_leader_neither_misses_nor_doubles_a_hole(
    roles: Roles,
    broadcasting: list[ScriptedExchange],
    redis_db: RedisServer,
    postgres_db: dict[str, Any],
    victim: str,
) -> None:
    """Owners find holes right before it is killed, while there is no leader, and afterwards."""
    one = Alerting(roles, redis_db, broadcasting)
    rule = one.make(kind="hole", level=None, symbol=None, exchange=None)
    with closing(PostgresHoles(connection_keywords(**postgres_db))) as holes:

        def find(after_id: int) -> None:
            """Store a hole, as an owner does."""
            now = now_ms()
            series = Series(Mode.LIVE, NAMES[after_id % 3], "BTCUSDT")
            holes.write([Hole(series, after_id, after_id + 5, now - 3_000, now - 2_500, now, now)])

        find(1)  # right after the first rule was made
        wait_until(lambda: one.counts([rule]) == [1], 20)
        lead = one.owner(LEAD)
        find(2)
        lead.process.send_signal(signal.SIGSTOP if victim == "frozen lead" else signal.SIGKILL)
        find(3)
        one.flips.run(0)
        find(4)
        wait_until(lambda: one.flips.sending() and one.owner(LEAD) is not lead, 20)
        find(5)
        if victim == "frozen lead":
            lead.process.send_signal(signal.SIGCONT)
        wait_until(lambda: one.flips.sending() and one.counts([rule]) == [5], 20)
        one.flips.run(5)
        find(6)
        wait_until(lambda: one.flips.sending() and one.counts([rule]) == [6], 20)
    assert len({event["text"] for event in events(one.api)}) == 6
