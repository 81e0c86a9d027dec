"""Settings: keys with defaults and rules, and the sources of their values.

`schema` has the keys, as structs. `sources` reads files and variables, `value_checks` checks a value by the rule of its
key, and `loader` merges the sources into the structs. `effective_settings` prints the result.
"""

from marketflow.settings.loader import convert, load, load_with_origins
from marketflow.settings.schema import (
    VENUES,
    ExchangeSettings,
    FlowSettings,
    GeneratorSettings,
    HttpSettings,
    LogSettings,
    PostgresSettings,
    RedisSettings,
    Settings,
)
from marketflow.settings.sources import own_settings_file

__all__ = [
    "VENUES",
    "ExchangeSettings",
    "FlowSettings",
    "GeneratorSettings",
    "HttpSettings",
    "LogSettings",
    "PostgresSettings",
    "RedisSettings",
    "Settings",
    "convert",
    "load",
    "load_with_origins",
    "own_settings_file",
]
