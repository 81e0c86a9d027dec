"""Background tasks have ended before what they use is closed, and go on when what they ask fails."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, closing, suppress
from functools import partial, wraps
from typing import Any

import pytest
import redis

from marketflow import tasks
from marketflow.api.streaming.broadcaster import Broadcaster
from marketflow.clock import system_clock
from marketflow.cluster.remote_control import RemoteIngest
from marketflow.errors import Unavailable
from marketflow.runtime.health_report import Probe
from marketflow.runtime.processes import ApiRole
from marketflow.server.service_notification import Supervisor
from marketflow.settings import load
from marketflow.stores.postgres.request_coalescing import CoalescedAnswers
from marketflow.stores.redis.connection import connection_keywords
from marketflow.stores.redis.near_cache import NearCache
from marketflow.stores.redis.reader import RedisReader
from marketflow.tasks import SerialCalls, background, cancel, timeout
from tests.support.servers import HOST, RedisServer, free_port

SECONDS = 0.1


def on_loop(test: Callable[..., Coroutine[object, object, None]]) -> Callable[..., None]:
    """A test that is a coroutine function, run by an event loop of its own."""

    @wraps(test)
    def run(*arguments: object, **keywords: object) -> None:
        asyncio.run(test(*arguments, **keywords))

    return run


@on_loop
async def test_task_whose_cleanup_fails_is_cancelled_again() -> None:
    async def work() -> None:
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if failures:
                    raise
                failures.append("the connection cannot be closed")

    failures: list[str] = []
    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    await cancel(task)
    assert task.cancelled()
    assert failures


@on_loop
async def test_timeout_ends_what_returns_in_spite_of_a_cancellation() -> None:
    """As asyncio.wait_for does in Python 3.11 if it is done at that moment."""
    swallowed: list[str] = []

    async def answer() -> None:
        for _ in range(2):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed.append("cancellation")
        await asyncio.sleep(60)

    began = time.monotonic()
    with pytest.raises(TimeoutError):
        async with timeout(SECONDS):
            await answer()
    assert len(swallowed) == 2
    assert time.monotonic() - began < 10
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)  # which a cancellation that was left would end


@on_loop
async def test_cancellation_during_a_timeout_ends_the_task() -> None:
    async def work() -> None:
        async with timeout(SECONDS):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                stuck.set()
                await asyncio.sleep(60)

    stuck = asyncio.Event()
    task = asyncio.create_task(work())
    await stuck.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


@on_loop
async def test_listener_ends_though_its_connection_cannot_be_closed(
    redis_db: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A starved event loop closes the connection of a cancelled read too late."""
    closed: list[object] = []
    close: Any = redis.asyncio.Connection.disconnect

    async def close_late(closed_late: object, *args: Any, **keywords: Any) -> None:
        await close(closed_late, *args, **keywords)
        closed.append(closed_late)
        if len(closed) == 1:  # not that of the pool
            raise redis.TimeoutError("Timed out closing connection")

    monkeypatch.setattr(redis.asyncio.Connection, "disconnect", close_late)
    keywords = connection_keywords(HOST, redis_db.port, "", 0)
    async with AsyncExitStack() as stack:
        reader = RedisReader.connect(keywords, system_clock, 0)
        stack.push_async_callback(reader.close)
        near_cache = NearCache(reader, keywords, system_clock)
        stack.push_async_callback(near_cache.close)
        await near_cache.newest([])
        listening = asyncio.create_task(near_cache.listen())
        while not near_cache.live:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.01)
        listening.cancel()
        await asyncio.wait([listening], timeout=5)
        assert listening.cancelled()
        assert closed


@on_loop
@pytest.mark.long
async def test_no_task_is_left_once_the_api_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listeners, probes, the broadcaster and queries end before what they use is closed. Stores are unreachable."""
    for store in ("REDIS", "POSTGRES"):
        monkeypatch.setenv(f"MARKETFLOW_{store}__HOST", HOST)
        monkeypatch.setenv(f"MARKETFLOW_{store}__PORT", str(free_port()))
    begun: list[str] = []
    ended: list[str] = []

    def ends_slowly(of: type, name: str, seconds: float = 0.05) -> None:
        work = getattr(of, name)

        async def run(self: object) -> None:
            begun.append(name)
            try:
                await work(self)
            finally:
                await asyncio.sleep(seconds)
                ended.append(name)

        monkeypatch.setattr(of, name, run)

    ends_slowly(NearCache, "listen")
    ends_slowly(Probe, "ping_periodically")
    ends_slowly(RemoteIngest, "follow")
    ends_slowly(Broadcaster, "_run", 0.5)
    before = asyncio.all_tasks()

    async def misses_a_cancellation() -> None:
        with suppress(asyncio.CancelledError):  # as asyncio.wait_for does in Python 3.11
            await asyncio.sleep(60)
        await asyncio.sleep(60)

    async with AsyncExitStack() as stack:
        broadcaster = (await ApiRole(load(), load).start(stack)).broadcaster
        request = asyncio.create_task(CoalescedAnswers[None](1, time.monotonic).get("all", misses_a_cancellation))
        with broadcaster.subscribe(broadcaster.subscription(frozenset())):
            await asyncio.sleep(0)  # all tasks have begun
            await cancel(request)
    assert sorted(ended) == sorted(begun) == ["_run", "follow", "listen", "ping_periodically", "ping_periodically"]
    assert asyncio.all_tasks() == before


class Counting(Supervisor):
    """Counts signs of life, and says when there were two."""

    def __init__(self) -> None:
        super().__init__(0.001)
        self.beats = 0
        self.two = asyncio.Event()

    def beat(self) -> None:
        self.beats += 1
        if self.beats == 2:
            self.two.set()


@on_loop
async def test_signs_of_life_go_on_after_a_failed_question(log: list[str]) -> None:
    fails = iter([False, True, True])

    def alive() -> bool:
        if next(fails, False):
            raise ValueError("broken")
        return True

    supervisor = Counting()
    async with background(supervisor.beat_while(alive)):
        await asyncio.wait_for(supervisor.two.wait(), 5)
    assert len([line for line in log if "broken" in line]) == 1


@on_loop
async def test_background_task_has_ended_after_the_block() -> None:
    order: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            order.append("task ended")

    async with background(work()):
        await asyncio.sleep(0)
    order.append("block left")
    assert order == ["task ended", "block left"]


@on_loop
async def test_failure_of_background_task_is_logged(log: list[str]) -> None:
    async def work() -> None:
        raise ValueError("broken")

    async with background(work()):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len([line for line in log if "broken" in line]) == 1


@on_loop
async def test_task_that_does_not_end_holds_up_no_stop(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "CANCEL_SECONDS", 0.05)
    released = asyncio.Event()

    async def work() -> None:
        while not released.is_set():
            try:
                await released.wait()
            except asyncio.CancelledError:
                continue

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    await asyncio.wait_for(cancel(task), 5)
    assert any("does not end" in line for line in log)
    released.set()
    await task


@on_loop
async def test_answer_that_came_while_loop_was_blocked_counts() -> None:
    """By the clock, asyncio's own timeout is due before the answer is read."""
    server, client = socket.socketpair()
    with closing(server), closing(client):
        reader, writer = await asyncio.open_connection(sock=client)
        server.sendall(b"+PONG\r\n")
        asyncio.get_running_loop().call_soon(time.sleep, 3 * SECONDS)
        async with timeout(SECONDS):
            assert await reader.readline() == b"+PONG\r\n"
        writer.close()


@on_loop
async def test_silence_ends_wait_in_time() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        async with timeout(SECONDS):
            await asyncio.Event().wait()
    assert SECONDS * 0.9 < time.monotonic() - began < 10 * SECONDS


@on_loop
async def test_progress_begins_limit_anew() -> None:
    answers = 0

    async def work() -> None:
        nonlocal answers
        for _ in range(30):
            await asyncio.sleep(SECONDS / 10)
            answers += 1

    async with timeout(SECONDS, lambda: answers):
        await work()


# Blocking calls one at a time


@on_loop
async def test_serial_calls_take_one_thread_however_many_wait() -> None:
    calls, running, most = SerialCalls(5.0), 0, 0

    def call(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.001)
        running -= 1
        return number

    found = await asyncio.gather(*(calls.run(partial(call, number)) for number in range(20)))
    assert (found, most) == (list(range(20)), 1)


@on_loop
async def test_serial_call_gives_up_when_those_before_take_too_long() -> None:
    calls, ended = SerialCalls(0.05), threading.Event()
    first = asyncio.create_task(calls.run(partial(ended.wait, 10)))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await calls.run(lambda: None)
    ended.set()
    assert await first
    assert await calls.run(lambda: 7) == 7


@on_loop
async def test_serial_call_that_raises_does_not_block_the_next() -> None:
    calls = SerialCalls(0.05)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await calls.run(lambda: 1 // 0)
