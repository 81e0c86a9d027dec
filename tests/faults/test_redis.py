"""Every kind of Redis outage; rows stay exact, prices current, and the cache is complete soon afterwards."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import redis

from marketflow.model import SLICE_MS, Candle, Series
from marketflow.stores.redis import codec, keys
from tests.faults.conftest import (
    LATE_MS,
    RATE,
    WINDOW_MS,
    Record,
    Sent,
    StartApplication,
    in_use,
    lost,
    says,
    seconds_until,
    seconds_until_written,
    stop_and_compare,
    through,
    wait_for_windows,
    wait_until_connected,
)
from tests.faults.hanging_resolver import HANGS
from tests.support.application import Application, ScriptedExchange, Traffic, exchanges_setting, now_ms
from tests.support.oracle import Rows, assert_rows_equal, candles_of_ticks
from tests.support.proxy import Proxy
from tests.support.redis_faults import frozen, killed, out_of_memory, read_only
from tests.support.servers import PATIENCE_SECONDS, RedisServer, wait_until

RETURN_SECONDS = 2.0
"""How long after its return Redis has everything again."""

STOP_SECONDS = 5.0
"""How long it may take to end."""

WRITE_MS = 200
"""How long what has come may take until it is in a store."""


def same(candle: Candle, expected: Candle) -> bool:
    """Return whether two candles are of the same ticks; only the application knows their order of arrival."""
    names = ("open", "high", "low", "close", "ticks", "first_at", "last_at", "high_at", "low_at")
    return math.isclose(candle.total, expected.total, rel_tol=1e-9) and all(
        getattr(candle, name) == getattr(expected, name) for name in names
    )


def is_cached(client: "redis.Redis", sent: Sent, at: int) -> bool:
    """Return whether Redis has every slice that had ended at a time (Unix ms), and newest ticks that are not older."""
    expected = candles_of_ticks(sent, SLICE_MS)
    for series in {slot.series for slot in expected}:
        latest = codec.decode_latest(
            cast("list[bytes | None]", client.hmget(keys.latest_key(series), keys.LATEST_FIELDS))
        )
        entries = cast("list[tuple[bytes, float]]", client.zrange(keys.window_key(series), 0, -1, withscores=True))
        slices = codec.decode_slots(entries)
        wanted = {
            slot.start: candle
            for slot, candle in expected.items()
            if slot.series == series and slot.start + SLICE_MS <= at
        }
        if latest is None or latest.at < max((candle.last_at for candle in wanted.values()), default=0):
            return False
        if not all(start in slices and same(slices[start], candle) for start, candle in wanted.items()):
            return False
    return True


def seconds_until_cached(server: RedisServer, traffic: Traffic) -> float:
    """Return the seconds until Redis has everything that was sent before now."""
    at = now_ms()
    with server.client() as client:

        def cached() -> bool:
            try:
                return is_cached(client, traffic.sent, at)
            except redis.RedisError:  # at first it may still refuse
                return False

        return seconds_until(cached, RETURN_SECONDS)


def assert_answers_equal(application: Application, sent: Sent) -> None:
    """Check that the averages of the last minute are those of all ticks, which were all sent within it."""
    for series in {series for series, _ in sent}:
        prices = [tick.price for each, tick in sent if each == series]
        wait_until(partial(is_average, application, series, prices), message=f"{series}: not the average of its ticks")


def is_average(application: Application, series: Series, prices: list[float]) -> bool:
    answer = application.get(f"/prices/average/{series.exchange}/{series.symbol}", period="1m")
    average = math.fsum(prices) / len(prices)
    return bool(answer["ticks"] == len(prices) and math.isclose(answer["price"], average, rel_tol=1e-9))


# On the way


@pytest.mark.parametrize("fault", [Proxy.refuse, Proxy.vanish])
def test_start_without_redis_fills_it_once_it_is_up(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    redis_db: RedisServer,
    redis_proxy: Proxy,
    rows: Callable[[], Rows],
    record_property: Record,
    fault: Callable[[Proxy], None],
) -> None:
    fault(redis_proxy)
    application = start(through(servers, redis=redis_proxy))
    with in_use(application, exchanges, record_property) as traffic:
        assert says(application, "redis", "down")()
        wait_for_windows(1)
        redis_proxy.heal()
        record_property("cached after seconds", seconds_until_cached(redis_db, traffic))
        wait_until(says(application, "redis", "ok"))
    assert_answers_equal(application, traffic.sent)
    stop_and_compare(application, rows, traffic)


def test_redis_outage_keeps_rows_exact_and_refills_the_cache(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    redis_db: RedisServer,
    redis_proxy: Proxy,
    rows: Callable[[], Rows],
    record_property: Record,
) -> None:
    application = start(through(servers, redis=redis_proxy))
    with in_use(application, exchanges, record_property) as traffic:
        for fault in (redis_proxy.refuse, redis_proxy.swallow, redis_proxy.vanish, redis_proxy.stall):
            fault()
            wait_until(says(application, "redis", "down"))
            wait_for_windows(1)
            redis_proxy.heal()
            seconds = seconds_until_cached(redis_db, traffic)
            record_property(f"{fault.__name__}: cached after seconds", seconds)
            wait_until(says(application, "redis", "ok"))
    assert_answers_equal(application, traffic.sent)
    stop_and_compare(application, rows, traffic)


def test_silent_redis_connections_are_replaced(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    redis_db: RedisServer,
    redis_proxy: Proxy,
    rows: Callable[[], Rows],
    record_property: Record,
) -> None:
    application = start(through(servers, redis=redis_proxy))
    with in_use(application, exchanges, record_property) as traffic:
        wait_for_windows(1)
        redis_proxy.forget()
        wait_until(says(application, "redis", "down"))
        record_property("cached after seconds", seconds_until_cached(redis_db, traffic))
        wait_until(says(application, "redis", "ok"))
    assert_answers_equal(application, traffic.sent)
    stop_and_compare(application, rows, traffic)


def test_write_whose_answer_was_cut_is_not_counted_twice(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    redis_db: RedisServer,
    redis_proxy: Proxy,
    rows: Callable[[], Rows],
    record_property: Record,
) -> None:
    application = start(through(servers, redis=redis_proxy))
    with Traffic(exchanges, rate=RATE) as traffic:
        for _ in range(5):
            redis_proxy.cut_after(b"EXEC")
            assert redis_proxy.was_cut.wait(10)
        wait_for_windows(1)
        record_property("cached after seconds", seconds_until_cached(redis_db, traffic))
    assert_answers_equal(application, traffic.sent)
    stop_and_compare(application, rows, traffic)


@pytest.mark.parametrize("fault", [Proxy.stall, Proxy.vanish])
def test_signal_right_after_redis_stalls_loses_no_tick(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    redis_proxy: Proxy,
    rows: Callable[[], Rows],
    record_property: Record,
    fault: Callable[[Proxy], None],
) -> None:
    """At that moment replies to newest prices are outstanding, and never come."""
    application = start(through(servers, redis=redis_proxy))
    with Traffic(exchanges, rate=RATE) as traffic:
        wait_for_windows(1)
        fault(redis_proxy)
        stalled_at = traffic.count
        wait_until(lambda: traffic.count >= stalled_at + 20)
    wait_until(lambda: not any(exchange.unread() for exchange in exchanges))
    code, seconds = application.stop()
    record_property("ended after seconds", seconds)
    assert code == 0
    assert seconds < STOP_SECONDS
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)
    assert "Traceback" not in application.log


# In the server


@contextmanager
def paused(server: RedisServer) -> Iterator[None]:
    with server.client(socket_timeout=10) as client:
        client.execute_command("CLIENT", "PAUSE", WINDOW_MS)
        yield
        client.ping()  # answered when it is over


def test_redis_server_faults_keep_rows_exact_and_refill_cache(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    redis_db: RedisServer,
    rows: Callable[[], Rows],
    record_property: Record,
) -> None:
    application = start(through(servers))
    with in_use(application, exchanges, record_property) as traffic:
        for fault in (out_of_memory, read_only, paused, frozen):
            with fault(redis_db):
                wait_until(says(application, "redis", "down"))
                wait_for_windows(1)
            seconds = seconds_until_cached(redis_db, traffic)
            record_property(f"{fault.__name__}: cached after seconds", seconds)
            wait_until(says(application, "redis", "ok"))
    assert_answers_equal(application, traffic.sent)
    stop_and_compare(application, rows, traffic)


def test_repeated_flushall_and_client_kill_are_repaired(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    redis_db: RedisServer,
    rows: Callable[[], Rows],
    record_property: Record,
) -> None:
    application = start(through(servers))
    with in_use(application, exchanges, record_property) as traffic, redis_db.client() as client:
        wait_for_windows(1)
        for _ in range(2):
            client.flushall()
            record_property("FLUSHALL: cached after seconds", seconds_until_cached(redis_db, traffic))
        until = now_ms() + WINDOW_MS
        while now_ms() < until:
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        record_property("CLIENT KILL: cached after seconds", seconds_until_cached(redis_db, traffic))
    assert_answers_equal(application, traffic.sent)
    stop_and_compare(application, rows, traffic)


@pytest.mark.parametrize("persistent", [True, False])
def test_killed_redis_is_refilled_soon_after_restart(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    server_folder: Path,
    rows: Callable[[], Rows],
    record_property: Record,
    persistent: bool,
) -> None:
    with RedisServer(server_folder / "redis", persistent=persistent) as server:
        application = start(through(servers | {"REDIS__PORT": server.port}))
        with in_use(application, exchanges, record_property) as traffic:
            wait_for_windows(1)
            with killed(server):
                wait_until(says(application, "redis", "down"))
                wait_for_windows(1)
            record_property("cached after seconds", seconds_until_cached(server, traffic))
            wait_until(says(application, "redis", "ok"))
        assert_answers_equal(application, traffic.sent)
        stop_and_compare(application, rows, traffic)


@pytest.mark.alone
def test_answers_stay_complete_during_a_large_refill(
    start: StartApplication, servers: dict[str, object], exchanges: list[ScriptedExchange], server_folder: Path
) -> None:
    """It takes seconds; memory answers until Redis has confirmed all of it."""
    symbols = [f"S{number}" for number in range(150)]
    with RedisServer(server_folder / "redis", persistent=False) as server:
        setting = str(symbols).replace("'", '"')
        # A machine that is short of CPU reads ticks late, and would reject them as stale.
        given = {"REDIS__PORT": server.port, "SYMBOLS": setting, "FLOW__MAX_CLOCK_SKEW_SECONDS": 60}
        application = start(servers | given)
        with Traffic(exchanges, symbols, rate=1500) as traffic:
            wait_until(lambda: traffic.count > 100_000, timeout=60)
        wait_until(says(application, "redis", "ok"))
        sent = Counter((series.exchange, series.symbol) for series, _ in traffic.sent)
        asked = [(exchange.name, symbol) for exchange in exchanges for symbol in symbols[::10]]

        def ticks(exchange: str, symbol: str) -> int:
            answer = application.get(f"/prices/average/{exchange}/{symbol}", period="5m")
            return int(answer["ticks"])

        wait_until(lambda: all(ticks(*each) == sent[each] for each in asked))
        with killed(server):
            wait_until(says(application, "redis", "down"))
        began, asked_after = time.monotonic(), 0
        wrong: list[str] = []
        while (seconds := time.monotonic() - began) < 6 or not says(application, "redis", "ok")():
            assert seconds < PATIENCE_SECONDS, "the refill does not end"
            for each in asked:
                asked_after += 1
                if (found := ticks(*each)) != sent[each]:
                    wrong.append(f"{each}: {found} of {sent[each]}")
        assert not wrong, f"{len(wrong)} of {asked_after} answers: {wrong[:3]}"


# Together with PostgreSQL


@pytest.mark.parametrize("redis_first", [True, False])
def test_outage_of_both_stores_keeps_rows_exact(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    redis_db: RedisServer,
    redis_proxy: Proxy,
    postgres_proxy: Proxy,
    rows: Callable[[], Rows],
    record_property: Record,
    redis_first: bool,
) -> None:
    application = start(through(servers, redis_proxy, postgres_proxy))
    with in_use(application, exchanges, record_property) as traffic:
        redis_proxy.swallow()
        postgres_proxy.swallow()
        wait_until(says(application, "redis", "down"))
        wait_for_windows(2)

        def redis_returns() -> None:
            redis_proxy.heal()
            record_property("cached after seconds", seconds_until_cached(redis_db, traffic))

        def postgres_returns() -> None:
            postgres_proxy.heal()
            record_property("rows written after seconds", seconds_until_written(rows, traffic))

        for store_returns in (redis_returns, postgres_returns)[:: 1 if redis_first else -1]:
            store_returns()
    assert_answers_equal(application, traffic.sent)
    stop_and_compare(application, rows, traffic)


@pytest.mark.parametrize("back", ["before", "after"])
def test_kill_in_redis_outage_costs_open_minutes_alone(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    redis_proxy: Proxy,
    rows: Callable[[], Rows],
    record_property: Record,
    back: str,
) -> None:
    """The ticks since the begin of the outage of minutes that were still open: neither store has them."""
    application = start(through(servers, redis=redis_proxy))
    with Traffic(exchanges, rate=RATE):
        wait_for_windows(1)
        away_at = now_ms()
        redis_proxy.refuse()
        wait_for_windows(1)
    killed_at = now_ms()
    application.kill()
    if back == "before":
        redis_proxy.heal()
    application.start()
    wait_until_connected(application, exchanges)
    with Traffic(exchanges, rate=RATE) as traffic:
        wait_for_windows(1)
        redis_proxy.heal()
        wait_until(says(application, "redis", "ok"))
    assert application.stop()[0] == 0
    times = [tick.at for tick in lost(rows(), traffic.sent)]
    record_property("ticks lost", len(times))
    open_since = (killed_at - LATE_MS - WRITE_MS) // WINDOW_MS * WINDOW_MS
    assert max(away_at - WRITE_MS, open_since) <= min(times)
    assert max(times) <= killed_at


def test_ticks_of_removed_symbols_still_become_rows(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    rows: Callable[[], Rows],
) -> None:
    application = start(through(servers))
    with Traffic(exchanges, rate=RATE) as traffic:
        wait_for_windows(1)
    killed_at = now_ms()
    application.kill()
    fewer = {"EXCHANGES": exchanges_setting(exchanges[0]), "SYMBOLS": '["BTCUSDT"]'}
    again = start(through(servers) | fewer, wait=False)
    wait_for_windows(1)
    assert again.stop()[0] == 0
    assert all(killed_at - tick.at <= WRITE_MS for tick in lost(rows(), traffic.sent))


def test_hanging_lookup_of_redis_is_an_outage_like_any_other(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    rows: Callable[[], Rows],
    record_property: Record,
) -> None:
    application = start(servers | {"REDIS__HOST": HANGS}, program=("-m", "tests.faults.hanging_resolver"))
    with in_use(application, exchanges, record_property) as traffic:
        wait_for_windows(2)
    assert application.get("/health")["redis"] == "down"
    code, seconds = application.stop()
    assert (code, seconds < STOP_SECONDS) == (0, True)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)
    assert f"{HANGS} cannot be looked up" in application.log
    assert "Traceback" not in application.log
