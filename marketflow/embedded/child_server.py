"""A server program as a child process: started, awaited and stopped.

- One server per folder, ever. One whose MarketFlow was killed is about to end (see guardian), and a start waits for its
  end: two redis-servers on one append-only file ruin it.
- Servers run in process groups of their own, so Ctrl+C in a terminal reaches MarketFlow alone, which stops them last.
- No TCP: Unix sockets in folders that only their owner may enter. Every wait is bounded.
"""

import os
import stat
import threading
import time
from abc import ABC, abstractmethod
from enum import Enum, auto
from pathlib import Path
from typing import ClassVar, Self

from loguru import logger

from marketflow.embedded.guardian import guardian
from marketflow.embedded.server_process import POLL_SECONDS, ServerProcess, Steps, find_servers
from marketflow.embedded.socket_folder import SocketFolder
from marketflow.errors import StartError

START_SECONDS = 10.0  # until a new server answers at all
BUSY_SECONDS = 60.0  # while it says that it is loading or recovering
LOG_BYTES = 1 << 20


class Answer(Enum):
    """Answer of a server to a readiness probe."""

    READY = auto()
    BUSY = auto()  # loading or recovering: given BUSY_SECONDS
    SILENT = auto()


class ChildServer(ABC):
    """A server program with a folder of its own; lives as long as the application.

    `start` may be called again when `running` says that the server has died; `stop` at any time.
    """

    title: ClassVar[str]
    program: ClassVar[str]
    stop_steps: ClassVar[Steps]
    transient_error: ClassVar[str | None] = None  # an exit with this in the log is retried

    def __init__(self, folder: Path, data: Path, socket_name: str) -> None:
        self.folder = folder.resolve()
        self.data = self.folder / data
        self.sockets = SocketFolder(self.folder, socket_name)
        self.owner: tuple[int, int] | None = None  # the user and group to run as, when not our own
        self._log_start = 0
        self._steps = self.stop_steps
        self._process: ServerProcess | None = None
        self._one_at_a_time = threading.RLock()
        self._stopping = threading.Event()

    @abstractmethod
    def prepare(self) -> None:
        """Find the programs and make the folder."""

    def tidy(self) -> None:  # noqa: B027 - optional
        """Prepare the folder for a start, once no server runs on it."""

    @abstractmethod
    def command(self) -> list[str]:
        """The command line; it holds the data folder as an argument, by which the process is found again."""

    @abstractmethod
    def probe(self, process: ServerProcess) -> Answer:
        """Ask the server for its state, within two seconds, and verify that this process answers."""

    @property
    def process(self) -> ServerProcess | None:
        """The server's process, None when it has not been started."""
        return self._process

    @property
    def running(self) -> bool:
        """Whether the server's process is alive."""
        return self._process is not None and self._process.alive()

    @property
    def log(self) -> Path:
        """The log of the server; truncated at a start that finds more than LOG_BYTES.

        Beside the server's folder: inside it a server that runs as another user could replace it by a link.
        """
        return self.folder.with_name(f"{self.folder.name}.log")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server, also after a `stop`, and wait until it answers.

        Raises:
            StartError: it could not be started; with the last lines of its log.
        """
        with self._one_at_a_time:
            self._stopping.clear()
            self.revive()

    def revive(self) -> None:
        """Start the server unless it runs or has been stopped: a stop is final.

        Raises:
            StartError: as above.
        """
        with self._one_at_a_time:
            if self.running or self._stopping.is_set():
                return
            try:
                self._release()
                self.prepare()
                self._end_leftovers()
                self.sockets.create(self.owner)
                self.tidy()
                self._launch()
            except OSError as error:
                self.stop()
                raise StartError(f"the embedded {self.title} cannot be started in {self.folder}: {error}") from error
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """Stop the server, by force if need be; returns within a few seconds and leaves no process behind.

        A start that is under way in another thread is aborted and raises StartError there.
        """
        self._stopping.set()
        with self._one_at_a_time:
            if self._process is not None:
                self._process.end(self._steps)
                self._release()
            self.sockets.remove()

    def _end_leftovers(self) -> None:
        """End a server whose MarketFlow was killed; it may already be stopping."""
        for process in find_servers(self.program, self.data):
            logger.info("{} was still running as process {}; ending it", self.title, process.pid)
            process.end(self.stop_steps)

    def _release(self) -> None:
        if self._process is not None:
            guardian.release(self._process)
            self._process = None

    def _launch(self) -> None:
        """Start the server; retry for START_SECONDS while remains of a killed one are in the way."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            process = self.spawn(self.command(), self.data)
            if self._becomes_ready(process, START_SECONDS):
                return
            process.end(self.stop_steps)
            tail = self.log_tail()
            transient = self.transient_error is not None and self.transient_error in tail
            if not transient or time.monotonic() > deadline:
                raise StartError(f"the embedded {self.title} did not start; {self.log} ends:\n{tail}")
            time.sleep(POLL_SECONDS * 10)

    def _becomes_ready(self, process: ServerProcess, limit_seconds: float) -> bool:
        began = time.monotonic()
        while process.alive():
            self.abort_if_stopping()
            answer = self.probe(process)
            if answer is Answer.READY:
                return True
            if time.monotonic() - began > (BUSY_SECONDS if answer is Answer.BUSY else limit_seconds):
                return False
            time.sleep(POLL_SECONDS)
        return False

    def abort_if_stopping(self) -> None:
        """Abort a start if a stop was requested; called in every wait of a start.

        Raises:
            StartError: a stop was requested.
        """
        if self._stopping.is_set():
            raise StartError(f"the embedded {self.title} was stopped while it was starting")

    def spawn(
        self, command: list[str], folder: Path, stdout: int | None = None, steps: Steps | None = None
    ) -> ServerProcess:
        """Start a program in a folder as the process that `stop` ends, with `steps` or else `stop_steps`.

        Its output goes to the log, or to `stdout` if given.
        """
        self._steps = steps or self.stop_steps
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        with os.fdopen(os.open(self.log, flags, 0o600), "ab") as log:
            if not stat.S_ISREG(os.fstat(log.fileno()).st_mode):
                raise StartError(f"{self.log} is not a regular file; remove it")
            if log.tell() > LOG_BYTES:
                log.truncate(0)
            self._log_start = log.seek(0, os.SEEK_END)
            number = self._steps[0][0]
            child = guardian.spawn(command, folder, number, self.owner, log if stdout is None else stdout, log)
        self._release()
        self._process = ServerProcess(child.pid, child)
        guardian.watch(self._process, self._steps, self.sockets.temporary)
        return self._process

    def log_tail(self) -> str:
        """Return the last lines that the latest process has logged."""
        with self.log.open("rb") as log:
            log.seek(max(self._log_start, self.log.stat().st_size - 2000))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-6:])
