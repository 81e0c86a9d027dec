"""What is watched of one price: its levels, and its changes within periods."""

from collections.abc import Iterable, Sequence

from marketflow.alerts.alert_model import ChangeRule, Direction, PriceRule
from marketflow.alerts.level_index import Crossing, LevelIndex, Point
from marketflow.alerts.price_history import PriceHistory
from marketflow.alerts.watched_rule import WatchedRule
from marketflow.model import Candle

_Threshold = tuple[float, float, Direction, WatchedRule]
"""That from below, that from above, the direction, and the rule."""


def _index_of(thresholds: Sequence[_Threshold]) -> LevelIndex:
    return LevelIndex(
        ((up, rule) for up, _, direction, rule in thresholds if direction != "down"),
        ((down, rule) for _, down, direction, rule in thresholds if direction != "up"),
    )


class PriceWatch:
    """One price that moves: of a series, the newest of all exchanges, or the reference price.

    What it has seen outlives a change of its rules.
    """

    __slots__ = ("_changes", "_last", "_last_order", "_levels")

    def __init__(self) -> None:
        self._levels = LevelIndex()
        self._changes: dict[int, _ChangeWatch] = {}  # by period
        self._last: Point | None = None
        self._last_order = (0, 0)

    def set_rules(self, rules: Sequence[WatchedRule]) -> None:
        """Watch for these price and change rules, in place of those before."""
        levels: list[_Threshold] = []
        changes: dict[int, list[_Threshold]] = {}
        for watched in rules:
            if isinstance(rule := watched.rule, PriceRule):
                levels.append((rule.level, rule.level, rule.direction, watched))
            elif isinstance(rule, ChangeRule):
                changes.setdefault(rule.period_ms, []).append((rule.percent, -rule.percent, rule.direction, watched))
        self._levels = _index_of(levels)
        self._changes = {period: self._changes.get(period) or _ChangeWatch(period) for period in changes}
        for period, change in self._changes.items():
            change.levels = _index_of(changes[period])

    def take(self, candle: Candle) -> list[Crossing]:
        """Return what the ticks of a candle have crossed since the one before; those of a late one are no news."""
        order = candle.last_at, candle.last_sequence
        if order <= self._last_order:
            return []
        self._last_order = order
        last, self._last = self._last, Point(candle.close, candle.last_at)
        found: list[Crossing] = []
        low, high = candle.low, candle.high
        if last is not None:
            low, high = min(low, last.value), max(high, last.value)
        if self._levels.touches(low, high):
            found = self._levels.crossed(path_of(candle, last))
        for change in self._changes.values():
            found += change.take(path_of(candle))
        return found

    def unseeded(self) -> dict[int, int]:
        """Return the periods of which no older prices were given yet, each with the length of its buckets (ms)."""
        return {period: each.history.bucket_ms for period, each in self._changes.items() if not each.is_seeded}

    def seed_changes(self, period_ms: int, closes: Iterable[tuple[int, float]]) -> None:
        """Give older prices of a period: pairs of a time (Unix ms) and a price."""
        if (change := self._changes.get(period_ms)) is not None:
            change.is_seeded = True
            change.history.seed(closes)

    def seed(self, price: float, at: int) -> None:
        """Set the price before the first candle, as an earlier run has left it, or as it is when a rule is made."""
        if self._last is None:
            self._last = Point(price, at)


class _ChangeWatch:
    """The change of a price within a period, in percent."""

    def __init__(self, period_ms: int) -> None:
        self._period_ms = period_ms
        self.history = PriceHistory(period_ms)
        self.is_seeded = False
        self._last: Point | None = None
        self.levels = LevelIndex()

    def take(self, path: Sequence[Point]) -> list[Crossing]:
        end = path[-1]
        before = self.history.before(end.at)
        self.history.add(end.at, end.value)
        if before is None:
            self._last = None
            return []
        changes = [Point((value / before - 1) * 100, at) for value, at in path]
        begin, self._last = self._last or changes[0], changes[-1]
        return self.levels.crossed([begin, *changes])


def path_of(candle: Candle, before: Point | None = None) -> list[Point]:
    """Return the way of a price through a candle: open, the two extremes in the order of their times, close.

    It crosses every level that the ticks have crossed, though it may have done so more often.
    """
    high, low = Point(candle.high, candle.high_at), Point(candle.low, candle.low_at)
    extremes = (high, low) if candle.high_at <= candle.low_at else (low, high)
    path = [Point(candle.open, candle.first_at), *extremes, Point(candle.close, candle.last_at)]
    return path if before is None else [before, *path]
