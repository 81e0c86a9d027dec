"""Settings: what can be set, its default and its range, and where a value comes from.

A value takes this way: `sources` finds it in files and variables, `checks` holds it to the rule that `model` has for
its key, and the structs of `model` are all that others see of it.
"""

from marketflow.settings.checks import convert, load, load_with_origins
from marketflow.settings.model import (
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
]
