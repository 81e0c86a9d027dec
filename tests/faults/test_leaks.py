"""Whatever happens again and again leaves nothing behind: no thread, descriptor, child or memory."""

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection

import pytest
import reactivex as rx

from marketflow.clock import system_clock
from marketflow.feeds.decoder import Decoder
from marketflow.feeds.tcp import TcpFeed
from marketflow.model import Mode
from marketflow.pipeline.operators import retry_with_backoff
from marketflow.pipeline.schedulers import TimingLoop
from marketflow.tasks import Backoff
from tests.faults.conftest import Footprint, StartApplication, wait_until_back, wait_until_connected
from tests.support.application import Application, Readers, ScriptedExchange, Traffic
from tests.support.oracle import Rows, assert_rows_equal
from tests.support.servers import HOST, wait_until


def ask(application: Application, times: int, keep_alive: bool) -> None:
    """Requests one after the other, on one connection or on one each."""
    paths = Readers.PATHS
    with closing(HTTPConnection(HOST, application.port, timeout=5)) as connection:
        for number in range(times):
            connection.request("GET", paths[number % len(paths)], headers={} if keep_alive else {"Connection": "close"})
            answer = connection.getresponse()
            answer.read()
            assert answer.status in (200, 404)


def ask_at_once(application: Application, times: int, keep_alive: bool) -> None:
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: ask(application, times // 4, keep_alive), range(4)))


def test_reconnects_switches_and_requests_leak_nothing(
    start: StartApplication, servers: dict[str, object], exchanges: list[ScriptedExchange]
) -> None:
    # Nothing is sent but what a phase sends, and that is no reason here to give a connection up.
    application = start(servers | {"FLOW__RECONNECT_AFTER_SECONDS": 0.01, "FLOW__STALE_AFTER_SECONDS": 600})

    def reconnect() -> None:
        exchange = exchanges[0]
        came = len(exchange.accepted_at)
        exchange.send(1.0)
        exchange.cut()
        wait_until(lambda: len(exchange.accepted_at) > came)

    def switch() -> None:
        application.switch("test")
        application.switch("live")

    phases: dict[str, tuple[int, Callable[[], object]]] = {
        "reconnects": (200, reconnect),
        "switches there and back": (100, switch),
        "thousand requests on four connections": (5, lambda: ask_at_once(application, 1000, keep_alive=True)),
        "thousand requests on a connection each": (5, lambda: ask_at_once(application, 1000, keep_alive=False)),
    }
    for _, act in phases.values():  # what is made at first use is there from then on
        act()
    wait_until_connected(application, exchanges)
    before = Footprint.of(application)
    for name, (times, act) in phases.items():
        for _ in range(times):
            act()
        wait_until_connected(application, exchanges)
        print(f"{before} before {times} {name}, {wait_until_back(application, before)} after")
    assert application.stop()[0] == 0
    assert "Traceback" not in application.log


@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(400)])])
def test_flood_of_ticks_leaks_nothing(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    rows: Callable[[], Rows],
    seconds: int,
) -> None:
    application = start(servers | {"FLOW__WINDOW_SECONDS": 60})
    rate = 10_000
    with Traffic(exchanges, rate=rate, burst=500) as traffic:
        wait_until(lambda: traffic.count > 3 * rate, timeout=10)
        before = Footprint.of(application)
        wait_until(lambda: traffic.count > seconds * 3 * rate, timeout=3 * seconds)
        print(f"{before} at the begin of a flood, {wait_until_back(application, before)} in its end")
    assert application.stop()[0] == 0
    assert_rows_equal(rows(), traffic.sent)


def test_reconnect_leaks_no_object() -> None:
    decoder = Decoder(Mode.LIVE, "exchange1", ["BTCUSDT"], system_clock, 5000, lambda *_: None)
    with ScriptedExchange() as exchange:
        feed = TcpFeed("exchange1", HOST, exchange.port, decoder, 15.0)
        loop = TimingLoop("leaks")
        ticks = feed.batches().pipe(retry_with_backoff(Backoff(0.001, 0.001), loop, rx.never()))

        def reconnect() -> None:
            came, received = len(exchange.accepted_at), decoder.ticks
            exchange.send_raw(b'{"symbol":"BTCUSDT","price":1}\n')
            wait_until(lambda: decoder.ticks > received)
            exchange.cut()
            wait_until(lambda: len(exchange.accepted_at) > came)

        def objects_after(reconnects: int) -> int:
            for _ in range(reconnects):
                reconnect()
            gc.collect()
            return len(gc.get_objects())

        with ticks.subscribe(lambda _: None):
            before = objects_after(20)
            after = objects_after(200)
        loop.dispose()
    print(f"{before} objects before 200 reconnects, {after} after")
    assert after - before < 100
