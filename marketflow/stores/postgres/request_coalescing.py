"""Request coalescing: one query to PostgreSQL for all requests that need the same answer within a moment.

Closed minutes hardly change, and a period of hours begins and ends with the same ones for a whole minute, so many
requests have one answer. Equal queries that run at the same time are sent once; an answer is cached for KEPT_SECONDS.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS, Candle, Series, Tick
from marketflow.stores.ports import ArchiveReader, CandleRange
from marketflow.stores.postgres.rows import DAY_MS, END_MS, HOUR_MS, OLDEST_MS
from marketflow.tasks import cancel

KEPT_SECONDS = 1.0

MAX_KEPT = 1000
"""How many summaries are cached."""

MAX_RANGES_KEPT = 50
"""How many answers of up to a thousand candles for each series are cached: about 10 MB."""

LONG_ROWS = 10_000
"""A candle query that reads more rows than this is a long one."""

LONG_QUERIES = 2
"""How many long candle queries run at once, so that short ones never wait behind them."""

WAIT_SECONDS = 0.75
"""How long a long candle query waits for its start."""

LONGEST_PERIOD_DAYS = 366
"""Days of a series that are charged at most before its age is known: an all-time period begins in 1970."""

_T = TypeVar("_T")


def rows_of_summary(since: int, until: int, oldest: int | None = None) -> float:
    """Rows that a summary of one series reads at most: the days within, and minutes at its two edges.

    Args:
        since: start of the period (Unix ms).
        until: its end (Unix ms).
        oldest: time of the first tick in the archive (Unix ms); None while unknown.
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


def rows_of_range(wanted: CandleRange) -> float:
    """Rows that a candle query of one series reads, where none is missing."""
    part = MINUTE_MS if wanted.length_ms < HOUR_MS else HOUR_MS if wanted.length_ms < DAY_MS else DAY_MS
    return min(wanted.limit * wanted.length_ms, max(0, wanted.until - wanted.since)) / part


class CoalescingReader:
    """An ArchiveReader that coalesces equal queries and caches answers for a moment; for one event loop.

    Args:
        archive: runs the queries.
        monotonic: the time, in seconds.
        charge: called with the rows that a query will read, before it runs; may reject it by raising.
    """

    def __init__(
        self,
        archive: ArchiveReader,
        monotonic: Callable[[], float] = time.monotonic,
        charge: Callable[[float], None] = lambda rows: None,
    ) -> None:
        self._archive = archive
        self._charge = charge
        self._oldest: dict[Series, int] = {}  # first tick of each series whose all-time summary was read (Unix ms)
        self._long_queries = asyncio.Semaphore(LONG_QUERIES)
        self._summaries: CoalescedAnswers[list[Candle | None]] = CoalescedAnswers(MAX_KEPT, monotonic)
        self._ranges: CoalescedAnswers[list[dict[int, Candle]]] = CoalescedAnswers(MAX_RANGES_KEPT, monotonic)

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        """One candle for each series of all its minutes from `since` to `until`."""
        rows = sum(rows_of_summary(since, until, self._oldest.get(each)) for each in series)
        query = (tuple(series), since, until)
        return await self._summaries.get(query, lambda: self._summary(series, since, until), lambda: self._charge(rows))

    async def _summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        found = await self._archive.summary(series, since, until)
        if since <= OLDEST_MS:
            self._oldest |= {each: candle.first_at for each, candle in zip(series, found, strict=True) if candle}
        return found

    async def candles(self, series: Sequence[Series], wanted: CandleRange) -> list[dict[int, Candle]]:
        """The candles of each series in a range; not to be changed."""
        rows = len(series) * rows_of_range(wanted)

        async def run() -> list[dict[int, Candle]]:
            if rows <= LONG_ROWS:
                return await self._archive.candles(series, wanted)
            try:
                async with asyncio.timeout(WAIT_SECONDS):
                    await self._long_queries.acquire()
            except TimeoutError:
                raise Unavailable("too many long candle queries at once") from None
            try:
                return await self._archive.candles(series, wanted)
            finally:
                self._long_queries.release()

        return await self._ranges.get((tuple(series), wanted), run, lambda: self._charge(rows))

    async def last(self, series: Sequence[Series]) -> list[Tick | None]:
        """The close of the last minute of each series."""
        return await self._archive.last(series)


_running: "set[asyncio.Task[Any]]" = set()


async def end_queries() -> None:
    """Cancel the queries of this event loop that still run, although the requests that need them have ended.

    Until they end, as long queries of many series do after seconds, and some miss one cancellation (see `cancel`).
    """
    loop = asyncio.get_running_loop()
    await cancel(*(task for task in _running if task.get_loop() is loop))


class CoalescedAnswers(Generic[_T]):
    """Running queries and recent answers; evicts the oldest first. For one event loop.

    Args:
        most: how many are kept.
        monotonic: the time, in seconds.
        kept_seconds: how long an answer is cached.
    """

    def __init__(self, most: int, monotonic: Callable[[], float], kept_seconds: float = KEPT_SECONDS) -> None:
        self._most = most
        self._kept_seconds = kept_seconds
        self._monotonic = monotonic
        self._tasks: dict[object, tuple[float, asyncio.Task[_T]]] = {}  # the oldest first

    async def get(
        self,
        query: object,
        run: Callable[[], Coroutine[Any, Any, _T]],
        charge: Callable[[], None] = lambda: None,
    ) -> _T:
        """Return the answer to a query: that of an equal one of a moment ago, or what `run` returns.

        `charge` is called before `run`, and may reject the query by raising.
        """
        now = self._monotonic()
        at, task = self._tasks.get(query, (0.0, None))
        if task is None or now - at > self._kept_seconds or _failed(task):
            charge()
            task = asyncio.create_task(run())
            task.add_done_callback(_failed)  # retrieves the exception, also if every request was cancelled
            _running.add(task)
            task.add_done_callback(_running.discard)
            self._tasks.pop(query, None)
            self._tasks[query] = (now, task)
            while len(self._tasks) > self._most:
                del self._tasks[next(iter(self._tasks))]
        # The cancellation of one request must not cancel the query for the others.
        return await asyncio.shield(task)


def _failed(task: "asyncio.Task[Any]") -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
