"""Every kind of failing exchange; others are not affected, and no tick is lost, doubled or forged."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psutil

from tests.faults.conftest import (
    WINDOW_MS,
    Footprint,
    StartApplication,
    seconds_until,
    through,
    wait_until_back,
    wait_until_connected,
)
from tests.faults.hanging_resolver import HANGS
from tests.support.application import Application, ScriptedExchange, Traffic, now_ms
from tests.support.oracle import Rows, assert_rows_equal
from tests.support.proxy import Proxy
from tests.support.servers import HOST, wait_until

FIRST_PAUSE = 0.15
STALE_SECONDS = 2.0


def state_of(application: Application, exchange: str = "exchange1") -> str:
    state: str = application.get("/health")["exchanges"][exchange]
    return state


def latest(application: Application, exchange: ScriptedExchange) -> float | None:
    answer = application.find(f"/prices/latest/{exchange.name}/BTCUSDT")
    return answer["price"] if answer else None


def send_and_see(application: Application, exchange: ScriptedExchange, timeout: float = 10) -> None:
    """Send a good tick, and wait until it is answered."""
    price = 1 + len(exchange.sent) / 8
    exchange.send(price)
    wait_until(lambda: latest(application, exchange) == price, timeout, message=f"{price} is not shown")


def assert_untouched(application: Application, exchanges: Sequence[ScriptedExchange]) -> None:
    """Check that these exchanges are connected and their prices continue."""
    for exchange in exchanges:
        assert state_of(application, exchange.name) == "connected"
        assert_goes_on(application, exchange)


def assert_goes_on(application: Application, exchange: ScriptedExchange) -> None:
    seen: set[float | None] = set()

    def advanced() -> bool:
        seen.add(latest(application, exchange))
        return len(seen) > 3

    seconds_until(advanced, timeout=3, message=f"the prices of {exchange.name} stand still")


def settings_of(servers: dict[str, object], first: str, others: Sequence[ScriptedExchange]) -> dict[str, object]:
    """Return settings with exchange1 at another address."""
    addresses = [("exchange1", first), *((exchange.name, exchange.address) for exchange in others)]
    tables = ", ".join(f'{{name="{name}",address="{address}"}}' for name, address in addresses)
    return servers | {"EXCHANGES": f"[{tables}]", "FLOW__STALE_AFTER_SECONDS": STALE_SECONDS}


# The connection


@contextmanager
def trickle(exchange: ScriptedExchange) -> Iterator[None]:
    """Yield bytes of a line that never ends, one at a time."""
    ended = threading.Event()

    def send() -> None:
        while not ended.wait(0.02):
            exchange.send_raw(b"x")

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(5)
    exchange.send_raw(b"\n")


def test_exchange_outage_leaves_other_exchanges_untouched(
    start: StartApplication, servers: dict[str, object], exchanges: list[ScriptedExchange], rows: Callable[[], Rows]
) -> None:
    bad, *good = exchanges
    with Proxy(bad.port) as proxy:
        application = start(settings_of(servers, f"{HOST}:{proxy.port}", good))
        with Traffic(good) as traffic:
            assert_comes_back(application, bad, bad.cut)
            for exchange in good:  # which may have been stale before
                wait_for_state(application, "connected", exchange)
            accepted = [len(exchange.accepted_at) for exchange in good]
            for begin, told in (
                (proxy.refuse, "connecting"),
                (proxy.swallow, "stale"),
                (proxy.vanish, "stale"),
            ):
                begin()
                wait_for_state(application, told)
                assert_untouched(application, good)
                assert_comes_back(application, bad, proxy.heal)
            for end in (proxy.cut, bad.cut, bad.reset):
                assert_comes_back(application, bad, end)
            with trickle(bad):
                came = len(bad.accepted_at)
                wait_for_state(application, "stale")
                assert_untouched(application, good)
                assert len(bad.accepted_at) == came  # it is not silent: nobody can say that it is not alive
            send_and_see(application, bad)
        assert [len(exchange.accepted_at) for exchange in good] == accepted
        assert application.stop()[0] == 0
    assert_rows_equal(rows(), traffic.sent + bad.sent, WINDOW_MS)
    assert "Traceback" not in application.log


def wait_for_state(application: Application, state: str, exchange: ScriptedExchange | None = None) -> None:
    name = exchange.name if exchange else "exchange1"
    wait_until(lambda: state_of(application, name) == state, message=f"{name} is not told to be {state}")


def assert_comes_back(application: Application, exchange: ScriptedExchange, event: Callable[[], None]) -> None:
    """Check that an exchange is connected again, and its ticks arrive, after an event that cuts its connection."""
    came = len(exchange.accepted_at)
    event()
    wait_until(lambda: len(exchange.accepted_at) > came)
    send_and_see(application, exchange)
    wait_for_state(application, "connected")


def test_two_hundred_lost_connections_leak_nothing(
    start: StartApplication, servers: dict[str, object], exchanges: list[ScriptedExchange], rows: Callable[[], Rows]
) -> None:
    flapping, *good = exchanges
    application = start(servers | {"FLOW__RECONNECT_AFTER_SECONDS": 0.01})
    with Traffic(good) as traffic:
        before = Footprint.of(application)
        for number in range(200):
            if number % 2:
                flapping.send(1 + len(flapping.sent) / 8)
                flapping.cut()
            else:
                send_and_see(application, flapping)  # what a reset overtakes would be lost
                flapping.reset()
        wait_until_connected(application, exchanges)
        after = wait_until_back(application, before)
        assert_untouched(application, good)
    print(f"{before} before 200 reconnects, {after} after")
    assert application.log.count("lost exchange") < 5
    assert application.stop()[0] == 0
    assert_rows_equal(rows(), traffic.sent + flapping.sent, WINDOW_MS)


def test_reconnect_backoff_doubles_and_resets_after_a_tick(
    start: StartApplication, servers: dict[str, object], exchanges: list[ScriptedExchange]
) -> None:
    exchange = exchanges[0]
    application = start(servers | {"FLOW__RECONNECT_AFTER_SECONDS": FIRST_PAUSE})

    def pause() -> float:
        """The seconds from a cut to the next attempt."""
        came = len(exchange.accepted_at)
        cut_at = time.monotonic()
        exchange.cut()
        wait_until(lambda: len(exchange.accepted_at) > came)
        return exchange.accepted_at[came] - cut_at

    pauses = [pause() for _ in range(4)]
    send_and_see(application, exchange)
    again = pause()
    print("pauses:", *(f"{each:.2f}" for each in pauses), f"after a tick {again:.2f}")
    for number, seconds in enumerate(pauses):
        nominal = FIRST_PAUSE * 2**number
        assert 0.8 * nominal <= seconds <= nominal + 0.25
    assert 0.8 * FIRST_PAUSE <= again <= FIRST_PAUSE + 0.25


def test_hanging_dns_lookup_delays_no_other_feed(
    start: StartApplication, servers: dict[str, object], exchanges: list[ScriptedExchange], rows: Callable[[], Rows]
) -> None:
    unknown, hanging, good = exchanges
    given = settings_of(servers, "no-such-host.invalid:1", exchanges[2:])
    given["EXCHANGES"] = str(given["EXCHANGES"]).replace(
        "}, ", f'}}, {{name="{hanging.name}",address="{HANGS}:1"}}, ', 1
    )
    application = start(given, wait=False, program=("-m", "tests.faults.hanging_resolver"))
    with Traffic([good]) as traffic:
        wait_until(lambda: application.find(f"/prices/latest/{good.name}/BTCUSDT"))
        for exchange in (unknown, hanging):
            assert state_of(application, exchange.name) == "connecting"
        assert_untouched(application, [good])
    code, seconds = application.stop()
    assert code == 0
    assert seconds < 5
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)
    assert "Traceback" not in application.log


# The lines

HOSTILE = (
    b"rubbish",
    b'{"symbol":"BTCUSDT","price":-5}',
    b'{"symbol":"BTCUSDT","price":0}',
    b'{"symbol":"BTCUSDT","price":NaN}',
    b'{"symbol":"BTCUSDT","price":Infinity}',
    b'{"symbol":"BTCUSDT","price":1e999}',
    b'{"symbol":"BTCUSDT","price":"9,5"}',
    b'{"symbol":"BTCUSDT","price":9,"price":null}',
    b'{"symbol":null,"price":9}',
    b'{"symbol":"BTCUSDT\x00","price":9}',
    b'{"symbol":"BTC\xff","price":9}',
    b'{"symbol":"BTCUSDT","price":9,"x":"\xff"}',
    b'[{"symbol":"BTCUSDT","price":9}]',
    b'{"symbol":"BTCUSDT","price":9} {"symbol":"BTCUSDT","price":9}',
    b'{"x":' + b"[" * 3000,
    b"[" * 60_000,
    b"y" * 200_000 + b'{"symbol":"BTCUSDT","price":9}',
    b"y" * 10_000_000 + b'{"symbol":"BTCUSDT","price":9}',
)
UNKNOWN_SYMBOLS = 1_000_000


def test_hostile_lines_cost_no_memory_and_no_valid_tick(
    start: StartApplication, servers: dict[str, object], exchanges: list[ScriptedExchange], rows: Callable[[], Rows]
) -> None:
    hostile, *good = exchanges
    # A machine that is short of CPU reads the million lines late, and would reject the ticks among them as stale.
    application = start(servers | {"FLOW__MAX_CLOCK_SKEW_SECONDS": 60})
    process = psutil.Process(application.process.pid)
    with Traffic(good) as traffic:
        send_and_see(application, hostile)
        began, before = time.monotonic(), process.memory_info().rss
        most = before
        for line in HOSTILE:
            hostile.send_raw(line + b"\n")
            hostile.send(2 + len(hostile.sent) / 8)
        for number in range(0, UNKNOWN_SYMBOLS, 10_000):
            lines = (b'{"symbol":"S%d","price":9}\n' % n for n in range(number, number + 10_000))
            hostile.send_raw(b"".join(lines))
            hostile.send(2 + len(hostile.sent) / 8)
            most = max(most, process.memory_info().rss)
        assert_untouched(application, good)
        send_and_see(application, hostile, 30)  # behind a million lines
        assert_untouched(application, good)
        seconds = time.monotonic() - began
    dropped = application.log.count("dropped as")
    print(f"{(most - before) / 1e6:.1f} MB more, {dropped} lines in the log in {seconds:.1f} s")
    assert most - before < 30e6
    reasons = ("malformed", "bad_price", "unknown_symbol", "too_long", "no_symbol")
    assert all(f"dropped as {reason}" in application.log for reason in reasons)
    assert dropped <= len(reasons) * (1 + seconds / 10)
    assert application.stop()[0] == 0
    assert_rows_equal(rows(), traffic.sent + hostile.sent, WINDOW_MS)
    assert "Traceback" not in application.log


def test_impossible_timestamps_are_dropped_or_replaced(
    start: StartApplication, servers: dict[str, object], exchanges: list[ScriptedExchange], rows: Callable[[], Rows]
) -> None:
    exchange = exchanges[0]
    application = start(servers)
    times = [0, -1, 10**30, 2**63, now_ms() + 3_600_000, now_ms() - 3_600_000, 1.5, "now", None]
    taken = 2  # those that are no number
    for number, at in enumerate(times):
        line = json.dumps({"symbol": "BTCUSDT", "price": 1 + number, "timestamp": at})
        exchange.send_raw(line.encode() + b"\n")
    began = now_ms()
    wait_until(lambda: latest(application, exchange) == len(times))
    send_and_see(application, exchange)
    assert application.stop()[0] == 0
    stored = rows()
    assert all(began - 2 * WINDOW_MS <= slot.start <= now_ms() for slot in stored)
    assert sum(row["tick_count"] for row in stored.values()) == taken + 1


def test_late_ticks_update_rows_for_six_minutes(
    start: StartApplication, servers: dict[str, object], exchanges: list[ScriptedExchange], rows: Callable[[], Rows]
) -> None:
    exchange = exchanges[0]
    application = start(servers | {"FLOW__MAX_CLOCK_SKEW_SECONDS": 1000})
    now = now_ms()
    for number in range(500):  # out of order, over five minutes, many in rows that were written before
        exchange.send(1 + number / 8, at=now - number * 7919 % 300_000)
    send_and_see(application, exchange)
    kept = list(exchange.sent)
    exchange.send(1.0, 2.0, 3.0, at=now - 480_000)
    wait_until(lambda: "3 ticks so far came for minutes long closed" in application.log)
    assert application.stop()[0] == 0
    assert_rows_equal(rows(), kept, WINDOW_MS)


# A consumer that cannot keep up


def test_slow_stores_cost_little_memory_and_no_tick(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    rows: Callable[[], Rows],
    redis_proxy: Proxy,
    postgres_proxy: Proxy,
) -> None:
    application = start(through(servers, redis_proxy, postgres_proxy))
    process = psutil.Process(application.process.pid)
    proxies = (redis_proxy, postgres_proxy)
    with Traffic(exchanges, rate=10_000, burst=250) as traffic:
        wait_until(lambda: traffic.count > 15_000, timeout=20)
        before = process.memory_info().rss
        for _ in range(25):
            for proxy in proxies:
                proxy.stall()
            threading.Event().wait(0.09)
            for proxy in proxies:
                proxy.heal()
            threading.Event().wait(0.01)
        grown = process.memory_info().rss - before
    print(f"{traffic.count} ticks, {grown / 1e6:.1f} MB more")
    assert grown < 20e6
    wait_until(lambda: application.get("/health")["status"] == "ok")
    assert application.stop()[0] == 0
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)
