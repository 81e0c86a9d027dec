"""The effective settings, each with its source, as text, JSON and TOML. Secrets are masked."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from marketflow.alerts.alert_model import Webhook
from marketflow.settings import schema
from marketflow.settings.schema import Settings
from marketflow.settings.sources import variable

DEFAULT = "default"

MASK = "***"


class EffectiveValue(NamedTuple):
    """A key, its value as JSON represents it (None: not set; secrets masked), and its source."""

    key: str
    value: Any
    source: str
    masked: bool


def effective_values(settings: Settings, origins: Mapping[str, str]) -> list[EffectiveValue]:
    """Return all keys, in the order of settings.toml.

    Args:
        settings: the loaded settings.
        origins: the source of each key that is set.
    """
    return [_entry(settings, key, origins.get(key, DEFAULT)) for key in schema.KEYS]


def as_text(value: Any) -> str:
    """Return a value for a person."""
    match value:
        case None:
            return "not set"
        case "":
            return '""'
        case []:
            return "none"
        case [{"kind": _}, *_]:
            return "\n".join(" ".join(f"{name}={each[name]}" for name in each) for each in value)
        case [dict(), *_]:
            return "\n".join(f"{each['name']} at {each.get('address') or each['venue']}" for each in value)
        case list():
            return " ".join(value)
    return str(value)


def as_json(entries: Sequence[EffectiveValue]) -> str:
    """Return a JSON object with value and source of each dotted key."""
    return json.dumps({key: {"value": value, "source": source} for key, value, source, _ in entries}, indent=2)


def as_toml(entries: Sequence[EffectiveValue]) -> str:
    """Return a file for --config with the same settings; secrets are comments, to be set by variables."""
    return "\n".join(_toml_lines(entries)) + "\n"


def _entry(settings: Settings, key: str, source: str) -> EffectiveValue:
    section, _, name = key.rpartition(".")
    value = getattr(getattr(settings, section) if section else settings, name)
    masked = bool(value) and schema.is_secret(schema.KEYS[key])
    shown: Any = MASK if masked else _builtins(value)
    return EffectiveValue(key, [masked_rule(each) for each in shown] if key == "alerts" else shown, source, masked)


def masked_rule(rule: dict[str, Any]) -> dict[str, Any]:
    """Return an alert rule, of its webhook the server alone: a path may be a secret as well."""
    if not rule.get("webhook"):
        return rule
    return rule | {"webhook": f"{Webhook(**rule['webhook']).receiver}/{MASK}"}


def _builtins(value: object) -> Any:
    return msgspec.to_builtins(list(value) if isinstance(value, tuple) else value, enc_hook=str)


def _toml_lines(entries: Sequence[EffectiveValue]) -> Iterator[str]:
    current = ""
    for key, value, source, masked in entries:
        section, _, name = key.rpartition(".")
        if section != current:
            current = section
            yield f"\n[{section}]"
        comment = ascii(source)[1:-1]
        if masked:
            yield f"# {name}: a secret, not shown (from {comment}); set it by {variable(key)}"
        elif value is None:
            yield f"# {name} is not set"
        elif key == "alerts":
            shown = [
                {name: each for name, each in rule.items() if each != MASK and name != "webhook"} for rule in value
            ]
            yield f"{name} = {_toml(shown)}  # {comment}; webhooks and their secrets are not shown"
        else:
            yield f"{name} = {_toml(value)}  # {comment}"


def _toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            # JSON and TOML have the same escapes, except for DEL, which JSON does not escape.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list():
            return f"[{', '.join(map(_toml, value))}]"
        case dict():
            return f"{{ {', '.join(f'{name} = {_toml(each)}' for name, each in value.items())} }}"
    return repr(value)
