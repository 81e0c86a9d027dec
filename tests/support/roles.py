"""Ingest and API processes on the same stores, and exchanges that send each of them the same ticks."""

import itertools
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from tests.support.application import Application, ScriptedExchange


class IngestProcess(Application):
    """A process that takes ticks or stands by; it has no port, so its log is what it says."""

    _log_began = 0
    """Size of the log in bytes at the last start; what follows is of the process that runs."""

    def start(self, wait: bool = True, timeout: float = 30.0) -> Self:
        """Start it and wait until it takes ticks or stands by.

        Raises:
            AssertionError: it did neither within `timeout` seconds.
        """
        self._log_began = self.log_path.stat().st_size if self.log_path.exists() else 0
        return super().start(wait, timeout)

    def ready(self) -> bool:
        assert self.process.poll() is None, f"the ingest process ended with {self.process.returncode}:\n{self.log}"
        return self.takes_ticks() or self.stands_by()

    def takes_ticks(self) -> bool:
        return b"takes ticks in" in self._logged()

    def stands_by(self) -> bool:
        return b"stands by: " in self._logged()

    def _logged(self) -> bytes:
        return self.log_path.read_bytes()[self._log_began :]


class Broadcasting(ScriptedExchange):
    """Sends each tick to everybody who is connected, as exchanges do; to nobody in particular."""

    def send_raw(self, data: bytes) -> None:
        for client in list(self.clients):
            try:
                client.sendall(data)
            except OSError:
                self.clients.remove(client)
                client.close()


class Roles:
    """Starts processes of either role, each in a folder of its own below `folder`; they end with the stack."""

    def __init__(self, stack: ExitStack, folder: Path, settings: dict[str, object]) -> None:
        self._stack = stack
        self._folder = folder
        self.settings = settings
        self._numbers = itertools.count(1)

    def ingest(self, program: tuple[str, ...] = ("-m", "marketflow"), **settings: object) -> IngestProcess:
        process = IngestProcess(self._own_folder(), self.settings | settings, ("--role", "ingest"), program)
        return self._stack.enter_context(process)

    def api(self, *arguments: str, **settings: object) -> Application:
        return self._stack.enter_context(
            Application(self._own_folder(), self.settings | settings, ("--role", "api", *arguments))
        )

    def both(self, program: tuple[str, ...] = ("-m", "marketflow"), **settings: object) -> Application:
        return self._stack.enter_context(Application(self._own_folder(), self.settings | settings, program=program))

    def _own_folder(self) -> Path:
        folder = self._folder / f"process{next(self._numbers)}"
        folder.mkdir(mode=0o711)
        return folder


def stop_all(*processes: Application) -> None:
    """End processes by SIGTERM, one after the other."""
    for process in processes:
        assert process.stop(signal.SIGTERM)[0] == 0
        assert "Traceback" not in process.log, process.log
