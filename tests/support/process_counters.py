"""What the kernel counts for processes and their threads."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_SWITCHES = re.compile(r"^(?:non)?voluntary_ctxt_switches:\s*(\d+)$", re.MULTILINE)


class Switches(NamedTuple):
    """Context switches: those of threads that waited for something, and those of threads that lost their core."""

    voluntary: int = 0
    involuntary: int = 0


def thread_switches(thread: int) -> Switches:
    """Context switches of a thread, by its native id."""
    return _switches_in(Path(f"/proc/{thread}/status"))


def context_switches(pid: int) -> Switches:
    """Context switches of the present threads of a process."""
    found = [_switches_in(path) for path in _each(pid, "status")]
    return Switches(sum(each.voluntary for each in found), sum(each.involuntary for each in found))


def cpu_seconds(pid: int) -> float:
    """CPU time of the present threads of a process, to the nanosecond."""
    used = 0
    for path in _each(pid, "schedstat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            used += int(path.read_text().split()[0])
    return used / 1e9


def _switches_in(status: Path) -> Switches:
    with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
        return Switches(*map(int, _SWITCHES.findall(status.read_text())))
    return Switches()


def _each(pid: int, name: str) -> Iterator[Path]:
    return Path(f"/proc/{pid}/task").glob(f"*/{name}")
