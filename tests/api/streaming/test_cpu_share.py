"""Passes to many clients rest to keep their share of a core; those to few never do. Time is the test's."""

import pytest

from marketflow.api.streaming.cpu_share import BURST_SECONDS, SHARE, CpuShare


class Machine:
    """A clock that passes and rests move on; the next pass begins when its tick has come and the rest has ended."""

    def __init__(self) -> None:
        self.now = 100.0
        self.share = CpuShare(lambda: self.now)
        self.busy = 0.0
        self.waits: list[float] = []  # of ticks, for the rest to end
        self._rests_until = 0.0

    def pass_at(self, tick_at: float, cpu_seconds: float) -> None:
        """Make a pass for a tick of this time."""
        tick_at = max(tick_at, self.now)
        self.now = max(tick_at, self._rests_until)
        self.waits.append(self.now - tick_at)
        self.now += cpu_seconds
        self.busy += cpu_seconds
        self._rests_until = self.now + self.share.rest_after(cpu_seconds)


@pytest.mark.parametrize("cpu_seconds", [0.003, 0.008, 0.05])
def test_passes_back_to_back_take_their_share_of_a_core(cpu_seconds: float) -> None:
    machine, began = Machine(), 100.0
    while machine.now < began + 20:
        machine.pass_at(machine.now, cpu_seconds)
    assert machine.busy / (machine.now - began) == pytest.approx(SHARE, rel=0.02)


def test_passes_below_the_share_never_rest() -> None:
    """A hundred clients at 300 ticks/s: each tick begins its pass at once."""
    machine = Machine()
    for tick in range(3000):
        machine.pass_at(100 + tick / 300, 0.001)
    assert max(machine.waits) < 1e-9


def test_idle_time_does_not_add_up_to_more_than_a_burst() -> None:
    machine = Machine()
    machine.pass_at(100, 0.008)
    machine.pass_at(1000, 0.008)
    began, busy = machine.now, machine.busy
    while machine.now < began + 1:
        machine.pass_at(machine.now, 0.008)
    assert machine.busy - busy <= SHARE * (machine.now - began + BURST_SECONDS) + 0.008
