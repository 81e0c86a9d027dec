"""Timeouts count time in which the event loop kept up, and calls wait while the server answers others."""

import asyncio
import socket
import time
from contextlib import closing

import pytest

from marketflow.timeouts import CallLimit, timeout
from tests.test_tasks import on_loop

SECONDS = 0.1


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


@on_loop
async def test_call_waits_while_server_answers_others() -> None:
    """Twenty calls, one at a time, take four times the limit of one."""
    limit = CallLimit(1, SECONDS)

    async def ask() -> None:
        async with limit.call():
            await asyncio.sleep(SECONDS / 5)

    await asyncio.gather(*(ask() for _ in range(20)))


@on_loop
async def test_calls_of_silent_server_all_end_in_time() -> None:
    limit = CallLimit(1, SECONDS)

    async def ask() -> None:
        async with limit.call():
            await asyncio.Event().wait()

    began = time.monotonic()
    ended = await asyncio.gather(*(ask() for _ in range(50)), return_exceptions=True)
    assert {type(each) for each in ended} == {TimeoutError}
    assert time.monotonic() - began < 10 * SECONDS


@on_loop
async def test_failed_call_leaves_its_place_to_others() -> None:
    limit = CallLimit(1, SECONDS)
    with pytest.raises(ValueError, match="broken"):
        async with limit.call():
            raise ValueError("broken")
    async with limit.call():
        pass
