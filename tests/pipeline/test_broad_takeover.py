"""A takeover of more series than memory or a recovery has all slices of, while Redis fails: in virtual time.

The owner is killed with slices that it could not write. Its standby began in the same minute, has evicted slices since,
takes over late, cannot read what the owner left for a while, and then reads it folded. All clocks, those of the
exchanges too, are set by up to a second meanwhile.

More seeds, or the one that failed:

    SEEDS=200 pytest tests/pipeline/test_broad_takeover.py
    SEED=17 pytest tests/pipeline/test_broad_takeover.py
"""

from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import pytest
from loguru import logger

from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS
from marketflow.settings.shards import LEAD
from marketflow.stores.redis import recovery
from tests.pipeline.shared_shards import ALL_SERIES, SHARDS, Group, Process
from tests.support.seeds import seeds

EVERY_MS = 1250
"""Interval of the ticks of a series."""

HELD_SECONDS = 17
"""How long the slices are held, as of 15,000 series with a tick a second."""


@pytest.fixture(autouse=True)
def few_slices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lower the limit of a recovery, and disable the log: faults log warnings."""
    monkeypatch.setattr(recovery, "SLICES_HELD", BroadTakeover.slices_held)
    logger.disable("marketflow")
    yield
    logger.enable("marketflow")


class BroadTakeover(Group):
    """A takeover out of a seed."""

    minute_ms = MINUTE_MS
    slices_held = len(ALL_SERIES) * HELD_SECONDS * 1000 // EVERY_MS

    def __init__(self, seed: int, is_first_readable: bool = False) -> None:
        super().__init__(seed, 1, 0)
        self.is_first_readable = is_first_readable
        self.first_reads = 0
        uniform = self.random.uniform
        self.processes.append(None)
        self.joins = uniform(20, 40)
        self.killed = self.joins + uniform(2, 30)
        self.takes_over = self.killed + uniform(1, 6)
        self.reads = self.takes_over + uniform(0, 25)
        self.steps = [self.random.choice((self.joins, self.killed, self.takes_over)) + uniform(-1.5, 1.5)] * (seed % 2)
        self._next_ms = {series: self.random.randrange(1000, 1000 + EVERY_MS) for series in ALL_SERIES}

    def play(self) -> None:
        """Let the time pass until the minutes are over; compare the rows."""
        owner = self.processes[0]
        assert owner is not None
        self._in(self.joins, self._join)
        self._in(self.killed - self.random.uniform(0, 2), partial(setattr, owner, "cut_off", True))
        self._in(self.killed, self._kill_owner)
        self._in(self.takes_over, self._take_over)
        for seconds in self.steps:
            self._in(seconds, self._step_clocks)
        while self.now_us < (self.reads + 65) * 1e6:
            self._step()
        standby = self.processes[1]
        assert standby is not None
        standby.stop()
        for _ in range(100):
            self._step(sends=False)
        assert standby.completed
        self.compare()

    def _send(self) -> None:
        raise AssertionError("ticks are sent by their interval")

    def _step(self, sends: bool = True) -> None:
        super()._step(sends=False)
        for series, at in self._next_ms.items():
            if sends and at <= self.now_us // 1000:
                self._next_ms[series] += EVERY_MS
                self._send_tick(series, self.now_ms)

    def _join(self) -> None:
        self.note("the standby begins")
        standby = self.processes[1] = Process(1, self, self.now_us)

        def while_readable(read: Callable[..., Any], is_first: bool = False) -> Callable[..., Any]:
            @wraps(read)
            def reading(*arguments: Any) -> Any:
                self.first_reads += is_first
                if not (is_first and self.is_first_readable) and self.takes_over <= self.now_us / 1e6 < self.reads:
                    raise Unavailable("the answer is late")
                return read(*arguments)

            return reading

        standby.cache.recover = while_readable(standby.cache.recover, is_first=True)  # type: ignore[method-assign]
        standby.pipeline.recovery.read_again = while_readable(standby.cache.between)

    def _kill_owner(self) -> None:
        self.note("kill the owner")
        owner = self.processes[0]
        assert owner is not None
        owner.kill()
        self.processes[0] = None

    def _step_clocks(self) -> None:
        by_ms = self.random.randrange(-1000, 1000)
        self.note(f"set the clocks by {by_ms} ms")
        self.step_ms += by_ms

    def _take_over(self) -> None:
        self.note(f"take over, readable at {self.reads:.2f}")
        self.owner = dict.fromkeys((*SHARDS.names, LEAD), 1)
        self._believe()


@pytest.mark.long
@pytest.mark.parametrize("seed", seeds(8))
def test_takeover_under_failing_reads_loses_and_doubles_no_tick(seed: int) -> None:
    takeover = BroadTakeover(seed)
    try:
        takeover.play()
    except AssertionError:
        print(*takeover.trace, sep="\n")
        raise


def test_first_read_is_kept_while_the_second_fails() -> None:
    takeover = BroadTakeover(3, is_first_readable=True)
    takeover.play()
    assert takeover.reads > takeover.takes_over + 2
    assert takeover.first_reads == 2  # at the start, and at the takeover


class OutageBeforeTakeover(BroadTakeover):
    """Redis fails the owner for longer than it holds slices; the standby begins after that, and the owner is killed."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        uniform = self.random.uniform
        self.fails = uniform(1, 8)
        self.answers = self.fails + uniform(HELD_SECONDS, HELD_SECONDS + 15)
        self.joins = self.answers + uniform(1, 5)
        self.killed = self.joins + uniform(2.5, 10)
        self.takes_over = self.killed + 1.25
        self.reads = self.takes_over
        self.steps = []

    def play(self) -> None:
        owner = self.processes[0]
        assert owner is not None
        self._in(self.fails, partial(setattr, owner, "cut_off", True))
        self._in(self.answers, partial(setattr, owner, "cut_off", False))
        super().play()


@pytest.mark.long
@pytest.mark.parametrize("seed", seeds(8))
def test_owner_keeps_what_redis_has_not_confirmed_until_it_has(seed: int) -> None:
    OutageBeforeTakeover(seed).play()
