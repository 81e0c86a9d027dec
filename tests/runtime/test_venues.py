"""The whole application on simulated venues, each in a process of its own, and `marketflow check` of them."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from marketflow.cli import main
from marketflow.settings import VENUES
from tests.support.application import Application
from tests.support.servers import free_port, wait_until


@contextmanager
def simulated(venue: str, folder: Path, port: int = 0) -> Iterator[int]:
    """Yield the port of a simulated venue that trades BTCUSDT and ETHUSDT."""
    command = [sys.executable, "-m", "marketflow", "exchange", "--venue", venue, "--port", str(port)]
    log = folder / f"{venue}.log"
    with (
        log.open("ab") as stderr,
        subprocess.Popen([*command, "--symbols", "BTCUSDT,ETHUSDT", "--rate", "50"], stderr=stderr) as process,
    ):
        try:
            found = wait_until(lambda: re.search(rb"listens on ws://127.0.0.1:(\d+)", log.read_bytes()), 30.0)
            assert found is not None
            yield int(found[1])
        finally:
            process.terminate()
            assert process.wait(10) == 0


def live(servers: dict[str, object], ports: dict[str, int]) -> dict[str, object]:
    return servers | {"MODE": "live", "EXCHANGES": setting(ports)}


def setting(ports: dict[str, int]) -> str:
    return json.dumps(
        [
            {"name": venue, "venue": venue, "url": f"ws://127.0.0.1:{port}", "rest_url": f"http://127.0.0.1:{port}"}
            for venue, port in ports.items()
        ]
    )


def test_prices_of_all_venues_are_served(tmp_path: Path, servers: dict[str, object]) -> None:
    with ExitStack() as stack:
        ports = {venue: stack.enter_context(simulated(venue, tmp_path)) for venue in VENUES}
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
            with simulated("kraken", tmp_path, port):
                wait_until(lambda: application.get("/health")["exchanges"] == {"kraken": "connected"}, 30.0)
            wait_until(lambda: application.get("/health")["exchanges"] == {"kraken": "connecting"}, 30.0)


def test_check_names_what_a_venue_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with simulated("coinbase", tmp_path) as port:
        for name, value in {
            "MODE": "live",
            "SYMBOLS": "BTCUSDT TONUSDT",
            "EXCHANGES": setting({"coinbase": port}),
            "DATA_DIR": str(tmp_path / "data"),
        }.items():
            monkeypatch.setenv(f"MARKETFLOW_{name}", value)
        main.main(["check"])
    out = " ".join(capfd.readouterr().out.split())
    assert "BTCUSDT" in out
    assert "TONUSDT" in out
