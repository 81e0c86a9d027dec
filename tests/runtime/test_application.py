"""MarketFlow as its users meet it: a process, real servers, real sockets."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from marketflow.embedded.server_process import ServerProcess, find_servers
from marketflow.model import MINUTE_MS, minute_start
from tests.support.application import ROOT, Application, ScriptedExchange, exchanges_setting, now_ms, switches
from tests.support.oracle import Rows, assert_rows_equal, differences
from tests.support.servers import HOST, RedisServer, free_port, wait_until

SYMBOLS = ("BTCUSDT", "DOGEUSDT", "TONUSDT", "SOLUSDT", "ETHUSDT")


@pytest.fixture
def live(server_folder: Path, servers: dict[str, object], exchanges: list[ScriptedExchange]) -> Iterator[Application]:
    """Live mode, three exchanges, and event times of minutes ago believed: a minute need not be waited for."""
    given = {"MODE": "live", "EXCHANGES": exchanges_setting(*exchanges), "FLOW__MAX_CLOCK_SKEW_SECONDS": 300}
    with Application(server_folder, servers | given) as application:
        wait_until(lambda: application.get("/health")["status"] == "ok", message="not all exchanges are connected")
        yield application


def descendants(pid: int) -> list[ServerProcess]:
    children = ServerProcess(pid).children()
    return children + [grandchild for child in children for grandchild in child.children()]


# With nothing but Python


def test_first_start_without_setup_serves_prices_and_ends_cleanly(server_folder: Path) -> None:
    application = Application(server_folder)
    with application:
        wait_until(lambda: application.find("/prices/latest/BTCUSDT"), timeout=30)
        wait_until(lambda: application.get("/health")["status"] == "ok")
        family = descendants(application.process.pid)
        assert len(family) >= 2
        code, seconds = application.stop(signal.SIGINT)
        assert code == 0
        assert seconds < 5
        assert not any(process.alive() for process in family)
    assert "Traceback" not in application.log
    assert "ERROR" not in application.log


SLOW_INITDB = """
import sys, time
from pathlib import Path
from marketflow.cli import main
from marketflow.embedded import EmbeddedPostgres
run_initdb = EmbeddedPostgres.run_initdb
def once_permitted(self, *arguments):
    while not Path(sys.argv[1]).exists():
        self.abort_if_stopping()
        time.sleep(0.05)
    run_initdb(self, *arguments)
EmbeddedPostgres.run_initdb = once_permitted
sys.exit(main.main([]))
"""
"""MarketFlow, whose initdb waits until a file exists."""


def test_slow_first_start_of_postgres_is_no_outage(server_folder: Path) -> None:
    permitted = server_folder / "permitted"
    application = Application(server_folder, {"FLOW__WINDOW_SECONDS": 1}, program=("-c", SLOW_INITDB, str(permitted)))
    with ExitStack() as stack:
        stack.push(application)
        application.start(wait=False)
        wait_until(lambda: " INFO     PostgreSQL is being started, " in application.log, timeout=30)
        wait_until(lambda: application.get("/health")["redis"] == "ok")
        assert application.get("/health")["postgres"] == "down"
        assert not application.ready()
        permitted.touch()
        wait_until(application.ready, timeout=30)
        wait_until(lambda: application.get("/health")["status"] == "ok")
        metrics = application.http.get("/metrics").text
        assert application.stop()[0] == 0
    assert "marketflow_archive_errors_total 0.0" in metrics
    assert "PostgreSQL cannot be used" not in application.log
    assert application.log.count("PostgreSQL is being started") == 1


def test_stop_during_first_start_of_postgres_reports_waiting_rows_only(server_folder: Path) -> None:
    application = Application(server_folder, program=("-c", SLOW_INITDB, str(server_folder / "permitted")))
    application.start(wait=False)
    wait_until(lambda: " INFO     PostgreSQL is being started, " in application.log, timeout=30)
    code, seconds = application.stop()
    application.http.close()
    assert (code, "Traceback" in application.log) == (0, False)
    assert seconds < 5
    assert "the drain did not end in time" not in application.log
    assert application.drained().in_no_store == 0


LOW_LIMITS = """
import resource, sys, threading
from marketflow.cli import main
from marketflow.server import system_limits
threads, needed, address_space = map(int, sys.argv[1:4])
system_limits.THREADS = needed
start = threading.Thread.start
def limited(self):
    if threading.active_count() >= threads:
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = limited
if address_space:
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
sys.exit(main.main(sys.argv[4:]))
"""
"""MarketFlow under limits of the system. The superuser has none on threads, so that one is simulated."""


@pytest.mark.parametrize("role", [(), ("--role", "ingest")])
@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ((22, 32, 0), "the system allows no more threads"),
        ((12, 1, 0), "the system allows no more threads"),
        ((100, 32, 600_000 * 1024), "limits the address space of this process to 600000 KiB (ulimit -v)"),
    ],
)
def test_low_limit_of_the_system_refuses_the_start_in_words(
    server_folder: Path, limits: tuple[int, int, int], reason: str, role: tuple[str, ...]
) -> None:
    program = ("-c", LOW_LIMITS, *map(str, limits))
    application = Application(server_folder, arguments=role, program=program)
    assert application.fails() == 1
    assert reason in application.log
    assert "Traceback" not in application.log
    assert not find_servers("redis-server", server_folder / "data" / "redis")


def test_mode_switch_is_logged_once(live: Application) -> None:
    live.switch("test")
    live.switch("test")
    assert live.stop()[0] == 0
    assert switches(live.log) == ["mode switched to test by"]


def test_second_start_serves_stored_data_within_five_seconds(server_folder: Path) -> None:
    with Application(server_folder) as first:
        # The newest tick is there before its slice, and with it the first ones: wait for the slice.
        wait_until(lambda: (first.find("/prices/average/BTCUSDT") or {"ticks": 0})["ticks"] > 30)
        began = first.get("/prices/average/BTCUSDT")["from"]
        first.stop()
    application = Application(server_folder)
    started = time.monotonic()
    with application:
        wait_until(lambda: application.find("/prices/latest/BTCUSDT"), timeout=5)
        assert time.monotonic() - started < 5
        assert application.get("/prices/average/BTCUSDT")["from"] == began
        assert application.stop(signal.SIGTERM)[0] == 0


def test_start_after_sigkill_loses_no_stored_data(server_folder: Path) -> None:
    application = Application(server_folder)
    with application:
        wait_until(lambda: (application.find("/prices/average/BTCUSDT") or {"ticks": 0})["ticks"] > 100)
        ticks = application.get("/prices/average/BTCUSDT")["ticks"]
        family = descendants(application.process.pid)
        application.kill()
        application.start()
        again = application.get("/prices/average/BTCUSDT")["ticks"]
        assert again >= ticks - 20  # 60 a second, of which 200 ms may be lost
        assert application.stop()[0] == 0
    wait_until(lambda: not any(process.alive() for process in family), message="a server was left behind")


def test_a_data_folder_may_have_any_name(server_folder: Path) -> None:
    folder = server_folder / "com,ma and 'quotes'"
    folder.mkdir(mode=0o711)
    with Application(folder) as application:
        wait_until(lambda: application.get("/health")["status"] == "ok")
        assert application.stop()[0] == 0


def test_an_embedded_server_that_dies_is_started_again_and_nothing_is_lost(server_folder: Path) -> None:
    with Application(server_folder) as application:
        wait_until(lambda: (application.find("/prices/average/BTCUSDT") or {"ticks": 0})["ticks"] > 50)
        for process in descendants(application.process.pid):
            process.send(signal.SIGKILL)
        wait_until(lambda: application.get("/health")["status"] == "degraded")
        wait_until(lambda: application.get("/health")["status"] == "ok", timeout=20)
        ticks = application.get("/prices/average/BTCUSDT")["ticks"]
        assert ticks > 50
        assert application.stop()[0] == 0
    assert "Traceback" not in application.log


def test_both_roles_share_the_embedded_servers_of_ingest(server_folder: Path) -> None:
    folders = [server_folder / name for name in ("feeds", "api")]
    for folder in folders:
        folder.mkdir(mode=0o711)
    given = {"DATA_DIR": server_folder / "data"}
    feeds = Application(folders[0], given, ("--role", "ingest"))
    api = Application(folders[1], given, ("--role", "api", "--workers", "2"))
    with ExitStack() as stack:
        for half in (api, feeds):
            stack.push(half.__exit__)
        api.start(wait=False)
        wait_until(lambda: "answers on" in api.log)
        assert api.get("/health")["redis"] == "down"  # nobody has started it yet, and this half never does
        for path in ("/readyz", "/prices/latest/BTCUSDT"):
            assert api.http.get(path).status_code == 503
        feeds.start(wait=False)
        wait_until(lambda: api.get("/health")["status"] == "ok", timeout=30)
        wait_until(lambda: api.find("/prices/latest/BTCUSDT"))
        assert api.switch("live") == {"mode": "live", "previous": "test"}
        family = descendants(feeds.process.pid)
        assert len(family) >= 2
        assert feeds.stop()[0] == 0
        assert not any(process.alive() for process in family)
        wait_until(lambda: api.get("/health")["redis"] == "down")
        assert api.stop()[0] == 0
    assert "Traceback" not in feeds.log + api.log


def test_uvicorn_serves_the_same_application(server_folder: Path, servers: dict[str, object]) -> None:
    port = free_port()
    environment = os.environ | {f"MARKETFLOW_{name}": str(value) for name, value in servers.items()}
    command = [sys.executable, "-m", "uvicorn", "marketflow.app:app", "--port", str(port)]
    log = server_folder / "uvicorn.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    with httpx.Client(base_url=f"http://{HOST}:{port}") as http:

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            try:
                return http.get("/prices/latest/BTCUSDT").status_code == 200
            except httpx.TransportError:
                return False

        try:
            wait_until(answers, timeout=20)
        finally:
            process.terminate()
            process.wait(10)
    assert "Traceback" not in log.read_text()


# Live mode with servers of one's own


def test_every_row_of_a_minute_from_three_exchanges_equals_the_oracle(
    live: Application,
    exchanges: list[ScriptedExchange],
    rows: Callable[[], Rows],
) -> None:
    minute = minute_start(now_ms()) - MINUTE_MS
    for number, exchange in enumerate(exchanges):
        for i in range(600):
            # Out of order, on both edges of the minute and of its neighbours, twins in a millisecond included.
            at = minute + (i * 7919 + number) % MINUTE_MS
            exchange.send(100 + (i * 31) % 97 + number / 8, 50 + i / 16, symbol=SYMBOLS[i % 5], at=at)
        exchange.send(1.0, symbol="BTCUSDT", at=minute)
        exchange.send(2.0, symbol="BTCUSDT", at=minute + MINUTE_MS - 1)
        exchange.send(3.0, symbol="BTCUSDT", at=minute - 1)
        exchange.send(4.0, symbol="BTCUSDT", at=minute + MINUTE_MS)
    sent = [item for exchange in exchanges for item in exchange.sent]
    closed = [
        (series, tick) for series, tick in sent if minute_start(tick.at) <= minute
    ]  # the running one is no row yet

    def stored() -> Rows:
        return {slot: row for slot, row in rows().items() if slot.start <= minute}

    wait_until(lambda: not differences(stored(), closed), message="not all ticks are in rows")
    assert live.stop()[0] == 0
    assert_rows_equal(rows(), sent)


def test_a_spike_is_in_a_period_to_its_very_edge_and_no_longer(
    live: Application, exchanges: list[ScriptedExchange]
) -> None:
    began = now_ms()
    spikes = {"10s": (10, 990.0, exchanges[0]), "1m": (60, 960.0, exchanges[1]), "3m": (180, 930.0, exchanges[2])}
    for seconds, price, exchange in spikes.values():
        exchange.send(100.0, at=began)
        exchange.send(price, 50.0, at=began - seconds * 1000 + 1500)

    def asked(question: str, period: str) -> dict[str, Any]:
        name = spikes[period][2].name
        return live.find(f"/prices/{question}/{name}/BTCUSDT", period=period) or {"price": None}

    for period, (_, price, _) in spikes.items():
        wait_until(lambda period=period, price=price: asked("highest", period)["price"] == price)  # type: ignore[misc]
        assert asked("lowest", period)["price"] == 50.0
        assert asked("average", period)["ticks"] == 3
    while now_ms() < began + 1000:
        for period, (_, price, _) in spikes.items():
            assert asked("highest", period)["price"] == price
    wait_until(lambda: now_ms() >= began + 1500 + 150)
    for period in spikes:
        assert asked("highest", period)["price"] == 100.0
        assert asked("average", period)["ticks"] == 1


def test_what_is_unknown_is_answered_as_documented(live: Application) -> None:
    for path, status, code in (
        ("/prices/latest/SHIBUSDT", 404, "unknown_symbol"),
        ("/prices/latest/exchange9/BTCUSDT", 404, "unknown_exchange"),
        ("/prices/highest/BTCUSDT?period=1y", 400, "invalid_period"),
        ("/prices/latest/BTCUSDT", 404, "no_data"),
        ("/prices/average/BTCUSDT?period=24h", 404, "no_data"),
        ("/elsewhere", 404, "not_found"),
    ):
        answer = live.http.get(path)
        assert (answer.status_code, answer.json()["code"]) == (status, code), path
        assert answer.headers["content-type"] == "application/problem+json"


def test_open_minute_is_stored_after_a_cut_connection(
    live: Application,
    exchanges: list[ScriptedExchange],
    postgres_db: dict[str, Any],
    rows: Callable[[], Rows],
) -> None:
    exchange = exchanges[0]
    exchange.send(1.0, 2.0)
    wait_until(lambda: live.find("/prices/latest/BTCUSDT"))
    with psycopg.connect(**postgres_db, autocommit=True) as connection:
        connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where application_name = 'marketflow' and datname = current_database()"
        )
    exchange.send(3.0)
    wait_until(lambda: live.get("/prices/latest/BTCUSDT")["price"] == 3.0)
    assert live.stop()[0] == 0
    assert_rows_equal(rows(), exchange.sent)


# Stores and exchanges that are down


def test_wrong_password_starts_degraded_with_the_cause_and_no_secret(
    server_folder: Path, servers: dict[str, object]
) -> None:
    wrong = {"POSTGRES__PASSWORD": "canary-secret", "REDIS__PASSWORD": "canary-secret"}
    with ExitStack() as stack:
        guarded = stack.enter_context(RedisServer(server_folder / "redis", password="another"))
        given = servers | wrong | {"REDIS__PORT": guarded.port}
        application = stack.enter_context(Application(server_folder, given))
        wait_until(lambda: application.find("/prices/latest/BTCUSDT"))
        health = application.get("/health")
        assert (health["status"], health["postgres"], health["redis"]) == ("degraded", "down", "down")
        wait_until(lambda: "password" in application.log)
        assert application.stop()[0] == 0
        assert "are in neither store" in application.log
    assert "canary" not in application.log
    assert "Traceback" not in application.log


def test_prices_are_answered_from_memory_while_both_stores_are_down(server_folder: Path) -> None:
    nowhere = {"POSTGRES__HOST": HOST, "POSTGRES__PORT": free_port(), "REDIS__HOST": HOST, "REDIS__PORT": free_port()}
    with Application(server_folder, nowhere) as application:
        wait_until(lambda: application.find("/prices/latest/BTCUSDT"))
        wait_until(lambda: application.find("/prices/average/BTCUSDT", period="1m"))
        assert application.get("/prices/highest/exchange2/ethusdt", period="10s")["exchange"] == "exchange2"
        began = time.monotonic()
        application.http.get("/prices/average/BTCUSDT")
        assert time.monotonic() - began < 1.5
        code, seconds = application.stop()
        assert code == 0
        assert seconds < 5
    assert "Traceback" not in application.log


# The simulated exchange


def test_the_simulated_exchange_serves_everybody_and_stops_at_a_signal(
    server_folder: Path, servers: dict[str, object]
) -> None:
    ports = [free_port() for _ in range(3)]
    logs = [server_folder / f"exchange{port}.log" for port in ports]
    with ExitStack() as stack:
        simulated = []
        for port, log in zip(ports, logs, strict=True):
            command = [sys.executable, "-m", "marketflow", "exchange", "--port", str(port), "--rate", "500"]
            output = stack.enter_context(log.open("wb"))
            simulated.append(stack.enter_context(subprocess.Popen(command, cwd=ROOT, stderr=output)))
        for process in simulated:
            stack.callback(process.terminate)
        tables = ", ".join(f'{{name="exchange{n}",address="{HOST}:{port}"}}' for n, port in enumerate(ports, 1))
        given = {"MODE": "live", "EXCHANGES": f"[{tables}]"}
        with Application(server_folder, servers | given) as application:
            wait_until(lambda: application.get("/health")["status"] == "ok")
            paths = [f"/prices/latest/exchange{n}/ETHUSDT" for n in (1, 2, 3)]
            wait_until(lambda: all(application.find(path) for path in paths))
            simulated[0].terminate()
            assert simulated[0].wait(5) == 0
    for log in logs:
        assert "Traceback" not in log.read_text()
