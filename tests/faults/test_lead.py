"""Roll-up and retention of three ingest processes: the leader does both, and another one after its death."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from marketflow.resources import resource
from marketflow.stores.postgres.rows import connection_keywords
from marketflow.stores.postgres.writer import PostgresWriter
from tests.faults.test_shared_alerts import wait_until_spread
from tests.support.application import ScriptedExchange
from tests.support.roles import IngestProcess, Roles, stop_all
from tests.support.servers import RedisServer, wait_until

DAYS = 25
KEPT_DAYS = 7

# Thirds and eighths add up exactly.
MINUTES = f"""
insert into aggregates (
    pair_name, exchange, mode, timestamp, average_price, min_price, max_price, open_price, close_price, tick_count
)
select symbol, exchange, 'live', minute, price + 4, price, price + 8, price + 2, price + 6, 1 + n %% 4
from unnest(%(exchanges)s::text[]) as exchange, unnest(%(symbols)s::text[]) as symbol,
     generate_series(0, {DAYS} * 1440 - 1) as n,
     lateral (
        select date_trunc('day', now(), 'UTC') - interval '{DAYS + 1} days' + n * interval '1 minute' as minute,
               100 + (n * 7919 + length(exchange) * 31 + ascii(symbol)) %% 1009 as price
     ) as values
"""  # noqa: S608 - put together from constants

# Independent of the product's: by arrays in the order of time.
CANDLES = """
select exchange, pair_name, mode, date_bin(interval '1 %(unit)s', timestamp, '2000-01-01 00:00:00+00') as start,
       min(min_price), max(max_price), (array_agg(open_price order by timestamp))[1],
       (array_agg(close_price order by timestamp desc))[1], sum(tick_count)::int8,
       round((sum(average_price * tick_count) / sum(tick_count))::numeric, 9)
from all_minutes group by 1, 2, 3, 4 order by 1, 2, 3, 4
"""
STORED = """
select exchange, pair_name, mode, timestamp, min_price, max_price, open_price, close_price, tick_count,
       round(average_price::numeric, 9)
from %(table)s order by 1, 2, 3, 4
"""

# Counted back from the end of the last day with minutes.
DUE = f"""
select count(*) from all_minutes
where timestamp < (select max(timestamp) from all_minutes) + interval '1 minute' - interval '{KEPT_DAYS} days'
"""  # noqa: S608
GONE = """
select count(*) from all_minutes left join aggregates using (exchange, pair_name, mode, timestamp)
where aggregates.tick_count is null
"""

WORKING = """
select client_port from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() and query ~
'(insert into aggregates_hourly|for update skip locked|update aggregates_rolled_until|delete from aggregates)'
"""


def ports_of(process: IngestProcess) -> set[int]:
    """The local TCP ports of the connections of a process; none once it has ended."""
    inodes = set()
    with suppress(OSError):
        for link in Path(f"/proc/{process.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                inodes.add(str(link.readlink()).removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(row[1].partition(":")[2], 16) for row in rows if row[9] in inodes}


class Workers:
    """Which processes are seen at the roll-up or the retention, as long as it lasts; looks 50 times a second."""

    def __init__(self, place: dict[str, Any], processes: Sequence[IngestProcess]) -> None:
        self._place, self._processes = place, processes
        self._ended = threading.Event()
        self.seen: list[frozenset[int]] = []
        """The numbers of the processes, one item each time that some were seen."""

    @contextmanager
    def watched(self) -> Iterator["Workers"]:
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            thread.join(10)

    def _watch(self) -> None:
        with psycopg.connect(**self._place, autocommit=True) as connection:
            while not self._ended.wait(0.02):
                ports = {port for (port,) in connection.execute(WORKING)}
                working = [n for n, each in enumerate(self._processes) if ports & ports_of(each)]
                if working:
                    self.seen.append(frozenset(working))


@pytest.fixture
def history(postgres_db: dict[str, Any]) -> Iterator["psycopg.Connection[Any]"]:
    """A connection to a database with minutes of weeks, which no process has rolled up."""
    with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 10)) as archive:
        archive.write({})
    symbols = ["BTCUSDT", "ETHUSDT", "SOLUSDT", "TONUSDT"]
    with psycopg.connect(**postgres_db, autocommit=True) as connection:
        connection.execute(MINUTES, {"exchanges": ["exchange1", "exchange2", "exchange3"], "symbols": symbols})
        connection.execute("create table all_minutes as select * from aggregates")
        connection.execute("analyze")
        yield connection


def candles(connection: "psycopg.Connection[Any]", query: str, **names: str) -> list[tuple[Any, ...]]:
    return connection.execute(query % names).fetchall()


@pytest.mark.timeout(480)
def test_roll_up_and_retention_are_done_once_and_go_on_after_sigkill(
    roles: Roles,
    broadcasting: list[ScriptedExchange],
    redis_db: RedisServer,
    postgres_db: dict[str, Any],
    history: "psycopg.Connection[Any]",
    record_property: Callable[[str, object], None],
) -> None:
    roles.settings["ARCHIVE__KEEP_MINUTES"] = f"{KEPT_DAYS}d"
    processes = [roles.ingest() for _ in range(3)]
    wait_until_spread(redis_db, processes)
    total = 12 * DAYS

    def rolled_up() -> int:
        (count,) = history.execute("select count(*) from aggregates_daily where hourly").fetchone() or (0,)
        return int(count)

    with Workers(postgres_db, processes).watched() as workers:
        wait_until(lambda: workers.seen and rolled_up() > total * 0.1, timeout=120)
        (killed,) = workers.seen[-1]
        processes[killed].kill()
        killed_at, of_killed, at_kill = time.monotonic(), len(workers.seen), rolled_up()
        wait_until(lambda: len(workers.seen) > of_killed + 1 and rolled_up() > at_kill, timeout=120)
        record_property("seconds until another process goes on", time.monotonic() - killed_at)
        wait_until(lambda: rolled_up() == total, timeout=120)
        (due,) = history.execute(DUE).fetchone() or (0,)
        assert due == 12 * 1440 * (DAYS - KEPT_DAYS)
        wait_until(lambda: history.execute(GONE).fetchone() == (due,), timeout=120)
    assert at_kill < total * 0.9, "it was killed too late"
    assert {n for each in workers.seen[:of_killed] for n in each} == {killed}
    after = [each - {killed} for each in workers.seen[of_killed + 1 :]]
    # On a busy machine the one that goes on may be replaced, too, and finish its step meanwhile; they do not alternate.
    assert len([each for each, _ in itertools.groupby(after)]) <= 3, after
    assert candles(history, STORED, table="aggregates_daily") == candles(history, CANDLES, unit="day")
    assert candles(history, STORED, table="aggregates_hourly") == candles(history, CANDLES, unit="hour")
    stop_all(*(each for n, each in enumerate(processes) if n != killed))
