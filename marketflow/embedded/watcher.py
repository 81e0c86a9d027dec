"""Ends the servers of a process that was killed: a process of its own that waits for the end of a pipe.

The kernel's signal (see launch) reaches a server that acts on it. This one also wakes a server that is frozen, kills
one that does not end, and removes the folder of its socket. It needs nothing but the standard library.
"""

import os
import signal
import sys
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from marketflow.embedded.server_process import ServerProcess, Steps
from marketflow.embedded.socket_folder import remove_unless_held


class Watched(NamedTuple):
    """A server that runs."""

    process: ServerProcess
    steps: Steps
    socket_folder: Path | None

    def end(self) -> None:
        """End it in good order, or else by force."""
        self.process.end(self.steps)
        if self.socket_folder is not None:
            remove_unless_held(self.socket_folder)


def main() -> None:
    """Read from stdin which servers run, and end them when nobody can write to it any more."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with its owner
    watched: dict[int, Watched] = {}
    for line in sys.stdin.buffer:
        if not line.endswith(b"\n"):
            break  # the owner ended while it wrote
        sign, pid, *rest = os.fsdecode(line.rstrip(b"\n")).split("\t")
        if sign == "+":
            watched[int(pid)] = _watched(int(pid), *rest)
        else:
            watched.pop(int(pid), None)
    ends = [Thread(target=each.end) for each in watched.values()]
    for end in ends:
        end.start()
    for end in ends:
        end.join()


def line_of(process: ServerProcess, steps: Steps, socket_folder: Path | None) -> bytes:
    """What the owner writes of a server that has been started."""
    signals = ",".join(f"{number:d}:{seconds}" for number, seconds in steps)
    return _line("+", str(process.pid), process.born or "", signals, str(socket_folder or ""))


def line_of_ended(process: ServerProcess) -> bytes:
    """What the owner writes of a server that it has ended."""
    return _line("-", str(process.pid))


def _line(*fields: str) -> bytes:
    # A folder with such a character has a socket folder of its own that has none.
    return os.fsencode("\t".join(fields) + "\n")


def _watched(pid: int, born: str, signals: str, socket_folder: str) -> Watched:
    pairs = (pair.split(":") for pair in signals.split(","))
    steps = tuple((int(number), float(seconds)) for number, seconds in pairs)
    return Watched(ServerProcess(pid, born=born), steps, Path(socket_folder) if socket_folder else None)
