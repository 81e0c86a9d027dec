"""Rules on candles: what is an event, when, and what each rule costs."""

import itertools
import random
from typing import Any

import pytest

from marketflow.alerts.alert_model import AlertEvent, RaisedAlert, RuleState
from marketflow.alerts.evaluator import Evaluator
from marketflow.alerts.watched_rule import WatchedRule
from marketflow.model import NANOSECONDS_PER_MS, Hole, Mode, Tick
from tests.alerts.rules import BTC, START, candles_of, evaluator_of, stored

OTHER = BTC._replace(exchange="exchange2")
THIRD = BTC._replace(exchange="exchange3")


def events_of(evaluator: Evaluator, *batches: Any) -> list[AlertEvent]:
    """Evaluate batches of prices, each a slice later than the one before."""
    found: list[RaisedAlert] = []
    for number, prices in enumerate(batches):
        at = START + 100 * number
        candles = prices if isinstance(prices, dict) else candles_of(*prices, at=at)
        found += evaluator.evaluate(candles, at + 100)
    return [raised.event for raised in found]


def test_crossing_within_a_slice_is_seen() -> None:
    rules = evaluator_of(stored("up", level=105, direction="up"), stored("down", level=95, direction="down"))
    events = events_of(rules, [100], [100, 106, 94, 100])
    assert [(event.rule, event.direction, event.threshold, event.value) for event in events] == [
        ("up", "up", 105, 106),
        ("down", "down", 95, 94),
    ]
    assert [event.timestamp for event in events] == ["2025-11-21T01:54:00.101Z", "2025-11-21T01:54:00.102Z"]


@pytest.mark.parametrize(
    ("direction", "prices", "expected"),
    [
        ("up", [[99], [100]], ["up"]),
        ("up", [[100], [101]], []),
        ("up", [[101], [99]], []),
        ("down", [[101], [100]], ["down"]),
        ("down", [[100], [99]], []),
        ("either", [[99], [101], [99]], ["up", "down"]),
        ("either", [[99], [101, 99]], ["up"]),
        ("either", [[101]], []),
        ("either", [[99, 101]], ["up"]),
        ("up", [[101], [99], [101], [99], [101]], ["up", "up"]),
    ],
)
def test_level_is_crossed_in_its_direction(direction: str, prices: Any, expected: list[str]) -> None:
    events = events_of(evaluator_of(stored("a", level=100, direction=direction)), *prices)
    assert [event.direction for event in events] == expected


def test_crossing_between_two_slices_is_seen_once() -> None:
    rules = evaluator_of(stored("a", level=100))
    assert len(events_of(rules, [99], [101], [101], [101.5])) == 1


def test_late_ticks_are_no_crossing() -> None:
    rules = evaluator_of(stored("a", level=100))
    assert events_of(rules, [101], [102], candles_of(99, at=START + 50), [102]) == []


def test_cooldown_suppresses_crossings_until_it_is_over() -> None:
    rules = evaluator_of(stored("a", level=100, direction="up", cooldown="1s"))
    up_and_down = [[99], [101]] * 12
    events = events_of(rules, *up_and_down)
    assert [event.timestamp[-6:] for event in events] == ["0.100Z", "1.100Z", "2.100Z"]


def test_rule_with_once_has_one_event() -> None:
    rules = evaluator_of(*(stored(f"r{n}", level=100, once=n < 5) for n in range(10)))
    assert len(events_of(rules, [99], [101], [99], [101])) == 5 + 5 * 3
    assert [each.state.done for each in rules.rules().values()] == [True] * 5 + [False] * 5


def test_rule_that_is_done_has_no_event() -> None:
    rules = evaluator_of(stored("a", RuleState(START, True), level=100))
    assert not rules.watches_candles
    assert events_of(rules, [99], [101]) == []


def test_new_rules_keep_what_was_seen_of_prices() -> None:
    rules = evaluator_of(stored("a", level=100))
    events_of(rules, [99])
    rules.set_rules([*rules.rules().values(), *evaluator_of(stored("b", level=100.5)).rules().values()])
    assert [each.event.rule for each in rules.evaluate(candles_of(101, at=START + 100), START + 200)] == ["a", "b"]


def test_price_of_an_earlier_run_begins_a_crossing() -> None:
    rules = evaluator_of(stored("a", level=100))
    (candle,) = candles_of(99).values()
    rules.seed({BTC: candle.newest})
    assert len(events_of(rules, [101])) == 1


@pytest.mark.parametrize("exchange", ["exchange1", "reference", None])
def test_new_rule_begins_with_the_price_of_now(exchange: str | None) -> None:
    ticks = {"exchange1": Tick(99.0, START, START * NANOSECONDS_PER_MS)}
    rules = Evaluator(lambda mode, symbol: ticks if (mode, symbol) == (Mode.TEST, "BTCUSDT") else {})
    rules.put(WatchedRule(stored("mine", level=100, exchange=exchange, direction="up")))
    rules.put(WatchedRule(stored("above", level=102, exchange=exchange)))
    (event,) = rules.evaluate(candles_of(101, at=START + 100), START + 100)
    assert event.event.value == 101


def test_rule_of_all_exchanges_follows_the_newest_tick() -> None:
    rules = evaluator_of(stored("a", level=100, exchange=None, direction="up"))
    batch = candles_of(99, 99.5, at=START + 100) | candles_of(101, at=START + 101, series=OTHER)
    events = events_of(rules, candles_of(98), batch)
    assert [(event.exchange, event.value) for event in events] == [(None, 101)]


def test_reference_rule_follows_the_median() -> None:
    rules = evaluator_of(stored("a", level=100, exchange="reference", direction="up"))
    assert events_of(rules, candles_of(98) | candles_of(99, series=OTHER) | candles_of(99, series=THIRD)) == []
    assert rules.evaluate(candles_of(200, at=START + 100), START + 200) == []  # of one exchange
    (raised,) = rules.evaluate(candles_of(104, at=START + 200, series=OTHER), START + 300)
    assert (raised.event.exchange, raised.event.value) == ("reference", 104)


def test_stale_exchanges_do_not_count_in_the_median() -> None:
    rules = evaluator_of(stored("a", level=100, exchange="reference", direction="up"))
    events_of(rules, candles_of(98) | candles_of(98, series=OTHER))
    at = START + 15_200
    (raised,) = rules.evaluate(candles_of(101, at=at), at + 50)
    assert raised.event.value == 101


def test_gap_between_exchanges_is_an_event() -> None:
    rules = evaluator_of(stored("a", kind="gap", symbol="BTCUSDT", basis_points=50))
    events_of(rules, candles_of(100) | candles_of(100, series=OTHER))
    assert rules.evaluate(candles_of(100.4, at=START + 100), START + 200) == []
    (raised,) = rules.evaluate(candles_of(100.6, at=START + 200), START + 300)
    assert raised.event.value == pytest.approx(60)
    assert raised.event.exchange is None
    assert rules.evaluate(candles_of(100.7, at=START + 300), START + 400) == []


def test_change_within_a_period_is_an_event() -> None:
    rules = evaluator_of(
        stored("rise", kind="change", symbol="BTCUSDT", exchange="exchange1", percent=2, period="10s", direction="up"),
        stored("fall", kind="change", symbol="BTCUSDT", exchange="exchange1", percent=2, period="10s"),
    )
    found = []
    for second, price in enumerate([100.0] * 12 + [101.0] * 3 + [103.0] + [103.0] * 20 + [99.0]):
        at = START + second * 1000
        found += [(second, each.event) for each in rules.evaluate(candles_of(price, at=at), at)]
    assert [(second, event.rule, event.direction) for second, event in found] == [
        (15, "rise", "up"),
        (15, "fall", "up"),
        (36, "fall", "down"),
    ]
    assert found[0][1].value == pytest.approx(3.0)
    assert found[2][1].value == pytest.approx((99 / 103 - 1) * 100)


def test_change_needs_a_price_of_a_period_ago() -> None:
    rules = evaluator_of(stored("a", kind="change", symbol="BTCUSDT", exchange=None, percent=1, period="10s"))
    for second, price in enumerate([100, 120, 150, 190]):
        at = START + second * 1000
        assert rules.evaluate(candles_of(price, at=at), at) == []


def test_stale_feed_is_an_event_of_its_rules() -> None:
    rules = evaluator_of(
        stored("any", kind="stale"),
        stored("one", kind="stale", exchange="exchange1"),
        stored("other", kind="stale", exchange="exchange2"),
    )
    assert not rules.watches_candles
    assert rules.watches_feeds
    found = rules.feeds_stale(Mode.LIVE, ["exchange1"], START)
    assert [(each.event.rule, each.event.exchange, each.event.mode) for each in found] == [
        ("any", "exchange1", "live"),
        ("one", "exchange1", "live"),
    ]


def test_hole_is_an_event_of_its_rules() -> None:
    rules = evaluator_of(
        stored("any", kind="hole"),
        stored("btc", kind="hole", symbol="BTCUSDT", exchange="exchange1"),
        stored("eth", kind="hole", symbol="ETHUSDT"),
    )
    found = rules.hole_found(Hole(BTC, 7, 9, START, START + 50, START + 100, START + 100))
    assert [each.event.rule for each in found] == ["any", "btc"]
    assert found[0].event.text == "trades of BTCUSDT on exchange1 are missing: those after id 7 and before 9"
    assert found[0].event.timestamp == "2025-11-21T01:54:00.000Z"


def test_holes_are_events_in_the_order_in_which_they_are_found() -> None:
    """That of another exchange may begin earlier, and two of one be found at once."""
    rules = evaluator_of(stored("any", kind="hole"))
    other = BTC._replace(exchange="exchange2")
    holes = [
        Hole(series, after_id, after_id + 5, START + begin, START + 50, START + 100, START + 100)
        for series, after_id, begin in ((BTC, 7, 10), (BTC, 20, 30), (other, 7, 0))
    ]
    assert len({raised.event.id for hole in holes for raised in rules.hole_found(hole)}) == 3


def test_modes_are_evaluated_apart() -> None:
    rules = evaluator_of(stored("a", level=100))
    live = BTC._replace(mode=Mode.LIVE)
    assert events_of(rules, candles_of(99), candles_of(101, series=live, at=START + 100)) == []
    (event,) = events_of(rules, candles_of(99, series=live, at=START + 200))
    assert (event.mode, event.direction) == ("live", "down")


def test_event_id_is_the_same_for_the_same_crossing() -> None:
    """Of processes that cut the ticks of a slice differently."""
    whole = events_of(evaluator_of(stored("a", level=100)), [99], [100, 101, 102])
    parts = events_of(evaluator_of(stored("a", level=100)), [99], [99.5], candles_of(100, 101, 102, at=START + 150))
    other = events_of(evaluator_of(stored("b", level=100)), [99], [100, 101, 102])
    assert [event.id for event in whole] == [event.id for event in parts]
    assert whole[0].id != other[0].id


def test_bisection_finds_what_a_scan_of_all_rules_finds() -> None:
    """Random walks over random levels against the crossings of single ticks."""
    chosen = random.Random(7)
    levels = {f"r{n}": chosen.uniform(95, 105) for n in range(300)}
    rules = evaluator_of(*(stored(id, level=level) for id, level in levels.items()))
    price, last = 100.0, None
    for number in range(200):
        prices = [price := price + chosen.gauss(0, 0.2) for _ in range(chosen.randint(1, 3))]
        path = [*([] if last is None else [last]), *prices]
        expected = {
            id
            for id, level in levels.items()
            if any(a < level <= b or a > level >= b for a, b in itertools.pairwise(path))
        }
        at = START + number * 100
        found = rules.evaluate(candles_of(*prices, at=at), at + 100)
        assert {each.event.rule for each in found} == expected
        last = price
    assert last is not None


def test_cost_of_a_slice_is_that_of_its_series() -> None:
    """Rules of other series and levels that are not crossed are not looked at."""
    looked_at = 0

    class Counting(float):
        def __lt__(self, other: float) -> bool:
            nonlocal looked_at
            looked_at += 1
            return float(self) < other

        __hash__ = float.__hash__

        def __gt__(self, other: float) -> bool:
            nonlocal looked_at
            looked_at += 1
            return float(self) > other

    def comparisons(rules: int, others: int) -> int:
        nonlocal looked_at
        own = [stored(f"a{n}", level=200 + n) for n in range(rules)]
        foreign = [stored(f"b{n}", level=200 + n, symbol="ETHUSDT") for n in range(others)]
        evaluator = evaluator_of(*own, *foreign)
        evaluator.evaluate(candles_of(100), START)
        looked_at = 0
        evaluator.evaluate(candles_of(Counting(101), at=START + 100), START + 100)
        return looked_at

    assert comparisons(10, 0) == comparisons(10, 1000)
    assert comparisons(1000, 1000) <= comparisons(10, 0) + 4 * 8


def test_series_without_rules_are_passed_over() -> None:
    rules = evaluator_of(stored("a", level=100, symbol="ETHUSDT"))
    assert events_of(rules, [99], [101]) == []
