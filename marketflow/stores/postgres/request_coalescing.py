"""One question to PostgreSQL for all who ask the same within a moment.

Minutes that are closed hardly change, and a period of hours begins and ends with the same ones for a whole minute: many
requests, one answer. What is asked for at the same time is asked once; an answer is good for KEPT_SECONDS.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS, Candle, Series, Tick
from marketflow.stores.ports import ArchiveReader, CandleRange
from marketflow.stores.postgres.rows import DAY_MS, END_MS, HOUR_MS, OLDEST_MS

KEPT_SECONDS = 1.0

MAX_KEPT = 1000
"""How many summaries are kept."""

MAX_WALKS_KEPT = 50
"""How many answers of up to a thousand candles for each series are kept: about 10 MB of them."""

LONG_ROWS = 10_000
LONG_WALKS = 2
"""A walk that reads more rows than that shares these places with others of its kind, so that short ones never wait."""

LONGEST_PERIOD_DAYS = 366
"""Days of a series that are charged at most before it is known how old it is: all time begins in 1970."""

WAIT_SECONDS = 0.75
"""How long a walk waits for its place."""

_T = TypeVar("_T")


def rows_of_summary(since: int, until: int, oldest: int | None = None) -> float:
    """Rows that a summary of one series reads at most: the days within, and minutes at its two edges.

    Args:
        since: beginning of the period (Unix ms).
        until: its end (Unix ms).
        oldest: what the archive begins with (Unix ms); None where that is not known yet.
    """
    if oldest is not None:
        since = max(since, min(oldest, until) // DAY_MS * DAY_MS)
    since, until = max(since, OLDEST_MS), min(until, END_MS)
    if since >= until:
        return 0.0
    first_day, last_day = -(-since // DAY_MS) * DAY_MS, until // DAY_MS * DAY_MS
    if first_day > last_day:
        return (until - since) / MINUTE_MS
    minutes = (first_day - since + until - last_day) / MINUTE_MS
    days = (last_day - first_day) / DAY_MS
    return minutes + (min(days, LONGEST_PERIOD_DAYS) if oldest is None else days)


def rows_of_walk(walk: CandleRange) -> float:
    """Rows that a walk along one series reads, where none is missing."""
    part = MINUTE_MS if walk.length_ms < HOUR_MS else HOUR_MS if walk.length_ms < DAY_MS else DAY_MS
    return min(walk.limit * walk.length_ms, max(0, walk.until - walk.since)) / part


class CoalescingReader:
    """An ArchiveReader that remembers its answers for a moment; for one event loop.

    Args:
        archive: who is asked.
        monotonic: the time, in seconds.
        charge: called with the rows that a question has the archive read, before it is asked; may refuse it by raising.
    """

    def __init__(
        self,
        archive: ArchiveReader,
        monotonic: Callable[[], float] = time.monotonic,
        charge: Callable[[float], None] = lambda rows: None,
    ) -> None:
        self._archive = archive
        self._charge = charge
        self._oldest: dict[Series, int] = {}  # the first tick of each series of which all time was asked (Unix ms)
        self._long_walks = asyncio.Semaphore(LONG_WALKS)
        self._summaries: _Answers[list[Candle | None]] = _Answers(MAX_KEPT, monotonic)
        self._walks: _Answers[list[dict[int, Candle]]] = _Answers(MAX_WALKS_KEPT, monotonic)

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        """One candle for each series of all its minutes from `since` to `until`."""
        rows = sum(rows_of_summary(since, until, self._oldest.get(each)) for each in series)
        question = (tuple(series), since, until)
        return await self._summaries.get(
            question, lambda: self._summary(series, since, until), lambda: self._charge(rows)
        )

    async def _summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        found = await self._archive.summary(series, since, until)
        if since <= OLDEST_MS:
            self._oldest |= {each: candle.first_at for each, candle in zip(series, found, strict=True) if candle}
        return found

    async def candles(self, series: Sequence[Series], walk: CandleRange) -> list[dict[int, Candle]]:
        """The candles of each series that a walk finds; not to be changed."""
        rows = len(series) * rows_of_walk(walk)

        async def walk_along() -> list[dict[int, Candle]]:
            if rows <= LONG_ROWS:
                return await self._archive.candles(series, walk)
            try:
                async with asyncio.timeout(WAIT_SECONDS):
                    await self._long_walks.acquire()
            except TimeoutError:
                raise Unavailable("too many long walks through the archive at once") from None
            try:
                return await self._archive.candles(series, walk)
            finally:
                self._long_walks.release()

        return await self._walks.get((tuple(series), walk), walk_along, lambda: self._charge(rows))

    async def last(self, series: Sequence[Series]) -> list[Tick | None]:
        """The close of the last minute of each series."""
        return await self._archive.last(series)


class _Answers(Generic[_T]):
    """What was asked for lately."""

    def __init__(self, most: int, monotonic: Callable[[], float]) -> None:
        self._most = most
        self._monotonic = monotonic
        self._asked: dict[object, tuple[float, asyncio.Task[_T]]] = {}  # the oldest first

    async def get(self, question: object, ask: Callable[[], Coroutine[Any, Any, _T]], charge: Callable[[], None]) -> _T:
        now = self._monotonic()
        at, task = self._asked.get(question, (0.0, None))
        if task is None or now - at > KEPT_SECONDS or _failed(task):
            charge()
            task = asyncio.create_task(ask())
            task.add_done_callback(_failed)  # even if nobody waits for it any more
            self._asked.pop(question, None)
            self._asked[question] = (now, task)
            while len(self._asked) > self._most:
                del self._asked[next(iter(self._asked))]
        # A request that is given up takes nothing away from others that wait for the same.
        return await asyncio.shield(task)


def _failed(task: "asyncio.Task[Any]") -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
