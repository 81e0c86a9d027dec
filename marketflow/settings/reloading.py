"""What a reload of the settings changes: exchanges, symbols and alert rules; all else needs a restart."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from marketflow.alerts.alert_model import AlertRule, configured_id
from marketflow.settings import schema
from marketflow.settings.schema import Settings

RELOADABLE = ("exchanges", "symbols", "alerts")
"""Keys that are changed without a restart."""


class Names(msgspec.Struct, frozen=True):
    """Names of exchanges, symbols and alert rules."""

    exchanges: Annotated[tuple[str, ...], Meta(description="Names of exchanges.", examples=[["exchange4"]])]
    symbols: Annotated[tuple[str, ...], Meta(description="Symbols.", examples=[["XRPUSDT"]])]
    alerts: Annotated[
        tuple[str, ...],
        Meta(description="Names of alert rules, ids of those without one of their own.", examples=[["BTC crash"]]),
    ]


class Changes(msgspec.Struct, frozen=True):
    """What a reload has changed. An exchange is changed if its address, venue or symbols are others."""

    added: Names
    removed: Names
    changed: Names
    unchanged: Names
    needs_restart: Annotated[
        tuple[str, ...],
        Meta(description="Keys that differ and have no effect before a restart.", examples=[["http.port"]]),
    ]

    def with_restart(self, keys: Sequence[str]) -> "Changes":
        """Return the same with further keys that need a restart."""
        return msgspec.structs.replace(self, needs_restart=tuple(sorted({*self.needs_restart, *keys})))


def changes_between(before: Settings, after: Settings) -> Changes:
    """Return what differs.

    Args:
        before: the effective settings.
        after: what was read.
    """
    exchanges = _by_kind(_exchanges(before), _exchanges(after))
    symbols = _by_kind(dict.fromkeys(before.symbols), dict.fromkeys(after.symbols))
    alerts = _by_kind(_alerts(before), _alerts(after))
    kinds = zip(exchanges, symbols, alerts, strict=True)
    added, removed, changed, unchanged = (Names(*names) for names in kinds)
    differing = [key for key in schema.KEYS if key not in RELOADABLE and _value(before, key) != _value(after, key)]
    return Changes(added, removed, changed, unchanged, tuple(sorted(differing)))


def with_changes(before: Settings, after: Settings) -> Settings:
    """Return the settings of before with what a reload takes from those of afterwards."""
    return msgspec.structs.replace(before, **{key: getattr(after, key) for key in RELOADABLE})


def _exchanges(settings: Settings) -> dict[str, Any]:
    return {each.name: (each.without_symbols(), settings.symbols_of(each)) for each in settings.exchanges}


def _alerts(settings: Settings) -> dict[str, AlertRule]:
    names = Counter(rule.name for rule in settings.alerts)
    return {rule.name if rule.name and names[rule.name] == 1 else configured_id(rule): rule for rule in settings.alerts}


def _by_kind(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The names that were added, removed, changed and neither, each in configured order."""
    both = [name for name in after if name in before]
    return [
        tuple(name for name in after if name not in before),
        tuple(name for name in before if name not in after),
        tuple(name for name in both if before[name] != after[name]),
        tuple(name for name in both if before[name] == after[name]),
    ]


def _value(settings: Settings, key: str) -> Any:
    section, _, name = key.rpartition(".")
    return getattr(getattr(settings, section) if section else settings, name)
