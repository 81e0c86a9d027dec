"""Minutes that are fetched from venues: stored beside the pipeline, with the times for which they are complete.

They do not pass through the backlog, which a year of them would flood: each write waits for PostgreSQL, on a connection
of its own, so that minutes of the ticks never wait for them. Nothing is read or written before the pipeline has begun
to write: it reads first what an earlier run has left, and would take these for it. Rows are in the order of their key,
as those of the pipeline, so that the two wait for each other instead of deadlocking.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS, Candles, Series, TimeRange
from marketflow.stores.postgres.rows import parameters, to_datetime, to_unix_ms
from marketflow.stores.postgres.writer import PostgresWriter

if TYPE_CHECKING:
    from marketflow.stores.postgres.connections.bounded_connection import BoundedConnection

ROWS_A_STATEMENT = 1000

_SERIES_A_READ = 1000

_INCOMPLETE = """
select wanted.number, lower(part), upper(part)
from unnest(%s::text[], %s::text[], %s::text[]) with ordinality as wanted (exchange, pair_name, mode, number)
left join history using (exchange, pair_name, mode)
cross join lateral unnest(tstzmultirange(tstzrange(%s, %s)) - coalesce(complete, '{}')) as part
"""

_PRESENT = """
select timestamp from aggregates
where exchange = %(exchange)s and pair_name = %(symbol)s and mode = %(mode)s
  and timestamp >= %(since)s and timestamp < %(until)s
"""

_COMPLETED = """
insert into history (exchange, pair_name, mode, complete)
values (%(exchange)s, %(symbol)s, %(mode)s, tstzmultirange(tstzrange(%(since)s, %(until)s)))
on conflict (exchange, pair_name, mode) do update set complete = history.complete + excluded.complete
"""


class FetchedMinutes(PostgresWriter):
    """Stores minutes of venues, and knows which ones are missing; for any number of threads.

    Args:
        keywords: of the connection, see connection_keywords.
        ddl: folder of the migrations.
        may_write: returns whether the pipeline writes to the archive. Otherwise it is unavailable here, too.
    """

    def __init__(self, keywords: dict[str, Any], ddl: Path, may_write: Callable[[], bool] = lambda: True) -> None:
        super().__init__(keywords, ddl, ROWS_A_STATEMENT)
        self._logged = True  # the pipeline's writer logs that PostgreSQL is ready
        self._may_write = may_write
        self._lock = threading.Lock()

    def incomplete(self, series: Iterable[Series], since: int, until: int) -> dict[Series, list[TimeRange]]:
        """The parts of a time range for which minutes of a series may be missing, in ascending order.

        Args:
            series: those without such parts are absent from the result.
            since: Unix ms.
            until: Unix ms.

        Raises:
            Unavailable: PostgreSQL is down.
        """
        wanted = sorted(series)
        found: dict[Series, list[TimeRange]] = {}
        with self._usable() as connection, connection.pinned():
            for begin in range(0, len(wanted), _SERIES_A_READ):
                some = wanted[begin : begin + _SERIES_A_READ]
                names = [[each.exchange for each in some], [each.symbol for each in some], [each.mode for each in some]]
                rows = connection.execute(_INCOMPLETE, [*names, to_datetime(since), to_datetime(until)], binary=True)
                for number, lower, upper in rows:
                    part = TimeRange(to_unix_ms(lower), to_unix_ms(upper))
                    found.setdefault(some[number - 1], []).append(part)
        return {each: sorted(parts) for each, parts in found.items()}

    def missing(self, series: Series, since: int, until: int) -> Sequence[int]:
        """The starts of the minutes of a series within a range that have no row, in ascending order.

        Raises:
            Unavailable: PostgreSQL is down.
        """
        span = {"since": to_datetime(since), "until": to_datetime(until)}
        with self._usable() as connection, connection.pinned():
            rows = connection.execute(_PRESENT, parameters(series) | span, binary=True)
            present = {to_unix_ms(minute) for (minute,) in rows}
        return [start for start in range(since, until, MINUTE_MS) if start not in present]

    def store(self, series: Series, minutes: Candles, complete: TimeRange | None) -> None:
        """Store minutes of a series, and then that a range of it is complete.

        Raises:
            Unavailable: not stored, or not confirmed; to be tried again.
        """
        span = (
            None if complete is None else {"since": to_datetime(complete.since), "until": to_datetime(complete.until)}
        )
        with self._usable() as connection:
            if minutes:
                self.write(minutes)
            if span is not None:
                with connection.pinned():
                    connection.execute(_COMPLETED, parameters(series) | span)

    @contextmanager
    def _usable(self) -> "Iterator[BoundedConnection]":
        if not self._may_write():
            raise Unavailable("the pipeline does not write to PostgreSQL now")
        with self._lock, self._connected() as connection:
            yield connection
            self._ready = True  # the schema is up to date
