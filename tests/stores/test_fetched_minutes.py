"""Minutes that are fetched from venues, on a real PostgreSQL: what is missing, what is stored, what replaces what."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Any

import pytest

from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS, Amounts, Candle, Candles, Mode, Slot, TimeRange
from marketflow.resources import resource
from marketflow.stores.postgres.fetched.fetched_minutes import FetchedMinutes
from marketflow.stores.postgres.rollups import PostgresRollups
from marketflow.stores.postgres.rows import DAY_MS, connection_keywords
from marketflow.stores.postgres.writer import PostgresWriter
from tests.support.market import BTC, ETH, MINUTE

YEAR_MS = 366 * DAY_MS


def theirs(start: int, ticks: int = 0, price: float = 10.0) -> Candle:
    """A minute as it is made of the venue's own candle."""
    last, amounts = start + MINUTE_MS - 1, Amounts(2.0, None, None, None)
    total = price * ticks
    return Candle(
        price, price + 1, price - 1, price, total, ticks, start, last, start, start, 0, 0, 1, amounts, "venue"
    )


def of_ticks(start: int, ticks: int) -> Candle:
    return Candle(10.0, 12.0, 9.0, 11.0, 10.5 * ticks, ticks, start, start + 5, start + 1, start + 2, 0, 0)


def minutes(*candles: Candle) -> Candles:
    return {Slot(BTC, each.first_at): each for each in candles}


@pytest.fixture
def place(postgres_db: dict[str, Any]) -> dict[str, Any]:
    return connection_keywords(**postgres_db)


@pytest.fixture
def store(place: dict[str, Any]) -> Iterator[FetchedMinutes]:
    with closing(FetchedMinutes(place, resource("ddl"))) as fetched:
        yield fetched


@pytest.fixture
def archive(place: dict[str, Any]) -> Iterator[PostgresWriter]:
    """The archive as the pipeline writes it."""
    with closing(PostgresWriter(place, resource("ddl"), 200)) as writer:
        yield writer


def at(number: int) -> int:
    return MINUTE + number * MINUTE_MS


def test_all_is_missing_of_a_new_series(store: FetchedMinutes) -> None:
    assert store.incomplete([BTC, ETH], at(0), at(3)) == {
        BTC: [TimeRange(at(0), at(3))],
        ETH: [TimeRange(at(0), at(3))],
    }
    assert store.missing(BTC, at(0), at(3)) == [at(0), at(1), at(2)]


def test_minutes_that_are_stored_are_not_missing(store: FetchedMinutes, archive: PostgresWriter) -> None:
    archive.write(minutes(of_ticks(at(1), 3)))
    store.store(BTC, minutes(theirs(at(3))), None)
    assert store.missing(BTC, at(0), at(5)) == [at(0), at(2), at(4)]
    assert store.missing(BTC._replace(mode=Mode.TEST), at(1), at(2)) == [at(1)]
    assert store.incomplete([BTC], at(0), at(5)) == {BTC: [TimeRange(at(0), at(5))]}


def test_complete_ranges_add_up_in_any_order(store: FetchedMinutes) -> None:
    for since, until in ((6, 8), (1, 3), (2, 4)):
        store.store(BTC, {}, TimeRange(at(since), at(until)))
    found = store.incomplete([ETH, BTC], at(0), at(10))
    assert found[BTC] == [TimeRange(at(0), at(1)), TimeRange(at(4), at(6)), TimeRange(at(8), at(10))]
    assert found[ETH] == [TimeRange(at(0), at(10))]
    store.store(BTC, {}, TimeRange(at(0), at(10)))
    assert store.incomplete([BTC], at(0), at(10)) == {}
    assert store.incomplete([BTC._replace(mode=Mode.TEST)], at(0), at(1)) != {}


def test_range_of_years_is_answered_in_one_piece(store: FetchedMinutes) -> None:
    since = MINUTE - YEAR_MS
    store.store(BTC, {}, TimeRange(at(-10), at(0)))
    assert store.incomplete([BTC], since, at(0)) == {BTC: [TimeRange(since, at(-10))]}


def test_fetched_minutes_are_rows_of_the_venue(store: FetchedMinutes, archive: PostgresWriter) -> None:
    written = minutes(theirs(at(0)), theirs(at(1), ticks=7))
    store.store(BTC, written, TimeRange(at(0), at(2)))
    assert archive.recent([BTC], at(0)) == written


@pytest.mark.parametrize(("ticks", "stays"), [(3, "ticks"), (4, "ticks"), (5, "venue")])
def test_fetched_minute_replaces_only_a_poorer_row(
    store: FetchedMinutes, archive: PostgresWriter, ticks: int, stays: str
) -> None:
    archive.write(minutes(of_ticks(at(0), 4)))
    store.store(BTC, minutes(theirs(at(0), ticks)), None)
    found = archive.recent([BTC], at(0))[Slot(BTC, at(0))]
    assert found.source == stays


@pytest.mark.parametrize("ticks", [0, 4])
def test_row_of_ticks_replaces_a_fetched_minute(store: FetchedMinutes, archive: PostgresWriter, ticks: int) -> None:
    store.store(BTC, minutes(theirs(at(0), ticks)), None)
    archive.write(minutes(of_ticks(at(0), 4)))
    found = archive.recent([BTC], at(0))[Slot(BTC, at(0))]
    assert (found.source, found.ticks, found.close) == ("ticks", 4, 11.0)


def test_fetched_minutes_of_the_past_are_rolled_up(store: FetchedMinutes, place: dict[str, Any]) -> None:
    today = MINUTE // DAY_MS * DAY_MS
    with closing(PostgresRollups(place)) as rollups:
        store.store(BTC, {}, None)
        store.store(BTC, minutes(theirs(today - DAY_MS, 3)), None)
        while rollups.roll_up(today + DAY_MS // 2):
            pass
        store.store(BTC, minutes(*(theirs(today - 30 * DAY_MS + n * MINUTE_MS, 3) for n in range(5))), None)
        while rollups.roll_up(today + DAY_MS // 2):
            pass
    with store._connected() as connection:
        rows = connection.execute("select tick_count, hourly from aggregates_daily order by timestamp").fetchall()
    assert rows == [(15, True), (3, True)]


def test_nothing_is_used_before_the_pipeline_writes(place: dict[str, Any]) -> None:
    writes = False
    with closing(FetchedMinutes(place, resource("ddl"), lambda: writes)) as store:
        for use in (
            lambda: store.store(BTC, minutes(theirs(at(0))), TimeRange(at(0), at(1))),
            lambda: store.missing(BTC, at(0), at(1)),
            lambda: store.incomplete([BTC], at(0), at(1)),
        ):
            with pytest.raises(Unavailable):
                use()
        writes = True
        assert store.missing(BTC, at(0), at(1)) == [at(0)]


def test_threads_share_the_store(store: FetchedMinutes, archive: PostgresWriter) -> None:
    archive.write({})

    def fetch(number: int) -> None:
        series = BTC._replace(symbol=f"S{number}")
        for minute in range(10):
            candle = theirs(at(minute))
            store.store(series, {Slot(series, at(minute)): candle}, TimeRange(at(minute), at(minute + 1)))

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(fetch, range(5)))
    series = [BTC._replace(symbol=f"S{number}") for number in range(5)]
    assert store.incomplete(series, at(0), at(10)) == {}
    assert len(archive.recent(series, at(0))) == 50


def test_store_is_usable_after_an_outage(store: FetchedMinutes, place: dict[str, Any]) -> None:
    store.store(BTC, minutes(theirs(at(0))), None)
    with store._connected() as connection:
        pid = connection.info.backend_pid
    with closing(PostgresWriter(place, resource("ddl"), 1)) as other, other._connected() as connection:
        connection.execute("select pg_terminate_backend(%s)", [pid])
    with suppress(Unavailable):
        store.missing(BTC, at(0), at(1))
    assert store.missing(BTC, at(0), at(2)) == [at(1)]
