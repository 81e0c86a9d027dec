"""Alerts in the pipeline, in virtual time, with a store in memory."""

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from marketflow.alerts.alert_model import (
    AlertEvent,
    DueDelivery,
    RaisedAlert,
    RuleState,
    StoredRule,
    Webhook,
    configured_id,
)
from marketflow.alerts.alert_service import AlertService, RuleRefused
from marketflow.alerts.deliveries import GIVEN_UP_AFTER_MS, Deliveries
from marketflow.alerts.webhook_sender import PostResult
from marketflow.errors import Unavailable
from marketflow.model import FeedState, Hole, HoleState, Mode, Series
from marketflow.runtime.alert_flow import AlertFlow
from marketflow.tasks import Backoff
from tests.alerts.rules import candles_of, rule_of
from tests.pipeline.world import BTC, World

HOOK: dict[str, Any] = {"webhook": {"url": "https://hooks.example.com/path", "secret": "sixteen-characters"}}
RECEIVER = "https://hooks.example.com"


class MemoryAlerts:
    """A store of rules, events and deliveries; unavailable while `down`."""

    def __init__(self) -> None:
        self.down = False
        self.calls = 0
        self.held: dict[str, StoredRule] = {}
        self.states: dict[str, RuleState] = {}
        self.events: list[RaisedAlert] = []
        self.deliveries: dict[str, list[Any]] = {}  # receiver, state, next try, attempts, found at
        self.now_ms = 0
        self.minutes: dict[tuple[Mode, str], list[tuple[str, int, float]]] = {}

    def _ask(self) -> None:
        self.calls += 1
        if self.down:
            raise Unavailable("down")

    def rules(self) -> list[StoredRule]:
        self._ask()
        return [each._replace(state=self.states.get(id, RuleState())) for id, each in self.held.items()]

    def configure(self, rules: Sequence[StoredRule]) -> None:
        self._ask()
        self.held = {id: each for id, each in self.held.items() if each.origin == "api"}
        self.held |= {each.id: each for each in rules}

    def put(self, stored: StoredRule) -> None:
        self._ask()
        self.held[stored.id] = stored
        self.states.pop(stored.id, None)

    def delete(self, id: str) -> None:
        self._ask()
        del self.held[id]
        self.states.pop(id, None)

    def store(self, raised: Sequence[RaisedAlert]) -> tuple[list[RaisedAlert], int]:
        self._ask()
        added = [each for each in raised if each.event.id not in [known.event.id for known in self.events]]
        added = [each for each in added if not self.states.get(each.event.rule, RuleState()).done]
        for each in added:
            self.states[each.event.rule] = RuleState(each.at, each.once)
            self.events.append(each)
            if each.receiver:
                self.deliveries[each.event.id] = [each.receiver, "pending", self.now_ms, 0, self.now_ms]
        return added, len(self.events)

    def closes(
        self, mode: Mode, exchanges: Sequence[str], symbol: str, since_ms: int, bucket_ms: int
    ) -> list[tuple[str, int, float]]:
        self._ask()
        return [each for each in self.minutes.get((mode, symbol), []) if each[0] in exchanges and each[1] >= since_ms]

    def expire(self, before_ms: int) -> None:
        self._ask()

    def receivers(self, now_ms: int) -> dict[str, tuple[int, bool]]:
        self._ask()
        found: dict[str, tuple[int, bool]] = {}
        for receiver, state, at, *_ in self.deliveries.values():
            count, due = found.get(receiver, (0, False))
            if state == "pending":
                found[receiver] = count + 1, due or at <= now_ms
        return found

    def claim(self, receiver: str, now_ms: int, until_ms: int) -> DueDelivery | None:
        self._ask()
        for raised in self.events:
            delivery = self.deliveries.get(raised.event.id)
            if delivery and delivery[:2] == [receiver, "pending"] and delivery[2] <= now_ms:
                delivery[2], delivery[3] = until_ms, delivery[3] + 1
                return DueDelivery(raised.event.id, raised.event.rule, "{}", delivery[3] - 1, delivery[4])
        return None

    def finish(self, states: dict[str, str]) -> None:
        self._ask()
        for event, state in states.items():
            self.deliveries[event][1] = state

    def retry(self, event: str, at_ms: int) -> None:
        self._ask()
        self.deliveries[event][2] = at_ms


class AlertWorld:
    """A pipeline with alerts, not yet started."""

    def __init__(self, *rules: Any, store: MemoryAlerts | None = None, most_pending: int = 10_000) -> None:
        self.world = World()
        self.store = store or MemoryAlerts()
        self.posts: list[tuple[str, str, str]] = []
        self.result = PostResult(None)
        self.states: dict[str, FeedState] = {"exchange1": FeedState.GENERATED}
        clock = self.world.pipeline.clock
        self.alerts = AlertService(self.store, rules, clock, most_pending, lambda: ["exchange1", "exchange2"])
        self.deliveries = Deliveries(
            self.store, self.alerts.evaluator.rules, self._post, clock, Backoff(1.0, 300.0, jitter=0.0)
        )
        self.flow = AlertFlow(self.alerts, self.deliveries, lambda: (Mode.TEST, self.states), 15.0, clock)
        self.world.pipeline.alerts = self.flow.branch

    def _post(self, webhook: Webhook, event: str, body: str) -> PostResult:
        self.posts.append((webhook.url, webhook.secret, event))
        return self.result

    def start(self) -> "AlertWorld":
        self.world.start()
        return self

    def tick(self, price: float, series: Series = BTC) -> None:
        """One tick, and the time until its slice is evaluated."""
        self.world.send(price, series=series)
        self.world.run(0.2)
        self.store.now_ms = self.world.now_ms

    @property
    def events(self) -> list[AlertEvent]:
        return [each.event for each in self.store.events]


def test_crossing_is_stored_within_two_slices() -> None:
    one = AlertWorld(rule_of(level=100)).start()
    one.tick(99)
    one.world.send(101)
    one.world.run(0.11)
    assert [event.direction for event in one.events] == ["up"]
    assert one.alerts.newest_event == 1
    assert one.flow.counters().events == {"price": 1}


def test_no_rules_cost_no_evaluation() -> None:
    one = AlertWorld()
    one.alerts.evaluate = None  # type: ignore[method-assign, assignment]
    one.start()
    one.tick(99)
    one.tick(101)
    assert one.world.pipeline.counters.failed_batches == 0
    assert not any(branch.name == "alerts" and branch.finished for branch in one.world.pipeline.branches._branches)


def test_failing_evaluation_touches_neither_prices_nor_rows(log: list[str]) -> None:
    one = AlertWorld(rule_of(level=100))

    def broken(_: object) -> None:
        raise ZeroDivisionError

    one.alerts.evaluate = broken  # type: ignore[method-assign, assignment]
    one.start()
    one.tick(99)
    one.tick(101)
    one.world.run(70)
    assert one.world.cache.newest[BTC].price == 101
    assert sum(candle.ticks for candle in one.world.archive.rows.values()) == 2
    assert one.world.pipeline.counters.failed_batches == 2
    assert any("ZeroDivisionError" in line for line in log)


def test_outage_of_the_store_keeps_events_in_memory() -> None:
    one = AlertWorld(rule_of(level=100), most_pending=3)
    one.start()
    one.store.down = True
    for price in [99, 101] * 3:
        one.tick(price)
    assert (one.alerts.pending, one.alerts.dropped, one.events) == (3, 2, [])
    one.store.down = False
    one.world.run(3)
    assert [event.value for event in one.events] == [101, 99, 101]
    assert one.alerts.pending == 0


def test_store_is_not_asked_before_the_archive_answers() -> None:
    one = AlertWorld(rule_of(level=100))
    one.world.archive.down = True
    one.start()
    one.tick(99)
    one.tick(101)
    one.world.run(5)
    assert (one.store.calls, one.alerts.pending) == (0, 1)
    one.world.archive.down = False
    one.world.run(3)
    assert len(one.events) == 1


def test_rules_of_the_api_are_read_at_the_start() -> None:
    store = MemoryAlerts()
    store.put(StoredRule("mine", "api", rule_of(level=100)))
    one = AlertWorld(store=store).start()
    one.tick(99)
    one.tick(101)
    assert [event.rule for event in one.events] == ["mine"]


def test_rule_with_once_stays_done_after_a_restart() -> None:
    store = MemoryAlerts()
    rule = rule_of(level=100, once=True)
    for _ in range(3):
        one = AlertWorld(rule, store=store).start()
        one.tick(99)
        one.tick(101)
    assert len(store.events) == 1


def test_rules_are_made_changed_and_deleted_while_it_runs() -> None:
    one = AlertWorld().start()
    one.tick(99)
    made = one.alerts.create(rule_of(level=100))
    one.tick(99)
    one.tick(101)
    assert one.alerts.replace(made.id, rule_of(level=200)).id == made.id
    one.tick(201)
    one.alerts.delete(made.id)
    one.tick(150)
    assert [event.threshold for event in one.events] == [100, 200]
    for change in (lambda: one.alerts.delete(made.id), lambda: one.alerts.replace("none", rule_of(level=1))):
        with pytest.raises(RuleRefused, match="unknown_rule"):
            change()


def test_configured_rules_are_replaced_while_it_runs() -> None:
    first, second = rule_of(level=100, cooldown="1h"), rule_of(level=200)
    one = AlertWorld(first).start()
    mine = one.alerts.create(rule_of(level=300))
    one.tick(99)
    one.tick(101)
    one.alerts.configure([first, second])
    one.tick(99)
    one.tick(301)  # the first one cools down
    assert [event.threshold for event in one.events] == [100, 200, 300]
    one.alerts.configure([])
    one.tick(99)
    assert [event.rule for event in one.events[3:]] == [mine.id]
    assert [*one.store.held] == [mine.id]
    with pytest.raises(RuleRefused, match="unknown_rule"):
        one.alerts.delete(configured_id(first))


def test_configured_rules_cannot_be_changed_by_the_api() -> None:
    one = AlertWorld(rule_of(level=100)).start()
    with pytest.raises(RuleRefused, match="configured_rule"):
        one.alerts.delete(configured_id(rule_of(level=100)))


@pytest.mark.parametrize(("exchange", "before"), [("exchange1", 100.0), (None, 104.0), ("reference", 102.0)])
def test_change_counts_from_stored_minutes_after_a_start(exchange: str | None, before: float) -> None:
    store = MemoryAlerts()
    rule = rule_of(kind="change", symbol="BTCUSDT", exchange=exchange, percent=5, period="1h", direction="up")
    one = AlertWorld(rule, store=store)
    then = one.world.now_ms - 3_600_000
    older = [("exchange1", then - 600_000, 50.0), ("exchange1", then - 2, 100.0), ("exchange2", then - 1, 104.0)]
    store.minutes[Mode.TEST, "BTCUSDT"] = older
    one.start()
    one.tick(before * 1.04)
    assert one.events == []
    one.tick(before * 1.06)
    assert [event.value for event in one.events] == [pytest.approx(6.0)]


def test_stale_feed_is_an_event_once() -> None:
    one = AlertWorld(rule_of(kind="stale")).start()
    one.world.run(2)
    one.states = {"exchange1": FeedState.STALE}
    one.world.run(10)
    one.states = {"exchange1": FeedState.CONNECTED}
    one.world.run(2)
    one.states = {"exchange1": FeedState.CONNECTING}
    one.world.run(14)
    assert len(one.events) == 1
    one.world.run(2)
    assert [(event.kind, event.exchange) for event in one.events] == [("stale", "exchange1")] * 2


def test_new_hole_is_an_event_and_a_filled_one_is_none() -> None:
    one = AlertWorld(rule_of(kind="hole")).start()
    now = one.world.now_ms
    hole = Hole(BTC, 5, 9, now - 500, now - 100, now, now)
    one.alerts.hole_changed(hole)
    one.alerts.hole_changed(Hole(BTC, 5, 9, now - 500, now - 100, now, now + 1, HoleState.FILLED))
    one.world.run(0.1)
    assert [event.text for event in one.events] == [
        "trades of BTCUSDT on exchange1 are missing: those after id 5 and before 9"
    ]


def test_stop_stores_the_events_of_the_last_ticks() -> None:
    one = AlertWorld(rule_of(level=100)).start()
    one.tick(99)
    one.world.send(101)
    one.world.stop()
    one.world.run(3)
    assert one.world.completed
    assert len(one.events) == 1


# Deliveries


def test_event_is_posted_until_it_is_acknowledged() -> None:
    one = AlertWorld(rule_of(level=100, **HOOK)).start()
    one.result = PostResult("status 500")
    one.tick(99)
    one.tick(101)
    wait_for_posts(one, 1)
    assert one.posts[0][:2] == (HOOK["webhook"]["url"], HOOK["webhook"]["secret"])
    for count in (2, 3):
        wait_for_posts(one, count)
    one.result = PostResult(None)
    wait_for_posts(one, 4)
    one.world.run(100)
    drain(one)
    assert len(one.posts) == 4
    assert {post[2] for post in one.posts} == {one.events[0].id}
    assert one.flow.counters().deliveries == {"failed": 3, "acknowledged": 1}


def test_acknowledgement_is_recorded_before_anything_is_sent() -> None:
    """The store is down just then: after its return the event is not posted again."""
    store = MemoryAlerts()
    one = AlertWorld(rule_of(level=100, **HOOK), store=store)
    alerts = one.alerts
    alerts.persist()
    alerts.evaluate({})
    _raise_two(one)
    (receiver,) = one.deliveries.due()

    def acknowledge(webhook: Webhook, event: str, body: str) -> PostResult:
        one.posts.append((webhook.url, webhook.secret, event))
        store.down = True
        return PostResult(None)

    one.deliveries._post = acknowledge
    with pytest.raises(Unavailable):
        one.deliveries.serve(receiver)
    for _ in range(3):
        with pytest.raises(Unavailable):
            one.deliveries.due()
    store.down = False
    assert one.deliveries.due() == [RECEIVER]
    with pytest.raises(Unavailable):
        one.deliveries.serve(receiver)
    store.down = False
    assert one.deliveries.due() == []
    assert len(one.posts) == len({post[2] for post in one.posts}) == 2
    assert [state for _, state, *_ in store.deliveries.values()] == ["acknowledged"] * 2


def test_failing_receiver_is_asked_ever_more_rarely() -> None:
    one = AlertWorld(rule_of(level=100, **HOOK))
    one.result = PostResult("status 503")
    _raise_two(one)
    posted_at = []
    began = one.world.now_ms
    for second in range(130):
        for receiver in one.deliveries.due():
            one.deliveries.serve(receiver)
            posted_at.append(second)
        one.world.run(1)
    assert posted_at == [0, 1, 3, 7, 15, 31, 63, 127]
    one.result = PostResult("status 429", retry_after_seconds=1000)
    one.world.run(200)
    for receiver in one.deliveries.due():
        one.deliveries.serve(receiver)
    one.world.run(900)
    assert one.deliveries.due() == []
    one.world.run((began + GIVEN_UP_AFTER_MS - one.world.now_ms) / 1000 + 1)
    for _ in range(20):
        one.world.run(3600)
        for receiver in one.deliveries.due():
            one.deliveries.serve(receiver)
    assert one.deliveries.results["given_up"] == 2
    assert one.deliveries.due() == []
    assert one.deliveries.pending == 0


def test_failing_receiver_does_not_hold_up_others() -> None:
    other = {"webhook": {"url": "https://other.example.com/", "secret": "sixteen-characters"}}
    one = AlertWorld(rule_of(level=100, **HOOK), rule_of(level=100.5, **other))
    _raise_two(one)
    assert sorted(one.deliveries.due()) == [RECEIVER, "https://other.example.com"]
    one.deliveries.serve("https://other.example.com")
    assert one.deliveries.due() == []  # the first one is still served
    assert {post[0] for post in one.posts} == {"https://other.example.com/"}


def test_events_of_a_deleted_rule_are_given_up() -> None:
    one = AlertWorld()
    one.alerts.store_is_usable()
    made = one.alerts.create(rule_of(level=100, **HOOK))
    _raise_two(one)
    one.alerts.delete(made.id)
    one.deliveries.serve(one.deliveries.due()[0])
    assert one.posts == []
    assert one.deliveries.results == {"given_up": 2}


def test_nothing_is_posted_after_the_stop() -> None:
    one = AlertWorld(rule_of(level=100, **HOOK))
    _raise_two(one)
    (receiver,) = one.deliveries.due()
    one.deliveries.stop()
    one.deliveries.serve(receiver)
    assert one.posts == []


def _raise_two(one: AlertWorld) -> None:
    """Have two events of each rule stored, without the pipeline."""
    now = one.world.now_ms
    for number, price in enumerate([99, 102, 99]):
        one.alerts.evaluate(candles_of(price, at=now + 200 * number))
    one.store.now_ms = now
    one.alerts.persist()
    assert one.alerts.pending == 0


def drain(one: AlertWorld) -> None:
    """Wait until the threads of the posts are idle."""
    pool = one.flow._pool
    assert pool is not None
    done = threading.Barrier(5)
    for _ in range(4):
        pool.threads.submit(partial(done.wait, 5))
    done.wait(5)


def wait_for_posts(one: AlertWorld, count: int) -> None:
    """Let virtual time pass until there are `count` posts, which are made on threads of their own."""
    for _ in range(200):
        if one.flow._pool is not None:
            drain(one)
        if len(one.posts) >= count:
            break
        one.world.run(0.5)
    assert len(one.posts) == count
