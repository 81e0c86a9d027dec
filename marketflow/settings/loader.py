"""Loads the settings: merges the sources, checks every key, and reports all problems at once.

A message names the key, the value, what is allowed and the source, and shows nothing that is or looks like a secret.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from marketflow.alerts.alert_model import AlertRule
from marketflow.alerts.rule_parsing import InvalidRule, known_names
from marketflow.errors import SettingsError
from marketflow.settings import schema
from marketflow.settings.schema import Settings
from marketflow.settings.sources import parse_text, read_sources, variable
from marketflow.settings.value_checks import RuleViolation, check_value


def load(config: Path | None = None, overrides: Mapping[str, object] | None = None) -> Settings:
    """Read all sources and check every key.

    `config` is a TOML, YAML or JSON file that is read instead of settings.toml. `overrides` maps dotted keys to values,
    such as {"http.port": 0}, and overrides all other sources.

    Raises:
        SettingsError: a file cannot be read, a key is unknown or a value is wrong; one line per problem.
    """
    return load_with_origins(config, overrides)[0]


def load_with_origins(
    config: Path | None = None, overrides: Mapping[str, object] | None = None
) -> tuple[Settings, dict[str, str]]:
    """Load the settings, and the source of each dotted key that is set: a file, a variable, "" for an override."""
    values: dict[str, Any] = {section: {} for section in schema.SECTIONS}
    origins: dict[str, str] = {}
    problems: list[str] = []
    for key, (value, origin) in read_sources(config, overrides or {}).items():
        source = f" (from {origin})" if origin else ""
        if key in schema.SECTIONS:
            problems.append(f"{key}: must be a table of {', '.join(schema.SECTIONS[key].__struct_fields__)}{source}")
        elif key not in schema.KEYS:
            problems.append(_unknown(key, origin))
        else:
            section, _, name = key.rpartition(".")
            origins[key] = origin
            try:
                (values[section] if section else values)[name] = check_value(key, value)
            except RuleViolation as wrong:
                problems.append(f"{_problem(key, value, wrong)}{source}")
    if problems:
        raise SettingsError("\n".join(problems))
    settings = msgspec.convert(values, Settings)
    _check_together(settings)
    return msgspec.structs.replace(settings, alerts=_alerts_of(settings)), origins


def _alerts_of(settings: Settings) -> tuple[AlertRule, ...]:
    """Return the alert rules with the configured spelling of exchanges and symbols.

    Raises:
        SettingsError: one names what is not configured.
    """
    exchanges, found = [exchange.name for exchange in settings.exchanges], []
    for number, rule in enumerate(settings.alerts):
        try:
            found.append(known_names(rule, exchanges, settings.symbols))
        except InvalidRule as error:
            raise SettingsError(f"alerts[{number}]: {error}") from None
    return tuple(found)


def _check_together(settings: Settings) -> None:
    """Check keys that depend on each other.

    Raises:
        SettingsError: keys contradict each other.
    """
    minutes, days = settings.archive.minutes_days, settings.archive.days_days
    if days is not None and (minutes is None or minutes > days):
        raise SettingsError(
            f'archive.keep_days = "{settings.archive.keep_days}": must be at least archive.keep_minutes'
            f' ("{settings.archive.keep_minutes}"), and "" if that is ""'
        )
    for number, exchange in enumerate(settings.exchanges):
        if others := [symbol for symbol in exchange.symbols if symbol not in settings.symbols]:
            raise SettingsError(f"exchanges[{number}].symbols = {others}: must be among symbols")
    files = [name for name in ("tls_ca", "tls_cert", "tls_key") if getattr(settings.redis, name)]
    if files and not settings.redis.tls:
        raise SettingsError(f"redis.{files[0]}: has no effect without redis.tls = true")
    if bool(settings.redis.tls_cert) != bool(settings.redis.tls_key):
        raise SettingsError("redis.tls_cert and redis.tls_key: must be given together")
    if settings.redis.tls and settings.redis.host.startswith("/"):
        raise SettingsError("redis.tls = true: is not possible with the path of a socket as redis.host")
    if settings.redis.nodes and settings.redis.host:
        raise SettingsError("redis.host and redis.nodes: only one of them, nodes is for a Redis Cluster")
    if settings.redis.nodes and settings.redis.db:
        raise SettingsError(f"redis.db = {settings.redis.db}: must be 0 with redis.nodes, as a cluster has no other")
    if settings.redis.bucket_count > 1 and not settings.redis.nodes:
        raise SettingsError(f"redis.buckets = {settings.redis.buckets}: must be 1 without redis.nodes")


def convert(key: str, text: str) -> Any:
    """Return the value of one key from the text of a command line option, checked like a variable.

    The name of an exchange has the key `exchange.name`.

    Raises:
        SettingsError: `99999: must be a whole number from 0 to 65535`.
    """
    value = parse_text(key, text)
    try:
        return check_value(key, value)
    except RuleViolation as wrong:
        raise SettingsError(_problem(key, value, wrong).removeprefix(key).removeprefix(" = ")) from None


def _problem(key: str, value: object, wrong: RuleViolation) -> str:
    """Return a problem as one line: `http.port = 99999: must be ...`, `exchanges[0].name = "": must be ...`."""
    return f"{key}{wrong.place} = {_shown(key, wrong.part if wrong.place else value)}: {wrong}"


def _unknown(key: str, origin: str) -> str:
    """Return the problem of an unknown key: of a variable that sets this key alone, in the names of variables."""
    if origin.upper() == variable(key):
        return f"{origin}: unknown variable, did you mean {variable(_nearest(key))}?"
    return f"{key}: unknown key, did you mean {_nearest(key)}?" + (f" (from {origin})" if origin else "")


def _nearest(key: str) -> str:
    """Return the known key that is most similar to an unknown one, or differs only in `.` and `_`."""
    known = [*schema.KEYS, *schema.SECTIONS]
    flat = key.replace(".", "_")
    if same := [name for name in known if name.replace(".", "_") == flat]:
        return same[0]
    if by_ending := [name for name in known if name.endswith(f".{key}")]:
        return by_ending[0]
    import difflib  # no start without a mistake needs it

    return difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]


def _shown(key: str, value: object) -> str:
    """Return a value for a message: short, on one line, without secrets and what looks like one."""
    if schema.is_secret(schema.KINDS[key]):
        return "***"
    text = json.dumps(value) if isinstance(value, str) else ascii(value)
    # A URL in the wrong place may hold a password.
    text = re.sub(r'(://|")[^"]*@', r"\1***@", text)
    text = re.sub(r'\?[^"]*', "?***", text)
    return text if len(text) <= 200 else f"{text[:200]}..."
