"""The archive in PostgreSQL, as the API reads it: from a pool, with an end to every wait."""

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any, TypeVar

import psycopg
from psycopg_pool import AsyncConnectionPool

from marketflow.errors import Unavailable
from marketflow.model import Candle, Series, Tick
from marketflow.stores.rows import candle_of_row, parameters, reason, to_datetime, to_unix_ms

_T = TypeVar("_T")

READ_SECONDS = 0.75
"""How long a request may wait for PostgreSQL in all: what is left of a second is for the answer without it."""

_OF_SERIES = "mode = %(mode)s and exchange = %(exchange)s and pair_name = %(symbol)s"

_SUMMARY = f"""
with minutes as not materialized (
    select * from aggregates where {_OF_SERIES} and timestamp >= %(since)s and timestamp < %(until)s
), whole as materialized (
    select sum(average_price * tick_count) as total, sum(tick_count)::int8 as ticks,
           min(timestamp) as first, max(timestamp) as last, max(max_price) as high, min(min_price) as low
    from minutes
)
select total, ticks, high, low, opening.open_price, closing.close_price,
       coalesce(opening.open_at, first), coalesce(closing.close_at, last),
       (select coalesce(max_at, timestamp) from minutes where max_price = high order by timestamp limit 1),
       (select coalesce(min_at, timestamp) from minutes where min_price = low order by timestamp limit 1)
from whole
join minutes as opening on opening.timestamp = first
join minutes as closing on closing.timestamp = last
"""  # noqa: S608 - put together from constants

_LAST = f"""
select close_price, coalesce(close_at, timestamp) from aggregates
where {_OF_SERIES} order by timestamp desc limit 1
"""  # noqa: S608


class PostgresReader:
    """Reads minute rows; for one event loop.

    Args:
        keywords: of the connections, see connection_keywords.
        max_size: connections at most.
    """

    def __init__(self, keywords: dict[str, Any], max_size: int = 8) -> None:
        self._pool = AsyncConnectionPool(
            kwargs={**keywords, "autocommit": True},
            min_size=1,
            max_size=max_size,
            open=False,
            timeout=READ_SECONDS,
            # The pool doubles its pauses without a limit; 2 s after giving up it begins anew.
            reconnect_timeout=2.0,
            reconnect_failed=lambda pool: None,
            name="archive-reader",
        )
        self._abandoned: set[asyncio.Future[Any]] = set()

    async def open(self) -> None:
        """Begin to connect, without waiting for it."""
        await self._pool.open(wait=False)

    async def close(self) -> None:
        """Close all connections, within a second."""
        await self._pool.close(timeout=1.0)

    async def ping(self) -> None:
        """Ask for a sign of life.

        Raises:
            Unavailable: there is none.
        """
        await self._fetch([("select 1", {})])

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        """One candle for each series of its minutes with `since <= start < until` (Unix ms)."""
        bounds = {"since": to_datetime(since), "until": to_datetime(until)}
        rows = await self._fetch([(_SUMMARY, {**parameters(each), **bounds}) for each in series])
        return [None if row is None else candle_of_row(row) for row in rows]

    async def last(self, series: Sequence[Series]) -> list[Tick | None]:
        """The close of the last minute of each series."""
        rows = await self._fetch([(_LAST, parameters(each)) for each in series])
        return [None if row is None else Tick(row[0], to_unix_ms(row[1]), 0) for row in rows]

    async def _fetch(self, queries: Iterable[tuple[str, dict[str, Any]]]) -> list[tuple[Any, ...] | None]:
        """The first row of each query."""

        async def ask() -> list[tuple[Any, ...] | None]:
            async with self._pool.connection(timeout=READ_SECONDS) as connection:
                cursors = [await connection.execute(query, values) for query, values in queries]
                return [await cursor.fetchone() for cursor in cursors]

        return await self._bounded(ask())

    async def _bounded(self, asked: Awaitable[_T]) -> _T:
        task = asyncio.ensure_future(asked)
        try:
            done, _ = await asyncio.wait({task}, timeout=READ_SECONDS)
        except asyncio.CancelledError:
            self._abandon(task)
            raise
        if not done:
            self._abandon(task)
            raise Unavailable(f"PostgreSQL did not answer within {READ_SECONDS:g} s")
        try:
            return task.result()
        except psycopg.errors.UndefinedTable as error:
            raise Unavailable("PostgreSQL has no schema yet") from error
        except psycopg.Error as error:
            raise Unavailable(reason(error)) from error

    def _abandon(self, task: "asyncio.Future[Any]") -> None:
        """Cancel without waiting: on a frozen server psycopg takes seconds to give a query up."""

        def ended(task: "asyncio.Future[Any]") -> None:
            self._abandoned.discard(task)
            if not task.cancelled():
                task.exception()

        self._abandoned.add(task)
        task.add_done_callback(ended)
        task.cancel()
