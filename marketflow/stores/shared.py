"""One question to PostgreSQL for all who ask the same within a moment.

Minutes that are closed hardly change, and a period of hours begins and ends with the same ones for a whole minute: many
requests, one answer. What is asked for at the same time is asked once; an answer is good for KEPT_SECONDS.
"""

import asyncio
import time
from collections.abc import Callable, Sequence

from marketflow.model import Candle, Series, Tick
from marketflow.stores.ports import ArchiveReader, Walk

KEPT_SECONDS = 1.0

MAX_KEPT = 1000
"""How many answers are kept."""

_Question = tuple[tuple[Series, ...], int, int]


class Shared:
    """An ArchiveReader that remembers its answers for a moment; for one event loop.

    Args:
        archive: who is asked.
        monotonic: the time, in seconds.
    """

    def __init__(self, archive: ArchiveReader, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._archive = archive
        self._monotonic = monotonic
        self._asked: dict[_Question, tuple[float, asyncio.Task[list[Candle | None]]]] = {}  # the oldest first

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        """One candle for each series of all its minutes from `since` to `until`."""
        question = (tuple(series), since, until)
        now = self._monotonic()
        at, task = self._asked.get(question, (0.0, None))
        if task is None or now - at > KEPT_SECONDS or _failed(task):
            task = asyncio.create_task(self._ask(series, since, until))
            task.add_done_callback(_failed)  # even if nobody waits for it any more
            self._asked.pop(question, None)
            self._asked[question] = (now, task)
            while len(self._asked) > MAX_KEPT:
                del self._asked[next(iter(self._asked))]
        # A request that is given up takes nothing away from others that wait for the same.
        return await asyncio.shield(task)

    async def _ask(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        return await self._archive.summary(series, since, until)

    async def candles(self, series: Sequence[Series], walk: Walk) -> list[dict[int, Candle]]:
        """The candles of each series that a walk finds."""
        return await self._archive.candles(series, walk)

    async def last(self, series: Sequence[Series]) -> list[Tick | None]:
        """The close of the last minute of each series."""
        return await self._archive.last(series)


def _failed(task: "asyncio.Task[list[Candle | None]]") -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
