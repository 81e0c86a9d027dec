"""A reload of the settings while ticks come in: real exchanges, PostgreSQL and processes."""

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

from tests.runtime.test_application import descendants
from tests.support.application import ROOT, Application, ScriptedExchange, Traffic, exchanges_setting, sent_by
from tests.support.oracle import Rows, differences
from tests.support.servers import HOST, wait_until
from tests.support.workers import ask_workers, children

TOKEN = "a-token-of-this-test"


class Settings:
    """A file of settings that a test changes."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "settings.toml"

    def write(self, exchanges: Sequence[ScriptedExchange], symbols: Sequence[str], more: str = "") -> None:
        self.path.write_text(f"symbols = {json.dumps([*symbols])}\nexchanges = {exchanges_setting(*exchanges)}\n{more}")


@pytest.fixture
def settings(server_folder: Path) -> Settings:
    return Settings(server_folder)


@pytest.fixture
def four() -> Iterator[list[ScriptedExchange]]:
    made = [ScriptedExchange(f"exchange{number}") for number in range(1, 5)]
    yield made
    for exchange in made:
        exchange.close()


@pytest.fixture(autouse=True)
def without_nohup() -> Iterator[None]:
    """SIGHUP with its default: under nohup it is ignored, and children inherit that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def live(servers: dict[str, object], **more: object) -> dict[str, object]:
    return servers | {"MODE": "live"} | more


def reload(application: Application, **headers: str) -> Any:
    answer = application.http.post("/reload", headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def code(application: Application, path: str) -> tuple[int, str]:
    answer = application.http.get(path)
    return answer.status_code, answer.json().get("code", "")


def connections(exchanges: Sequence[ScriptedExchange]) -> list[int]:
    return [len(exchange.accepted_at) for exchange in exchanges]


def all_received(application: Application, traffic: Traffic) -> Callable[[], bool]:
    def received() -> bool:
        text = application.http.get("/metrics").text
        counts = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith("marketflow_ticks_total{")]
        return sum(map(float, counts)) >= traffic.count

    return received


def test_twenty_reloads_under_load_lose_and_double_no_tick(
    server_folder: Path,
    servers: dict[str, object],
    settings: Settings,
    four: list[ScriptedExchange],
    rows: Callable[[], Rows],
) -> None:
    *untouched, changing = four
    symbols = ("BTCUSDT", "ETHUSDT")
    settings.write(untouched, symbols)
    with Application(server_folder, live(servers), ("--config", str(settings.path))) as application:
        with Traffic(untouched, symbols, rate=10_000 / len(untouched), burst=20) as traffic:
            for number in range(10):
                settings.write(four, (*symbols, f"X{number}USDT"))
                added = reload(application)
                assert added["added"] == {"exchanges": [changing.name], "symbols": [f"X{number}USDT"], "alerts": []}
                assert added["changed"]["exchanges"] == [exchange.name for exchange in untouched]
                changing.client()
                settings.write(untouched, symbols)
                removed = reload(application)
                assert removed["removed"] == added["added"]
                changing.cut()
        assert connections(untouched) == [1, 1, 1]
        assert connections([changing]) == [10]
        wait_until(all_received(application, traffic), 20)
        assert application.stop(signal.SIGTERM)[0] == 0
    assert differences(rows(), sent_by(untouched)) == []
    assert "Traceback" not in application.log


def test_removed_exchange_has_rows_and_answers_404(
    server_folder: Path,
    servers: dict[str, object],
    settings: Settings,
    four: list[ScriptedExchange],
    rows: Callable[[], Rows],
) -> None:
    stays, moves, goes, comes = four
    settings.write((stays, moves, goes), ("BTCUSDT", "ETHUSDT"))
    with Application(server_folder, live(servers), ("--config", str(settings.path))) as application:
        for exchange in (stays, moves, goes):
            exchange.client()
            exchange.send(100.0, 101.0)
            exchange.send(7.0, symbol="ETHUSDT")
            name = exchange.name
            wait_until(lambda name=name: application.find(f"/prices/latest/{name}/ETHUSDT"))  # type: ignore[misc]
        application.get("/prices/latest/BTCUSDT")
        with connect(f"ws://{HOST}:{application.port}/ws", proxy=None) as websocket:
            assert json.loads(websocket.recv(10))["event"] == "snapshot"
            comes.name = moves.name  # the same exchange at another address
            goes.send(102.0)
            settings.write((stays, comes), ("BTCUSDT", "XRPUSDT"))
            wait_until(lambda: application.get(f"/prices/latest/{goes.name}/BTCUSDT")["price"] == 102.0)
            answer = reload(application)
            assert answer["removed"] == {"exchanges": [goes.name], "symbols": ["ETHUSDT"], "alerts": []}
            assert answer["added"] == {"exchanges": [], "symbols": ["XRPUSDT"], "alerts": []}
            assert answer["changed"]["exchanges"] == [stays.name, moves.name]
            assert answer["unchanged"] == {"exchanges": [], "symbols": ["BTCUSDT"], "alerts": []}
            snapshot = next(
                message for message in (json.loads(text) for text in websocket) if message["event"] == "snapshot"
            )["data"]
            assert (snapshot["symbols"], snapshot["exchanges"]) == (["BTCUSDT", "XRPUSDT"], [stays.name, moves.name])
            comes.client()
            comes.send(200.0)
            stays.send(8.0, symbol="XRPUSDT")
            received: set[tuple[str, str]] = set()
            while not received >= {(stays.name, "XRPUSDT"), (moves.name, "BTCUSDT")}:
                message = json.loads(websocket.recv(10))
                received |= {(each["exchange"], each["symbol"]) for each in message["data"].get("prices", ())}
        assert application.get("/prices/latest/XRPUSDT")["price"] == 8.0
        assert application.get(f"/prices/latest/{moves.name}/BTCUSDT")["price"] == 200.0
        for path in ("/prices/latest/ETHUSDT", "/candles/ETHUSDT", f"/prices/highest/{stays.name}/ETHUSDT?period=1m"):
            assert code(application, path) == (404, "unknown_symbol")
        assert code(application, f"/prices/latest/{goes.name}/BTCUSDT") == (404, "unknown_exchange")
        assert [each["symbol"] for each in application.get("/market")["symbols"]] == ["BTCUSDT", "XRPUSDT"]
        assert set(application.get("/health")["exchanges"]) == {stays.name, moves.name}
        assert {each["exchange"] for each in application.get("/feeds")["exchanges"]} == {stays.name, moves.name}
        assert "XRPUSDT" in application.http.get("/openapi.json").text
        assert "ETHUSDT" not in json.dumps(application.get("/openapi.json")["components"]["schemas"]["Symbol"])
        assert f'exchange="{goes.name}"' not in application.http.get("/metrics").text
        assert connections([stays]) == [1]
        assert application.stop(signal.SIGTERM)[0] == 0
    assert differences(rows(), sent_by(four)) == []
    assert "Traceback" not in application.log


def test_invalid_settings_are_refused_and_change_nothing(
    server_folder: Path, servers: dict[str, object], settings: Settings, four: list[ScriptedExchange]
) -> None:
    settings.write(four[:1], ("BTCUSDT",))
    given = live(servers, HTTP__TOKEN=TOKEN)
    with Application(server_folder, given, ("--config", str(settings.path))) as application:
        four[0].client()
        assert application.http.post("/reload").status_code == 401
        settings.write(four[:2], ("BTCUSDT", "btc usdt"), "[flow]\ndb_batch_size = 0\n")
        answer = application.http.post("/reload", headers={"Authorization": f"Bearer {TOKEN}"})
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_settings")
        detail = answer.json()["detail"]
        assert "flow.db_batch_size = 0: must be a whole number from 1 to 10000" in detail
        assert "symbols[1]" in detail
        application.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "settings not reloaded: flow.db_batch_size = 0" in application.log)
        assert application.get("/market")["exchanges"] == [four[0].name]
        assert connections(four) == [1, 0, 0, 0]
        settings.write(four[:2], ("BTCUSDT",), "[flow]\ndb_batch_size = 7\n[http]\nport = 1\n")
        application.process.send_signal(signal.SIGHUP)
        four[1].client()
        wait_until(lambda: application.get("/market")["exchanges"] == [four[0].name, four[1].name])
        # The port comes from a variable, which overrides the file.
        assert reload(application, Authorization=f"Bearer {TOKEN}")["needs_restart"] == ["flow.db_batch_size"]
        assert connections(four) == [1, 1, 0, 0]
        assert application.stop(signal.SIGTERM)[0] == 0


def test_reload_reaches_ingest_and_every_api_worker(
    server_folder: Path, servers: dict[str, object], settings: Settings, four: list[ScriptedExchange]
) -> None:
    folders = [server_folder / name for name in ("ingest", "api")]
    for folder in folders:
        folder.mkdir()
    settings.write(four[:2], ("BTCUSDT",))
    config = ("--config", str(settings.path))
    api = Application(folders[1], live(servers), (*config, "--role", "api", "--workers", "2"))
    ingest = Application(folders[0], live(servers), (*config, "--role", "ingest"))
    with ExitStack() as stack:
        for role in (api, ingest):
            stack.push(role.__exit__)
        ingest.start(wait=False)
        api.start()

        def workers_know(*names: str) -> bool:
            known = {pid: answer["exchanges"] for pid, answer in ask_workers(api, "/market").items()}
            return known == {pid: [*names] for pid in workers}

        workers = children(api)
        assert len(workers) == 2
        wait_until(lambda: workers_know("exchange1", "exchange2"))
        for exchange in four[:2]:
            exchange.client()
        settings.write(four[1:3], ("BTCUSDT", "ETHUSDT"))
        answer = wait_until(lambda: reload(api))
        assert answer["added"] == {"exchanges": ["exchange3"], "symbols": ["ETHUSDT"], "alerts": []}
        assert answer["removed"] == {"exchanges": ["exchange1"], "symbols": [], "alerts": []}
        four[2].client()
        wait_until(lambda: workers_know("exchange2", "exchange3"))
        four[1].send(5.0, symbol="ETHUSDT")
        wait_until(lambda: (api.find("/prices/latest/exchange2/ETHUSDT") or {}).get("price") == 5.0)
        assert set(api.get("/health")["exchanges"]) == {"exchange2", "exchange3"}
        # A signal to the parent of the workers, and one to the ingest process.
        settings.write(four[1:4], ("BTCUSDT", "ETHUSDT"))
        api.process.send_signal(signal.SIGHUP)
        four[3].client()
        wait_until(lambda: workers_know("exchange2", "exchange3", "exchange4"))
        settings.write(four[1:2], ("BTCUSDT",))
        ingest.process.send_signal(signal.SIGHUP)
        wait_until(lambda: workers_know("exchange2"))
        assert code(api, "/prices/latest/ETHUSDT") == (404, "unknown_symbol")
        assert connections(four)[1] == 1
        settings.path.write_text("symbols = 7\n")
        assert api.http.post("/reload").json()["code"] == "invalid_settings"
        assert ingest.stop(signal.SIGTERM)[0] == 0
        settings.write(four[1:2], ("BTCUSDT",))
        wait_until(lambda: api.http.post("/reload").status_code == 503)
        assert api.stop(signal.SIGTERM)[0] == 0
    assert "Traceback" not in api.log + ingest.log


def test_generated_prices_follow_the_settings(
    server_folder: Path, servers: dict[str, object], settings: Settings, four: list[ScriptedExchange]
) -> None:
    settings.write(four[:2], ("BTCUSDT", "ETHUSDT"))
    given = servers | {"MODE": "test"}
    with Application(server_folder, given, ("--config", str(settings.path))) as application:
        wait_until(lambda: application.find("/prices/latest/exchange2/ETHUSDT"))
        settings.write((four[0], four[2]), ("BTCUSDT", "XRPUSDT"))
        assert reload(application)["added"] == {"exchanges": ["exchange3"], "symbols": ["XRPUSDT"], "alerts": []}
        wait_until(lambda: application.find("/prices/latest/exchange3/XRPUSDT"))
        wait_until(lambda: application.find("/prices/latest/exchange1/XRPUSDT"))
        assert application.get("/health")["exchanges"] == {"exchange1": "generated", "exchange3": "generated"}
        assert code(application, "/prices/latest/ETHUSDT") == (404, "unknown_symbol")
        assert "unknown_symbol" not in application.log
        assert application.switch("live")["previous"] == "test"
        four[2].client()
        assert application.stop(signal.SIGTERM)[0] == 0


def test_closed_terminal_stops_it_in_good_order(server_folder: Path) -> None:
    environment = os.environ | {"MARKETFLOW_DATA_DIR": str(server_folder / "data"), "MARKETFLOW_HTTP__PORT": "0"}
    environment |= {"PYTHONPATH": str(ROOT)}
    controller, terminal = pty.openpty()
    log = server_folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", TERMINAL_PROGRAM, sys.executable, os.ttyname(terminal)],
            stdout=output, stderr=output, env=environment, start_new_session=True,
        )  # fmt: skip
    os.close(terminal)
    try:
        wait_until(lambda: "answers on" in log.read_text(), 30)
        family = descendants(process.pid)
        assert family
        os.close(controller)
        assert process.wait(15) == 0, log.read_text()
        assert not any(each.alive() for each in family)
    finally:
        if process.poll() is None:
            process.kill()
    assert "stopping" in log.read_text()


TERMINAL_PROGRAM = """
import fcntl, os, sys, termios
fcntl.ioctl(os.open(sys.argv[2], os.O_RDWR), termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], [sys.argv[1], "-m", "marketflow"])
"""
