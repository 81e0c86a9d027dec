"""Timeouts for an event loop that may be behind, which says nothing of the server that it waits for."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

STEPS = 25
"""Timers in a row that make one timeout: so often at least the loop reads what has come before it gives up."""


@asynccontextmanager
async def timeout(seconds: float, progress: Callable[[], object] = lambda: None) -> AsyncIterator[None]:
    """Limit what the block awaits, as asyncio.timeout does, by time in which the event loop kept up.

    By the clock a starved loop would miss answers that have long come: its timer is due before they are read.

    Args:
        seconds: the limit.
        progress: a value; each change begins the limit anew.

    Raises:
        TimeoutError: the limit has passed.
    """
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as limit:
        left, seen = STEPS, progress()
        timer: asyncio.TimerHandle

        def step() -> None:
            nonlocal left, seen, timer
            now = progress()
            left, seen = (STEPS, now) if now != seen else (left - 1, seen)
            if left > 0:
                timer = loop.call_later(seconds / STEPS, step)
            else:
                limit.reschedule(loop.time())

        timer = loop.call_later(seconds / STEPS, step)
        try:
            yield
        finally:
            timer.cancel()


class CallLimit:
    """So many calls of a server at a time; further ones wait for as long as it answers any. For one event loop.

    Args:
        calls: at a time.
        seconds: limit of a call, from its beginning or from the last answer that came while it waited for its turn.
    """

    def __init__(self, calls: int, seconds: float) -> None:
        self._free = asyncio.Semaphore(calls)
        self._seconds = seconds
        self._answers = 0

    @asynccontextmanager
    async def call(self) -> AsyncIterator[None]:
        """Make one call in the block.

        Raises:
            TimeoutError: the server did not answer in time.
        """
        waiting, answers = True, self._answers

        def progress() -> int:
            nonlocal answers
            if waiting:
                answers = self._answers
            return answers

        async with timeout(self._seconds, progress), self._free:
            waiting = False
            yield
            self._answers += 1
