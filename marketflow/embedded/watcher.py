"""Watcher process: ends the servers of an owner that was killed, at the end of a pipe.

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
    """A running server."""

    process: ServerProcess
    steps: Steps
    socket_folder: Path | None

    def end(self) -> None:
        """Stop it, by force if need be."""
        self.process.end(self.steps)
        if self.socket_folder is not None:
            remove_unless_held(self.socket_folder)


def main() -> None:
    """Read the running servers from stdin, and end them when its last writer has gone."""
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
    """Return the line that reports a started server."""
    signals = ",".join(f"{number:d}:{seconds}" for number, seconds in steps)
    return _line("+", str(process.pid), process.born or "", signals, str(socket_folder or ""))


def line_of_ended(process: ServerProcess) -> bytes:
    """Return the line that reports an ended server."""
    return _line("-", str(process.pid))


def _line(*fields: str) -> bytes:
    # A folder with such a character has a socket folder of its own that has none.
    return os.fsencode("\t".join(fields) + "\n")


def _watched(pid: int, born: str, signals: str, socket_folder: str) -> Watched:
    pairs = (pair.split(":") for pair in signals.split(","))
    steps = tuple((int(number), float(seconds)) for number, seconds in pairs)
    return Watched(ServerProcess(pid, born=born), steps, Path(socket_folder) if socket_folder else None)
