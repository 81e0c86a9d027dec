"""How long questions about a year of minutes take, while the application runs, and how long its days take to be made.

A year of minutes is put into PostgreSQL as an earlier version would have left it, without daily and hourly candles.
Then the application starts, in test mode, and rolls the days up while minutes go on being written. Every question is
asked over HTTP by one client; before that the same is asked of the minutes alone, over a connection of psycopg, which
is what it cost without daily candles and what each answer must be equal to. Candles are asked for as well, a year of
them page by page, and compared with the minutes. The limit is the round trip of a `select 1`.

    python -m tests.benchmarks.history --days 365 --series 15
"""

import argparse
import asyncio
import math
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import reduce
from typing import Any

import psycopg

from marketflow.model import Candle, Mode, Series, merge
from marketflow.resources import resource
from marketflow.settings import Settings
from marketflow.stores.postgres.reader import PostgresReader
from marketflow.stores.postgres.request_coalescing import KEPT_SECONDS
from marketflow.stores.postgres.rows import connection_keywords, to_unix_ms
from marketflow.stores.postgres.writer import PostgresWriter
from tests.benchmarks.report import report
from tests.benchmarks.stage import Stage, stage
from tests.support.application import Application
from tests.support.servers import wait_until

EXCHANGES = ("exchange1", "exchange2", "exchange3")
DAYS_A_STATEMENT = 10
BEFORE_REQUESTS = 3
SHARED_SECONDS = KEPT_SECONDS + 0.05
QUESTIONS = {"average 24h": "24h", "highest 30d": "30d", "highest": None, "lowest": None, "average": None}

# A tick a second, at prices so far apart that those of the generator are no extremes.
GENERATE = """
insert into aggregates
select symbol, exchange, 'test', minute, price, price - 1, price + 1, price - 0.5, price + 0.5, 60,
       minute + interval '1 second', minute + interval '59 seconds',
       minute + interval '20 seconds', minute + interval '40 seconds'
from generate_series(%(since)s::timestamptz, %(until)s - interval '1 minute', interval '1 minute') as minute
cross join unnest(%(exchanges)s::text[]) as exchange cross join unnest(%(symbols)s::text[]) as symbol
cross join lateral (
    select (100 + (abs(hashtext(exchange || symbol)) + extract(epoch from minute)::int8 / 60 * 7919) %% 200003)::float8
        as price
) as prices
"""

ROLLED_UP = """
select rolled_until >= date_trunc('day', now() - interval '10 minutes', 'UTC')
       and not exists (select from aggregates_daily where not hourly)
from aggregates_rolled_until
"""

OF_MINUTES = """
select sum(average_price * tick_count) / sum(tick_count), max(max_price), min(min_price) from aggregates
where mode = 'test' and exchange = any(%s) and pair_name = %s and timestamp >= %s and timestamp < %s
"""


def generate(postgres: "psycopg.Connection[Any]", days: int, symbols: list[str]) -> tuple[datetime, datetime]:
    """So many days of minutes, up to half an hour ago; gives their begin and end.

    As a version without daily candles would have: nobody watches as the minutes are written.
    """
    until = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(minutes=30)
    since = until - timedelta(days=days)
    postgres.execute("alter table aggregates disable trigger user")
    for number in range(0, days, DAYS_A_STATEMENT):
        begin = since + timedelta(days=number)
        end = min(until, begin + timedelta(days=DAYS_A_STATEMENT))
        postgres.execute(GENERATE, {"since": begin, "until": end, "exchanges": list(EXCHANGES), "symbols": symbols})
    postgres.execute("alter table aggregates enable trigger user")
    postgres.execute("vacuum analyze aggregates")
    return since, until


def counters(times: list[float]) -> tuple[float, float]:
    """Median and 99th percentile in ms."""
    return statistics.median(times) * 1000, sorted(times)[math.ceil(len(times) * 0.99) - 1] * 1000


def timed(work: Callable[[], Any], count: int) -> list[float]:
    """Seconds of each of `count` calls."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return times


def roll_up(postgres: "psycopg.Connection[Any]") -> dict[str, object]:
    """Wait until all days are made and minutes were written meanwhile and after; tells how that went."""
    began = time.monotonic()
    newest_minute = "select max(timestamp) from aggregates where timestamp > now() - interval '15 minutes'"
    latest, written_after = None, []

    def done() -> bool:
        nonlocal latest
        (newest,) = postgres.execute(newest_minute).fetchone() or (None,)
        if newest != latest:
            latest = newest
            written_after.append((datetime.now(UTC) - newest).total_seconds() - 60)
        (over,) = postgres.execute(ROLLED_UP).fetchone() or (False,)
        return bool(over)

    wait_until(done, timeout=240, message="the days were not rolled up")
    seconds = time.monotonic() - began
    wait_until(lambda: done() and bool(written_after), timeout=70, message="no minute was written")
    (days,) = postgres.execute("select count(*) from aggregates_daily").fetchone() or (0,)
    return {
        "roll_up_seconds": seconds,
        "series_days": days,
        "minutes_written_after_seconds": max(written_after),
    }


def ask(
    application: Application,
    postgres: "psycopg.Connection[Any]",
    question: str,
    exchange: str | None,
    since: datetime,
    until: datetime,
    requests: int,
) -> dict[str, object]:
    """Measure one question before and after, and compare the answers."""
    kind, symbol, period = question.split()[0], "BTCUSDT", QUESTIONS[question]
    begin = since if period is None else datetime.now(UTC).replace(second=0, microsecond=0) - _length(period)
    exchanges = [exchange] if exchange else list(EXCHANGES)
    values = [exchanges, symbol, begin, until]
    before = counters(timed(lambda: postgres.execute(OF_MINUTES, values).fetchone(), BEFORE_REQUESTS))
    path = f"/prices/{kind}/{exchange}/{symbol}" if exchange else f"/prices/{kind}/{symbol}"
    query = {} if period is None else {"period": period}
    after = counters(timed(lambda: application.get(path, **query), requests))
    return {
        "question": question,
        "exchanges": len(exchanges),
        "before_p50_ms": before[0],
        "p50_ms": after[0],
        "p99_ms": after[1],
        "right": _right(application, postgres, kind, path, query, exchanges),
    }


CANDLES = {"1m newest 500": ("1m", 500), "1h of a year": ("1h", 1000), "4h of a year": ("4h", 1000), "1d": ("1d", 1000)}
"""Questions by their names: interval, and how many candles a page. What is of a year is asked page by page."""

OF_INTERVAL = """
select count(*), sum(ticks), max(high), min(low) from (
    select sum(tick_count) as ticks, max(max_price) as high, min(min_price) as low from aggregates
    where mode = 'test' and exchange = any(%s) and pair_name = 'BTCUSDT' and timestamp >= %s and timestamp < %s
    group by date_bin(%s, timestamp, timestamptz 'epoch')
) as candle
"""


def ask_for_candles(
    application: Application,
    postgres: "psycopg.Connection[Any]",
    question: str,
    exchange: str | None,
    since: datetime,
    until: datetime,
    requests: int,
) -> dict[str, object]:
    """Measure the pages of one question, and compare them with all minutes."""
    interval, limit = CANDLES[question]
    length = _length(interval)
    path = f"/candles/{exchange}/BTCUSDT" if exchange else "/candles/BTCUSDT"
    whole_since, whole_until = (_on_grid(at, length) for at in (since + length, until))
    times: list[float] = []
    totals: list[float] = []
    pages: list[dict[str, Any]] = []
    for _ in range(max(1, requests // 10)):
        begin, pages = whole_since, []
        began = time.perf_counter()
        while True:
            asked = {"interval": interval, "limit": str(limit)}
            if question.endswith("year"):
                asked |= {"from": begin.isoformat(), "to": whole_until.isoformat()}
            page_began = time.perf_counter()
            pages += application.get(path, **asked)["candles"]
            times.append(time.perf_counter() - page_began)
            if not question.endswith("year") or len(pages) % limit or not pages:
                break
            begin = datetime.fromisoformat(pages[-1]["time"]) + length
        totals.append(time.perf_counter() - began)
        time.sleep(SHARED_SECONDS)  # what is shared with others who ask at once is no measure
    p50, p99 = counters(times)
    exchanges = [exchange] if exchange else list(EXCHANGES)
    return {
        "candles": question,
        "exchanges": len(exchanges),
        "given": len(pages),
        "all_pages_p50_ms": statistics.median(totals) * 1000,
        "page_p50_ms": p50,
        "page_p99_ms": p99,
        "right": _same_candles(postgres, pages, exchanges, length, until),
    }


def _same_candles(
    postgres: "psycopg.Connection[Any]",
    candles: list[dict[str, Any]],
    exchanges: list[str],
    length: timedelta,
    until: datetime,
) -> bool:
    """Whether they are what the minutes say, of all that do not change any more."""
    over = [each for each in candles if datetime.fromisoformat(each["time"]) + length <= until]
    if not over:
        return True
    begin, end = (datetime.fromisoformat(over[at]["time"]) for at in (0, -1))
    found = postgres.execute(OF_INTERVAL, [exchanges, begin, end + length, length]).fetchone()
    highest, lowest = max(each["high"] for each in over), min(each["low"] for each in over)
    return found == (len(over), sum(each["ticks"] for each in over), highest, lowest)


def _on_grid(at: datetime, length: timedelta) -> datetime:
    return at - (at - datetime.fromtimestamp(0, UTC)) % length


def _length(period: str) -> timedelta:
    units = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}
    return int(period[:-1]) * units[period[-1]]


def _right(
    application: Application,
    postgres: "psycopg.Connection[Any]",
    kind: str,
    path: str,
    query: dict[str, str],
    exchanges: list[str],
) -> bool:
    """Whether an answer is what all minutes say: the archive's to the last digit, and over HTTP with newer ticks."""
    answer = application.get(path, **query)
    since, until = datetime.fromisoformat(answer["from"]).replace(second=0, microsecond=0), datetime.now(UTC)
    found = postgres.execute(OF_MINUTES, [exchanges, "BTCUSDT", since, until]).fetchone()
    assert found is not None
    average, highest, lowest = found
    whole = asyncio.run(_archived(postgres, exchanges, since, until))
    assert whole.average is not None
    archived = math.isclose(whole.average, average, rel_tol=1e-12) and (whole.high, whole.low) == (highest, lowest)
    expected = {"average": average, "highest": highest, "lowest": lowest}[kind]
    return archived and math.isclose(answer["price"], expected, rel_tol=0.01 if kind == "average" else 1e-12)


async def _archived(
    postgres: "psycopg.Connection[Any]", exchanges: list[str], since: datetime, until: datetime
) -> Candle:
    keywords = {name: getattr(postgres.info, name) for name in ("host", "port", "user", "password", "dbname")}
    reader = PostgresReader(connection_keywords(**keywords))
    await reader.open()
    try:
        series = [Series(Mode.TEST, exchange, "BTCUSDT") for exchange in exchanges]
        candles = await reader.summary(series, to_unix_ms(since), to_unix_ms(until))
    finally:
        await reader.close()
    return reduce(merge, [candle for candle in candles if candle is not None])


Table = list[dict[str, object]]


def run(stage: Stage, days: int, series: int, requests: int) -> tuple[Table, Table, dict[str, object]]:
    """One measurement: the tables of periods and of candles, and the account of the roll-up."""
    symbols = list(Settings().symbols)[: max(1, series // len(EXCHANGES))]
    archive = PostgresWriter(connection_keywords(**stage.postgres.keywords), resource("ddl"), 200)
    archive.write({})
    archive.close()
    with stage.postgres.connect() as postgres:
        began = time.monotonic()
        since, until = generate(postgres, days, symbols)
        rows = days * 24 * 60 * len(EXCHANGES) * len(symbols)
        print(f"{rows:,} minutes generated in {time.monotonic() - began:.0f} s", flush=True)
        application = stage.start({"MODE": "test", "GENERATOR__RATE": 10})
        account = {"rows": rows} | roll_up(postgres)
        limit = counters(timed(lambda: postgres.execute("select 1").fetchone(), requests))
        bare = counters(timed(lambda: application.get("/mode"), requests))
        table: Table = [
            ask(application, postgres, question, exchange, since, until, requests)
            for question in QUESTIONS
            for exchange in (EXCHANGES[0], None)
        ]
        candles: Table = [
            ask_for_candles(application, postgres, question, exchange, since, until, requests)
            for question in CANDLES
            for exchange in (EXCHANGES[0], None)
        ]
        account |= {"select_1_p50_ms": limit[0], "http_p50_ms": bare[0], "http_p99_ms": bare[1]}
    return table, candles, account


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=int, default=365, help="how far back the minutes reach")
    parser.add_argument("--series", type=int, default=15, help="of three exchanges together")
    parser.add_argument("--requests", type=int, default=300, help="of each question")
    parser.add_argument("--quick", action="store_true", help="a month, for a look")
    arguments = parser.parse_args()
    days = 31 if arguments.quick else arguments.days
    with stage(shared_buffers="64MB") as servers:
        table, candles, account = run(servers, days, arguments.series, arguments.requests)
    report("history: roll-up", [account])
    report("history", table)
    report("history: candles", candles)
    return 0 if all(row["right"] for row in table + candles) else 1


if __name__ == "__main__":
    sys.exit(main())
