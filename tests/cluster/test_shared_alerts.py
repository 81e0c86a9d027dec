"""Alerts of several ingest processes, step by step: the next one that leads finds what the one before would have."""

import random
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import msgspec
import psycopg
import pytest

from marketflow.alerts.alert_model import StoredRule
from marketflow.alerts.alert_service import AlertService
from marketflow.alerts.slice_follower import SliceFollower
from marketflow.cluster.messages import AlertMark
from marketflow.cluster.shared_alerts import SharedAlerts
from marketflow.errors import Unavailable
from marketflow.model import (
    MINUTE_MS,
    NANOSECONDS_PER_MS,
    SLICE_MS,
    Candle,
    Candles,
    FeedState,
    Hole,
    HoleState,
    Mode,
    Series,
    Slot,
    Tick,
    candle_of,
    merge_all,
    minute_start,
    slice_start,
)
from marketflow.resources import resource
from marketflow.stores.postgres.alert_store import PostgresAlerts
from marketflow.stores.postgres.holes import PostgresHoles
from marketflow.stores.postgres.rows import connection_keywords
from marketflow.stores.postgres.writer import PostgresWriter
from tests.alerts.rules import rule_of, stored

EXCHANGES = ("exchange1", "exchange2", "exchange3")
SERIES = [Series(Mode.LIVE, exchange, "BTCUSDT") for exchange in EXCHANGES]

RULES: dict[str, dict[str, Any]] = {
    "price": {"level": 100},
    "once": {"level": 101, "once": True},
    "cooldown": {"level": 100, "exchange": "exchange2", "cooldown": "7s"},
    "change": {"kind": "change", "symbol": "BTCUSDT", "exchange": "exchange3", "percent": 1, "period": "10s"},
}
OF_ALL: dict[str, dict[str, Any]] = {
    "any": {"level": 100, "exchange": None},
    "reference": {"level": 100, "exchange": "reference"},
    "change of reference": {
        "kind": "change", "symbol": "BTCUSDT", "exchange": "reference", "percent": 0.5, "period": "30s"
    },
    "gap": {"kind": "gap", "symbol": "BTCUSDT", "basis_points": 150},
}  # fmt: skip


class World:
    """What all processes share: time, slices, states of feeds, the mark and PostgreSQL."""

    def __init__(self, place: Mapping[str, Any]) -> None:
        self.place = place
        self.now_ms = slice_start(time.time_ns() // 1_000_000 + 5_000)
        self.slices: Candles = {}
        self.states = dict.fromkeys(EXCHANGES, FeedState.CONNECTED)
        self.last_mark: AlertMark | None = None
        self.mode = Mode.LIVE
        self.no_mark_until = 0
        self.unreadable: set[Series] = set()

    def clock(self) -> int:
        return self.now_ms * NANOSECONDS_PER_MS

    def tick(self, price: float, series: Series = SERIES[0]) -> None:
        """One tick, which Redis has at once."""
        tick = Tick(price, self.now_ms, self.now_ms * NANOSECONDS_PER_MS)
        slot = Slot(series, slice_start(self.now_ms))
        self.slices |= merge_all([{slot: self.slices[slot]} if slot in self.slices else {}, {slot: candle_of(tick)}])

    # Of Redis

    def slices_since(self, starts: Mapping[Series, int], until: int) -> tuple[Candles, Collection[Series]]:
        readable = {series: start for series, start in starts.items() if series not in self.unreadable}
        found = {
            slot: candle
            for slot, candle in self.slices.items()
            if readable.get(slot.series, until) <= slot.start < until
        }
        return found, starts.keys() - readable.keys()

    def last_before(self, series: Collection[Series], before: int) -> tuple[Candles, Collection[Series]]:
        newest: dict[Series, Slot] = {}
        for slot in sorted(self.slices, key=lambda slot: slot.start):
            if slot.series in series and slot.start < before:
                newest[slot.series] = slot
        return {slot: self.slices[slot] for slot in newest.values()}, ()

    def feed_states(self, mode: Mode, exchanges: Iterable[str]) -> Mapping[str, FeedState]:
        return {exchange: self.states[exchange] for exchange in exchanges}

    def mark(self) -> AlertMark | None:
        if self.now_ms < self.no_mark_until:
            raise Unavailable("as in a failover")
        return self.last_mark

    def put_mark(self, mark: AlertMark) -> None:
        self.last_mark = mark


class Lead:
    """A process that leads, with connections of its own."""

    def __init__(self, world: World, rules: Mapping[str, StoredRule]) -> None:
        self.world = world
        self.store = PostgresAlerts(connection_keywords(**world.place))
        self.alerts = AlertService(
            self.store, (), world.clock, newest=lambda mode, symbol: self.shared.newest(mode, symbol)
        )
        self.shared = SharedAlerts(
            self.alerts,
            world,
            world,
            self.store.holes_found,
            lambda: world.mode,
            SERIES,
            15_000,
            world.clock,
            lambda: world.now_ms / 1000,
        )
        self.shared.begin()
        self.rules = rules
        self.persist()

    def persist(self) -> None:
        """Read and store, of the rules these alone."""
        self.alerts.store_is_usable()
        self.alerts.persist()
        for id in self.alerts.evaluator.rules().keys() - self.rules.keys():
            self.alerts.evaluator.remove(id)

    def run(self, seconds: float, ticks: Iterable[tuple[float, Series]] = ()) -> None:
        """Step for so long, and store what is found; the ticks come first, one in each step."""
        coming = iter(ticks)
        for _ in range(round(seconds * 5)):
            if tick := next(coming, None):
                self.world.tick(*tick)
            self.world.now_ms += 200
            self.shared.step()
            self.persist()

    def close(self) -> None:
        self.store.close()


@pytest.fixture
def archive(postgres_db: dict[str, Any]) -> Iterator[PostgresWriter]:
    with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 10)) as archive:
        archive.write({})
        yield archive


@pytest.fixture
def world(postgres_db: dict[str, Any], archive: PostgresWriter) -> World:
    return World(postgres_db)


class Leads:
    """Processes of which one leads at a time, with rules of their own."""

    def __init__(self, world: World, **rules: Any) -> None:
        self._world = world
        self.rules = {id: stored(id, **rule) for id, rule in rules.items()}
        with closing(PostgresAlerts(connection_keywords(**world.place))) as store:
            for rule in self.rules.values():
                store.put(rule)
        self._lead: Lead | None = None

    @property
    def lead(self) -> Lead:
        if self._lead is None:
            self._lead = Lead(self._world, self.rules)
        return self._lead

    def kill(self) -> None:
        """Have the process that leads do nothing any more; the next use of `lead` begins another one."""
        if self._lead is not None:
            self._lead.close()
            self._lead = None

    def events(self) -> list[tuple[str, str | None, str]]:
        """Rule, direction and time of each stored event, in the order of time."""
        with psycopg.connect(**self._world.place) as connection:
            found = connection.execute("select event from alert_events order by time, number").fetchall()
        events = [msgspec.json.decode(text) for (text,) in found]
        return [(each["rule"], each["direction"], each["timestamp"]) for each in events if each["rule"] in self.rules]


@pytest.fixture
def make_leads(world: World) -> Iterator[Any]:
    made: list[Leads] = []

    def make(**rules: Any) -> Leads:
        made.append(Leads(world, **rules))
        return made[-1]

    yield make
    for each in made:
        each.kill()


@pytest.mark.parametrize(("seconds", "expected"), [(3, ["up", "down"]), (10, ["down"])])
def test_lead_that_begins_waits_for_the_mark(
    world: World, make_leads: Any, seconds: int, expected: Sequence[str]
) -> None:
    """It is the next one's only way to know what nobody has evaluated. In a long outage it begins without."""
    leads = make_leads(rule=RULES["price"])
    leads.lead.run(15, [(99.0, SERIES[0])])
    leads.kill()
    world.tick(101.0)
    world.no_mark_until = world.now_ms + seconds * 1000
    leads.lead.run(12)
    leads.lead.run(2, [(99.0, SERIES[0])])
    assert [direction for _, direction, _ in leads.events()] == expected


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rules", [RULES, OF_ALL], ids=["of one exchange", "of all exchanges"])
def test_processes_that_die_find_together_what_one_finds(
    world: World, make_leads: Any, seed: int, rules: Mapping[str, Mapping[str, Any]]
) -> None:
    """Killed at any time, before or after its events are stored; owners are late, or gone for two seconds."""
    chance = random.Random(seed)
    dying = make_leads(**{f"dying {name}": rule for name, rule in rules.items()})
    living = make_leads(**{f"living {name}": rule for name, rule in rules.items()})
    prices = dict.fromkeys(SERIES, 100.5)
    unwritten: list[tuple[int, Slot, Candle]] = []
    last_due: dict[Series, int] = {}
    dead_until = 0
    kills = 0
    for _ in range(450):
        start = world.now_ms
        late_ms = 2_000 if rules is RULES and chance.random() < 0.02 else 0
        for series in SERIES:
            ticks = []
            for at in sorted(chance.sample(range(SLICE_MS), chance.randrange(3))):
                prices[series] = round(min(max(prices[series] + chance.uniform(-0.6, 0.6), 97), 104), 2)
                ticks.append(Tick(prices[series], start + at, (start + at) * NANOSECONDS_PER_MS))
            if ticks:
                slot = Slot(series, start)
                candle = merge_all({slot: candle_of(tick)} for tick in ticks)[slot]
                due = start + SLICE_MS + late_ms + chance.randrange(150)
                last_due[series] = max(due, last_due.get(series, 0))
                unwritten.append((last_due[series], slot, candle))
        world.now_ms += SLICE_MS
        for each in [each for each in unwritten if each[0] <= world.now_ms]:
            world.slices[each[1]] = each[2]
            unwritten.remove(each)
        if start % 200 == 0:
            living.lead.shared.step()
            living.lead.persist()
            if world.now_ms >= dead_until:
                dying.lead.shared.step()
                if chance.random() < 0.05:
                    dying.kill()
                    kills += 1
                    dead_until = world.now_ms + 1_500
                elif chance.random() < 0.8:
                    dying.lead.persist()
    for leads in (living, dying):
        leads.lead.run(0.2)
    world.now_ms += 1_000
    for leads in (living, dying):
        leads.lead.run(0.4)
    found = [(rule.removeprefix("dying "), *rest) for rule, *rest in dying.events()]
    expected = [(rule.removeprefix("living "), *rest) for rule, *rest in living.events()]
    assert kills >= 3
    assert {rule for rule, *_ in expected} == {*rules}
    assert sorted(map(str, found)) == sorted(map(str, expected))


def test_next_lead_finds_the_change_that_nobody_has_evaluated(
    world: World, make_leads: Any, archive: PostgresWriter
) -> None:
    """The archive has minutes that ended after the first slices that the next lead reads."""
    change = {"kind": "change", "symbol": "BTCUSDT", "percent": 5, "period": "3m"}
    leads = make_leads(one=change | {"exchange": "exchange1"}, all=change | {"exchange": "reference"})
    for _ in range(250):
        world.now_ms += 1_000
        world.tick(90.0)
    minutes: Candles = merge_all(
        {Slot(SERIES[0], minute_start(slot.start)): candle} for slot, candle in world.slices.items()
    )
    archive.write({slot: candle for slot, candle in minutes.items() if slot.start + MINUTE_MS < world.now_ms})
    leads.lead.run(12, [(90.0, SERIES[0])] * 60)
    leads.kill()
    world.tick(100.0)
    world.now_ms += 1_500
    leads.lead.run(12)
    assert sorted((rule, direction) for rule, direction, _ in leads.events()) == [("all", "up"), ("one", "up")]


def test_next_lead_finds_what_could_not_be_read_for_long(world: World, make_leads: Any) -> None:
    """A master of a Redis Cluster is down, and the process that leads receives none of its series."""
    leads = make_leads(unread={"level": 100, "exchange": "exchange1"}, read={"level": 100, "exchange": "exchange2"})
    leads.lead.run(12, [(99.0, series) for series in SERIES])
    world.unreadable = {SERIES[0]}
    leads.lead.run(30, [(101.0, SERIES[0]), (101.0, SERIES[1])])
    assert [rule for rule, _, _ in leads.events()] == ["read"]
    leads.kill()
    world.unreadable = set()
    leads.lead.run(12)
    assert sorted(rule for rule, _, _ in leads.events()) == ["read", "unread"]


def test_crossing_before_a_rule_was_made_is_no_event(world: World, make_leads: Any) -> None:
    """Neither in the process that made it nor in the next one; a crossing right after that is one."""
    leads = make_leads()
    leads.lead.run(3, [(price, SERIES[1]) for price in (99, 101, 99)])
    rule = rule_of(level=100, exchange="exchange2", direction="up")
    leads.lead.shared.follow([rule])
    made = leads.lead.alerts.create(rule)
    leads.rules[made.id] = made
    with psycopg.connect(**world.place) as connection:
        at = (world.now_ms / 1000, made.id)  # the clock of this test is ahead
        connection.execute("update alert_rules set created_at = to_timestamp(%s) where id = %s", at)
    leads.kill()
    world.tick(99, SERIES[1])
    leads.lead.run(3)
    assert leads.events() == []
    leads.lead.run(3, [(101, SERIES[1])])
    assert len(leads.events()) == 1
    rule = rule_of(level=102, exchange="exchange3")
    world.tick(101, SERIES[2])
    leads.lead.shared.follow([rule])
    made = leads.lead.alerts.create(rule)
    leads.rules[made.id] = made
    world.now_ms += 100
    world.tick(103, SERIES[2])
    leads.lead.run(1)
    assert [direction for _, direction, _ in leads.events()] == ["up", "up"]


def test_first_rule_of_all_finds_what_follows_it_at_once(
    world: World, make_leads: Any, postgres_db: dict[str, Any]
) -> None:
    """Steps begin with it, a moment later."""
    leads = make_leads()
    world.tick(99)
    world.now_ms += 1_000
    for rule in (rule_of(level=100, exchange="exchange1"), rule_of(kind="hole")):
        leads.lead.shared.follow([rule])
        made = leads.lead.alerts.create(rule)
        leads.rules[made.id] = made
    world.now_ms += 100
    world.tick(101)
    with closing(PostgresHoles(connection_keywords(**postgres_db))) as holes:
        holes.write([Hole(SERIES[1], 5, 9, world.now_ms, world.now_ms, world.now_ms, world.now_ms)])
    world.now_ms += 200
    leads.lead.run(2)
    assert len(leads.events()) == 2


def test_stale_feed_is_an_event_once_whichever_process_leads(world: World, make_leads: Any) -> None:
    leads = make_leads(stale={"kind": "stale"})
    leads.lead.run(1)
    world.states["exchange2"] = FeedState.STALE
    leads.lead.run(1)
    assert len(leads.events()) == 1
    leads.kill()
    leads.lead.run(20)
    assert len(leads.events()) == 1
    world.states["exchange2"] = FeedState.CONNECTED
    leads.lead.run(1)
    world.states["exchange2"] = FeedState.STALE
    world.now_ms += 1_000
    leads.lead.shared.step()
    leads.kill()  # before it is stored
    leads.lead.run(20)
    assert len(leads.events()) == 2


def test_hole_of_any_owner_is_an_event_once(world: World, make_leads: Any, postgres_db: dict[str, Any]) -> None:
    leads = make_leads(hole={"kind": "hole"})
    with closing(PostgresHoles(connection_keywords(**postgres_db))) as holes:
        leads.lead.run(1)
        first, second = world.now_ms, world.now_ms + 5_000
        holes.write([Hole(SERIES[1], 5, 9, first - 900, first - 300, first, first + 1, HoleState.FILLED)])
        leads.lead.run(2)
        assert len(leads.events()) == 1
        leads.lead.run(2)
        leads.kill()
        holes.write([Hole(SERIES[0], 5, 9, first - 990, first - 300, second, second)])
        leads.lead.run(20)
    assert len(leads.events()) == 2


def test_first_process_of_all_begins_with_the_prices_of_now(world: World, make_leads: Any) -> None:
    for price in (99, 101, 99):
        world.tick(price)
        world.now_ms += 1_000
    leads = make_leads(price={"level": 100})
    leads.lead.run(2)
    assert leads.events() == []
    leads.lead.run(2, [(101, SERIES[0])])
    assert len(leads.events()) == 1


def test_mode_that_comes_back_begins_with_the_prices_of_now(world: World, make_leads: Any) -> None:
    leads = make_leads(price={"level": 100})
    leads.lead.run(2, [(99, SERIES[0])])
    world.mode = Mode.TEST
    leads.lead.run(20)
    for price in (99, 101, 99):
        world.tick(price)
        world.now_ms += 1_000
    world.mode = Mode.LIVE
    leads.lead.run(2)
    assert leads.events() == []


def test_slice_that_grows_gives_each_tick_once(world: World) -> None:
    follower = SliceFollower(world)
    assert follower.news(SERIES, world.now_ms) == []
    found = []
    start = world.now_ms
    for price in (99, 101, 98, 98.5):
        world.tick(price)
        world.now_ms += 10
        found += follower.news(SERIES, world.now_ms + SLICE_MS)
    assert {each.start for each in found} == {start}
    (slot,) = world.slices
    paths = [(each.candles[slot].open, each.candles[slot].close) for each in found]
    assert paths == [(99, 99), (99, 101), (101, 98), (98, 98.5)]
    assert [(each.candles[slot].low, each.candles[slot].high) for each in found][1:] == [
        (99, 101),
        (98, 101),
        (98, 98.5),
    ]
    assert follower.news(SERIES, world.now_ms + SLICE_MS) == []
