"""Ties the servers to this process: they end when it ends, in whatever way. Two independent mechanisms.

The kernel sends a server its stop signal when the thread that started it has ended, so all are started by one thread
that lives as long as the process. And a watcher process sees the end of a pipe that only this process holds open, and
ends the servers that still run.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

from loguru import logger

from marketflow.embedded.launch import NOBODY
from marketflow.embedded.server_process import ServerProcess, Steps
from marketflow.embedded.watcher import line_of, line_of_ended

T = TypeVar("T")

PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "TMPDIR")
"""Variables that a server inherits. Others may hold secrets, such as tokens."""

WATCHER_ENDS_SECONDS = 2.0

_ROOT = str(Path(__file__).parents[2])


def environment() -> dict[str, str]:
    """Return the environment of a server; in the C locale, since ours may not be installed."""
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ} | {"LC_ALL": "C", "TZ": "UTC"}


def python(module: str) -> list[str]:
    """Return the command that runs a module of this package in a bare Python: no site packages, no variables."""
    program = f"import sys; sys.path.insert(0, {_ROOT!r}); from marketflow.embedded.{module} import main; main()"
    return [sys.executable or "python3", "-I", "-S", "-c", program]


class Guardian:
    """The one thread that starts servers, and the watcher while there are any. Safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._pipe: IO[bytes]
        self._watched: dict[ServerProcess, bytes] = {}
        os.register_at_fork(after_in_child=self._forget)

    def spawn(
        self,
        command: Sequence[str],
        folder: Path,
        stop_signal: int,
        owner: tuple[int, int] | None,
        stdout: IO[bytes] | int,
        stderr: IO[bytes],
    ) -> "subprocess.Popen[bytes]":
        """Start a program that the kernel signals when this process ends; as another user and group if given.

        In a process group of its own, but in this session: Linux divides busy cores between sessions (autogroup). In a
        session of its own, Redis waited 5 ms for a core at each request, and up to 1 s, beside a flood; so 0.2 ms.
        """
        user, group = map(str, owner or (NOBODY, NOBODY))
        launch = [*python("launch"), str(os.getpid()), str(int(stop_signal)), user, group, *command]
        return self._in_thread(
            lambda: subprocess.Popen(
                launch,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                process_group=0,
                umask=0o077,
                env=environment(),
            )
        )

    def watch(self, process: ServerProcess, steps: Steps, socket_folder: Path | None) -> None:
        """Have the watcher end a server if this process is killed."""
        with self._lock:
            self._watched[process] = line_of(process, steps, socket_folder)
            self._send_to_watcher(self._watched[process])

    def release(self, process: ServerProcess) -> None:
        """Stop watching a server that has ended; the watcher ends with the last one."""
        with self._lock:
            if self._watched.pop(process, None) is None:
                return
            self._send_to_watcher(line_of_ended(process))
            if not self._watched:
                self._end_watcher()

    @property
    def watcher_pids(self) -> list[int]:
        """The process of the watcher, if there is one."""
        watcher = self._watcher
        return [] if watcher is None else [watcher.pid]

    def keep(self) -> None:
        """Restart the watcher if it was killed."""
        with self._lock:
            if self._watched and (self._watcher is None or self._watcher.poll() is not None):
                logger.warning("the watcher of the embedded servers was ended; starting another")
                self._send_to_watcher(b"")

    def _send_to_watcher(self, line: bytes) -> None:
        watcher = self._watcher
        if watcher is None or watcher.poll() is not None:
            self._end_watcher()
            self._watcher = self._start_watcher(b"".join(self._watched.values()))
            return
        with suppress(BrokenPipeError):  # killed just now; `keep` starts another
            self._pipe.write(line)

    def _start_watcher(self, lines: bytes) -> "subprocess.Popen[bytes]":
        """Start a watcher whose pipe already holds the servers, so that there is no moment in which it knows none."""
        reader, writer = os.pipe()
        self._pipe = open(writer, "wb", buffering=0)  # noqa: SIM115 - open as long as the watcher
        self._pipe.write(lines)  # some hundred bytes, of the 64 KiB that a pipe takes
        with open(reader, "rb") as stdin:
            # In / and with nothing open of ours: it may outlive this process.
            return self._in_thread(
                lambda: subprocess.Popen(
                    python("watcher"),
                    cwd="/",
                    stdin=stdin,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    env=environment(),
                )
            )

    def _end_watcher(self) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is None:
            return
        self._pipe.close()
        try:
            watcher.wait(WATCHER_ENDS_SECONDS)
        except subprocess.TimeoutExpired:  # frozen, say; no server is left to end
            watcher.kill()
            watcher.wait()

    def _in_thread(self, start: Callable[[], T]) -> T:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="starts-servers")
        return self._thread.submit(start).result()

    def _forget(self) -> None:
        """In a forked child: neither thread nor servers are its own, and the pipe must not stay open by it."""
        if self._watcher is not None:
            self._pipe.close()
            self._watcher.returncode = 0  # not a child of this one
        self._lock = threading.Lock()
        self._thread = self._watcher = None
        self._watched = {}


guardian = Guardian()
"""The one of this process."""
