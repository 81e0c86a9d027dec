"""Thresholds of one quantity, sorted: those that a path crosses are found by bisection, however many there are."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from marketflow.alerts.watched_rule import WatchedRule


class Point(NamedTuple):
    """A value of a quantity, and its event time (Unix ms)."""

    value: float
    at: int


class Crossing(NamedTuple):
    """A threshold that was reached: of which rule, by which point, and from where."""

    rule: WatchedRule
    threshold: float
    point: Point
    direction: Literal["up", "down"]


class LevelIndex:
    """Thresholds to be reached from below and from above.

    Args:
        up: pairs of a threshold and its rule, to be reached from below.
        down: those to be reached from above.
    """

    def __init__(
        self, up: Iterable[tuple[float, WatchedRule]] = (), down: Iterable[tuple[float, WatchedRule]] = ()
    ) -> None:
        self._up, self._up_rules = _sorted(up)
        self._down, self._down_rules = _sorted(down)

    def __len__(self) -> int:
        return len(self._up) + len(self._down)

    def touches(self, low: float, high: float) -> bool:
        """Whether a path from `low` to `high`, or back, may cross any."""
        up, down = self._up, self._down
        return bool(
            (up and bisect_right(up, low) < bisect_right(up, high))
            or (down and bisect_left(down, low) < bisect_left(down, high))
        )

    def crossed(self, path: Sequence[Point]) -> list[Crossing]:
        """Return the thresholds that a path crosses, in the order of time: each rule once, if it admits an event.

        One is reached from below by a segment that begins below it and ends at it or above.
        """
        found: dict[WatchedRule, Crossing] = {}
        for begin, end in pairwise(path):
            if begin.value < end.value:
                levels, rules = self._up, self._up_rules
                for n in range(bisect_right(levels, begin.value), bisect_right(levels, end.value)):
                    if (rule := rules[n]) not in found and rule.admits(end.at):
                        found[rule] = Crossing(rule, levels[n], end, "up")
            elif begin.value > end.value:
                levels, rules = self._down, self._down_rules
                for n in reversed(range(bisect_left(levels, end.value), bisect_left(levels, begin.value))):
                    if (rule := rules[n]) not in found and rule.admits(end.at):
                        found[rule] = Crossing(rule, levels[n], end, "down")
        return list(found.values())


def _sorted(pairs: Iterable[tuple[float, WatchedRule]]) -> tuple[list[float], list[WatchedRule]]:
    ordered = sorted(pairs, key=lambda pair: pair[0])
    return [level for level, _ in ordered], [rule for _, rule in ordered]
