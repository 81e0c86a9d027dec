"""What was traded, in Redis and PostgreSQL: written, read back, rolled up, and replaced by better versions."""

import asyncio
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from marketflow.model import MINUTE_MS, Amounts, Candle, Candles, Mode, Series, Slot, VenueValues
from marketflow.resources import resource
from marketflow.stores.ports import CandleRange
from marketflow.stores.postgres.reader import PostgresReader
from marketflow.stores.postgres.rollups import PostgresRollups
from marketflow.stores.postgres.rows import DAY_MS, HOUR_MS, connection_keywords
from marketflow.stores.postgres.writer import PostgresWriter
from marketflow.stores.redis import codec

SERIES = Series(Mode.LIVE, "binance", "BTCUSDT")
DAY = 1_763_683_200_000
WHOLE = Amounts(3.0, 30.0, 1.0, 11.0)


def candle(start: int, ticks: int = 2, amounts: Amounts | None = WHOLE, **more: Any) -> Candle:
    return Candle(
        10.0, 12.0, 9.0, 11.0, 10.5 * ticks, ticks, start, start + 5, start + 1, start + 2, 0, 0, 1, amounts, **more
    )


@dataclass
class Archive:
    writer: PostgresWriter
    rollups: PostgresRollups
    keywords: dict[str, Any]

    def write(self, *candles: Candle) -> None:
        minutes: Candles = {Slot(SERIES, each.first_at): each for each in candles}
        assert self.writer.write(minutes) == 0

    def roll_up(self) -> None:
        while self.rollups.roll_up(DAY + 2 * DAY_MS):
            pass

    def candles(self, length_ms: int) -> dict[int, Candle]:
        async def read() -> dict[int, Candle]:
            reader = PostgresReader(self.keywords)
            await reader.open()
            try:
                (found,) = await reader.candles([SERIES], CandleRange(length_ms, DAY, DAY + DAY_MS, 1000, newest=False))
                return found
            finally:
                await reader.close()

        return asyncio.run(read())

    def minute(self, start: int = DAY) -> Candle:
        return self.writer.recent([SERIES], DAY)[Slot(SERIES, start)]


@pytest.fixture
def archive(postgres_db: dict[str, Any]) -> Iterator[Archive]:
    keywords = connection_keywords(**postgres_db)
    with (
        closing(PostgresWriter(keywords, resource("ddl"), 200)) as writer,
        closing(PostgresRollups(keywords)) as rollups,
    ):
        writer.write({})
        yield Archive(writer, rollups, keywords)


def test_row_has_all_that_a_candle_has(archive: Archive) -> None:
    venue = VenueValues(10.0, 12.5, 9.0, 11.0, 3.1, None, 7)
    written = candle(DAY, verified=False, venue=venue)
    archive.write(written)
    assert archive.minute() == written
    assert archive.candles(MINUTE_MS)[DAY].amounts == WHOLE


def test_query_has_the_venue_s_values_of_single_minutes(archive: Archive) -> None:
    venue = VenueValues(10.0, 12.5, 9.0, 11.0, 3.1, None, 7)
    archive.write(candle(DAY, verified=False, venue=venue), candle(DAY + MINUTE_MS, verified=True))
    archive.write(candle(DAY + HOUR_MS))
    minutes = archive.candles(MINUTE_MS)
    assert [minutes[DAY + at].venue for at in (0, MINUTE_MS, HOUR_MS)] == [venue, None, None]
    for length in (5 * MINUTE_MS, HOUR_MS, DAY_MS):
        found = archive.candles(length)[DAY]
        assert (found.verified, found.venue) == (False, None)


@pytest.mark.parametrize("rolled_up", [False, True])
@pytest.mark.parametrize("length", [MINUTE_MS * 5, HOUR_MS, DAY_MS])
def test_amounts_of_longer_candles_are_sums(archive: Archive, length: int, rolled_up: bool) -> None:
    archive.write(*(candle(DAY + n * MINUTE_MS) for n in range(4)))
    if rolled_up:
        archive.roll_up()
    found = archive.candles(length)[DAY]
    assert found.amounts == Amounts(12.0, 120.0, 4.0, 44.0)
    assert (found.ticks, found.average, found.source, found.verified) == (8, 10.5, "ticks", None)


@pytest.mark.parametrize("rolled_up", [False, True])
@pytest.mark.parametrize("length", [MINUTE_MS * 5, HOUR_MS, DAY_MS])
@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (None, None),
        (Amounts(1.0, None, None, None), Amounts(4.0, None, None, None)),
        (Amounts(1.0, 9.0, None, None), Amounts(4.0, 39.0, None, None)),
    ],
)
def test_unknown_amount_of_a_minute_makes_the_sum_unknown(
    archive: Archive, length: int, rolled_up: bool, other: Amounts | None, expected: Amounts | None
) -> None:
    archive.write(candle(DAY), candle(DAY + MINUTE_MS, amounts=other))
    if rolled_up:
        archive.roll_up()
    assert archive.candles(length)[DAY].amounts == expected


@pytest.mark.parametrize("length", [MINUTE_MS * 5, HOUR_MS, DAY_MS])
@pytest.mark.parametrize("rolled_up", [False, True])
def test_candle_of_the_venue_without_a_count_adds_no_ticks(archive: Archive, length: int, rolled_up: bool) -> None:
    theirs = Candle(8.0, 20.0, 7.0, 9.0, 0.0, 0, DAY, DAY, DAY, DAY, 0, 0, 1, Amounts(1.0, 8.0, None, None), "venue")
    archive.write(theirs, candle(DAY + MINUTE_MS))
    if rolled_up:
        archive.roll_up()
    found = archive.candles(length)[DAY]
    assert (found.open, found.high, found.low, found.close) == (8.0, 20.0, 7.0, 11.0)
    assert (found.ticks, found.average, found.source) == (2, 10.5, "venue")
    assert found.amounts == Amounts(4.0, 38.0, None, None)


def test_candle_of_the_venue_alone_has_no_average(archive: Archive) -> None:
    archive.write(Candle(8.0, 8.5, 7.0, 8.0, 0.0, 0, DAY, DAY, DAY, DAY, 0, 0, 1, None, "venue"))
    for rolled_up in (False, True):
        if rolled_up:
            archive.roll_up()
        for length in (MINUTE_MS, HOUR_MS, DAY_MS):
            found = archive.candles(length)[DAY]
            assert (found.ticks, found.average, found.source) == (0, None, "venue")


def test_row_of_ticks_replaces_the_venue_s_and_never_the_other_way_round(archive: Archive) -> None:
    theirs = candle(DAY, ticks=5, source="venue")
    archive.write(theirs)
    archive.write(candle(DAY, ticks=5, amounts=Amounts(4.0, 40.0, 1.0, 10.0)))
    assert archive.minute().source == "ticks"
    archive.write(theirs)
    assert archive.minute().source == "ticks"


def test_verification_is_kept_and_raises_no_version(archive: Archive) -> None:
    archive.write(candle(DAY))
    archive.write(candle(DAY, verified=True))
    archive.write(candle(DAY))
    assert (archive.minute().verified, archive.minute().version) == (True, 1)
    archive.write(candle(DAY, ticks=3))
    assert archive.minute().verified is None


def test_verification_of_a_corrected_row_keeps_its_version(archive: Archive) -> None:
    """What corrects or verifies an old minute was made without the row, and has the first version itself."""
    archive.write(candle(DAY))
    archive.write(candle(DAY, ticks=3))
    assert archive.minute().version == 2
    archive.write(candle(DAY, ticks=3, verified=True))
    assert (archive.minute().verified, archive.minute().version) == (True, 2)


def test_longer_candle_is_verified_if_all_its_minutes_are(archive: Archive) -> None:
    archive.write(
        candle(DAY, verified=True), candle(DAY + MINUTE_MS, verified=True), candle(DAY + HOUR_MS, verified=True)
    )
    archive.write(candle(DAY + HOUR_MS + MINUTE_MS), candle(DAY + 2 * HOUR_MS, verified=False))
    for rolled_up in (False, True):
        if rolled_up:
            archive.roll_up()
        hours = archive.candles(HOUR_MS)
        assert [hours[DAY + n * HOUR_MS].verified for n in range(3)] == [True, None, False]


def test_volume_changed_by_hand_reaches_the_day(archive: Archive) -> None:
    archive.write(candle(DAY))
    archive.roll_up()
    with psycopg.connect(
        **{
            key: value
            for key, value in archive.keywords.items()
            if key in ("host", "port", "user", "dbname", "password")
        }
    ) as user:
        user.execute("update aggregates set volume = 7")
    archive.roll_up()
    found = archive.candles(DAY_MS)[DAY]
    assert (found.amounts, found.version) == (Amounts(7.0, 30.0, 1.0, 11.0), 2)


@pytest.mark.parametrize(
    "each",
    [
        candle(DAY),
        Candle(10.0, 10.0, 10.0, 10.0, 10.0, 1, DAY, DAY, DAY, DAY, 7, 7, 1, Amounts(2.0, 20.0, 2.0, 20.0)),
        Candle(10.0, 10.0, 10.0, 10.0, 10.0, 1, DAY, DAY, DAY, DAY, 7, 7, 1, Amounts(2.0, 20.0, 0.0, 0.0)),
        Candle(10.0, 10.0, 10.0, 10.0, 10.0, 1, DAY, DAY, DAY, DAY, 7, 7, 1, Amounts(2.0, 20.0, None, None)),
        Candle(10.0, 10.0, 10.0, 10.0, 10.0, 1, DAY, DAY, DAY, DAY, 7, 7, 1, Amounts(2.0, 21.0, 2.0, 20.0)),
        candle(DAY, source="venue", verified=True),
        candle(DAY, verified=False, venue=VenueValues(1.0, 2.0, 1.0, 2.0, None, None, None)),
    ],
)
def test_cache_keeps_all_that_a_candle_has(each: Candle) -> None:
    assert codec.decode_candle(codec.encode_candle(each)) == each
    assert codec.valid_candle("slot", codec.encode_candle(each)) == each


def test_entries_of_earlier_versions_are_read() -> None:
    assert codec.decode_candle(b"[10.0,5,7]").amounts is None
    old = codec.decode_candle(b"[10.0,12.0,9.0,11.0,21.0,2,1,5,2,3,7,8,1]")
    assert (old.amounts, old.source, old.verified) == (None, "ticks", None)
