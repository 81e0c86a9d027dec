"""What `uvicorn marketflow.app:app` serves: the same application as `marketflow`."""

import sys
from typing import Any

from marketflow import logs
from marketflow.errors import SettingsError
from marketflow.runtime.processes import Everything
from marketflow.settings import load


def __getattr__(name: str) -> Any:
    """`app`, for uvicorn: made when asked for, so that nothing else that imports this module reads settings."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        settings = load()
    except SettingsError as error:
        sys.stderr.write(f"marketflow: {error}\n")
        raise SystemExit(2) from None
    logs.setup(settings.log.level, settings.log.format)
    return Everything(settings)
