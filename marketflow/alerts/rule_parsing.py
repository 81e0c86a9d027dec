"""Alert rules from JSON and from settings; errors say in words what is allowed, and quote no value."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import msgspec

from marketflow.alerts.alert_model import AlertKind, AlertRule, Direction, Period, StaleRule
from marketflow.model import REFERENCE

_NAME = "the name of a configured one, of at most 32 characters"
_ALLOWED = {
    "kind": f"one of {', '.join(get_args(AlertKind))}",
    "symbol": _NAME,
    "exchange": _NAME,
    "level": "a number above 0 and up to 1e12",
    "percent": "a number above 0 and up to 1e6",
    "basis_points": "a number above 0 and up to 1e6",
    "period": f"one of {', '.join(get_args(Period))}",
    "direction": f"one of {', '.join(get_args(Direction))}",
    "once": "true or false",
    "cooldown": "a whole number with s, m, h or d, such as 0s, 30s or 24h",
    "name": "a text of at most 100 characters without control characters",
    "webhook": "an object with url and secret",
    "webhook.url": "http:// or https:// with a host name or an IPv4 address, and with a port from 1 to 65535 if any, "
    "without user and password, at most 2000 characters",
    "webhook.secret": "a text of 16 to 200 printable ASCII characters without blanks",
}
"""What is allowed, by the path of the key within a rule."""

_PLACE = re.compile(r" - at `\$\.?(.*)`$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)


class InvalidRule(Exception):
    """A rule that is not valid; the text says what is allowed, and quotes no value."""


class UnknownName(InvalidRule):
    """No configured exchange or symbol has this name; `what` is "exchange" or "symbol"."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} must be one of those configured")
        self.what = what


def decode_rule(body: bytes) -> AlertRule:
    """Return the rule of a JSON body.

    Raises:
        InvalidRule: it is not valid.
    """
    try:
        return _checked(msgspec.json.decode(body, type=AlertRule))
    except msgspec.ValidationError as error:
        raise InvalidRule(_in_words(str(error))) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRule("it is empty" if not body.strip() else _without_json(error)) from None


def convert_rule(fields: Mapping[str, object]) -> AlertRule:
    """Return the rule of a table in the settings.

    Raises:
        InvalidRule: it is not valid.
    """
    try:
        return _checked(msgspec.convert(fields, AlertRule))
    except msgspec.ValidationError as error:
        raise InvalidRule(_in_words(str(error))) from None


def _checked(rule: AlertRule) -> AlertRule:
    """Return the rule.

    Raises:
        InvalidRule: a text ends with a line feed.
    """
    texts = [getattr(rule, name) for name in rule.__struct_fields__]
    texts += [] if rule.webhook is None else [rule.webhook.url, rule.webhook.secret]
    if any(isinstance(text, str) and text.endswith("\n") for text in texts):  # `$` in their patterns accepts it
        raise InvalidRule("no text of a rule ends with a line feed")
    return rule


def _in_words(error: str) -> str:
    """Return what is allowed at the place of a msgspec error, whose own text has patterns and names of classes."""
    at = _PLACE.search(error)
    place = at[1] if at else ""
    what = error[: at.start()] if at else error
    if missing := _MISSING.fullmatch(what):
        path = f"{place}.{missing[1]}".lstrip(".")
        return f"`{path}` is missing, which must be {_ALLOWED[path]}"
    if unknown := _UNKNOWN.fullmatch(what):
        return _unknown_key(f"{place}.".lstrip("."), unknown[1])
    if place in _ALLOWED:
        return f"`{place}` must be {_ALLOWED[place]}"
    return "a rule is an object"


def _unknown_key(prefix: str, name: str) -> str:
    import difflib  # only an invalid rule needs it

    known = {path.removeprefix(prefix) for path in _ALLOWED if path.startswith(prefix)}
    meant = difflib.get_close_matches(name.lower()[:40], {each for each in known if "." not in each} - {name}, n=1)
    hint = f"; did you mean `{prefix}{meant[0]}`" if meant else ""
    shown = ascii(name[:40])[1:-1]
    return f"a rule of this kind has no key `{prefix}{shown}`{hint}"


def _without_json(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    return str(error).replace("Input data was truncated", "it is incomplete JSON")


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
