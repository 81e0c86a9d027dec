"""Calls beyond the limit wait while the server answers others, and end in time when it answers none."""

import asyncio
import time

import pytest

from marketflow.stores.call_limit import CallLimit
from tests.test_tasks import on_loop

SECONDS = 0.1


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
