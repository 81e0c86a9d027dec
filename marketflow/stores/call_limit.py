"""Bounded calls of a server: a maximum at a time, each with a timeout that a busy event loop does not shorten."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from marketflow.tasks import timeout


class CallLimit:
    """Concurrent calls of a server, at most `calls`; further ones wait while it answers any. For one event loop.

    Args:
        calls: how many at a time.
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
