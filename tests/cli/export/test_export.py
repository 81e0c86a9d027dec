"""`marketflow export` on real rows, also as a process: exact rows, and files that appear once complete."""

import asyncio
import csv
import fcntl
import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars
import psycopg
import pytest
from pyarrow import feather, parquet  # type: ignore[import-untyped]

from marketflow import logs
from marketflow.api.queries.boundaries import INTERVALS
from marketflow.api.queries.candles import folded
from marketflow.cli import main
from marketflow.cli.export.columns import CANDLE
from marketflow.cli.export.row_reader import COLUMNS
from marketflow.model import Candle, Mode, Series, rounded
from marketflow.resources import resource
from marketflow.stores.ports import CandleRange
from marketflow.stores.postgres.reader import PostgresReader
from marketflow.stores.postgres.retention import Retention
from marketflow.stores.postgres.rollups import PostgresRollups
from marketflow.stores.postgres.rows import connection_keywords
from tests.support.application import Application
from tests.support.proxy import Proxy
from tests.support.servers import wait_until

Row = tuple[Any, ...]

START = datetime(2026, 11, 1, tzinfo=UTC)
FORMATS = ["csv", "parquet", "feather"]

MANY = 5_000
"""Minutes of 15 series that exceed the buffers."""

LAST_SERIES = b"exchange = 'exchange3' and pair_name = 'TONUSDT'"
"""Part of the query for the last series; by then a row group of Parquet is in the file."""


@pytest.fixture
def table(postgres_db: dict[str, Any]) -> Iterator["psycopg.Connection[Any]"]:
    """Yield a connection to a database with the empty table."""
    with psycopg.connect(**postgres_db, autocommit=True) as connection:
        for file in sorted(resource("ddl").glob("*.sql")):
            connection.execute(file.read_bytes())
        connection.execute("set timezone = 'UTC'")
        yield connection


def put(table: "psycopg.Connection[Any]", *rows: Row) -> None:
    with table.cursor() as cursor:
        cursor.executemany(f"insert into aggregates values ({', '.join(['%s'] * len(COLUMNS))})", rows)  # noqa: S608


TICKS: Row = (0.3, 20_229.642, 0.1, 1e-9, "ticks", True, None)
DIFFERENT: Row = (0.0, 0.0, None, None, "ticks", False, [1 / 3, 1e100, 1e-300, 67432.14, 0.5, None, None])
UNKNOWN: Row = (None, None, None, None, "ticks", None, None)
"""What was traded, and what the venue says: the columns after the version."""


def minute(
    number: int, symbol: str = "BTCUSDT", exchange: str = "exchange1", mode: str = "test", traded: Row = TICKS
) -> Row:
    at = START + timedelta(minutes=number)
    ticks_at = [at + timedelta(milliseconds=ms) for ms in (0, 59_999, 1_001, 30_500)]
    return (
        symbol,
        exchange,
        mode,
        at,
        0.1 + number,
        1e-300,
        1e100,
        1 / 3,
        67432.14,
        10**12 - number,
        *ticks_at,
        1 + number,
        *traded,
    )


def put_many(table: "psycopg.Connection[Any]", minutes: int) -> None:
    """Insert a number of minutes of 15 series."""
    table.execute(
        """
        insert into aggregates select pair, exchange, 'test', at, 1.5, 1, 2, 1.25, 1.75, 60, at, at, at, at
        from generate_series(%s::timestamptz, %s::timestamptz, interval '1 minute') as at,
             unnest(array['BTCUSDT', 'DOGEUSDT', 'TONUSDT', 'SOLUSDT', 'ETHUSDT']) as pair,
             unnest(array['exchange1', 'exchange2', 'exchange3']) as exchange
        """,
        [START, START + timedelta(minutes=minutes - 1)],
    )


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "marketflow", "export", *arguments]


@pytest.fixture
def environment(postgres_db: dict[str, Any], tmp_path: Path) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    given = {f"MARKETFLOW_POSTGRES__{name.upper()}": str(value) for name, value in postgres_db.items()}
    return inherited | given | {"MARKETFLOW_DATA_DIR": str(tmp_path / "none")}


def run(environment: dict[str, str], *arguments: str, check: int = 0) -> "subprocess.CompletedProcess[bytes]":
    done = subprocess.run(
        command(*arguments), env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=60
    )
    assert done.returncode == check, done.stderr
    return done


Run = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Iterator[Run]:
    """Runs an export as `run` does, within this process: to start one takes ten times as long as most exports."""
    monkeypatch.setattr(logs, "setup", lambda *_: None)
    handler = signal.getsignal(signal.SIGTERM)

    def ran(environment: dict[str, str], *arguments: str, check: int = 0) -> "subprocess.CompletedProcess[bytes]":
        capfdbinary.readouterr()
        with monkeypatch.context() as within:
            for name, value in environment.items():
                within.setenv(name, value)
            code = main.main(["export", *arguments])
        done = subprocess.CompletedProcess(arguments, code, *capfdbinary.readouterr())
        assert done.returncode == check, done.stderr
        return done

    yield ran
    signal.signal(signal.SIGTERM, handler)


def error_line(done: "subprocess.CompletedProcess[bytes]") -> str:
    """Return the one line on stderr."""
    (line,) = done.stderr.decode().splitlines()
    return line


def read_csv(data: bytes) -> list[Row]:
    header, *lines = csv.reader(io.StringIO(data.decode(), newline=""))
    assert header == list(COLUMNS)

    def time(text: str) -> datetime | None:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC) if text else None

    def number(text: str) -> float | None:
        return float(text) if text else None

    return [
        (
            *line[:3],
            time(line[3]),
            number(line[4]),
            *map(float, line[5:9]),
            None if line[9] == "" else int(line[9]),
            *map(time, line[10:14]),
            int(line[14]),
            *map(number, line[15:19]),
            line[19],
            {"": None, "true": True, "false": False}[line[20]],
            json.loads(line[21]) if line[21] else None,
        )
        for line in lines
    ]


def read_parquet(data: bytes) -> list[Row]:
    table = parquet.read_table(io.BytesIO(data))
    assert table.column_names == list(COLUMNS)
    return [tuple(row.values()) for row in table.to_pylist()]


def read_feather(data: bytes) -> list[Row]:
    table = feather.read_table(io.BytesIO(data))
    assert table.column_names == list(COLUMNS)
    return [tuple(row.values()) for row in table.to_pylist()]


def read(data: bytes, form: str) -> list[Row]:
    return {"csv": read_csv, "parquet": read_parquet, "feather": read_feather}[form](data)


# --- What is written


@pytest.mark.parametrize("form", FORMATS)
def test_export_equals_stored_rows_in_key_order(
    table: "psycopg.Connection[Any]", environment: dict[str, str], form: str
) -> None:
    odd = 'A,"B"\nC'
    put(table, *(minute(n, symbol, exchange) for n in (2, 0, 1) for symbol in ("ETHUSDT", odd) for exchange in "ba"))
    put(table, (*minute(3, odd, "b")[:10], None, None, None, None, 1, *UNKNOWN), minute(9, mode="live"))
    put(table, minute(4, odd, "b", traded=DIFFERENT), venue_minute(5, odd, "b"))
    stored = table.execute("select * from aggregates where mode = 'test' order by exchange, pair_name, timestamp")
    done = run(environment, "--format", form)
    assert read(done.stdout, form) == stored.fetchall()
    assert error_line(done) == "15 rows of test mode"


def venue_minute(number: int, symbol: str, exchange: str) -> Row:
    """A row of the venue's own candle, whose number of trades is unknown."""
    row = list(minute(number, symbol, exchange, traded=(12.5, None, None, None, "venue", None, None)))
    row[4] = row[9] = None
    return tuple(row)


@pytest.mark.parametrize("form", FORMATS)
def test_malformed_venue_values_are_exported_as_null(
    table: "psycopg.Connection[Any]", environment: dict[str, str], run_here: Run, form: str
) -> None:
    for number, values in enumerate(("{1,2}", "{{1,2,3,4,5,6,7}}", "{}")):
        put(table, minute(number))
        table.execute(
            "update aggregates set venue_values = %s::float8[] where timestamp = %s", [values, minute(number)[3]]
        )
    assert [row[-1] for row in read(run_here(environment, "--format", form).stdout, form)] == [None] * 3


def test_csv_header_keeps_the_order_of_earlier_versions(
    table: "psycopg.Connection[Any]", environment: dict[str, str], run_here: Run
) -> None:
    """New columns are the last ones, so that a reader by position still finds the others."""
    assert run_here(environment).stdout.decode() == (
        "pair_name,exchange,mode,timestamp,average_price,min_price,max_price,open_price,close_price,tick_count,"
        "open_at,close_at,min_at,max_at,version,"
        "volume,turnover,buy_volume,buy_turnover,source,verified,venue_values\n"
    )


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\\t=1"),
        ("\r=1", "'\\r=1"),
        ("\uff1d1", "'\uff1d1"),
        ("A\x1b]0;owned\x07B", r"A\x1b]0;owned\x07B"),
        ("A\x9b2JB", r"A\x9b2JB"),
        ("A\nB", "A\nB"),
        ("BTC-USD", "BTC-USD"),
    ],
)
def test_names_are_escaped_in_csv_and_exact_in_parquet(
    table: "psycopg.Connection[Any]", environment: dict[str, str], run_here: Run, name: str, cell: str
) -> None:
    put(table, minute(0, symbol=name, exchange=name))
    (row,) = read_csv(run_here(environment).stdout)
    assert (row[0], row[1]) == (cell, cell)
    (row,) = read_parquet(run_here(environment, "--format", "parquet").stdout)
    assert (row[0], row[1]) == (name, name)


def test_error_escapes_names_of_the_database(
    table: "psycopg.Connection[Any]", environment: dict[str, str], run_here: Run
) -> None:
    put(table, minute(0, symbol="\x1b[31mRED"))
    done = run_here(environment, "--symbol", "NONE", check=2)
    assert b"\x1b" not in done.stderr
    assert r"\x1b[31mRED" in error_line(done)


def test_times_are_rfc_3339_in_utc_and_prices_exact(
    table: "psycopg.Connection[Any]", environment: dict[str, str], run_here: Run
) -> None:
    put(table, minute(1, traded=DIFFERENT))
    table.execute(f"alter database {table.info.dbname} set timezone = 'Asia/Kathmandu'")
    table.execute(f"alter database {table.info.dbname} set extra_float_digits = -10")
    assert run_here(environment).stdout.decode().splitlines()[1] == (
        "BTCUSDT,exchange1,test,2026-11-01T00:01:00.000Z,1.1,1e-300,1e+100,0.3333333333333333,67432.14,999999999999,"
        "2026-11-01T00:01:00.000Z,2026-11-01T00:01:59.999Z,2026-11-01T00:01:01.001Z,2026-11-01T00:01:30.500Z,2,"
        '0,0,,,ticks,false,"[0.3333333333333333,1e+100,1e-300,67432.14,0.5,null,null]"'
    )


def test_parquet_has_typed_columns_and_is_compressed(
    table: "psycopg.Connection[Any]", environment: dict[str, str], run_here: Run
) -> None:
    put(table, minute(1))
    file = parquet.ParquetFile(io.BytesIO(run_here(environment, "--format", "parquet").stdout))
    kinds = {field.name: str(field.type) for field in file.schema_arrow}
    assert kinds == dict.fromkeys(COLUMNS[:3], "string") | dict.fromkeys(
        [*COLUMNS[4:9], *COLUMNS[15:19]], "double"
    ) | dict.fromkeys(["timestamp", *COLUMNS[10:14]], "timestamp[ms, tz=UTC]") | {
        "tick_count": "int64",
        "version": "int32",
        "source": "string",
        "verified": "bool",
        "venue_values": "list<element: double>",
    }
    group = file.metadata.row_group(0)
    assert {group.column(n).compression for n in range(group.num_columns)} == {"ZSTD"}


@pytest.mark.parametrize(
    ("flags", "left"),
    [
        ("--symbol ethusdt", {(n, "ETHUSDT", e) for n in range(4) for e in "ab"}),
        ("--symbol ETHUSDT,BTCUSDT --exchange A", {(n, s, "a") for n in range(4) for s in ("ETHUSDT", "BTCUSDT")}),
        ("--symbol ETHUSDT BTCUSDT --exchange b", {(n, s, "b") for n in range(4) for s in ("ETHUSDT", "BTCUSDT")}),
        ("--symbol BTCUSDT --exchange a --from 2026-11-01T00:01:00Z", {(n, "BTCUSDT", "a") for n in (1, 2, 3)}),
        ("--symbol BTCUSDT --exchange a --to 2026-11-01T00:02:00Z", {(n, "BTCUSDT", "a") for n in (0, 1)}),
        (
            "--symbol BTCUSDT --exchange a --from 2026-11-01T01:00:00.001+01:00 --to 2026-11-01T00:02:00.001Z",
            {(n, "BTCUSDT", "a") for n in (1, 2)},
        ),
        (f"--symbol BTCUSDT --exchange a --from {1_793_491_260_000} --to {1_793_491_320_000}", {(1, "BTCUSDT", "a")}),
        ("--from 2026-11-02", set()),
        ("--from now", set()),
        ("--from -1d --to -1h", set()),
        ("--symbol TONUSDT", set()),  # configured, without rows
        ("--exchange exchange1", set()),
        ("--mode live", {(0, "BTCUSDT", "a")}),
    ],
)
def test_range_includes_from_and_excludes_to(
    table: "psycopg.Connection[Any]",
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    flags: str,
    left: set[tuple[int, str, str]],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(logs, "setup", lambda *_: None)
    put(
        table,
        *(minute(n, symbol, exchange) for n in range(4) for symbol in ("ETHUSDT", "BTCUSDT") for exchange in "ab"),
    )
    put(table, minute(0, "BTCUSDT", "a", "live"))
    for form in FORMATS:
        path = tmp_path / f"rows.{form}"
        assert main.main(["export", *flags.split(), "--output", str(path)]) == 0
        rows = read(path.read_bytes(), form)
        assert {((row[3] - START) // timedelta(minutes=1), row[0], row[1]) for row in rows} == left
        assert len(rows) == len(left)


# --- Candles


def candles_of(data: bytes) -> list[dict[str, str]]:
    return [*csv.DictReader(io.StringIO(data.decode()))]


@pytest.fixture
def hours(table: "psycopg.Connection[Any]") -> "psycopg.Connection[Any]":
    """Yield a database with minutes of three days of two series, and some gaps."""
    table.execute(
        """
        insert into aggregates (pair_name, exchange, mode, timestamp, average_price, min_price, max_price, open_price,
                                close_price, tick_count, volume, turnover)
        select pair, 'exchange1', 'test', at, price, price - 1, price + 2, price - 0.5, price + 0.25, 10, 0.5, price / 2
        from generate_series(%s::timestamptz, %s::timestamptz, interval '1 minute') as at,
             unnest(array['BTCUSDT', 'ETHUSDT']) as pair,
             lateral (select 1000 + extract(epoch from at)::int8 %% 7919 / 100.0 as price)
        where extract(epoch from at)::int8 / 60 %% 17 <> 0
        """,
        [START, START + timedelta(minutes=3 * 1440 - 1)],
    )
    return table


@pytest.mark.parametrize("interval", [*INTERVALS])
def test_candles_are_those_of_the_api(
    hours: "psycopg.Connection[Any]",
    environment: dict[str, str],
    run_here: Run,
    postgres_db: dict[str, Any],
    interval: str,
) -> None:
    grid = INTERVALS[interval]
    begin, end = (
        int(START.timestamp() * 1000) + (0 if interval == "1M" else 90_000),
        int(START.timestamp() * 1000) + 2 * 86_400_000 + 1,
    )
    done = run_here(
        environment,
        *("--interval", interval, "--symbol", "BTCUSDT", "--from", str(begin), "--to", str(end)),
    )
    wanted = CandleRange(grid.part_ms, grid.at_or_after(begin), grid.at_or_after(end), 10_000, newest=False)

    async def archived() -> dict[int, Candle]:
        reader = PostgresReader(connection_keywords(**postgres_db))
        await reader.open()
        try:
            (found,) = folded(await reader.candles([Series(Mode.TEST, "exchange1", "BTCUSDT")], wanted), grid)
        finally:
            await reader.close()
        return found

    expected = asyncio.run(archived())
    rows = candles_of(done.stdout)
    assert [*rows[0]] == [*CANDLE]
    assert len(rows) == len(expected) > 0
    for row, start in zip(rows, sorted(expected), strict=True):
        candle = expected[start]
        assert datetime.fromisoformat(row["time"]).timestamp() * 1000 == start
        assert (row["exchange"], row["symbol"], row["source"]) == ("exchange1", "BTCUSDT", "ticks")
        assert candle.amounts is not None
        for name, value in {
            **{name: getattr(candle, name) for name in ("open", "high", "low", "close", "average", "vwap", "ticks")},
            "volume": rounded(candle.amounts.volume),
        }.items():
            assert float(row[name]) == value


def test_ohlcv_has_the_columns_of_backtests(
    hours: "psycopg.Connection[Any]", environment: dict[str, str], run_here: Run
) -> None:
    one = ("--symbol", "BTCUSDT", "--columns", "ohlcv", "--to", "2026-11-01T03:00:00Z")
    lines = run_here(environment, *one, "--interval", "1h").stdout.decode().splitlines()
    assert lines[0] == "time,open,high,low,close,volume"
    assert [line.split(",")[0] for line in lines[1:]] == [f"2026-11-01T0{hour}:00:00.000Z" for hour in range(3)]
    stored = hours.execute(
        "select (array_agg(open_price order by timestamp))[1], max(max_price), min(min_price),"
        " (array_agg(close_price order by timestamp desc))[1], sum(volume) from aggregates"
        " where pair_name = 'BTCUSDT' and timestamp >= %s and timestamp < %s",
        [START, START + timedelta(hours=1)],
    ).fetchone()
    assert tuple(map(float, lines[1].split(",")[1:])) == stored
    minutes = run_here(environment, *one).stdout.decode().splitlines()
    assert len(minutes) == 1 + 180 - 11  # each 17th is missing
    chosen = run_here(environment, *one[:2], "--columns", "close symbol, TIME", "--interval", "1d").stdout.decode()
    assert chosen.splitlines()[0] == "close,symbol,time"
    assert len(chosen.splitlines()) == 4


def test_candles_of_several_series_need_their_names(
    hours: "psycopg.Connection[Any]", environment: dict[str, str], run_here: Run
) -> None:
    done = run_here(environment, "--columns", "ohlcv", "--interval", "1h", check=2)
    assert error_line(done) == (
        "marketflow: argument --columns: rows of several symbols (BTCUSDT, ETHUSDT) need the column symbol,"
        " as in --columns exchange,symbol,ohlcv; or choose one by --symbol"
    )
    done = run_here(environment, "--columns", "symbol,ohlcv", "--interval", "1d")
    assert [(row["symbol"], row["time"][:10]) for row in candles_of(done.stdout)] == [
        (symbol, f"2026-11-0{day}") for symbol in ("BTCUSDT", "ETHUSDT") for day in (1, 2, 3)
    ]


@pytest.mark.parametrize("form", ["parquet", "feather"])
def test_candles_have_typed_columns(
    hours: "psycopg.Connection[Any]", environment: dict[str, str], run_here: Run, form: str
) -> None:
    done = run_here(environment, "--interval", "4h", "--format", form)
    table = (parquet if form == "parquet" else feather).read_table(io.BytesIO(done.stdout))
    kinds = {field.name: str(field.type) for field in table.schema}
    assert kinds["time"] == "timestamp[ms, tz=UTC]"
    assert {kinds[name] for name in ("open", "high", "low", "close", "volume", "vwap")} == {"double"}
    assert (kinds["ticks"], kinds["version"], kinds["verified"]) == ("int64", "int32", "bool")
    as_csv = candles_of(run_here(environment, "--interval", "4h").stdout)
    assert [row["close"] for row in table.to_pylist()] == [float(row["close"]) for row in as_csv]
    assert polars.read_ipc(done.stdout).height == len(as_csv) if form == "feather" else True


def test_hours_are_exported_whose_minutes_are_deleted(
    hours: "psycopg.Connection[Any]", environment: dict[str, str], run_here: Run, postgres_db: dict[str, Any]
) -> None:
    before = run_here(environment, "--interval", "1h").stdout
    assert len(before.splitlines()) == 1 + 2 * 72
    # On the day after, with two kept: the first day has no minutes any more.
    days = PostgresRollups(connection_keywords(**postgres_db), retention=Retention(2))
    now = START + timedelta(days=3, hours=1)
    while days.roll_up(int(now.timestamp() * 1000)):
        pass
    days.close()
    assert hours.execute("select min(timestamp) from aggregates").fetchone() == (START + timedelta(days=1),)
    assert run_here(environment, "--interval", "1h").stdout == before
    assert len(candles_of(run_here(environment, "--interval", "1d").stdout)) == 6
    (first, *_) = candles_of(run_here(environment, "--interval", "5m").stdout)
    assert first["time"] == "2026-11-02T00:00:00.000Z"
    hours.execute("set session_replication_role = replica")
    hours.execute("delete from aggregates")
    assert len(candles_of(run_here(environment, "--interval", "1d").stdout)) == 6


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--columns ohlcv,time", "argument --columns: time is named twice"),
        ("--columns price", "argument --columns: no such column price; there are ohlcv, exchange, symbol, time, open,"),
        ("--columns ,", "marketflow export: error: argument --columns: ',': must name one or more columns"),
        ("--interval 2h", "marketflow export: error: argument --interval: '2h': must be one of 1m, "),
    ],
)
def test_wrong_columns_and_intervals_are_refused(
    environment: dict[str, str], run_here: Run, flags: str, line: str
) -> None:
    done = run_here(environment, *flags.split(), check=2)
    assert line in done.stderr.decode().splitlines()[-1]


# --- Nothing found


def test_export_without_rows_says_what_is_stored(
    table: "psycopg.Connection[Any]", environment: dict[str, str], run_here: Run
) -> None:
    def said(*flags: str) -> list[str]:
        return run_here(environment, *flags).stderr.decode().splitlines()

    assert said() == ["0 rows of test mode", "nothing is stored yet"]
    put(table, minute(0), minute(7, "ETHUSDT"), minute(3, exchange="\x1bb"))
    put(table, *(minute(1, f"S{number:02}", mode="live") for number in range(14)))
    names = ", ".join(f"S{number:02}" for number in range(12))
    stored = [
        "stored in test mode: 2026-11-01T00:00:00.000Z to 2026-11-01T00:07:00.000Z, 3 series"
        " (exchange \\x1bb, exchange1; symbol BTCUSDT, ETHUSDT)",
        "stored in live mode: 2026-11-01T00:01:00.000Z to 2026-11-01T00:01:00.000Z, 14 series"
        f" (exchange exchange1; symbol {names}, ...)",
    ]
    assert said("--from", "2026-11-02") == ["0 rows of test mode", *stored]
    assert said("--mode", "live", "--to", "2026-11-01", "--interval", "1h") == ["0 rows of live mode", *stored]
    assert said("--mode", "live") == ["14 rows of live mode"]
    assert said("--symbol", "ETHUSDT") == ["1 row of test mode"]


# --- Arguments that are wrong


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--symbol SHIBUSDT", "argument --symbol: no such symbol SHIBUSDT; there are BTCUSDT, DOGEUSDT, ETHUSDT, OLD,"),
        ("--exchange nyse", "argument --exchange: no such exchange nyse; there are exchange1, exchange2, exchange3"),
        ("--from 2026-11-02 --to 2026-11-01", "argument --from: must not be after --to"),
    ],
)
def test_unknown_name_is_refused_with_known_ones(
    table: "psycopg.Connection[Any]", environment: dict[str, str], run_here: Run, tmp_path: Path, flags: str, line: str
) -> None:
    put(table, minute(0, "OLD"))
    done = run_here(environment, *flags.split(), "--output", str(tmp_path / "rows.csv"), check=2)
    assert error_line(done).startswith(f"marketflow: {line}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("nothing_set")
@pytest.mark.parametrize("form", ["parquet", "feather"])
def test_format_without_pyarrow_names_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    """The package that an index really has: there is no marketflow on any."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main.main(["export", "--format", form]) == 2
    expected = f"marketflow: argument --format: {form} needs pyarrow: pip install pyarrow\n"
    assert capsys.readouterr().err == expected


# --- Files


def test_file_appears_complete_in_format_of_its_name(
    table: "psycopg.Connection[Any]", environment: dict[str, str], run_here: Run, tmp_path: Path
) -> None:
    put(table, minute(0))
    for form in FORMATS:
        path = tmp_path / f"rows.{form}"
        done = run_here(environment, "--output", str(path))
        assert done.stdout == b""
        assert len(read(path.read_bytes(), form)) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"rows.csv", "rows.parquet", "rows.feather"}


def test_only_force_replaces_a_file(
    table: "psycopg.Connection[Any]", environment: dict[str, str], run_here: Run, tmp_path: Path
) -> None:
    put(table, minute(0))
    path = tmp_path / "rows.csv"
    path.write_text("mine")
    (tmp_path / "link.csv").symlink_to(path)
    (tmp_path / "rows.csv.partial").write_text("of one that was killed, and longer than what is to come " * 100)
    for name in ("rows.csv", "link.csv"):
        done = run_here(environment, "--output", str(tmp_path / name), check=2)
        assert error_line(done) == f"marketflow: argument --output: {path} exists; --force replaces it"
        assert path.read_text() == "mine"
    run_here(environment, "--output", str(tmp_path / "link.csv"), "--force")
    assert len(read_csv(path.read_bytes())) == 1
    assert (tmp_path / "link.csv").is_symlink()
    assert not (tmp_path / "rows.csv.partial").exists()


@pytest.mark.parametrize("planted", ["link", "dangling link", "hard link", "fifo", "of another user"])
def test_planted_partial_file_is_refused(
    table: "psycopg.Connection[Any]", environment: dict[str, str], run_here: Run, tmp_path: Path, planted: str
) -> None:
    put(table, minute(0))
    victim, partial = tmp_path / "victim", tmp_path / "rows.csv.partial"
    victim.write_text("mine")
    match planted:
        case "link":
            partial.symlink_to(victim)
        case "dangling link":
            partial.symlink_to(tmp_path / "new")
        case "hard link":
            partial.hardlink_to(victim)
        case "fifo":
            os.mkfifo(partial)
        case _ if os.geteuid() == 0:
            partial.write_text("theirs")
            os.chown(partial, 65534, 65534)
        case _:
            pytest.skip("only root can make a file of another user")
    before = partial.lstat()
    done = run_here(environment, "--output", str(tmp_path / "rows.csv"), check=2)
    assert str(partial) in error_line(done)
    assert victim.read_text() == "mine"
    assert (partial.lstat().st_ino, partial.lstat().st_size) == (before.st_ino, before.st_size)
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "rows.csv").exists()


def test_dangling_link_is_not_followed(
    table: "psycopg.Connection[Any]", environment: dict[str, str], run_here: Run, tmp_path: Path
) -> None:
    put(table, minute(0))
    (tmp_path / "rows.csv").symlink_to(tmp_path / "new")
    for arguments in ([], ["--force"]):
        done = run_here(environment, "--output", str(tmp_path / "rows.csv"), *arguments, check=2)
        assert error_line(done).endswith("rows.csv is a link to a file that does not exist")
    assert not (tmp_path / "new").exists()


def test_two_exports_never_write_one_file(
    table: "psycopg.Connection[Any]", environment: dict[str, str], run_here: Run, tmp_path: Path
) -> None:
    put(table, minute(0))
    with (tmp_path / "rows.csv.partial").open("wb") as partial:
        fcntl.flock(partial, fcntl.LOCK_EX)
        done = run_here(environment, "--output", str(tmp_path / "rows.csv"), check=2)
        assert error_line(done).endswith("rows.csv.partial is being written by another process")


@pytest.mark.parametrize("form", FORMATS)
def test_full_disk_fails_and_leaves_no_file(
    table: "psycopg.Connection[Any]", environment: dict[str, str], tmp_path: Path, form: str
) -> None:
    put_many(table, MANY)
    path = tmp_path / f"rows.{form}"
    # Python ignores the signal that comes with it.
    line = f"ulimit -f 100; {' '.join(command('--output', str(path)))}"
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, timeout=60)
    assert (done.returncode, error_line(done)) == (1, f"marketflow: {path} cannot be written: File too large")
    assert list(tmp_path.iterdir()) == []
    line = f"{' '.join(command('--format', form))} > /dev/full"
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, timeout=60)
    assert (done.returncode, error_line(done)) == (1, "marketflow: stdout cannot be written: No space left on device")


def test_only_regular_files_are_replaced(environment: dict[str, str], run_here: Run, tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/null")):
        done = run_here(environment, "--output", str(path), "--force", check=2)
        assert error_line(done) == f"marketflow: argument --output: {path} exists; it is not a file"
    done = run_here(environment, "--output", str(tmp_path / "no" / "rows.csv"), check=2)
    assert error_line(done).endswith("cannot be written: No such file or directory")


@pytest.mark.parametrize(("form", "number"), [("csv", signal.SIGINT), ("parquet", signal.SIGTERM)])
def test_interrupted_export_leaves_no_file(
    table: "psycopg.Connection[Any]",
    postgres_db: dict[str, Any],
    environment: dict[str, str],
    tmp_path: Path,
    form: str,
    number: int,
) -> None:
    put_many(table, MANY)
    path = tmp_path / f"rows.{form}"
    partial = tmp_path / f"rows.{form}.partial"
    with Proxy(postgres_db["port"]) as proxy:
        proxy.stall_within(LAST_SERIES)
        given = environment | {"MARKETFLOW_POSTGRES__PORT": str(proxy.port)}
        with subprocess.Popen(command("--output", str(path)), env=given, stderr=subprocess.PIPE) as export:
            assert proxy.was_stalled.wait(30)  # it is in the middle now, and the server does not answer
            assert partial.stat().st_size > 4
            assert not path.exists()
            export.send_signal(number)
            _, said = export.communicate(timeout=30)
    assert (export.returncode, said) == (130, b"")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMATS)
def test_lost_server_fails_and_leaves_no_file(
    table: "psycopg.Connection[Any]",
    postgres_db: dict[str, Any],
    environment: dict[str, str],
    tmp_path: Path,
    form: str,
) -> None:
    put_many(table, MANY)
    partial = tmp_path / f"rows.{form}.partial"
    with Proxy(postgres_db["port"]) as proxy:
        proxy.stall_within(LAST_SERIES)
        given = environment | {"MARKETFLOW_POSTGRES__PORT": str(proxy.port)}
        arguments = command("--output", str(tmp_path / f"rows.{form}"))
        with subprocess.Popen(arguments, env=given, stderr=subprocess.PIPE, text=True) as export:
            assert proxy.was_stalled.wait(30)
            assert partial.stat().st_size > 4
            proxy.cut()
            _, said = export.communicate(timeout=30)
    assert export.returncode == 1
    assert said.startswith("marketflow: PostgreSQL: ")
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_incomplete_parquet_on_stdout_has_no_footer(
    table: "psycopg.Connection[Any]", postgres_db: dict[str, Any], environment: dict[str, str], tmp_path: Path
) -> None:
    put_many(table, MANY)
    path = tmp_path / "rows.parquet"
    with Proxy(postgres_db["port"]) as proxy, path.open("wb") as stdout:
        proxy.stall_within(LAST_SERIES)
        given = environment | {"MARKETFLOW_POSTGRES__PORT": str(proxy.port)}
        arguments = command("--format", "parquet")
        with subprocess.Popen(arguments, env=given, stdout=stdout, stderr=subprocess.PIPE) as export:
            assert proxy.was_stalled.wait(30)
            assert path.stat().st_size > 4
            proxy.cut()
            _, said = export.communicate(timeout=30)
    assert export.returncode == 1
    assert len(said.splitlines()) == 1
    assert path.read_bytes()[:4] == b"PAR1"
    assert path.read_bytes()[-4:] != b"PAR1"


@pytest.mark.parametrize("form", FORMATS)
def test_closed_pipe_is_no_error(table: "psycopg.Connection[Any]", environment: dict[str, str], form: str) -> None:
    put_many(table, MANY)
    line = f"set -o pipefail; {sys.executable} -m marketflow export --format {form} | head -c 100"
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr, len(done.stdout)) == (0, b"", 100)


def test_closed_stdout_fails_the_export(environment: dict[str, str]) -> None:
    line = f"{' '.join(command())} >&-"
    done = subprocess.run(["bash", "-c", line], env=environment, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (1, b"marketflow: stdout is closed; set --output FILE\n")


# --- Where the rows come from


def test_unreachable_server_is_one_line_without_secrets(environment: dict[str, str], tmp_path: Path) -> None:
    with Proxy(1) as proxy:
        given = environment | {"MARKETFLOW_POSTGRES__PORT": str(proxy.port)}
        proxy.refuse()
        done = run(given, "--output", str(tmp_path / "rows.csv"), check=1)
    assert error_line(done).startswith("marketflow: PostgreSQL: connection failed")
    assert environment["MARKETFLOW_POSTGRES__PASSWORD"] not in done.stderr.decode()
    assert list(tmp_path.iterdir()) == []


def test_wrong_password_is_one_line_without_it(environment: dict[str, str]) -> None:
    done = run(environment | {"MARKETFLOW_POSTGRES__PASSWORD": "hush"}, check=1)
    assert "password authentication failed" in error_line(done)
    assert "hush" not in error_line(done)


def test_database_without_the_table_fails(environment: dict[str, str]) -> None:
    assert (
        error_line(run(environment, check=1))
        == "marketflow: nothing to export: the database has no table aggregates yet"
    )


def test_missing_data_folder_fails_and_is_not_made(environment: dict[str, str], tmp_path: Path) -> None:
    done = run(environment | {"MARKETFLOW_POSTGRES__HOST": ""}, check=1)
    folder = tmp_path / "none"
    assert (
        error_line(done) == f"marketflow: nothing to export: the data folder {folder} has no PostgreSQL; set data_dir"
    )
    assert not folder.exists()


def test_embedded_rows_are_exported_running_or_stopped(server_folder: Path) -> None:
    settings: dict[str, object] = {"FLOW__WINDOW_SECONDS": 1, "FLOW__LATE_AFTER_SECONDS": 0.1}
    data = server_folder / "data"
    given = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    given |= {"MARKETFLOW_DATA_DIR": str(data), "MARKETFLOW_FLOW__WINDOW_SECONDS": "1"}
    with Application(server_folder, settings) as application:
        wait_until(lambda: len(read_csv(run(given).stdout)) >= 15, 30, "no row was exported")
        assert application.get("/readyz") is not None
    stopped = read_csv(run(given).stdout)
    assert {(row[0], row[1]) for row in stopped} >= {("BTCUSDT", "exchange1"), ("ETHUSDT", "exchange3")}
    assert not list(data.glob("postgres/data/postmaster.pid"))  # it was started for the export alone
    with Application(server_folder, settings):
        pass


# --- Progress and memory


def test_terminal_shows_progress_and_gets_no_parquet(
    table: "psycopg.Connection[Any]", environment: dict[str, str], tmp_path: Path
) -> None:
    put_many(table, 100)
    given = environment | {"TERM": "xterm", "COLUMNS": "80"}
    shown = in_terminal(command("--output", str(tmp_path / "rows.csv")), given)
    assert "1,500 rows" in shown
    assert shown.splitlines()[-1].endswith("1500 rows of test mode")
    shown = in_terminal(command("--format", "parquet"), given)
    assert "argument --format: parquet is binary, and stdout is a terminal; set --output FILE" in shown


def in_terminal(arguments: list[str], environment: dict[str, str]) -> str:
    """What a command prints to a terminal."""
    here, there = pty.openpty()
    with subprocess.Popen(arguments, env=environment, stdin=there, stdout=there, stderr=there) as process:
        os.close(there)
        shown = b""
        try:
            while more := os.read(here, 65536):
                shown += more
        except OSError:  # the other side is closed
            pass
        os.close(here)
        process.wait(30)
    return shown.decode()


@pytest.mark.parametrize("form", FORMATS)
def test_memory_does_not_grow_with_the_rows(
    table: "psycopg.Connection[Any]", environment: dict[str, str], tmp_path: Path, form: str
) -> None:
    put_many(table, 30_000)  # 450,000 rows
    few = peak_megabytes(environment, tmp_path / f"few.{form}", "--to", "2026-11-04")
    many = peak_megabytes(environment, tmp_path / f"many.{form}")
    # As CSV, in which they come, the rows that are more take 60 MB.
    assert many - few < 40, (few, many)


def peak_megabytes(environment: dict[str, str], path: Path, *arguments: str) -> float:
    """The most memory that an export to a file had."""
    # Started by a small process: of one that a large one starts, the most that it had begins with that one's size.
    measure = (
        "import os, sys; pid = os.posix_spawn(sys.executable, sys.argv[1:], os.environ)\n"
        "print(os.wait4(pid, 0)[2].ru_maxrss)"
    )
    words = [sys.executable, "-c", measure, *command("--output", str(path), *arguments)]
    done = subprocess.run(words, env=environment, capture_output=True, timeout=60)
    assert path.exists(), done.stderr
    return int(done.stdout) / 1024
