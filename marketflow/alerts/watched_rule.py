"""A rule as it is evaluated: with what it has done, which decides on its next event."""

from marketflow.alerts.alert_model import RaisedAlert, RuleState, StoredRule

SKEW_MS = 60_000
"""An event further before the last one than this is from after the clock was set back, and no repetition."""


class WatchedRule:
    """A rule and its state; for one thread at a time. Compared by identity.

    Args:
        stored: the rule as it is stored.
    """

    __slots__ = ("cooldown_ms", "id", "origin", "rule", "state")

    def __init__(self, stored: StoredRule) -> None:
        self.id, self.origin, self.rule, self.state = stored
        self.cooldown_ms = self.rule.cooldown_ms

    @property
    def stored(self) -> StoredRule:
        """The rule as it is stored."""
        return StoredRule(self.id, self.origin, self.rule, self.state)

    def admits(self, at: int) -> bool:
        """Whether an event at this time (Unix ms) is one: the rule is not done, and does not cool down."""
        last = self.state.last_event_at
        return not self.state.done and (last is None or not last - SKEW_MS <= at < last + self.cooldown_ms)

    def note(self, raised: RaisedAlert) -> None:
        """Note an event of this rule."""
        self.state = RuleState(raised.at, raised.once)
