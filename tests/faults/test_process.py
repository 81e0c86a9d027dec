"""The process is killed, stopped or started twice at any moment; each received tick is in its row once."""

import functools
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest

from marketflow.embedded import claim
from marketflow.embedded.server_process import ServerProcess, find_servers
from marketflow.model import MINUTE_MS, Mode, Series, Tick, minute_start
from marketflow.pipeline.fan_in import ModeSwitch
from tests.faults.conftest import (
    WINDOW_MS,
    Footprint,
    Sent,
    StartApplication,
    wait_until_back,
    wait_until_connected,
)
from tests.support.application import (
    ROOT,
    Application,
    Readers,
    ScriptedExchange,
    Traffic,
    exchanges_setting,
    now_ms,
    sent_by,
)
from tests.support.oracle import Rows, assert_rows_equal, differences, missing, ticks_by_slot
from tests.support.servers import HOST, RedisServer, free_port, wait_until

SYMBOLS = ("BTCUSDT", "ETHUSDT")


# SIGKILL


def kill_under_traffic(application: Application, exchanges: Sequence[ScriptedExchange], ticks: int) -> int:
    """Kill it once `ticks` more were sent, and stop sending; return when it was killed (Unix ms)."""
    with Traffic(exchanges, SYMBOLS, coming_and_going=True) as traffic:
        enough = traffic.count + ticks
        wait_until(lambda: traffic.count >= enough)
        killed_at = now_ms()
        application.kill()
    return killed_at


def lost_by_kill(application: Application, exchanges: Sequence[ScriptedExchange], lost_before: Sent) -> Sent:
    """Return the later ticks that are in no row; those of a series must follow each other."""
    wait_until_connected(application, exchanges)
    return [
        lost
        for exchange in exchanges
        for symbol in SYMBOLS
        for lost in lost_of_series(application, exchange, symbol, lost_before)
    ]


def lost_of_series(application: Application, exchange: ScriptedExchange, symbol: str, lost_before: Sent) -> Sent:
    path = f"{exchange.name}/{symbol}"
    # The newest tick is shown before its slice. This one goes ahead of any that was left without one.
    price = 500 + len(exchange.sent) / 8
    exchange.send(price, symbol=symbol)
    wait_until(lambda: application.get(f"/prices/latest/{path}")["price"] == price)
    answer = application.get(f"/prices/average/{path}")
    sent = [item for item in without(exchange.sent, lost_before) if item[0].symbol == symbol]
    ticks = [tick for _, tick in sent]
    lacking = missing({"tick_count": answer["ticks"], "average_price": answer["price"]}, ticks)
    assert lacking is not None, f"{path}: {answer['ticks']} of {len(ticks)} ticks, but not without one run"
    assert not lacking or lacking[-1] == ticks[-2], f"{path}: what is missing is not what came last"
    return [item for item in sent if item[1] in lacking]


def without(sent: Sent, lost: Sent) -> list[tuple[Series, Tick]]:
    gone = set(lost)
    return [tick for tick in sent if tick not in gone]


def test_kill_in_mid_minute_costs_at_most_200_ms_of_ticks(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    rows: Callable[[], Rows],
) -> None:
    wait_until(lambda: now_ms() % MINUTE_MS < 45_000, timeout=16)  # most often all are in one row
    application = start(servers | {"FLOW__WINDOW_SECONDS": 60})
    rng = random.Random(9)
    killed: list[int] = []
    lost: list[tuple[Series, Tick]] = []
    for _ in range(5):
        killed_at = kill_under_traffic(application, exchanges, ticks=rng.randrange(300, 700))
        application.start()
        killed.append(minute_start(killed_at))
        lost_now = lost_by_kill(application, exchanges, lost)
        lost_ms = killed_at - min((tick.at for _, tick in lost_now), default=killed_at)
        print(f"killed: {len(lost_now)} ticks of the last {lost_ms} ms lost")
        assert lost_ms <= 200
        lost += lost_now
    assert application.stop(signal.SIGTERM)[0] == 0
    assert max(Counter(killed).values()) >= 3
    assert_rows_equal(rows(), without(sent_by(exchanges), lost))


def test_minutes_ended_while_down_are_written_after_restart(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    rows: Callable[[], Rows],
) -> None:
    application = start(servers)
    killed_at = kill_under_traffic(application, exchanges, ticks=600)
    end = minute_start(killed_at, WINDOW_MS) + WINDOW_MS
    wait_until(lambda: now_ms() > end)
    application.start()
    lost = lost_by_kill(application, exchanges, [])
    kept = without(sent_by(exchanges), lost)
    wait_until(lambda: not differences(rows(), kept, WINDOW_MS), message="the minute was not completed")
    assert application.stop(signal.SIGTERM)[0] == 0
    assert_rows_equal(rows(), kept, WINDOW_MS)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return all processes that run in a folder or have it as an argument."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in text for text in (process.cwd(), *process.cmdline())):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
    return found


def test_kill_during_start_does_not_disturb_the_next_start(server_folder: Path) -> None:
    rng = random.Random(4)
    for _ in range(5):
        killed = Application(server_folder)
        killed.start(wait=False)
        threading.Event().wait(rng.uniform(0, 1))
        killed.kill()
        killed.http.close()
    with Application(server_folder) as application:
        wait_until(lambda: application.get("/health")["status"] == "ok", timeout=30)
        wait_until(lambda: application.find("/prices/average/BTCUSDT"))
        assert application.stop()[0] == 0
    assert "Traceback" not in application.log
    wait_until(lambda: not processes_of(server_folder), message="a server was left behind")
    with Application(server_folder) as again:
        assert again.get("/prices/average/BTCUSDT")["ticks"] > 0
        assert again.stop()[0] == 0


# SIGTERM and SIGINT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_under_load_ends_in_5_s_and_loses_no_tick(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    rows: Callable[[], Rows],
    number: int,
) -> None:
    application = start(servers | {"FLOW__WINDOW_SECONDS": 60})
    with ExitStack() as stack:
        idle, half = (stack.enter_context(socket.create_connection((HOST, application.port))) for _ in range(2))
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")  # the answer is never read
        half.sendall(b"GET /health HTTP/1.1\r\n")
        readers = stack.enter_context(Readers(application.port))
        with Traffic(exchanges, SYMBOLS, rate=20_000, burst=500) as traffic:
            wait_until(lambda: traffic.count > 60_000 and readers.answers > 100, timeout=30)
        # What the kernel has taken in on the other side counts as accepted, read or not.
        wait_until(lambda: not any(exchange.unread() for exchange in exchanges))
        code, seconds = application.stop(number)
    print(f"ended after {seconds:.2f} s, {readers.answers} answers")
    assert code == 0
    assert seconds < 5
    assert_rows_equal(rows(), traffic.sent)
    assert not readers.refused
    assert "Traceback" not in application.log


def test_signal_during_traffic_and_switches_ends_cleanly(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    rows: Callable[[], Rows],
) -> None:
    application = start(servers)
    switches = 0

    def switch() -> None:
        nonlocal switches
        for mode in itertools.cycle(("test", "live")):
            try:
                application.switch(mode)
            except httpx.TransportError:
                return  # it has ended
            switches += 1

    switching = threading.Thread(target=switch, daemon=True)
    with (
        Readers(application.port) as readers,
        Traffic(exchanges, SYMBOLS, rate=2000, burst=20, coming_and_going=True) as traffic,
    ):
        switching.start()
        wait_until(lambda: traffic.count > 3000 and switches > 10, timeout=20)
        code, seconds = application.stop(signal.SIGTERM)
        switching.join(5)
    print(f"ended after {seconds:.2f} s, {readers.answers} answers, {switches} switches")
    assert code == 0
    assert seconds < 5
    assert not switching.is_alive()
    assert not readers.refused
    assert_no_more_than_sent(rows(), traffic.sent, WINDOW_MS)
    assert "Traceback" not in application.log


def assert_no_more_than_sent(rows: Rows, sent: Sent, minute_ms: int) -> None:
    """Check that no row of live mode has more ticks than were sent, or a price that was not."""
    ticks = ticks_by_slot(sent, minute_ms)
    for slot, row in rows.items():
        if slot.series.mode == Mode.LIVE:
            prices = [tick.price for tick in ticks[slot]]
            assert row["tick_count"] <= len(prices), row
            assert {row["min_price"], row["max_price"], row["open_price"], row["close_price"]} <= set(prices), row


# A signal during the start


def on_data_folder(program: str, folder: Path) -> list[ServerProcess]:
    places = {"redis-server": folder / "data" / "redis", "postgres": folder / "data" / "postgres" / "data"}
    return find_servers(program, places[program])


def freeze_once_started(program: str, folder: Path) -> None:
    """Freeze a server as soon as it is started: it never becomes ready, like one that recovers for minutes."""
    (server,) = wait_until(lambda: on_data_folder(program, folder))
    server.send(signal.SIGSTOP)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("program", ["redis-server", "postgres", "initdb"])
@pytest.mark.parametrize("role", ["all", "ingest"])
def test_signal_while_embedded_servers_start_ends_it_at_once(
    server_folder: Path, exchanges: list[ScriptedExchange], program: str, number: int, role: str
) -> None:
    # Of feeds that send nothing: it goes on without a server that does not become ready, and would have ticks to lose.
    settings = {"MODE": "live", "EXCHANGES": exchanges_setting(*exchanges)}
    application = Application(server_folder, settings, () if role == "all" else ("--role", role))
    with closing(application):
        application.start(wait=False)
        if program == "initdb":
            wait_until(lambda: list(server_folder.glob("data/postgres/new-*/PG_VERSION")))
        else:
            freeze_once_started(program, server_folder)
        code, seconds = application.stop(number)
    assert code == 0, application.log
    assert seconds < 5
    assert not processes_of(server_folder)
    assert "Traceback" not in application.log
    assert "ERROR" not in application.log


def test_second_signal_while_embedded_servers_start_kills_them(server_folder: Path) -> None:
    with closing(Application(server_folder)) as application:
        application.start(wait=False)
        (server,) = wait_until(lambda: on_data_folder("postgres", server_folder))
        with refreezing(server):
            application.process.send_signal(signal.SIGTERM)
            threading.Event().wait(0.3)
            code, seconds = application.stop()
    assert code == 0, application.log
    assert seconds < 2
    assert not processes_of(server_folder)


@contextmanager
def refreezing(server: ServerProcess) -> Iterator[None]:
    """Freeze the server again and again, so that it reacts only to SIGKILL."""
    ended = threading.Event()

    def freeze() -> None:
        while not ended.wait(0.001):
            server.send(signal.SIGSTOP)

    freezing = threading.Thread(target=freeze, daemon=True)
    freezing.start()
    try:
        yield
    finally:
        ended.set()
        freezing.join(5)


def test_signals_repeated_until_the_end_leave_the_exit_code(server_folder: Path) -> None:
    with Application(server_folder) as application:
        while application.process.poll() is None:
            application.process.send_signal(signal.SIGTERM)
            threading.Event().wait(0.01)
        assert application.process.returncode == 0


# Readers of its output


@pytest.mark.parametrize("end", ["stalled", "gone"])
def test_stalled_log_reader_blocks_neither_rows_nor_sigterm(
    server_folder: Path,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    rows: Callable[[], Rows],
    monkeypatch: pytest.MonkeyPatch,
    end: str,
) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"." * 4096)  # by another process, say
    os.set_blocking(writer, True)
    if end == "gone":
        os.close(reader)
    start_process = functools.partial(subprocess.Popen)
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **given: start_process(*args, **given | {"stderr": writer}))
    given = {
        "MODE": "live",
        "EXCHANGES": exchanges_setting(*exchanges),
        "FLOW__WINDOW_SECONDS": 1,
        "LOG__LEVEL": "DEBUG",
    }
    with Application(server_folder, servers | given) as application:
        os.close(writer)
        with Traffic(exchanges, SYMBOLS, rate=200) as traffic:
            for number in range(5000):  # each is logged
                application.get("/health" if number % 10 else "/prices/latest/BTCUSDT")
            wait_until(lambda: len(rows()) > 5, message="rows have stopped")
        code, seconds = application.stop(signal.SIGTERM)
    assert code == 0
    assert seconds < 5
    assert_rows_equal(rows(), traffic.sent, 1000)
    if end == "stalled":
        os.close(reader)


@pytest.mark.parametrize("closed", [(1, 2), (0, 1, 2), (2,), (1,)])
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((), 0),
        (("--role", "ingest"), 0),
        (("--role", "api", "--workers", "2"), 0),
        (("exchange", "--port", "0"), 0),
        (("check",), 0),
        (("config",), 0),
        (("export",), 1),
        (("export", "--format", "parquet"), 1),
        (("watch", "--once", "--url", "http://127.0.0.1:1"), 1),
        (("--mode", "demo"), 2),
    ],
    ids=lambda value: "-".join(value) or "all" if isinstance(value, tuple) and value[:1] != (1,) else None,
)
def test_closed_descriptors_change_no_exit_code(
    server_folder: Path, arguments: tuple[str, ...], code: int, closed: tuple[int, ...]
) -> None:
    port = free_port()
    environment = {"PATH": os.environ["PATH"], "MARKETFLOW_DATA_DIR": str(server_folder / "data")}
    environment |= {"MARKETFLOW_HTTP__PORT": str(port)}
    redirections = " ".join(f"{descriptor}>&-" for descriptor in closed)
    command = ["/bin/sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-m", "marketflow", *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            if arguments[:1] in ((), ("--role",), ("exchange",)):
                threading.Event().wait(3.0)  # there is nothing by which it could say that it has started
                process.send_signal(signal.SIGTERM)
            output, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == code, errors
    assert b"Traceback" not in output + errors
    assert b"Fatal" not in output + errors


# Two at once


def test_second_instance_on_same_port_touches_nothing(
    server_folder: Path,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    redis_db: RedisServer,
    postgres_db: dict[str, Any],
) -> None:
    with socket.create_server((HOST, 0)) as taken:
        given = {"MODE": "live", "EXCHANGES": exchanges_setting(*exchanges), "HTTP__PORT": taken.getsockname()[1]}
        second = Application(server_folder, servers | given)
        assert second.fails() == 1
    assert "cannot listen on" in second.log
    assert not any(exchange.accepted_at for exchange in exchanges)
    with psycopg.connect(**postgres_db) as connection:
        assert connection.execute("select count(*) from pg_tables where schemaname = 'public'").fetchone() == (0,)
    with redis_db.client() as client:
        assert client.dbsize() == 0


def test_second_instance_on_same_data_folder_touches_nothing(
    server_folder: Path,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    redis_db: RedisServer,
) -> None:
    embedded_postgres = {name: value for name, value in servers.items() if name.startswith("REDIS")}
    given = {"MODE": "live", "EXCHANGES": exchanges_setting(*exchanges)} | embedded_postgres
    with claim(server_folder / "data"):
        second = Application(server_folder, given)
        assert second.fails() == 1
    assert f"in use by another MarketFlow (process {os.getpid()})" in second.log
    assert not any(exchange.accepted_at for exchange in exchanges)
    assert [path.name for path in (server_folder / "data").iterdir()] == ["lock"]
    with redis_db.client() as client:
        assert client.dbsize() == 0


# Modes


def test_modes_never_mix_while_four_threads_switch_them(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    rows: Callable[[], Rows],
) -> None:
    alien = 1e9  # and more is what exchanges ask; the generator never comes near
    application = start(servers | {"FLOW__RECONNECT_AFTER_SECONDS": 0.05})

    def modes_asked() -> list[Mode]:
        """Return the mode of each kind of price."""
        answers = [application.find(f"/prices/{kind}/BTCUSDT") for kind in ("latest", "highest", "lowest", "average")]
        prices = [answer["price"] for answer in answers if answer is not None]
        assert not [price for price in prices if 1e6 < price < alien], "an answer of both modes"
        return [Mode.LIVE if price >= alien else Mode.TEST for price in prices]

    def switch(number: int) -> tuple[str, str]:
        answer = application.switch("test" if number % 2 else "live")
        modes_asked()
        return answer["previous"], answer["mode"]

    with Traffic(exchanges, rate=400, coming_and_going=True, lowest=alien) as traffic:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(switch, range(12)))  # what is made at first use is there from then on
            application.switch("live")
            wait_until_connected(application, exchanges)
            before = Footprint.of(application)
            switched = list(threads.map(switch, random.Random(3).choices(range(2), k=100)))
        for mode in (Mode.TEST, Mode.LIVE) * 5:
            application.switch(mode)
            asked = wait_until(modes_asked)
            assert set(asked) == {mode}
        wait_until_connected(application, exchanges)
        after = wait_until_back(application, before)
    print(f"{before} before 100 switches, {after} after")
    # One at a time they make a chain, in which the way to the one mode and the way back take turns.
    to_test, to_live = switched.count(("live", "test")), switched.count(("test", "live"))
    assert to_test + to_live > 20
    assert to_test - to_live in (0, 1)
    assert application.stop()[0] == 0
    stored = rows()
    assert {series.mode for series, _ in stored} == set(Mode)
    for (series, _), row in stored.items():
        bounds = (alien, 2 * alien) if series.mode == Mode.LIVE else (0, 1e6)
        assert bounds[0] <= row["min_price"] <= row["max_price"] <= bounds[1], row
    assert_no_more_than_sent(stored, traffic.sent, WINDOW_MS)
    assert "Traceback" not in application.log


def test_mode_switch_waits_for_the_one_in_progress() -> None:
    modes = ModeSwitch(Mode.LIVE)
    begun, go_on = threading.Event(), threading.Event()

    def close_feeds(mode: Mode) -> None:
        if mode == Mode.TEST:
            begun.set()
            go_on.wait(10)

    with modes.changes.subscribe(close_feeds), ThreadPoolExecutor(2) as threads:
        first = threads.submit(modes.switch, Mode.TEST)
        assert begun.wait(5)
        second = threads.submit(modes.switch, Mode.LIVE)
        with pytest.raises(TimeoutError):
            second.result(0.1)
        go_on.set()
        assert (first.result(5), second.result(5)) == (Mode.LIVE, Mode.TEST)
