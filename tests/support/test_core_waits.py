"""What is subtracted from seconds measured on a busy machine: what processes waited for a core, and no more."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support.core_waits import CoreWaits

ON_ONE_CORE = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
BURNING = ON_ONE_CORE + "print('runs', flush=True)\nwhile True: pass"
USING_CPU = ON_ONE_CORE + "import time; input()\nwhile time.process_time() < 0.3: pass"
SLEEPING = ON_ONE_CORE + "import time; input(); time.sleep(1)"


@pytest.fixture
def busy_core() -> Iterator[None]:
    """Two processes that use all of the core on which the measured ones run."""
    with ExitStack() as stack:
        for _ in range(2):
            burning = stack.enter_context(subprocess.Popen([sys.executable, "-c", BURNING], stdout=subprocess.PIPE))
            stack.callback(burning.kill)
            assert burning.stdout is not None
            burning.stdout.readline()
        yield


def measured(program: str) -> tuple[float, float]:
    """How long a program takes: in all, and without its waits for a core."""
    with (
        subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as process,
        CoreWaits([process.pid]) as waits,
    ):
        began = time.monotonic()
        process.communicate(b"\n")
        return time.monotonic() - began, waits.seconds_since(began)


@pytest.mark.usefixtures("busy_core")
def test_waits_for_a_core_are_no_seconds() -> None:
    in_all, without_waits = measured(USING_CPU)
    assert in_all > 0.6
    assert without_waits < 0.7 * in_all


@pytest.mark.usefixtures("busy_core")
def test_sleep_on_a_busy_core_is_measured_in_full() -> None:
    in_all, without_waits = measured(SLEEPING)
    assert without_waits > 0.95
    assert in_all >= without_waits


def noted(*samples: tuple[float, float]) -> CoreWaits:
    """Samples of one group: when each was taken, and the longest wait that ended since the one before."""
    waits = CoreWaits([os.getpid()])
    for at, longest in samples:
        waits.note(at, [longest])
    return waits


def test_waits_are_those_between_the_samples_around() -> None:
    waits = noted((1.0, 0.0), (2.0, 0.5), (3.0, 0.0), (4.0, 0.25))
    assert waits.between(2.0, 3.0) == 0.0
    assert waits.between(1.5, 3.0) == 0.5
    assert waits.between(2.5, 3.5) == 0.25
    assert waits.between(3.9, 4.0) == pytest.approx(0.1)  # never more than the time itself
    assert waits.between(5.0, 9.0) == 0.0


def test_waits_at_the_same_time_count_once() -> None:
    waits = noted((1.0, 0.0), (2.0, 0.0), (3.0, 1.5), (4.0, 1.8))
    assert waits.between(1.0, 4.0) == pytest.approx(2.5)
    assert waits.between(1.0, 2.0) == pytest.approx(0.5)  # counted when it had ended


def test_waits_of_groups_add_up() -> None:
    waits = CoreWaits([], [])
    for at, longest in ((1.0, [0.0, 0.0]), (2.0, [0.25, 0.5]), (3.0, [0.75, 0.5])):
        waits.note(at, longest)
    assert waits.between(1.0, 2.0) == 0.75
    assert waits.between(2.0, 3.0) == 1.0


def test_quarter_of_the_seconds_counts_however_long_the_waits() -> None:
    now = time.monotonic()
    waits = noted((now - 8, 0), (now, 8))
    assert waits.between(now - 8, now) == pytest.approx(8)
    assert waits.seconds_since(now - 8) == pytest.approx(2, abs=0.2)
