"""Rules of alerts as tests write them, and candles for them."""

from typing import Any

from marketflow.alerts.alert_model import AlertRule, RuleState, StoredRule
from marketflow.alerts.evaluator import Evaluator
from marketflow.alerts.rule_parsing import convert_rule
from marketflow.alerts.watched_rule import WatchedRule
from marketflow.model import NANOSECONDS_PER_MS, Candles, Mode, Series, Slot, Tick, candle_of, merge_all, slice_start

START = 1_763_690_040_000
BTC = Series(Mode.TEST, "exchange1", "BTCUSDT")


def rule_of(**fields: Any) -> AlertRule:
    """Return a rule; a price rule of BTCUSDT on exchange1 without cooldown unless said otherwise."""
    if fields.get("kind", "price") == "price":
        fields = {"kind": "price", "symbol": "BTCUSDT", "exchange": "exchange1", **fields}
    return convert_rule({"cooldown": "0s", **fields})


def stored(id: str, state: RuleState = RuleState(), **fields: Any) -> StoredRule:  # noqa: B008 - immutable
    return StoredRule(id, "api", rule_of(**fields), state)


def evaluator_of(*rules: StoredRule) -> Evaluator:
    evaluator = Evaluator()
    evaluator.set_rules([WatchedRule(each) for each in rules])
    return evaluator


def candles_of(*prices: float, at: int = START, series: Series = BTC, step_ms: int = 1) -> Candles:
    """Return the candles of ticks, the first of them at a time, one every `step_ms`."""
    ticks = [Tick(price, at + n * step_ms, (at + n * step_ms) * NANOSECONDS_PER_MS) for n, price in enumerate(prices)]
    return merge_all({Slot(series, slice_start(tick.at)): candle_of(tick)} for tick in ticks)
