"""A stop in mid-minute with 15,000 series while PostgreSQL is up, late, slow or down.

Rows that it has not confirmed are in Redis, and written after the next start; the log says how many these are, and how
many are in neither store.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from marketflow.model import MINUTE_MS, Mode, Series, Tick
from marketflow.stores.postgres.writer import ROWS_A_TRANSACTION
from tests.faults.conftest import StartApplication, through, wait_until_connected
from tests.support.application import Application, Drained, ScriptedExchange, exchanges_setting, now_ms, sent_by
from tests.support.oracle import Rows, assert_rows_equal
from tests.support.proxy import Proxy
from tests.support.servers import wait_until

pytestmark = pytest.mark.alone

SYMBOLS = [f"S{number}USDT" for number in range(5000)]
SERIES = 3 * len(SYMBOLS)

SECONDS = 5
"""For which each series has a tick a second."""

STEPS = 20
"""How often in a second each exchange sends."""

STOP_SECONDS = 5.0

ROWS_SECONDS = 30.0
"""How long after a restart all rows are there: it begins with reading what was left of 15,000 series."""


@pytest.fixture
def application(
    start: StartApplication, servers: dict[str, object], redis_proxy: Proxy, postgres_proxy: Proxy
) -> Application:
    """An application with 15,000 series, whose tables exist."""
    settings = {"FLOW__WINDOW_SECONDS": 60, "SYMBOLS": json.dumps(SYMBOLS)}
    application = start(through(servers, redis_proxy, postgres_proxy) | settings)
    wait_until(lambda: application.get("/health")["postgres"] == "ok")
    return application


def tick_each_second(exchanges: Sequence[ScriptedExchange]) -> None:
    """Send ticks of all series with the time of the exchange; return once all are on the other side."""
    wait_until(lambda: now_ms() % MINUTE_MS < 40_000, timeout=21)  # all is in one minute
    began = time.monotonic()
    for step in range(SECONDS * STEPS):
        for exchange in exchanges:
            send(exchange, SYMBOLS[step % STEPS :: STEPS], price=1000 + step / 8)
        time.sleep(max(0.0, began + (step + 1) / STEPS - time.monotonic()))
    wait_until(lambda: not any(exchange.unread() for exchange in exchanges))


def send(exchange: ScriptedExchange, symbols: Sequence[str], price: float) -> None:
    at = now_ms()
    for symbol in symbols:
        exchange.sent.append((Series(Mode.LIVE, exchange.name, symbol), Tick(price, at, len(exchange.sent))))
    lines = [f'{{"symbol":"{symbol}","price":{price},"timestamp":{at}}}\n' for symbol in symbols]
    exchange.send_raw("".join(lines).encode())


@contextmanager
def later(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Call a function after some seconds."""
    timer = threading.Timer(seconds, act)
    timer.start()
    yield
    timer.join()


def stop(application: Application) -> Drained:
    code, seconds = application.stop()
    assert code == 0
    print(f"ended after {seconds:.2f} s: {application.drained()}")
    assert seconds < STOP_SECONDS
    return application.drained()


def write_the_rest(
    application: Application,
    exchanges: Sequence[ScriptedExchange],
    rows: Callable[[], Rows],
) -> None:
    """Start it again: it writes all rows that are missing."""
    began = time.monotonic()
    application.start()
    wait_until(lambda: len(rows()) == SERIES, ROWS_SECONDS)
    print(f"all rows after {time.monotonic() - began:.2f} s")
    wait_until_connected(application, exchanges)
    assert application.stop()[0] == 0
    assert_rows_equal(rows(), sent_by(exchanges))
    assert "Traceback" not in application.log


def test_stop_with_15_000_series_writes_all_rows(
    application: Application, exchanges: list[ScriptedExchange], rows: Callable[[], Rows]
) -> None:
    tick_each_second(exchanges)
    assert stop(application) == Drained(SERIES, 0, 0)
    assert_rows_equal(rows(), sent_by(exchanges))
    assert "Traceback" not in application.log


def test_stop_without_postgres_leaves_all_rows_to_the_next_start(
    application: Application, exchanges: list[ScriptedExchange], rows: Callable[[], Rows], postgres_proxy: Proxy
) -> None:
    tick_each_second(exchanges)
    postgres_proxy.refuse()
    assert stop(application) == Drained(0, SERIES, 0)
    postgres_proxy.heal()
    write_the_rest(application, exchanges, rows)


@pytest.mark.parametrize("fault", [Proxy.refuse, Proxy.vanish])
def test_stop_uses_a_postgres_that_returns_half_way(
    application: Application,
    exchanges: list[ScriptedExchange],
    rows: Callable[[], Rows],
    postgres_proxy: Proxy,
    fault: Callable[[Proxy], None],
) -> None:
    tick_each_second(exchanges)
    fault(postgres_proxy)
    with later(1.5, postgres_proxy.heal):
        end = stop(application)
    assert (end.in_no_store, end.written + end.in_redis) == (0, SERIES)
    assert end.written
    assert end.written <= len(rows()) <= end.written + ROWS_A_TRANSACTION  # the answer to one may have been cut off
    write_the_rest(application, exchanges, rows)


def test_stop_keeps_what_a_slow_postgres_has_confirmed(
    application: Application,
    exchanges: list[ScriptedExchange],
    rows: Callable[[], Rows],
    postgres_db: dict[str, Any],
) -> None:
    tick_each_second(exchanges)
    with psycopg.connect(**postgres_db, autocommit=True) as connection:
        connection.execute(
            "create function slow() returns trigger language plpgsql as 'begin perform pg_sleep(0.1); return null; end'"
        )
        connection.execute("create trigger slow after insert on aggregates execute function slow()")
        end = stop(application)
        connection.execute("drop trigger slow on aggregates")
    assert (end.in_no_store, end.written + end.in_redis) == (0, SERIES)
    assert end.written >= ROWS_A_TRANSACTION
    assert end.written <= len(rows()) <= end.written + ROWS_A_TRANSACTION
    write_the_rest(application, exchanges, rows)


def test_stop_without_both_stores_reports_lost_rows(
    application: Application,
    exchanges: list[ScriptedExchange],
    postgres_proxy: Proxy,
    redis_proxy: Proxy,
) -> None:
    tick_each_second(exchanges)
    postgres_proxy.refuse()
    redis_proxy.refuse()
    assert stop(application) == Drained(0, 0, SERIES)
    assert "Traceback" not in application.log


def test_stop_uses_a_redis_that_returns_half_way(
    application: Application,
    exchanges: list[ScriptedExchange],
    rows: Callable[[], Rows],
    postgres_proxy: Proxy,
    redis_proxy: Proxy,
) -> None:
    """Only a few series have rows, so that there is time to write all of them."""
    exchange = exchanges[0]
    wait_until(lambda: now_ms() % MINUTE_MS < 40_000, timeout=21)
    send(exchange, SYMBOLS[:1000], 1000.0)
    wait_until(lambda: not exchange.unread())
    postgres_proxy.refuse()
    redis_proxy.refuse()
    with later(1.0, redis_proxy.heal):
        assert stop(application) == Drained(0, 1000, 0)
    postgres_proxy.heal()
    application.start()
    wait_until(lambda: len(rows()) == 1000, ROWS_SECONDS)
    wait_until_connected(application, exchanges)
    assert application.stop()[0] == 0
    assert_rows_equal(rows(), sent_by(exchanges))


@pytest.mark.parametrize("redis_is_there", [True, False])
def test_stop_of_the_ingest_role_reports_lost_rows(
    server_folder: Path,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    redis_proxy: Proxy,
    postgres_proxy: Proxy,
    redis_is_there: bool,
) -> None:
    settings = {"MODE": "live", "EXCHANGES": exchanges_setting(*exchanges)}
    application = Application(
        server_folder, through(servers, redis_proxy, postgres_proxy) | settings, ("--role", "ingest")
    )
    with closing(application):
        application.start(wait=False)
        for exchange in exchanges:
            exchange.send(1.0)
        wait_until(lambda: application.log.count("come in") == len(exchanges))
        postgres_proxy.refuse()
        if not redis_is_there:
            redis_proxy.refuse()
        assert stop(application) == (Drained(0, 3, 0) if redis_is_there else Drained(0, 0, 3))
    assert "Traceback" not in application.log
