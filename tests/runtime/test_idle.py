"""What the default command costs while nothing ticks and nobody asks, in counts that do not depend on the machine."""

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.application import Application, ScriptedExchange, exchanges_setting
from tests.support.servers import wait_until

SECONDS = 10.0

MOST_WAKES = 18.0
"""A second, of all threads: 13 were measured, and 36 with timers and polls of their own for each part."""

MOST_CPU = 0.008
"""Of a core: 0.003 to 0.004 were measured. With a margin for a machine whose caches others use."""

_VOLUNTARY = re.compile(r"^voluntary_ctxt_switches:\s*(\d+)$", re.MULTILINE)


def wakes(pid: int) -> int:
    """How often the threads of a process have waited for something."""
    waited = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            found = _VOLUNTARY.search(status.read_text())
            waited += int(found[1]) if found else 0
    return waited


def cpu_seconds(pid: int) -> float:
    """CPU time of the threads of a process, to the nanosecond."""
    used = 0
    for schedstat in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            used += int(schedstat.read_text().split()[0])
    return used / 1e9


@pytest.fixture
def idle(server_folder: Path, exchanges: list[ScriptedExchange]) -> Iterator[Application]:
    """Live mode in one process with embedded servers, connected to exchanges that are silent."""
    given = {"MODE": "live", "EXCHANGES": exchanges_setting(*exchanges), "FLOW__STALE_AFTER_SECONDS": 600}
    with Application(server_folder, given) as application:
        for exchange in exchanges:
            exchange.client()
        wait_until(lambda: application.get("/health")["postgres"] == "ok")
        application.http.close()
        yield application


@pytest.mark.long
def test_idle_application_rarely_wakes(idle: Application) -> None:
    """The first seconds connect and load; after them, the quietest of three times counts."""
    pid, measured = idle.process.pid, []
    for _ in range(4):
        began, used, woken = time.monotonic(), cpu_seconds(pid), wakes(pid)
        time.sleep(SECONDS / 4)
        elapsed = time.monotonic() - began
        measured.append(((wakes(pid) - woken) / elapsed, (cpu_seconds(pid) - used) / elapsed))
    assert min(each[0] for each in measured[1:]) < MOST_WAKES
    assert min(each[1] for each in measured[1:]) < MOST_CPU
