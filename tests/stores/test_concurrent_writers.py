"""Several writers at once: processes that share the exchanges, a standby that takes over, and the history of venues."""

import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Barrier
from typing import Any

import psycopg

from marketflow.model import MINUTE_MS, Candle, Candles, Mode, Series, Slot
from marketflow.resources import resource
from marketflow.stores.postgres.rollups import PostgresRollups
from marketflow.stores.postgres.rows import DAY_MS, connection_keywords
from marketflow.stores.postgres.writer import PostgresWriter
from tests.support.servers import wait_until

DAY = 1_763_683_200_000  # midnight, UTC
SERIES = [Series(Mode.LIVE, f"exchange{n % 3}", f"SYMBOL{n:02}") for n in range(90)]
ROUNDS = 12


def candle(start: int, ticks: int) -> Candle:
    return Candle(2, 3, 1, 2, 2.0 * ticks, ticks, start, start, start, start, 0, 0)


def minutes(ticks: int, days: int = 2) -> Candles:
    starts = [DAY + day * DAY_MS + n * MINUTE_MS for day in range(days) for n in range(5)]
    return {Slot(series, start): candle(start, ticks) for series in SERIES for start in starts}


def some_of(rows: Candles, seed: int) -> Candles:
    """Every series with few of its minutes: a writer that is behind another one can still get ahead of it."""
    return {slot: rows[slot] for slot in random.Random(seed).sample([*rows], len(rows) // 4)}


def roll_up(keywords: dict[str, Any]) -> None:
    with closing(PostgresRollups(keywords)) as days:
        while days.roll_up(DAY + DAY_MS + 60 * MINUTE_MS):
            pass


def waiting(user: "psycopg.Connection[Any]") -> int:
    """The number of sessions that wait for a lock."""
    query = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
    row = user.execute(query).fetchone()
    assert row is not None
    return int(row[0])


def test_writers_of_a_rolled_up_day_do_not_deadlock(postgres_db: dict[str, Any]) -> None:
    """One has marked the day and comes to a minute that the other has written, which wants to mark the day."""
    keywords = connection_keywords(**postgres_db)
    series = SERIES[0]
    starts = [DAY + n * MINUTE_MS for n in range(3)]
    with closing(PostgresWriter(keywords, resource("ddl"), 200)) as archive:
        archive.write({Slot(series, start): candle(start, 1) for start in starts})
    roll_up(keywords)

    def write(minutes: list[int], batch_size: int) -> int:
        with closing(PostgresWriter(keywords, resource("ddl"), batch_size)) as archive:
            return archive.write({Slot(series, start): candle(start, 2) for start in minutes})

    with (
        psycopg.connect(**postgres_db, autocommit=True) as user,
        psycopg.connect(**postgres_db) as blocking,
        ThreadPoolExecutor(2) as pool,
    ):
        blocking.execute("select from aggregates where timestamp = '2025-11-21 00:01Z' for update")
        first = pool.submit(write, starts, 1)
        wait_until(lambda: waiting(user) == 1)
        second = pool.submit(write, starts[2:], 1)
        wait_until(lambda: waiting(user) == 2)
        blocking.rollback()
        assert first.result() == second.result() == 0
        assert user.execute("select tick_count from aggregates").fetchall() == [(2,)] * 3


def test_overlapping_writers_store_the_more_complete_rows(postgres_db: dict[str, Any]) -> None:
    """Of days that are rolled up and of others, at once, each with batches of another size."""
    keywords = connection_keywords(**postgres_db)
    with closing(PostgresWriter(keywords, resource("ddl"), 200)) as archive:
        archive.write(minutes(1, 1))
    roll_up(keywords)
    together = Barrier(3)
    batch_sizes = (3, 7, 40)

    def write(batch_size: int) -> None:
        with closing(PostgresWriter(keywords, resource("ddl"), batch_size)) as archive:
            for ticks in range(2, 2 + ROUNDS):
                together.wait(30.0)
                assert archive.write(some_of(minutes(ticks), ticks * batch_size)) == 0

    with ThreadPoolExecutor(3) as pool:
        for result in [pool.submit(write, batch_size) for batch_size in batch_sizes]:
            result.result()
    expected = dict.fromkeys(minutes(1, 1), 1)
    for ticks in range(2, 2 + ROUNDS):
        for batch_size in batch_sizes:
            expected |= dict.fromkeys(some_of(minutes(ticks), ticks * batch_size), ticks)
    with psycopg.connect(**postgres_db, autocommit=True) as user:
        rows = user.execute(
            "select exchange, pair_name, (date_part('epoch', timestamp) * 1000)::int8, tick_count from aggregates"
        )
        assert {Slot(Series(Mode.LIVE, *row[:2]), row[2]): row[3] for row in rows} == expected
