"""Daily and hourly candles change no answer, whatever is written, changed or removed, by whom, and whenever made."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count, cycle
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg import IsolationLevel

from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS, Candle, Mode, Series
from marketflow.resources import resource
from marketflow.stores.ports import CandleRange
from marketflow.stores.postgres import rollups
from marketflow.stores.postgres.reader import PostgresReader
from marketflow.stores.postgres.rollups import LATE_MS, PostgresRollups
from marketflow.stores.postgres.rows import DAY_MS, connection_keywords, to_datetime, to_unix_ms
from marketflow.stores.postgres.writer import PostgresWriter
from tests.stores.archive_questions import ArchiveQuestions
from tests.stores.expected_candles import HOUR_MS, assert_found
from tests.support.partitions import partition
from tests.support.seeds import seeds
from tests.support.servers import PostgresServer, wait_until

Keywords = dict[str, Any]
DDL = resource("ddl")
DAY = 1_763_683_200_000  # the start of a day
TODAY = DAY + 5 * DAY_MS
NOW = TODAY + LATE_MS
SERIES = [Series(Mode.LIVE, exchange, "BTCUSDT") for exchange in ("exchange1", "exchange2")]
BTC = SERIES[0]

INSERT = """
insert into aggregates values (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
on conflict (exchange, pair_name, mode, timestamp) do update set
    average_price = excluded.average_price, min_price = excluded.min_price, max_price = excluded.max_price,
    open_price = excluded.open_price, close_price = excluded.close_price, tick_count = excluded.tick_count
"""


def row(start: int, series: Series = BTC, price: float = 100.0, ticks: int = 3, timed: bool = True) -> list[object]:
    """A row with prices from `price` to two more; without times of its own unless `timed`."""
    times = [to_datetime(start + ms) if timed else None for ms in (1, 9, 3, 5)]
    prices = (price + 1, price, price + 2, price + 0.5, price + 1.5)
    return [series.symbol, series.exchange, series.mode.value, to_datetime(start), *prices, ticks, *times]


class Database(NamedTuple):
    """A database with the schema, a connection of a user, the roll-up by single steps, and a reader.

    Each check goes on with `walks`, lengths of candles, limits, and whether the newest ones are asked for.
    """

    place: Keywords
    user: "psycopg.Connection[Any]"
    days: PostgresRollups
    reader: ArchiveQuestions
    walks: Iterator[tuple[int, int, bool]]

    def put(self, *rows: list[object]) -> None:
        self.user.cursor().executemany(INSERT, rows)

    def roll_up(self, now_ms: int = NOW) -> None:
        while self.days.roll_up(now_ms):
            pass

    def rolled(self) -> list[tuple[datetime, int | None]]:
        """Each daily row by its day: the ticks, None for a mark."""
        return self.user.execute("select timestamp, tick_count from aggregates_daily order by 1, exchange").fetchall()

    def answers(self, *spans: tuple[int, int]) -> list[list[Candle | None]]:
        async def summaries(reader: PostgresReader) -> list[list[Candle | None]]:
            return [await reader.summary(SERIES, since, until) for since, until in spans]

        return self.reader.ask(summaries)

    def check(self, *spans: tuple[int, int]) -> None:
        """Compare answers with what the minutes alone say: summaries of all spans, and candles of them in turn."""
        walks = [
            CandleRange(length, since // length * length, until // MINUTE_MS * MINUTE_MS, limit, newest)
            for (since, until), (length, limit, newest) in zip(spans, self.walks, strict=False)
        ]

        async def ask(reader: PostgresReader) -> tuple[list[list[Candle | None]], list[list[dict[int, Candle]]]]:
            summaries = [await reader.summary(SERIES, since, until) for since, until in spans]
            return summaries, [await reader.candles(SERIES, walk) for walk in walks]

        summaries, found = self.reader.ask(ask)
        for span, answers in zip(spans, summaries, strict=True):
            for series, answer in zip(SERIES, answers, strict=True):
                expected = self._of_minutes(series, *span)
                assert (answer is None) == (expected is None), (series, span, answer, expected)
                if answer is not None and expected is not None:
                    names = [name for name in Candle.__struct_fields__ if name != "total"]
                    for name in names:
                        assert getattr(answer, name) == getattr(expected, name), (series, span, name)
                    assert answer.total == pytest.approx(expected.total, rel=1e-9)
        rows = {series: self._rows(series, *EVERYTHING) for series in SERIES}
        for walk, of_each in zip(walks, found, strict=True):
            for series, candles in zip(SERIES, of_each, strict=True):
                assert_found(candles, rows[series], walk)

    def _rows(self, series: Series, since: int, until: int) -> list[dict[str, Any]]:
        cursor = self.user.execute(
            "select * from aggregates where (mode, exchange, pair_name) = (%s, %s, %s) and timestamp >= %s "
            "and timestamp < %s order by timestamp",
            [series.mode.value, series.exchange, series.symbol, to_datetime(since), to_datetime(until)],
        )
        names = [column.name for column in cursor.description or ()]
        return [dict(zip(names, values, strict=True)) for values in cursor]

    def _of_minutes(self, series: Series, since: int, until: int) -> Candle | None:
        """The earliest minute that has a price is the one whose time counts."""
        rows = self._rows(series, since, until)
        if not rows:
            return None

        def at(row: dict[str, Any], name: str) -> int:
            return to_unix_ms(row[name] or row["timestamp"])

        first, last = rows[0], rows[-1]
        high = max(rows, key=lambda row: row["max_price"])
        low = min(rows, key=lambda row: row["min_price"])
        total = sum(row["average_price"] * row["tick_count"] for row in rows)
        ticks = sum(row["tick_count"] for row in rows)
        prices = (first["open_price"], high["max_price"], low["min_price"], last["close_price"], total, ticks)
        times = (at(first, "open_at"), at(last, "close_at"), at(high, "max_at"), at(low, "min_at"))
        return Candle(*prices, *times, 0, 0, 1 + sum(row["version"] - 1 for row in rows))


EVERYTHING = (0, 2**42)

WALKS = (
    (HOUR_MS, 1000, True),
    (HOUR_MS, 3, False),
    (4 * HOUR_MS, 4, True),
    (4 * HOUR_MS, 1000, False),
    (DAY_MS, 2, True),
    (DAY_MS, 3, False),
)


@contextmanager
def rolling(place: Keywords) -> Iterator[PostgresRollups]:
    """A roll-up whose clock shows a second more each time, so that it does one short step a call."""
    seconds = count()
    with closing(PostgresRollups(connection_keywords(**place), lambda: float(next(seconds)))) as days:
        yield days


@pytest.fixture
def database(postgres_db: Keywords, request: pytest.FixtureRequest) -> Iterator[Database]:
    """With a plain table of minutes, or `partitioned` by day from the second day on."""
    with closing(PostgresWriter(connection_keywords(**postgres_db), DDL, 200)) as archive:
        archive.write({})
    if getattr(request, "param", "plain") == "partitioned":
        partition(postgres_db, day(0))
    with (
        psycopg.connect(**postgres_db, autocommit=True) as user,
        rolling(postgres_db) as days,
        closing(ArchiveQuestions(postgres_db)) as reader,
    ):
        yield Database(postgres_db, user, days, reader, cycle(WALKS))


def day(number: int) -> datetime:
    return to_datetime(DAY + number * DAY_MS)


@pytest.mark.parametrize("database", ["plain", "partitioned"], indirect=True)
def test_ended_days_are_rolled_up_and_rest_read_from_minutes(database: Database) -> None:
    database.put(*(row(DAY + hour * 3_600_000 + 60_000, price=hour) for hour in range(6 * 24)))
    database.check(EVERYTHING)
    database.roll_up()
    assert database.rolled() == [(day(number), 72) for number in range(5)]
    database.check(EVERYTHING, (DAY + 1, TODAY - 1), (DAY + DAY_MS, DAY + 2 * DAY_MS), (DAY + 100_000, DAY + 7_200_000))


def test_a_day_waits_for_late_minutes(database: Database) -> None:
    database.put(row(TODAY - MINUTE_MS))
    database.roll_up(NOW - 1)
    assert database.rolled() == []
    database.roll_up(NOW)
    assert database.rolled() == [(day(4), 3)]


def test_answers_come_from_the_days_and_not_from_their_minutes(database: Database) -> None:
    database.put(row(DAY), row(DAY + DAY_MS))
    database.roll_up()
    database.user.execute("alter table aggregates disable trigger user; delete from aggregates")
    ((answer, _),) = database.answers(EVERYTHING)
    assert answer is not None
    assert answer.ticks == 6


CHANGES = [
    "delete from aggregates where timestamp = %(minute)s",
    "delete from aggregates where timestamp >= %(minute)s and timestamp < %(day)s",
    "update aggregates set max_price = max_price + 7, tick_count = tick_count + 1 where timestamp = %(minute)s",
    "update aggregates set timestamp = timestamp + interval '1 day 13 seconds' where timestamp = %(minute)s",
    "update aggregates set exchange = 'exchange3' where timestamp = %(minute)s and exchange = 'exchange1'",
    "truncate aggregates",
]


@pytest.mark.parametrize("change", CHANGES)
def test_manual_change_is_answered_before_and_after_roll_up(database: Database, change: str) -> None:
    minutes = [DAY + day * DAY_MS + ms for day in range(5) for ms in (0, 43_200_000, DAY_MS - MINUTE_MS)]
    database.put(*(row(start, series, start % 7919) for start in minutes for series in SERIES))
    database.roll_up()
    for start in minutes:
        with database.user.transaction():
            if start == DAY or change != CHANGES[-1]:
                database.user.execute(change, {"minute": to_datetime(start), "day": day(3)}, prepare=False)
        database.check(EVERYTHING, (DAY, start), (start, TODAY))
        database.roll_up()
        database.check(EVERYTHING, (DAY, start), (start, TODAY))
    assert None not in [ticks for _, ticks in database.rolled()]


@pytest.mark.parametrize(
    ("database", "seed"),
    [*(("plain", seed) for seed in seeds(6)), *(("partitioned", seed) for seed in seeds(2))],
    indirect=["database"],
)
def test_whatever_happens_to_minutes_answers_are_theirs(database: Database, seed: int) -> None:
    random = Random(seed)
    times = [DAY + number * DAY_MS + ms for number in range(-2, 7) for ms in (0, 60_000, 40_000_000, DAY_MS - 60_000)]
    now = NOW - 3 * DAY_MS

    def put() -> None:
        chosen = {(random.choice(times), series): series for series in random.sample(SERIES, 2) for _ in range(6)}
        database.put(
            *(
                row(start, series, random.choice((1.0, 2.0, 5.5)), random.randint(1, 9), random.random() < 0.7)
                for start, series in sorted(chosen)
            )
        )

    def change() -> None:
        values = {"minute": to_datetime(random.choice(times)), "day": day(random.randrange(6))}
        text = random.choices(CHANGES, (20, 10, 20, 20, 5, 1))[0]
        with database.user.transaction(force_rollback=random.random() < 0.2):
            try:
                database.user.execute(text, values if "%" in text else None)
            except psycopg.errors.UniqueViolation:
                raise psycopg.Rollback from None

    for _ in range(60):
        now += random.randrange(DAY_MS // 6)
        if random.random() < 0.5:
            database.days.roll_up(now)
        else:
            random.choice((put, change))()
        spans = [sorted(random.choices((*times, *(at + 1 for at in times)), k=2)) for _ in range(2)]
        database.check(EVERYTHING, *((since, until) for since, until in spans))


# At the same time


@pytest.fixture
def other(database: Database) -> "Iterator[psycopg.Connection[Any]]":
    """A second writer, whose transaction lasts until the test commits it."""
    with psycopg.connect(**database.place) as connection:
        yield connection


def waits(database: Database) -> bool:
    return bool(database.user.execute("select 1 from pg_locks where not granted").fetchall())


def test_move_of_rolled_until_waits_for_uncommitted_minute(
    database: Database, other: "psycopg.Connection[Any]"
) -> None:
    database.put(row(DAY))
    other.execute(INSERT, row(DAY + DAY_MS))
    with pytest.raises(Unavailable, match="lock timeout"):  # it is not patient
        database.roll_up()
    assert database.rolled() == []
    other.commit()
    database.roll_up()
    assert [ticks for _, ticks in database.rolled()] == [3, 3]


def test_minute_waits_for_uncommitted_move_and_marks_its_day(
    database: Database, other: "psycopg.Connection[Any]"
) -> None:
    database.put(row(DAY))
    for move, values in (
        ("select from aggregates_rolled_until for update", {}),
        (rollups._MOVE, {"rolled": to_datetime(0), "until": to_datetime(TODAY), "first": day(-1), "end": day(99)}),
    ):
        other.execute(move, values)
    with ThreadPoolExecutor(1) as pool, psycopg.connect(**database.place, autocommit=True) as late:
        writing = pool.submit(late.execute, INSERT, row(DAY + MINUTE_MS))
        wait_until(lambda: waits(database))
        other.commit()
        writing.result(5)
    assert database.rolled() == [(day(0), None)]
    database.check(EVERYTHING)
    database.roll_up()
    assert database.rolled() == [(day(0), 6)]


def test_uncommitted_mark_is_skipped_until_its_minute_commits(
    database: Database, other: "psycopg.Connection[Any]"
) -> None:
    database.put(row(DAY), row(DAY + DAY_MS))
    database.roll_up()
    database.put(row(DAY + MINUTE_MS))
    assert database.rolled()[0] == (day(0), None)
    other.execute(INSERT, row(DAY + 2 * MINUTE_MS))  # marks a second time what is marked already
    database.roll_up()
    assert database.rolled()[0] == (day(0), None)
    database.check(EVERYTHING)
    other.commit()
    database.check(EVERYTHING)
    database.roll_up()
    assert database.rolled()[0] == (day(0), 9)


@pytest.mark.parametrize("database", ["plain", "partitioned"], indirect=True)
def test_minute_written_during_roll_up_marks_its_day_again(
    database: Database, other: "psycopg.Connection[Any]"
) -> None:
    database.put(row(DAY))
    database.days.roll_up(NOW)
    marked = other.execute(rollups._MARKED, [[], [], [], [], 9]).fetchall()
    rollups.make(other, marked)
    with ThreadPoolExecutor(1) as pool, psycopg.connect(**database.place, autocommit=True) as late:
        writing = pool.submit(late.execute, INSERT, row(DAY + MINUTE_MS))
        wait_until(lambda: waits(database))
        database.check(EVERYTHING)  # and no reader waits
        other.commit()
        writing.result(5)
    assert database.rolled() == [(day(0), None)]
    database.check(EVERYTHING)


@pytest.mark.parametrize("level", [IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE])
def test_old_snapshot_cannot_write_behind_a_move(
    database: Database, other: "psycopg.Connection[Any]", level: IsolationLevel
) -> None:
    database.put(row(DAY))
    other.isolation_level = level
    other.execute("select from aggregates").fetchall()
    database.roll_up()
    with pytest.raises(psycopg.errors.SerializationFailure):
        other.execute(INSERT, row(DAY + MINUTE_MS))
    other.rollback()
    other.execute(INSERT, row(DAY + MINUTE_MS))
    other.commit()
    database.check(EVERYTHING)
    assert database.rolled() == [(day(0), None)]


@pytest.mark.parametrize("database", ["plain", "partitioned"], indirect=True)
def test_concurrent_writers_and_roll_ups_end_with_exact_days(database: Database) -> None:
    """Real threads on a short history, days made over and over."""

    def write(number: int) -> None:
        random = Random(number)
        with psycopg.connect(**database.place, autocommit=True) as connection:
            for _ in range(150):
                start = DAY + random.randrange(4) * DAY_MS + random.randrange(5) * MINUTE_MS
                text = "delete from aggregates where timestamp = %s"
                if random.random() < 0.3:
                    connection.execute(text, [to_datetime(start)])
                else:
                    connection.execute(INSERT, row(start, random.choice(SERIES), random.randrange(9)))

    def roll_up(_: int) -> None:
        with closing(PostgresRollups(connection_keywords(**database.place))) as days:
            while not writing.done():
                try:
                    days.roll_up(NOW)
                except Unavailable:
                    continue  # waited too long, or the other one did it

    with ThreadPoolExecutor(3) as pool:
        writing = pool.submit(write, 1)
        for number in range(2):
            pool.submit(roll_up, number)
        writing.result(60)
    database.check(EVERYTHING)
    database.roll_up()
    assert None not in [ticks for _, ticks in database.rolled()]
    database.check(EVERYTHING, (DAY, TODAY))


@pytest.mark.parametrize("database", ["plain", "partitioned"], indirect=True)
def test_a_truncation_and_a_roll_up_do_not_deadlock(database: Database, other: "psycopg.Connection[Any]") -> None:
    database.put(row(DAY))
    database.roll_up(NOW - DAY_MS)
    other.execute("truncate aggregates")
    with pytest.raises(Unavailable, match="lock timeout"):
        database.roll_up()
    other.commit()
    database.roll_up()
    assert database.rolled() == []
    assert database.answers(EVERYTHING) == [[None, None]]


# Upgrades and users


def test_an_upgrade_finds_the_minutes_of_earlier_versions(postgres_db: Keywords, tmp_path: Path) -> None:
    (tmp_path / "0001_aggregates.sql").write_text((DDL / "0001_aggregates.sql").read_text())
    with psycopg.connect(**postgres_db, autocommit=True) as user:
        for folder in (tmp_path, DDL):
            with closing(PostgresWriter(connection_keywords(**postgres_db), folder, 200)) as archive:
                archive.write({})
            if folder == tmp_path:
                user.execute("grant select on aggregates to public")
                user.cursor().executemany(INSERT, [row(DAY + hour * 3_600_000) for hour in range(100)])
        with rolling(postgres_db) as days, closing(ArchiveQuestions(postgres_db)) as reader:
            database = Database(postgres_db, user, days, reader, cycle(WALKS))
            database.check(EVERYTHING)
            database.roll_up()
            assert sum(ticks or 0 for _, ticks in database.rolled()) == 300
            database.check(EVERYTHING)
        readable = "select has_table_privilege('pg_monitor', 'aggregates_daily', 'select')"
        assert user.execute(readable).fetchone() == (True,)


def test_user_with_rights_to_minutes_needs_none_to_days(database: Database) -> None:
    database.put(row(DAY))
    database.roll_up()
    name = f"writer_of_{database.place['dbname']}"
    database.user.execute(f"create role {name}; grant select, insert, update on aggregates to {name}")
    database.user.execute(f"set role {name}")
    # Nor does a table of its own mislead the trigger.
    database.user.execute("create temp table aggregates_rolled_until (rolled_until timestamptz)")
    database.user.execute(INSERT, row(DAY + MINUTE_MS))
    database.user.execute(f"reset role; drop owned by {name}; drop role {name}")
    assert database.rolled() == [(day(0), None)]


def test_days_are_those_of_utc_wherever_the_user_lives(database: Database) -> None:
    database.user.execute("set timezone = 'America/St_Johns'")
    begin = to_unix_ms(datetime(2026, 3, 8, tzinfo=UTC))  # where a day of theirs has 23 hours
    database.put(*(row(begin + hour * 3_600_000) for hour in range(48)))
    database.roll_up(begin + 4 * DAY_MS)
    assert [ticks for _, ticks in database.rolled()] == [72, 72]
    database.put(row(begin + 23 * 3_600_000 + MINUTE_MS))
    assert [ticks for _, ticks in database.rolled()] == [None, 72]
    database.check(EVERYTHING, (begin, begin + DAY_MS), (begin + DAY_MS, begin + 2 * DAY_MS))


# Trouble


def test_roll_up_resumes_where_the_last_run_ended(database: Database) -> None:
    database.put(*(row(DAY + number * DAY_MS) for number in range(5)))
    for _ in range(30):
        with rolling(database.place) as days:
            more = days.roll_up(NOW)
            with days._connection.opened() as connection, connection.transaction():
                connection.execute(rollups._BEGIN)  # undone as it closes
                connection.execute(rollups._MARKED, [[], [], [], [], 1])
        database.check(EVERYTHING)
        if not more:
            break
    assert [ticks for _, ticks in database.rolled()] == [3] * 5


def test_days_that_time_out_together_are_made_singly(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    database.put(*(row(DAY + number * DAY_MS) for number in range(5)))
    database.roll_up()
    database.user.execute("update aggregates set tick_count = 4")
    slow = rollups._REPLACE.replace("hourly = true", "hourly = length(pg_sleep(0.7)::text) = 0")
    assert slow != rollups._REPLACE
    monkeypatch.setattr(rollups, "_REPLACE", slow)
    with closing(PostgresRollups(connection_keywords(**database.place))) as days:
        with pytest.raises(Unavailable, match="statement timeout"):
            days.roll_up(NOW)
        with pytest.raises(Unavailable, match="statement timeout"):
            days.roll_up(NOW)
        assert days.roll_up(NOW)
    assert [ticks for _, ticks in database.rolled()].count(None) == 3


def test_roll_up_resumes_after_an_outage(server_folder: Path, postgres_template: Path) -> None:
    with PostgresServer(server_folder / "postgres", postgres_template) as server:
        with closing(PostgresWriter(connection_keywords(**server.keywords), DDL, 200)) as archive:
            archive.write({})
        with server.connect() as user:
            user.execute(INSERT, row(DAY))
        with closing(PostgresRollups(connection_keywords(**server.keywords))) as days:
            days.roll_up(NOW - DAY_MS * 10)
            server.kill()
            with pytest.raises(Unavailable):
                days.roll_up(NOW)
            server.start()
            while days.roll_up(NOW):
                pass
        with server.connect() as user:
            assert user.execute("select tick_count from aggregates_daily").fetchall() == [(3,)]


def test_a_gap_of_years_is_passed_at_once(database: Database) -> None:
    database.put(row(DAY - 3650 * DAY_MS), row(DAY))
    calls = 0
    while database.days.roll_up(NOW):
        calls += 1
    assert calls < 10
    assert [at - day(0) for at, _ in database.rolled()] == [timedelta(days=-3650), timedelta()]
