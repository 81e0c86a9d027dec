"""A store is down after several missed answers in a row, not after one on a busy machine."""

from collections.abc import Iterator

from marketflow.errors import Unavailable
from marketflow.runtime.health_report import FAILURES_OF_AN_OUTAGE, Probe
from tests.test_tasks import on_loop


class Store:
    """Answers pings as scripted: each item is the result of one."""

    def __init__(self, *answers: bool) -> None:
        self._answers: Iterator[bool] = iter(answers)

    async def ping(self) -> None:
        if not next(self._answers):
            raise Unavailable("no answer")


@on_loop
async def test_single_missed_ping_is_no_outage() -> None:
    probe = Probe(Store(True, False, False, True, False), writable=lambda: True)
    for _ in range(5):
        await probe.ask()
        assert probe.state == "ok"


@on_loop
async def test_store_is_down_after_failures_in_a_row() -> None:
    probe = Probe(Store(True, *[False] * FAILURES_OF_AN_OUTAGE, True), writable=lambda: True)
    for _ in range(1 + FAILURES_OF_AN_OUTAGE):
        await probe.ask()
    assert not probe.answers
    await probe.ask()
    assert probe.state == "ok"


@on_loop
async def test_start_asks_again_before_it_calls_store_down() -> None:
    late = Probe(Store(False, True), writable=lambda: True)
    await late.ask_until_known()
    assert late.state == "ok"
    silent = Probe(Store(*[False] * FAILURES_OF_AN_OUTAGE), writable=lambda: True)
    await silent.ask_until_known()
    assert silent.state == "down"


@on_loop
async def test_store_that_refuses_writes_is_down() -> None:
    probe = Probe(Store(True), writable=lambda: False)
    await probe.ask()
    assert probe.state == "down"
