"""The effective settings of a process, and their reload."""

import threading
from collections.abc import Callable

from loguru import logger

from marketflow.errors import SettingsError
from marketflow.settings import Settings
from marketflow.settings.reloading import Changes, changes_between, with_changes

ReadSettings = Callable[[], Settings]
"""Reads all sources; raises SettingsError where anything is wrong."""


class SettingsReload:
    """Reads the settings again and has the changes applied, one reload at a time.

    Args:
        settings: the effective ones.
        read: reads them again.
        apply: takes the changed ones.
    """

    def __init__(self, settings: Settings, read: ReadSettings, apply: Callable[[Settings], None]) -> None:
        self.settings = settings
        """The effective ones."""
        self._read = read
        self._apply = apply
        self._lock = threading.Lock()

    def check(self) -> None:
        """Read the settings, and change nothing.

        Raises:
            SettingsError: they are wrong.
        """
        self._read()

    def __call__(self) -> Changes:
        """Read and apply the settings; return what has changed. Blocks.

        Raises:
            SettingsError: they are wrong, and nothing has changed.
        """
        with self._lock:
            after = self._read()
            changes = changes_between(self.settings, after)
            settings = with_changes(self.settings, after)
            if settings != self.settings:
                self._apply(settings)
                self.settings = settings
        _log(changes)
        return changes

    def or_log(self) -> None:
        """Read and apply the settings, or log what is wrong with them."""
        try:
            self()
        except SettingsError as error:
            for line in str(error).splitlines():
                logger.error("settings not reloaded: {}", line)


def _log(changes: Changes) -> None:
    kinds = {"added": changes.added, "removed": changes.removed, "changed": changes.changed}
    names = {kind: " ".join((*of.exchanges, *of.symbols, *of.alerts)) for kind, of in kinds.items()}
    text = "; ".join(f"{kind} {each}" for kind, each in names.items() if each) or "nothing changed"
    logger.info("settings reloaded: {}", text)
    if changes.needs_restart:
        logger.warning("changed settings have no effect before a restart: {}", " ".join(changes.needs_restart))
