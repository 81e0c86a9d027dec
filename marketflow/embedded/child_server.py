"""A server program as a child: found or started, waited for, and stopped.

- One server per folder, ever. One whose MarketFlow was killed is about to end (see guardian), and its end is waited for
  before another is started: two redis-servers on one append-only file ruin it.
- Servers run in sessions of their own, so Ctrl+C in a terminal reaches MarketFlow alone, which stops them last.
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
    """What a server says when asked how it is."""

    READY = auto()
    BUSY = auto()  # loading or recovering: worth waiting longer for
    SILENT = auto()


class ChildServer(ABC):
    """A server program with a folder of its own; lives as long as the application.

    `start` may be called again when `running` says that the server has died; `stop` at any time.
    """

    title: ClassVar[str]
    program: ClassVar[str]
    stop_steps: ClassVar[Steps]
    passing_trouble: ClassVar[str | None] = None  # an exit with this in the log is worth another try

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

    def tidy(self) -> None:  # noqa: B027 - most have nothing to do
        """What else is to be done before a start, once no server runs on the folder."""

    @abstractmethod
    def command(self) -> list[str]:
        """The command line; it holds the data folder as an argument, by which the process is found again."""

    @abstractmethod
    def probe(self, process: ServerProcess) -> Answer:
        """Ask the server, for a second or two at most, and make sure that it is this process that answers."""

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
        """What the server has printed; begun anew at a start that finds more than LOG_BYTES.

        Beside the server's folder: in there its user, where that is not ours, could put a link in the log's place.
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
        """The same, unless it runs already or has been stopped: a stop that comes first is final.

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
        """End the server in good order, or else by force; returns within a few seconds and leaves no process behind.

        A start that is under way in another thread is cut short, and raises StartError there.
        """
        self._stopping.set()
        with self._one_at_a_time:
            if self._process is not None:
                self._process.end(self._steps)
                self._release()
            self.sockets.remove()

    def _end_leftovers(self) -> None:
        """Wait for the end of a server whose MarketFlow was killed; it has been asked to end, or is now."""
        for process in find_servers(self.program, self.data):
            logger.info("{} was still running as process {}; ending it", self.title, process.pid)
            process.end(self.stop_steps)

    def _release(self) -> None:
        if self._process is not None:
            guardian.release(self._process)
            self._process = None

    def _launch(self) -> None:
        """Start the server; again, for START_SECONDS, while the remains of a killed one are in the way."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            process = self.spawn(self.command(), self.data)
            if self._becomes_ready(process, START_SECONDS):
                return
            process.end(self.stop_steps)
            tail = self.log_tail()
            passing = self.passing_trouble is not None and self.passing_trouble in tail
            if not passing or time.monotonic() > deadline:
                raise StartError(f"the embedded {self.title} did not start; {self.log} ends:\n{tail}")
            time.sleep(POLL_SECONDS * 10)

    def _becomes_ready(self, process: ServerProcess, patience_seconds: float) -> bool:
        began = time.monotonic()
        while process.alive():
            self.go_on()
            answer = self.probe(process)
            if answer is Answer.READY:
                return True
            if time.monotonic() - began > (BUSY_SECONDS if answer is Answer.BUSY else patience_seconds):
                return False
            time.sleep(POLL_SECONDS)
        return False

    def go_on(self) -> None:
        """Called wherever a start waits.

        Raises:
            StartError: it has been told to stop.
        """
        if self._stopping.is_set():
            raise StartError(f"the embedded {self.title} was stopped while it was starting")

    def spawn(
        self, command: list[str], folder: Path, stdout: int | None = None, steps: Steps | None = None
    ) -> ServerProcess:
        """Start a program in a folder as the process that `stop` ends; it prints to the log, or to a `stdout` given.

        It is ended by `stop_steps` unless others are given.
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
        """The last lines that the latest process has printed."""
        with self.log.open("rb") as log:
            log.seek(max(self._log_start, self.log.stat().st_size - 2000))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-6:])
