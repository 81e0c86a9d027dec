"""Holes in PostgreSQL: rows of the table `holes`, written by the ingest process and read by anybody.

A write is absolute: of two versions of a hole the later one stays, and repeating a write changes nothing.
"""

from collections.abc import Iterable
from typing import Any

from marketflow.logs import RateLimit
from marketflow.model import Hole, HoleState, Mode, Series
from marketflow.stores.ports import HoleCounts, HoleQuery
from marketflow.stores.postgres.connections.reconnecting_connection import ReconnectingConnection
from marketflow.stores.postgres.rows import to_datetime, to_unix_ms
from marketflow.text import visible

HOLES_A_STATEMENT = 1000

MAX_ID = 10**40
"""Ids have fewer digits than this."""

MOST_REASON = 300
"""Length of a reason at most; it may quote a venue."""

_COLUMNS = """
exchange, pair_name, mode, after_id, before_id, from_time, to_time, state, reason, found_at, changed_at
"""

_UPSERT = f"""
insert into holes ({_COLUMNS})
select * from unnest(
    %s::text[], %s::text[], %s::text[], %s::numeric[], %s::numeric[], %s::timestamptz[], %s::timestamptz[],
    %s::text[], %s::text[], %s::timestamptz[], %s::timestamptz[]
)
on conflict (exchange, pair_name, mode, after_id) do update set
    before_id = excluded.before_id, from_time = excluded.from_time, to_time = excluded.to_time,
    state = excluded.state, reason = excluded.reason, changed_at = excluded.changed_at
where excluded.changed_at >= holes.changed_at
"""  # noqa: S608 - put together from constants

_OPEN = f"select {_COLUMNS} from holes where state = 'open' order by from_time, exchange, pair_name, after_id"  # noqa: S608

# Two parts, each by an index of its own: however many holes are on record, few are counted.
_COUNTS = """
select mode, exchange, pair_name, state, count(*) from holes where state = 'open'
group by mode, exchange, pair_name, state
union all
select mode, exchange, pair_name, state, count(*) from holes
where mode in ('test', 'live') and from_time >= now() - interval '24 hours' and state <> 'open'
group by mode, exchange, pair_name, state
"""

# Each part by an index. One that is found later than a day after its trades, and closed at once, is in neither.
FOUND_SINCE = f"""
select {_COLUMNS} from holes where state = 'open' and found_at >= %(since)s
union
select {_COLUMNS} from holes
where mode in ('test', 'live') and from_time >= now() - interval '24 hours' and found_at >= %(since)s
order by found_at, exchange, pair_name, after_id
"""  # noqa: S608 - put together from constants

_FILTERS = {
    "exchange": "exchange = %(exchange)s",
    "symbol": "pair_name = %(symbol)s",
    "state": "state = %(state)s",
    "since": "to_time >= %(since)s",
}


class PostgresHoles:
    """Writes holes; for one thread at a time. `counts` may be read by any.

    Args:
        keywords: of the connection, see connection_keywords.
    """

    def __init__(self, keywords: dict[str, Any]) -> None:
        self._connection = ReconnectingConnection(keywords)
        self.counts: HoleCounts = {}
        """Number of holes by series and state, as of the last call: all open ones, and others of the last 24 hours."""
        self._limit = RateLimit(60.0)

    def write(self, holes: Iterable[Hole]) -> None:
        """Store holes, each in place of an earlier version of itself.

        Raises:
            Unavailable: not written, or not confirmed; to be tried again with the same holes.
        """
        latest: dict[tuple[Series, int], Hole] = {}
        for hole in sorted(holes, key=lambda hole: hole.changed_at):
            if _is_valid(hole):
                latest[hole.series, hole.after_id] = hole
            else:  # one that no row can hold must not block the others
                self._limit.log("invalid", "ERROR", f"dropped a hole that is none, which is a bug: {hole}")
        # In the order of the key, so that two writers wait for each other instead of deadlocking.
        rows = [_row(latest[key]) for key in sorted(latest)]
        with self._connection.opened() as connection, connection.pinned():
            for begin in range(0, len(rows), HOLES_A_STATEMENT):
                columns = zip(*rows[begin : begin + HOLES_A_STATEMENT], strict=True)
                connection.execute(_UPSERT, [list(column) for column in columns])
            self._count(connection.execute(_COUNTS, binary=True).fetchall())

    def open_holes(self) -> list[Hole]:
        """The holes that are open, of both modes, the oldest first.

        Raises:
            Unavailable: PostgreSQL is down, or has no schema yet.
        """
        with self._connection.opened() as connection, connection.pinned():
            rows = connection.execute(_OPEN, binary=True).fetchall()
            self._count(connection.execute(_COUNTS, binary=True).fetchall())
        return [hole_of_row(row) for row in rows]

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _count(self, rows: list[tuple[Any, ...]]) -> None:
        counts: HoleCounts = {}
        for mode, exchange, symbol, state, count in rows:
            counts.setdefault(Series(Mode(mode), exchange, symbol), {})[HoleState(state)] = count
        self.counts = counts


def hole_query(wanted: HoleQuery) -> tuple[str, dict[str, Any]]:
    """The statement for some holes, the newest first, and its parameters."""
    given = {
        "exchange": wanted.exchange,
        "symbol": wanted.symbol,
        "state": wanted.state,
        "since": None if wanted.since is None else to_datetime(wanted.since),
    }
    conditions = ["mode = %(mode)s", *(_FILTERS[name] for name, value in given.items() if value is not None)]
    if wanted.unfilled:
        conditions.append("state <> 'filled'")
    order = "from_time desc, exchange, pair_name, after_id desc"
    text = f"select {_COLUMNS} from holes where {' and '.join(conditions)} order by {order} limit %(limit)s"  # noqa: S608
    return text, {**given, "mode": wanted.mode.value, "limit": wanted.limit}


def hole_of_row(row: tuple[Any, ...]) -> Hole:
    """The hole of a row of `_COLUMNS`."""
    exchange, symbol, mode, after_id, before_id, from_time, to_time, state, reason, found_at, changed_at = row
    return Hole(
        Series(Mode(mode), exchange, symbol),
        int(after_id),
        int(before_id),
        to_unix_ms(from_time),
        to_unix_ms(to_time),
        to_unix_ms(found_at),
        to_unix_ms(changed_at),
        HoleState(state),
        reason,
    )


def _is_valid(hole: Hole) -> bool:
    return -MAX_ID < hole.after_id < hole.before_id < MAX_ID and hole.from_ms <= hole.to_ms


def _row(hole: Hole) -> tuple[Any, ...]:
    return (
        hole.series.exchange,
        hole.series.symbol,
        hole.series.mode.value,
        hole.after_id,
        hole.before_id,
        to_datetime(hole.from_ms),
        to_datetime(hole.to_ms),
        hole.state.value,
        visible(hole.reason)[:MOST_REASON],
        to_datetime(hole.found_at),
        to_datetime(hole.changed_at),
    )
