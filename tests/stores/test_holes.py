"""Holes on a real PostgreSQL: stored, read, counted and deleted with their minutes."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import psycopg
import pytest

from marketflow.errors import Unavailable
from marketflow.model import Hole, HoleState, Mode, Series
from marketflow.resources import resource
from marketflow.stores.ports import HoleQuery
from marketflow.stores.postgres.holes import PostgresHoles
from marketflow.stores.postgres.reader import PostgresReader
from marketflow.stores.postgres.retention import Retention
from marketflow.stores.postgres.rows import DAY_MS, connection_keywords
from marketflow.stores.postgres.writer import PostgresWriter
from tests.stores.test_retention import DAY, NOW, minutes, roll_up
from tests.support.market import BTC, ETH, MINUTE

BIG_ID = 2**70
"""More than a bigint holds, as the ids of some venues are."""


def hole(after_id: int = 10, series: Series = BTC, at: int = MINUTE, **changes: Any) -> Hole:
    given = {"before_id": after_id + 5, "from_ms": at, "to_ms": at + 1500, "found_at": at + 2000}
    return Hole(series, after_id, **{"changed_at": at + 2000, **given, **changes})


def filled(one: Hole, reason: str = "3 trades by REST") -> Hole:
    return hole(
        one.after_id, one.series, one.from_ms, changed_at=one.changed_at + 1, state=HoleState.FILLED, reason=reason
    )


@pytest.fixture
def place(postgres_db: dict[str, Any]) -> dict[str, Any]:
    """A database with the schema."""
    with closing(PostgresWriter(connection_keywords(**postgres_db), resource("ddl"), 10)) as archive:
        archive.write({})
    return postgres_db


@pytest.fixture
def store(place: dict[str, Any]) -> Iterator[PostgresHoles]:
    with closing(PostgresHoles(connection_keywords(**place))) as holes:
        yield holes


def read(place: dict[str, Any], **wanted: Any) -> list[Hole]:
    async def ask() -> list[Hole]:
        reader = PostgresReader(connection_keywords(**place))
        await reader.open()
        try:
            return await reader.holes(HoleQuery(**{"mode": Mode.LIVE, "limit": 100, **wanted}))
        finally:
            await reader.close()

    return asyncio.run(ask())


def test_holes_are_read_as_they_were_written(store: PostgresHoles, place: dict[str, Any]) -> None:
    first, second = hole(1), hole(BIG_ID, at=MINUTE + 7, reason="17 trades\nmissing\0")
    store.write([first, second])
    newest, oldest = read(place)
    assert oldest == first
    assert newest == hole(BIG_ID, at=MINUTE + 7, reason="17 trades\nmissing\\x00")
    assert store.open_holes() == [oldest, newest]


def test_later_version_of_a_hole_stays(store: PostgresHoles, place: dict[str, Any]) -> None:
    store.write([hole()])
    store.write([filled(hole()), hole()])
    store.write([hole()])
    assert read(place) == [filled(hole())]
    assert store.open_holes() == []


def test_ids_of_two_series_or_modes_are_apart(store: PostgresHoles, place: dict[str, Any]) -> None:
    store.write([hole(), hole(series=ETH), hole(series=BTC._replace(mode=Mode.TEST))])
    assert [each.series for each in read(place)] == [BTC, ETH]
    assert [each.series.mode for each in read(place, mode=Mode.TEST)] == [Mode.TEST]


@pytest.mark.parametrize(
    ("wanted", "ids"),
    [
        ({}, [5, 3, 2, 1]),
        ({"limit": 2}, [5, 3]),
        ({"exchange": "exchange1"}, [5, 2, 1]),
        ({"symbol": "ETHUSDT"}, [3]),
        ({"state": HoleState.OPEN}, [5, 3, 1]),
        ({"since": MINUTE + 3500}, [5, 3, 2]),
        ({"exchange": "exchange1", "state": HoleState.FILLED, "since": MINUTE + 9000}, []),
    ],
)
def test_holes_are_found_by_all_filters(
    store: PostgresHoles, place: dict[str, Any], wanted: dict[str, Any], ids: list[int]
) -> None:
    at = {number: MINUTE + 1000 * number for number in (1, 2, 3, 5)}
    store.write([hole(1, at=at[1]), hole(3, ETH, at[3]), filled(hole(2, at=at[2])), hole(5, at=at[5])])
    assert [each.after_id for each in read(place, **wanted)] == ids


def test_counts_are_by_series_and_state(store: PostgresHoles) -> None:
    now = time.time_ns() // 1_000_000
    store.write([hole(1), hole(2, at=now), filled(hole(3, at=now)), filled(hole(4)), hole(5, ETH, now)])
    counted = {BTC: {HoleState.OPEN: 2, HoleState.FILLED: 1}, ETH: {HoleState.OPEN: 1}}
    assert store.counts == counted
    store.counts = {}
    store.open_holes()
    assert store.counts == counted


def test_invalid_hole_does_not_block_the_others(store: PostgresHoles, place: dict[str, Any]) -> None:
    store.write([hole(1, before_id=1), hole(2, to_ms=MINUTE - 1), hole(10**41), hole(4)])
    assert [each.after_id for each in read(place)] == [4]


def test_holes_need_the_schema(postgres_db: dict[str, Any]) -> None:
    with closing(PostgresHoles(connection_keywords(**postgres_db))) as store, pytest.raises(Unavailable):
        store.open_holes()
    with pytest.raises(Unavailable):
        read(postgres_db)


def test_holes_expire_with_their_minutes(store: PostgresHoles, place: dict[str, Any]) -> None:
    with closing(PostgresWriter(connection_keywords(**place), resource("ddl"), 200)) as archive:
        for day in range(10):
            archive.write(minutes(day))
    store.write([hole(day, at=DAY + day * DAY_MS) for day in range(10)])
    store.write([hole(100, at=DAY + 6 * DAY_MS - 1000)])  # ends in a day that stays
    roll_up(place, Retention(minutes_days=4), NOW)
    assert sorted(each.after_id for each in read(place)) == [6, 7, 8, 9, 100]


def test_readers_of_minutes_may_read_holes(place: dict[str, Any]) -> None:
    """A role that was given its rights before the table was made."""
    with psycopg.connect(**place, autocommit=True) as owner:
        name = f"reader_of_{place['dbname']}"
        owner.execute(f"create role {name}")
        try:
            owner.execute(f"grant select on aggregates to {name}; drop table holes")
            owner.execute((resource("ddl") / "0009_holes.sql").read_text())
            rights = owner.execute(
                "select privilege from unnest(array['select', 'insert', 'update', 'delete']) as each (privilege)"
                " where has_table_privilege(%s, 'holes', privilege)",
                [name],
            ).fetchall()
        finally:
            owner.execute(f"drop owned by {name}; drop role {name}")
    assert rights == [("select",)]
