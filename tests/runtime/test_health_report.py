"""A store is down after several missed answers in a row, not after one on a busy machine."""

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from marketflow.errors import Unavailable
from marketflow.health import ShardHealth
from marketflow.model import FeedState, Mode
from marketflow.runtime import health_report
from marketflow.runtime.health_report import FAILURES_OF_AN_OUTAGE, HealthReport, Probe, WriterStatus
from marketflow.tasks import background
from tests.test_tasks import on_loop


class Store:
    """Answers pings as scripted: each item is the result of one."""

    def __init__(self, *answers: bool) -> None:
        self._answers: Iterator[bool] = iter(answers)

    async def ping(self) -> None:
        if not next(self._answers):
            raise Unavailable("no answer")


class CountingStore:
    """Counts pings, and answers all or none."""

    def __init__(self, fails: bool = False) -> None:
        self._fails = fails
        self.pings = 0
        self.pinged = asyncio.Semaphore(0)

    async def ping(self) -> None:
        self.pings += 1
        self.pinged.release()
        if self._fails:
            raise Unavailable("no answer")


def report(*shards: ShardHealth) -> dict[str, Any]:
    """The answer of /health."""
    feeds = {"exchange1": FeedState.CONNECTED}
    store = WriterStatus(lambda: True)
    health = HealthReport(lambda: (Mode.LIVE, feeds), store, store, shards=lambda: shards)()
    answer: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(health))
    return answer


def test_shards_are_listed_where_they_are_known() -> None:
    shard = ShardHealth("exchange1", "host1/7", "host2/8", "warm", 12)
    assert report(shard)["shards"] == [
        {"shard": "exchange1", "owner": "host1/7", "standby": "host2/8", "standby_state": "warm", "lag_ms": 12}
    ]
    assert "shards" not in report()
    assert report(shard)["status"] == "ok"


class BrokenStore:
    """Raises what no store should."""

    async def ping(self) -> None:
        raise ZeroDivisionError


def test_pings_that_raise_are_logged_once(log: list[str]) -> None:
    probe = Probe(BrokenStore(), writable=lambda: True)

    @on_loop
    async def ask() -> None:
        for _ in range(5):
            await probe.ping()

    ask()
    assert probe.state == "down"
    assert len([line for line in log if "a store cannot be pinged, which is a bug" in line]) == 1


@on_loop
async def test_single_missed_ping_is_no_outage() -> None:
    probe = Probe(Store(True, False, False, True, False), writable=lambda: True)
    for _ in range(5):
        await probe.ping()
        assert probe.state == "ok"


@on_loop
async def test_store_is_down_after_failures_in_a_row() -> None:
    probe = Probe(Store(True, *[False] * FAILURES_OF_AN_OUTAGE, True), writable=lambda: True)
    for _ in range(1 + FAILURES_OF_AN_OUTAGE):
        await probe.ping()
    assert not probe.answers
    await probe.ping()
    assert probe.state == "ok"


@on_loop
async def test_start_asks_again_before_it_calls_store_down() -> None:
    late = Probe(Store(False, True), writable=lambda: True)
    await late.ping_until_known()
    assert late.state == "ok"
    silent = Probe(Store(*[False] * FAILURES_OF_AN_OUTAGE), writable=lambda: True)
    await silent.ping_until_known()
    assert silent.state == "down"


@on_loop
async def test_store_that_refuses_writes_is_down() -> None:
    probe = Probe(Store(True), writable=lambda: False)
    await probe.ping()
    assert probe.state == "down"


@on_loop
async def test_store_is_pinged_rarely_while_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_report, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(health_report, "IDLE_PROBE_SECONDS", 60.0)
    store = CountingStore()
    probe = Probe(store, writable=lambda: True)
    async with background(probe.ping_periodically()):
        await asyncio.sleep(0.2)
        assert not store.pings
        for count in range(1, 4):
            assert probe.state == ("ok" if count > 1 else "down")
            async with asyncio.timeout(5):
                await store.pinged.acquire()
            assert store.pings == count


@on_loop
async def test_store_that_misses_a_ping_is_asked_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while nobody looks: one that is down is known to be after a second."""
    monkeypatch.setattr(health_report, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(health_report, "IDLE_PROBE_SECONDS", 60.0)
    store = CountingStore(fails=True)
    probe = Probe(store, writable=lambda: True)
    await probe.ping()
    async with background(probe.ping_periodically()), asyncio.timeout(5):
        for _ in range(FAILURES_OF_AN_OUTAGE):
            await store.pinged.acquire()
    assert probe.state == "down"
