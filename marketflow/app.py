"""The ASGI application for `uvicorn marketflow.app:app`: the same as `marketflow` serves."""

import sys
from functools import partial
from typing import Any

from marketflow import logs
from marketflow.errors import SettingsError
from marketflow.runtime.processes import BothRoles
from marketflow.settings import load, own_settings_file


def __getattr__(name: str) -> Any:
    """Build `app` at its first use: importing this module reads no settings."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    read = partial(load, own_settings_file())
    try:
        settings = read()
    except SettingsError as error:
        sys.stderr.write(f"marketflow: {error}\n")
        raise SystemExit(2) from None
    logs.setup(settings.log.level, settings.log.format)
    return BothRoles(settings, read)
