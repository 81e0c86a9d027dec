"""A rule as it is evaluated: with what it has done, which decides on its next event."""

import sys

from marketflow.alerts.alert_model import RaisedAlert, RuleState, StoredRule

SKEW_MS = 60_000
"""An event further before the last one than this is from after the clock was set back, and no repetition."""


class WatchedRule:
    """A rule and its state; for one thread at a time. Compared by identity.

    Args:
        stored: the rule as it is stored.
    """

    __slots__ = ("_made_at", "_quiet_from", "_quiet_until", "_state", "cooldown_ms", "id", "origin", "rule")

    def __init__(self, stored: StoredRule) -> None:
        self.id, self.origin, self.rule, state, self._made_at = stored
        self.cooldown_ms = self.rule.cooldown_ms
        self.state = state

    @property
    def state(self) -> RuleState:
        """What the rule has done."""
        return self._state

    @state.setter
    def state(self, state: RuleState) -> None:
        self._state = state
        last = state.last_event_at
        # Compared for each crossing: with much movement within their cooldown most of them are no events.
        self._quiet_from = 0 if state.done or last is None else last - SKEW_MS
        self._quiet_until = sys.maxsize if state.done else self._made_at if last is None else last + self.cooldown_ms

    @property
    def stored(self) -> StoredRule:
        """The rule as it is stored."""
        return StoredRule(self.id, self.origin, self.rule, self.state, self._made_at)

    def know(self, state: RuleState, made_at: int) -> None:
        """Take what it has done, and when it was made (Unix ms): what was before is no event."""
        self._made_at = made_at
        self.state = state

    def admits(self, at: int) -> bool:
        """Whether an event at this time (Unix ms) is one: the rule is not done, and does not cool down."""
        return not self._quiet_from <= at < self._quiet_until

    def note(self, raised: RaisedAlert) -> None:
        """Note an event of this rule."""
        self.state = RuleState(raised.at, raised.once)
