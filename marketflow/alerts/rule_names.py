"""Names in rules: matched with those that are configured, without regard to case."""

from collections.abc import Sequence
from typing import Any

import msgspec

from marketflow.alerts.alert_model import AlertRule, StaleRule
from marketflow.alerts.rule_parsing import InvalidRule
from marketflow.model import REFERENCE


class UnknownName(InvalidRule):
    """No configured exchange or symbol has this name; `what` says which of both."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} must be one of those configured")
        self.what = what


def known_names(rule: AlertRule, exchanges: Sequence[str], symbols: Sequence[str]) -> AlertRule:
    """Return a rule with the configured spelling of its names.

    Raises:
        UnknownName: one is not configured.
    """
    names: dict[str, Any] = {}
    if not isinstance(rule, StaleRule) and rule.symbol is not None:
        names["symbol"] = _known("symbol", rule.symbol, symbols)
    exchange = getattr(rule, "exchange", None)
    if exchange is not None:
        known = exchanges if rule_is_of_feeds(rule) else [*exchanges, REFERENCE]
        names["exchange"] = _known("exchange", exchange, known)
    found: AlertRule = msgspec.structs.replace(rule, **names) if names else rule
    return found


def rule_is_of_feeds(rule: AlertRule) -> bool:
    """Return whether a rule is about feeds, of which the reference price is none."""
    return rule.__struct_config__.tag in ("stale", "hole")


def _known(what: str, name: str, configured: Sequence[str]) -> str:
    for each in configured:
        if each.lower() == name.lower():
            return each
    raise UnknownName(what)
