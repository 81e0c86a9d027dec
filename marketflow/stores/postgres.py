"""The archive in PostgreSQL: minute rows, upserted by the flow on one connection and read by the API from a pool.

A commit whose answer is lost may have happened, so a row is written absolutely: the version with more ticks stays,
and repeating or reordering writes changes nothing. Rows go in the order of their key; two writers then wait for each
other instead of deadlocking. No wait is without end: a server that freezes without closing its connection is noticed
by its silence.
"""

import asyncio
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import psycopg
from loguru import logger
from psycopg.abc import PQGen
from psycopg_pool import AsyncConnectionPool

from marketflow.errors import Unavailable
from marketflow.model import Candle, Candles, Mode, Series, Slot, Tick
from marketflow.stores.schema import apply_ddl

_T = TypeVar("_T")

CONNECT_SECONDS = 2
ANSWER_SECONDS = 2.0
"""How long the writer waits for any one answer."""

# The server gives up as well, and sooner. Else each further try would leave another session that waits for the same
# lock, and one whose connection broke within a transaction would keep its rows locked until the kernel notices.
_SERVER_GIVES_UP = f"""
set statement_timeout = {ANSWER_SECONDS * 900:.0f};
set idle_in_transaction_session_timeout = {ANSWER_SECONDS * 1000:.0f}
"""

READ_SECONDS = 0.9
"""How long a request may wait for PostgreSQL in all."""

_UPSERT = """
insert into aggregates (
    pair_name, exchange, mode, timestamp, average_price, min_price, max_price, open_price, close_price, tick_count,
    open_at, close_at, min_at, max_at
)
select * from unnest(
    %s::text[], %s::text[], %s::text[], %s::timestamptz[],
    %s::float8[], %s::float8[], %s::float8[], %s::float8[], %s::float8[], %s::int8[],
    %s::timestamptz[], %s::timestamptz[], %s::timestamptz[], %s::timestamptz[]
)
on conflict (exchange, pair_name, mode, timestamp) do update set
    average_price = excluded.average_price, min_price = excluded.min_price, max_price = excluded.max_price,
    open_price = excluded.open_price, close_price = excluded.close_price, tick_count = excluded.tick_count,
    open_at = excluded.open_at, close_at = excluded.close_at, min_at = excluded.min_at, max_at = excluded.max_at
where excluded.tick_count > aggregates.tick_count
"""

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
"""

_RECENT = """
select mode, exchange, pair_name, timestamp, average_price * tick_count, tick_count, max_price, min_price,
       open_price, close_price, coalesce(open_at, timestamp), coalesce(close_at, timestamp),
       coalesce(max_at, timestamp), coalesce(min_at, timestamp)
from aggregates where timestamp >= %s
"""

_LAST = f"""
select close_price, coalesce(close_at, timestamp) from aggregates
where {_OF_SERIES} order by timestamp desc limit 1
"""


def connection_keywords(
    host: str, port: int, user: str, password: str, dbname: str, sslmode: str | None = None
) -> dict[str, Any]:
    """Keywords for a connection of either kind. Never a DSN: one that does not parse is printed with its password."""
    keywords = {
        "host": host,
        "port": port,
        "user": user,
        "password": password or None,
        "dbname": dbname,
        "sslmode": sslmode,
        "connect_timeout": CONNECT_SECONDS,
        "application_name": "marketflow",
    }
    return {name: value for name, value in keywords.items() if value is not None}


class _BoundedConnection(psycopg.Connection[Any]):
    """A connection that gives up on a server that does not answer."""

    def wait(self, gen: PQGen[_T], interval: float = 0.1, timeout: float | None = None) -> _T:
        try:
            return super().wait(gen, interval=interval, timeout=ANSWER_SECONDS if timeout is None else timeout)
        except psycopg.errors._WaitTimeout:
            self.pgconn.finish()  # what it is doing nobody knows; without this a rollback would wait once more
            raise psycopg.OperationalError(f"no answer within {ANSWER_SECONDS:g} s") from None


class PostgresArchive:
    """Writes minute rows; for one thread at a time.

    Args:
        keywords: of the connection, see connection_keywords.
        ddl: folder of the schema, applied on the first connection.
        batch_size: rows a statement.
    """

    def __init__(self, keywords: dict[str, Any], ddl: Path, batch_size: int) -> None:
        self._keywords = keywords
        self._ddl = ddl
        self._batch_size = batch_size
        self._connection: psycopg.Connection[Any] | None = None
        self._ready = False

    @property
    def available(self) -> bool:
        """Whether the last write got through."""
        return self._ready

    def write(self, minutes: Candles) -> None:
        """Upsert rows in one transaction; the fuller version of a row stays.

        Connects and brings the schema up to date when that is needed, without any rows as well.

        Raises:
            Unavailable: PostgreSQL is away or did not confirm. Writing the same rows again is right.
        """
        rows = sorted(minutes.items(), key=lambda item: (item[0].series.exchange, item[0].series.symbol, *item[0]))
        with self._connected() as connection:
            self._upsert(connection, rows)
        if not self._ready:
            self._ready = True
            logger.info("PostgreSQL is ready")

    def recent(self, since: int) -> Candles:
        """The rows of all minutes that start at `since` (Unix ms) or later.

        Raises:
            Unavailable: PostgreSQL is away.
        """
        with self._connected() as connection:
            rows = connection.execute(_RECENT, [_datetime(since)]).fetchall()
        return {
            Slot(Series(Mode(mode), exchange, symbol), _unix_ms(minute)): _candle((*amounts,))
            for mode, exchange, symbol, minute, *amounts in rows
        }

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            with suppress(psycopg.Error):
                self._connection.close()
            self._connection = None

    @contextmanager
    def _connected(self) -> "Iterator[psycopg.Connection[Any]]":
        """The connection, with the schema up to date; any error of psycopg ends it and becomes Unavailable."""
        try:
            if self._connection is None or self._connection.closed:
                self._connection = _BoundedConnection.connect(**self._keywords, autocommit=True)
                self._connection.execute(_SERVER_GIVES_UP)
            if not self._ready:
                apply_ddl(self._connection, self._ddl)
            yield self._connection
        except psycopg.Error as error:
            self.close()
            self._ready = False  # the database may come back as another one
            raise Unavailable(_reason(error)) from error

    def _upsert(self, connection: "psycopg.Connection[Any]", rows: list[tuple[Slot, Candle]]) -> None:
        with connection.transaction():
            remaining = iter(rows)
            while batch := list(islice(remaining, self._batch_size)):
                connection.execute(_UPSERT, _columns(batch))


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
        bounds = {"since": _datetime(since), "until": _datetime(until)}
        rows = await self._fetch([(_SUMMARY, {**_parameters(each), **bounds}) for each in series])
        return [None if row is None else _candle(row) for row in rows]

    async def last(self, series: Sequence[Series]) -> list[Tick | None]:
        """The close of the last minute of each series."""
        rows = await self._fetch([(_LAST, _parameters(each)) for each in series])
        return [None if row is None else Tick(row[0], _unix_ms(row[1]), 0) for row in rows]

    async def _fetch(self, queries: Iterable[tuple[str, dict[str, Any]]]) -> list[tuple[Any, ...] | None]:
        """The first row of each query."""

        async def ask() -> list[tuple[Any, ...] | None]:
            async with self._pool.connection(timeout=READ_SECONDS) as connection:
                cursors = [await connection.execute(query, parameters) for query, parameters in queries]
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
            raise Unavailable(_reason(error)) from error

    def _abandon(self, task: "asyncio.Future[Any]") -> None:
        """Cancel without waiting: on a frozen server psycopg takes seconds to give a query up."""

        def ended(task: "asyncio.Future[Any]") -> None:
            self._abandoned.discard(task)
            if not task.cancelled():
                task.exception()

        self._abandoned.add(task)
        task.add_done_callback(ended)
        task.cancel()


def _parameters(series: Series) -> dict[str, Any]:
    return {"mode": series.mode.value, "exchange": series.exchange, "symbol": series.symbol}


def _columns(rows: list[tuple[Slot, Candle]]) -> list[list[Any]]:
    return [
        list(column)
        for column in zip(
            *(
                (
                    slot.series.symbol,
                    slot.series.exchange,
                    slot.series.mode.value,
                    _datetime(slot.start),
                    candle.average,
                    candle.low,
                    candle.high,
                    candle.open,
                    candle.close,
                    candle.ticks,
                    _datetime(candle.first_at),
                    _datetime(candle.last_at),
                    _datetime(candle.low_at),
                    _datetime(candle.high_at),
                )
                for slot, candle in rows
            ),
            strict=True,
        )
    ]


def _candle(row: tuple[Any, ...]) -> Candle:
    total, ticks, high, low, opening, closing, *times = row
    first_at, last_at, high_at, low_at = map(_unix_ms, times)
    # Rows have no order of arrival; zero stands before every tick of the same millisecond.
    return Candle(opening, high, low, closing, total, ticks, first_at, last_at, high_at, low_at, 0, 0)


def _datetime(unix_ms: int) -> datetime:
    return datetime.fromtimestamp(unix_ms // 1000, UTC).replace(microsecond=unix_ms % 1000 * 1000)


def _unix_ms(moment: datetime) -> int:
    return int(moment.timestamp()) * 1000 + moment.microsecond // 1000


def _reason(error: psycopg.Error) -> str:
    """The first line of what psycopg says; the rest repeats it for every address of the host."""
    return next(iter(str(error).splitlines()), type(error).__name__)
