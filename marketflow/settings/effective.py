"""The settings as they came out of all sources, each with the one that had the last word; secrets are masked."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from marketflow.settings import model
from marketflow.settings.model import Settings

DEFAULT = "default"

MASK = "***"


class Effective(NamedTuple):
    """One key: its value as JSON has it (None: not set; a secret is masked), and where that comes from."""

    key: str
    value: Any
    source: str
    masked: bool


def effective(settings: Settings, origins: Mapping[str, str]) -> list[Effective]:
    """All keys, in the order of settings.toml.

    Args:
        settings: what came out.
        origins: the source of each key that has one.
    """
    return [_entry(settings, key, origins.get(key, DEFAULT)) for key in model.KEYS]


def as_text(value: Any) -> str:
    """A value for a person."""
    match value:
        case None:
            return "not set"
        case "":
            return '""'
        case []:
            return "none"
        case [dict(), *_]:
            return "\n".join(f"{each['name']} at {each.get('address') or each['venue']}" for each in value)
        case list():
            return " ".join(value)
    return str(value)


def as_json(entries: Sequence[Effective]) -> str:
    """An object with value and source of each dotted key."""
    return json.dumps({key: {"value": value, "source": source} for key, value, source, _ in entries}, indent=2)


def as_toml(entries: Sequence[Effective]) -> str:
    """A file for --config that gives the same settings, but for secrets: those are comments, to be set by variables."""
    return "\n".join(_toml_lines(entries)) + "\n"


def _entry(settings: Settings, key: str, source: str) -> Effective:
    section, _, name = key.rpartition(".")
    value = getattr(getattr(settings, section) if section else settings, name)
    masked = bool(value) and model.is_secret(model.KEYS[key])
    return Effective(key, MASK if masked else _builtins(value), source, masked)


def _builtins(value: object) -> Any:
    return msgspec.to_builtins(list(value) if isinstance(value, tuple) else value, enc_hook=str)


def _toml_lines(entries: Sequence[Effective]) -> Iterator[str]:
    current = ""
    for key, value, source, masked in entries:
        section, _, name = key.rpartition(".")
        if section != current:
            current = section
            yield f"\n[{section}]"
        comment = ascii(source)[1:-1]
        if masked:
            variable = f"MARKETFLOW_{section}__{name}".upper()
            yield f"# {name}: a secret, not shown (from {comment}); set it by {variable}"
        elif value is None:
            yield f"# {name} is not set"
        else:
            yield f"{name} = {_toml(value)}  # {comment}"


def _toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            # JSON's escapes are TOML's, but for this one, which JSON leaves as it is.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list():
            return f"[{', '.join(map(_toml, value))}]"
        case dict():
            return f"{{ {', '.join(f'{name} = {_toml(each)}' for name, each in value.items())} }}"
    return repr(value)
