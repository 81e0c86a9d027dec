"""The whole application on simulated venues, each in a process of its own, and `marketflow check` of them."""

import json
import re
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect

from marketflow.cli import main
from marketflow.feeds.recording.record_files import read_frames, read_header, record_files
from marketflow.feeds.venues.registry import VENUES as VENUES_OF
from marketflow.settings import VENUES
from tests.support.application import Application
from tests.support.servers import free_port, wait_until
from tests.support.simulated_venues import exchange_process, simulated_venue, venues_setting


def ids_of(frame: bytes) -> list[str]:
    return re.findall(r'"tradeId":"(\d+)"', frame.decode())


def live(servers: dict[str, object], ports: dict[str, int]) -> dict[str, object]:
    return servers | {"MODE": "live", "EXCHANGES": venues_setting(ports)}


def test_prices_of_all_venues_are_served(tmp_path: Path, servers: dict[str, object]) -> None:
    with ExitStack() as stack:
        ports = {venue: stack.enter_context(simulated_venue(venue, tmp_path)) for venue in VENUES}
        application = stack.enter_context(Application(tmp_path, live(servers, ports)))
        wait_until(lambda: set(application.get("/health")["exchanges"].values()) == {"connected"}, 20.0)
        for venue in VENUES:
            latest = wait_until(lambda venue=venue: application.find(f"/prices/latest/{venue}/ethusdt"), 10.0)  # type: ignore[misc]
            assert latest["exchange"] == venue
            assert 3_000 < latest["price"] < 4_000
        assert "symbols that okx does not trade" in application.log
        code, _ = application.stop()
        assert code == 0
        assert "Traceback" not in application.log


def test_venue_that_comes_back_is_connected_again(tmp_path: Path, servers: dict[str, object]) -> None:
    port = free_port()
    with ExitStack() as stack:
        application = stack.enter_context(Application(tmp_path, live(servers, {"kraken": port})))
        for _ in range(2):
            with simulated_venue("kraken", tmp_path, port):
                wait_until(lambda: application.get("/health")["exchanges"] == {"kraken": "connected"}, 30.0)
            wait_until(lambda: application.get("/health")["exchanges"] == {"kraken": "connecting"}, 30.0)


def test_recorded_frames_are_replayed_by_the_command(tmp_path: Path, servers: dict[str, object]) -> None:
    record = {"RECORD__DIR": str(tmp_path / "frames")}
    with ExitStack() as stack:
        port = stack.enter_context(simulated_venue("okx", tmp_path))
        application = stack.enter_context(Application(tmp_path, live(servers, {"okx": port}) | record))
        wait_until(lambda: application.find("/prices/latest/okx/ethusdt"), 20.0)
        wait_until(lambda: application.find("/prices/latest/okx/btcusdt"), 20.0)
        code, _ = application.stop()
        assert code == 0
    (path,) = record_files(tmp_path / "frames")
    assert read_header(path).place == f"ws://127.0.0.1:{port}"
    frames = [frame for _, frame in read_frames(path)]
    assert any(b'"event":"subscribe"' in frame for frame in frames)
    with exchange_process(["--replay", path, "--speed", "1000", "--port", "0"], tmp_path / "replay.log") as replay_port:
        names = httpx.get(f"http://127.0.0.1:{replay_port}/api/v5/public/instruments?instType=SPOT").json()["data"]
        assert {each["instId"] for each in names} == {"BTC-USDT", "ETH-USDT"}
        with connect(f"ws://127.0.0.1:{replay_port}") as client:
            client.send(VENUES_OF["okx"].subscribe(["BTC-USDT"])[0])
            traded = [each for each in frames if b'"data"' in each and b'"BTC-USDT"' in each]
            received = [client.recv(timeout=10, decode=False) for _ in range(len(traded) + 1)]
        assert [ids_of(each) for each in received[1:]] == [ids_of(each) for each in traded]


def test_check_names_what_a_venue_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with simulated_venue("coinbase", tmp_path) as port:
        for name, value in {
            "MODE": "live",
            "SYMBOLS": "BTCUSDT TONUSDT",
            "EXCHANGES": venues_setting({"coinbase": port}),
            "DATA_DIR": str(tmp_path / "data"),
        }.items():
            monkeypatch.setenv(f"MARKETFLOW_{name}", value)
        main.main(["check"])
    out = " ".join(capfd.readouterr().out.split())
    assert "BTCUSDT" in out
    assert "TONUSDT" in out


@pytest.mark.parametrize("venue", ["binance", "coinbase"])
def test_reload_changes_symbols_of_a_venue_without_a_gap(
    tmp_path: Path, servers: dict[str, object], venue: str
) -> None:
    file = tmp_path / "settings.toml"

    def write(symbols: tuple[str, ...], ports: dict[str, int]) -> None:
        tables = ", ".join(
            f'{{name="{name}",venue="{name}",url="ws://127.0.0.1:{port}",rest_url="http://127.0.0.1:{port}"}}'
            for name, port in ports.items()
        )
        file.write_text(f"symbols = {json.dumps([*symbols])}\nexchanges = [{tables}]\n")

    listed = ("BTCUSDT", "ETHUSDT", "SOLUSDT")
    with ExitStack() as stack:
        ports = {name: stack.enter_context(simulated_venue(name, tmp_path, symbols=listed)) for name in (venue, "okx")}
        write(listed[:2], {venue: ports[venue]})
        given = servers | {"MODE": "live", "HISTORY": "0s"}
        application = stack.enter_context(Application(tmp_path, given, ("--config", str(file))))
        for symbol in listed[:2]:
            wait_until(lambda symbol=symbol: application.find(f"/prices/latest/{venue}/{symbol}"), 20.0)  # type: ignore[misc]
        write((listed[0], listed[2]), ports)
        assert application.http.post("/reload").json()["changed"]["exchanges"] == [venue]
        for name in (venue, "okx"):
            wait_until(lambda name=name: application.find(f"/prices/latest/{name}/SOLUSDT"), 20.0)  # type: ignore[misc]
        ticks = application.get("/prices/average/BTCUSDT")["ticks"]
        wait_until(lambda: application.get("/prices/average/BTCUSDT")["ticks"] > ticks + 100, 30.0)
        (feed, other) = application.get("/feeds")["exchanges"]
        assert (feed["exchange"], feed["reconnects"], feed["state"]) == (venue, 0, "connected")
        assert other["exchange"] == "okx"
        assert application.get("/holes", symbol="BTCUSDT")["holes"] == []
        assert "unknown_symbol" not in application.log
        write(listed[:1], {venue: ports[venue]})
        assert application.http.post("/reload").json()["removed"]["exchanges"] == ["okx"]
        assert application.stop()[0] == 0
    assert "Traceback" not in application.log
