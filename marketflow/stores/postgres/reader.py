"""Reads the archive in PostgreSQL for the API: from a connection pool, with a limit to every wait."""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from marketflow.errors import Unavailable
from marketflow.model import Candle, Hole, Series, Tick
from marketflow.stores.call_limit import CallLimit
from marketflow.stores.ports import CandleRange, HoleQuery, ListedRule, NumberedEvent
from marketflow.stores.postgres import alert_store
from marketflow.stores.postgres.candle_queries import candles_of
from marketflow.stores.postgres.candle_queries import query as candle_query
from marketflow.stores.postgres.candle_sql import SUMS, VALID, candle_select, time_of

if TYPE_CHECKING:
    from marketflow.stores.postgres.connections.read_pool import ReadPool
from marketflow.stores.postgres.holes import hole_of_row, hole_query
from marketflow.stores.postgres.rows import DAY_MS, candle_of_row, parameters, reason, to_datetime, to_unix_ms

_T = TypeVar("_T")

READ_SECONDS = 0.75
"""How long a request may wait for PostgreSQL in all; the rest of a second is for an answer without it."""

_OF_SERIES = "mode = %(mode)s and exchange = %(exchange)s and pair_name = %(symbol)s"

_OF_WANTED = "exchange = wanted.exchange and pair_name = wanted.pair_name and mode = wanted.mode"
_MINUTES = f"{_OF_WANTED} and timestamp >= span.since and timestamp < span.until"
_DAYS = f"{_OF_WANTED} and timestamp >= rolled.first_day and timestamp < rolled.until"

# Whole days as daily candles; minutes before and after them, and of marked days (ddl/0002_aggregates_daily.sql). One
# statement, so that all parts are of one snapshot. Where minutes are deleted (`kept_from`) a day at the edge counts
# as a whole. The last select merges the parts in the order of their time.
_SUMMARY = f"""
with wanted as (
    select * from unnest(%(mode)s::text[], %(exchange)s::text[], %(symbol)s::text[]) with ordinality
        as wanted (mode, exchange, pair_name, number)
), rolled as (
    select edge.*, greatest(first_day, least(last_day, rolled_until)) as until
    from (
        select case when %(since)s < kept_from then %(day_of_since)s else %(first_day)s end as first_day,
               case when %(until)s <= kept_from then %(end_of_until)s else %(last_day)s end as last_day, rolled_until
        from aggregates_rolled_until
        union all
        select %(first_day)s, %(last_day)s, timestamptz 'epoch' where not exists (select from aggregates_rolled_until)
    ) as edge
), parts as (
    select number, candle.* from wanted cross join rolled
    cross join lateral ({candle_select("aggregates_daily", f"{_DAYS} and tick_count is not null")}) as candle
    union all
    select number, candle.* from wanted cross join rolled
    cross join lateral (
        values (%(since)s, least(rolled.first_day, %(until)s)), (rolled.until, %(until)s)
        union all
        select timestamp, timestamp + interval '24 hours' from aggregates_daily where {_DAYS} and tick_count is null
    ) as span (since, until)
    cross join lateral ({candle_select("aggregates", _MINUTES)}) as candle
)
select number, sum(total), sum(ticks)::int8, max(high), min(low),
       (pg_catalog.array_agg(open order by first))[1], (pg_catalog.array_agg(close order by last desc))[1],
       (pg_catalog.array_agg(first_at order by first))[1], (pg_catalog.array_agg(last_at order by last desc))[1],
       (pg_catalog.array_agg(high_at order by high desc, high_start))[1],
       (pg_catalog.array_agg(low_at order by low, low_start))[1],
       {SUMS}
from parts group by number
"""  # noqa: S608 - put together from constants

# The alias: without one the second column is named `timestamp`, and all rows of the series are sorted by it.
_LAST = f"""
select close_price, {time_of("close_at")} as at from aggregates
where {_OF_SERIES} and timestamp < timestamptz '2200-01-01 00:00:00+00' and {VALID} order by timestamp desc limit 1
"""  # noqa: S608


class PostgresReader:
    """Reads minute rows; for one event loop.

    Args:
        keywords: of the connections, see connection_keywords.
        max_size: limit of connections.
    """

    def __init__(self, keywords: dict[str, Any], max_size: int = 8) -> None:
        self._keywords = keywords
        self._max_size = max_size
        self._calls = CallLimit(max_size, READ_SECONDS)
        self._pool: ReadPool | None = None
        # A pool of its own, so that a ping does not wait behind queries.
        self._ping_pool: ReadPool | None = None
        self._pings = CallLimit(1, READ_SECONDS)
        self._abandoned: set[asyncio.Future[Any]] = set()

    async def open(self) -> None:
        """Load psycopg and start to connect, without waiting for a connection."""
        # On a thread: it takes a tenth of a second, in which the event loop answers requests.
        pools = await asyncio.to_thread(import_module, "marketflow.stores.postgres.connections.read_pool")
        self._pool = pools.read_pool(self._keywords, self._max_size, "archive-reader")
        self._ping_pool = pools.read_pool(self._keywords, 1, "archive-ping")
        await self._pool.open(wait=False)
        await self._ping_pool.open(wait=False)

    async def close(self) -> None:
        """Close all connections, within a second."""
        pools = [pool for pool in (self._pool, self._ping_pool) if pool is not None]
        await asyncio.gather(*(pool.close(timeout=1.0) for pool in pools))

    async def ping(self) -> None:
        """Run an empty query.

        Raises:
            Unavailable: no answer.
        """
        await self._rows([("select 1", {})], self._ping_pool, self._pings)

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        """One candle for each series of its minutes with `since <= start < until` (Unix ms)."""
        wanted = {
            "mode": [each.mode.value for each in series],
            "exchange": [each.exchange for each in series],
            "symbol": [each.symbol for each in series],
        }
        bounds = {"since": since, "until": until, "first_day": -(-since // DAY_MS) * DAY_MS}
        bounds |= {"last_day": until // DAY_MS * DAY_MS, "end_of_until": -(-until // DAY_MS) * DAY_MS}
        bounds["day_of_since"] = since // DAY_MS * DAY_MS
        moments = {name: to_datetime(bound) for name, bound in bounds.items()}
        (rows,) = await self._fetch([(_SUMMARY, {**wanted, **moments})])
        found = {number: candle_of_row((*amounts,)) for number, *amounts in rows}
        return [found.get(number) for number in range(1, len(series) + 1)]

    async def candles(self, series: Sequence[Series], wanted: CandleRange) -> list[dict[int, Candle]]:
        """The candles of each series in a range, by their start."""
        (rows,) = await self._fetch([candle_query(series, wanted)])
        return candles_of(rows, len(series))

    async def last(self, series: Sequence[Series]) -> list[Tick | None]:
        """The close of the last minute of each series."""
        answers = await self._fetch([(_LAST, parameters(each)) for each in series])
        return [Tick(rows[0][0], to_unix_ms(rows[0][1]), 0) if rows else None for rows in answers]

    async def holes(self, wanted: HoleQuery) -> list[Hole]:
        """The holes that a query asks for, the newest first."""
        (rows,) = await self._fetch([hole_query(wanted)])
        return [hole_of_row(row) for row in rows]

    async def alert_rules(self, after: int, limit: int) -> list[ListedRule]:
        """The first alert rules with a number above `after`; without those that this version does not understand."""
        (rows,) = await self._fetch([(alert_store.LISTED_RULES, {"after": after, "limit": limit})])
        return [rule for row in rows if (rule := alert_store.listed_rule(row)) is not None]

    async def alert_rule(self, id: str) -> ListedRule | None:
        """The alert rule with this id."""
        if not id.isascii() or "\0" in id:  # which no id is, and not every database has such text
            return None
        (rows,) = await self._fetch([(alert_store.LISTED_RULE, {"id": id})])
        return alert_store.listed_rule(rows[0]) if rows else None

    async def alert_events(self, after: int, limit: int) -> list[NumberedEvent]:
        """The first events of alerts with a number above `after`, in their order."""
        (rows,) = await self._fetch([(alert_store.EVENTS_AFTER, {"after": after, "limit": limit})])
        return [NumberedEvent(*row) for row in rows]

    async def newest_alert_events(self, limit: int) -> list[NumberedEvent]:
        """The last events of alerts, in their order."""
        (rows,) = await self._fetch([(alert_store.NEWEST_EVENTS, {"limit": limit})])
        return [NumberedEvent(*row) for row in reversed(rows)]

    async def newest_alert_event(self) -> int:
        """The number of the newest event of an alert; 0 without any."""
        (rows,) = await self._fetch([(alert_store.NEWEST_EVENT, {})])
        newest: int = rows[0][0]
        return newest

    async def _fetch(self, queries: Iterable[tuple[str, dict[str, Any]]]) -> list[list[tuple[Any, ...]]]:
        """The rows of each query."""
        return await self._rows(queries, self._pool, self._calls)

    async def _rows(
        self,
        queries: Iterable[tuple[str, dict[str, Any]]],
        pool: "ReadPool | None",
        calls: CallLimit,
    ) -> list[list[tuple[Any, ...]]]:
        if pool is None:
            raise Unavailable("PostgreSQL is not connected yet")

        async def ask() -> list[list[tuple[Any, ...]]]:
            async with pool.connection() as connection:
                pinning = await connection.pinned(self._keywords)
                async with connection.transaction() if pinning else nullcontext():
                    if pinning:
                        await connection.execute(pinning)
                    # Binary: no setting of the session changes its meaning.
                    cursors = [await connection.execute(query, values, binary=True) for query, values in queries]
                    return [await cursor.fetchall() for cursor in cursors]

        try:
            async with calls.call():
                return await self._answer(ask())
        except TimeoutError as error:
            raise Unavailable(f"PostgreSQL did not answer within {READ_SECONDS:g} s") from error

    async def _answer(self, asked: Coroutine[Any, Any, _T]) -> _T:
        from psycopg.errors import UndefinedTable

        task = asyncio.create_task(asked)
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            self._abandon(task)
            raise
        try:
            return task.result()
        except UndefinedTable as error:
            raise Unavailable("PostgreSQL has no schema yet") from error
        except Exception as error:
            raise Unavailable(reason(error)) from error

    def _abandon(self, task: "asyncio.Future[Any]") -> None:
        """Cancel without waiting: on a frozen server psycopg takes seconds to cancel a query."""

        def ended(task: "asyncio.Future[Any]") -> None:
            self._abandoned.discard(task)
            if not task.cancelled():
                task.exception()

        self._abandoned.add(task)
        task.add_done_callback(ended)
        task.cancel()
