"""Server processes, as /proc lists them.

Whether a server runs on a folder is read from there (the program's name, and the folder among its arguments or as its
working directory), not from a pid file, which may be stale, torn or name a reused pid.
"""

import os
import pwd
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

POLL_SECONDS = 0.01

SYSTEM_USER = "pgserver"
"""The user that PostgreSQL runs as when MarketFlow runs as root."""

Steps = tuple[tuple[int, float], ...]
"""Signals, and the seconds that each is given."""


class ServerProcess:
    """A running server program: a child of ours, or one adopted by its pid.

    An adopted one is known by pid and time of birth, so that a reused pid is never signalled.
    """

    def __init__(self, pid: int, child: "subprocess.Popen[bytes] | None" = None, born: str | None = None) -> None:
        self.pid = pid
        self._child = child
        self.born = born or _born(pid)
        """When it began, in the kernel's ticks since the start of the machine; None when it has ended."""

    def alive(self) -> bool:
        """Return whether it runs; reaps a child that has ended."""
        if self._child is not None:
            return self._child.poll() is None
        return self.born is not None and _born(self.pid) == self.born

    def send(self, number: int) -> None:
        """Send a signal, if it is still there to get it."""
        if self.alive():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    @property
    def exit_code(self) -> int | None:
        """Of a child that has ended; None before, and for one that was adopted."""
        return self._child.poll() if self._child is not None else None

    def children(self) -> "list[ServerProcess]":
        """Its child processes."""
        return [ServerProcess(pid) for pid in _pids() if _parent(pid) == self.pid]

    def wake(self) -> None:
        """Continue it and its children: a stopped process acts on nothing but SIGKILL."""
        for process in (self, *self.children()):
            process.send(signal.SIGCONT)

    def wait(self, seconds: float) -> bool:
        """Wait for its end; return whether it came within `seconds`."""
        deadline = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _kill_group(self) -> None:
        """Kill what it has started in its process group, such as the shells of initdb and their children."""
        with suppress(ProcessLookupError, PermissionError):
            if self.alive() and os.getpgid(self.pid) == self.pid != os.getpgrp():
                os.killpg(self.pid, signal.SIGKILL)

    def end(self, steps: Steps) -> None:
        """Try signals, each with the seconds it is given, until one works; at last SIGKILL, for its children too."""
        self.wake()
        for number, seconds in steps:
            self.send(number)
            if self.wait(seconds):
                return
        family = (self, *self.children())
        self._kill_group()
        for process in family:
            process.send(signal.SIGKILL)
        for process in family:
            process.wait(1.0)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/N/stat from the state on; empty when there is no such process or only its zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else fields


def _parent(pid: int) -> int | None:
    return int(fields[1]) if (fields := _stat(pid)) else None


def _born(pid: int) -> str | None:
    return fields[19] if (fields := _stat(pid)) else None


def find_servers(program: str, folder: Path) -> list[ServerProcess]:
    """The processes that run a program, by its file's name, on a folder: ours, and as root those of its owner.

    Those of others are none of ours, whatever they call themselves: anybody can name a process, and give it arguments.
    """
    users = {os.geteuid()}
    if os.geteuid() == 0:  # PostgreSQL runs as another user then
        with suppress(OSError):
            users.add(folder.stat().st_uid)
        with suppress(KeyError):
            users.add(pwd.getpwnam(SYSTEM_USER).pw_uid)
    return [
        ServerProcess(pid) for pid in _pids() if _claims_to_run(pid, program, folder) and _runs(pid, program, users)
    ]


def claimed_by_others(program: str, folder: Path) -> bool:
    """Return whether a process of any user claims to run a program on a folder that this user may not enter."""
    try:
        os.listdir(folder)
    except PermissionError:
        return any(_claims_to_run(pid, program, folder) for pid in _pids())
    except OSError:
        pass
    return False


def _runs(pid: int, program: str, users: set[int]) -> bool:
    """Return whether one of these users runs that file, which a process cannot fake as it can its arguments."""
    try:
        user = os.stat(f"/proc/{pid}").st_uid
        file = os.path.basename(os.readlink(f"/proc/{pid}/exe")).removesuffix(" (deleted)")
    except OSError:
        return False  # ended meanwhile, or a stranger's
    return user in users and file == program


def _claims_to_run(pid: int, program: str, folder: Path) -> bool:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if os.path.basename(arguments[0]) != program.encode():
            return False
        if os.fsencode(folder) in arguments:
            return True
        return Path(f"/proc/{pid}/cwd").samefile(folder)  # finds it after the folder was moved
    except OSError:
        return False  # ended meanwhile, or a stranger's
