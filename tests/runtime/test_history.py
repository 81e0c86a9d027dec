"""History and verification of the whole application, on simulated venues in processes of their own."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from marketflow.model import minute_start
from marketflow.settings import VENUES
from tests.support.application import Application, now_ms
from tests.support.exposition import samples_of
from tests.support.oracle import Rows
from tests.support.servers import HOST, wait_until
from tests.support.simulated_venues import simulated_venue

HISTORY_SECONDS = 90.0

VERIFIED_SECONDS = 280.0
"""A whole minute after the start, a minute for it, 75 s, and a minute for the interval of the calls."""

POLL_SECONDS = 0.5
"""Asked more often, the application would be slower than without the test."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@contextmanager
def tampering(port: int) -> Iterator[int]:
    """Yield the port of a proxy before Kraken's REST that adds 3 to the volume of each candle since now."""
    since = now_ms() // 1000

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            reply = httpx.get(f"http://{HOST}:{port}{self.path}")
            body = reply.json()
            if "/OHLC" in self.path:
                (key,) = body["result"].keys() - {"last"}
                for row in body["result"][key]:
                    if row[0] > since:
                        row[6] = str(float(row[6]) + 3)
            content = json.dumps(body).encode()
            self.send_response(reply.status_code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer((HOST, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def exchange(name: str, venue: str, port: int, rest_port: int) -> dict[str, str]:
    urls = {"url": f"ws://{HOST}:{port}", "rest_url": f"http://{HOST}:{rest_port}"}
    return {"name": name, "venue": venue, **urls}


def settings(servers: Mapping[str, object], *exchanges: dict[str, str]) -> dict[str, object]:
    shared = {"MODE": "live", "SYMBOLS": "BTCUSDT,ETHUSDT", "EXCHANGES": json.dumps(exchanges)}
    return {**servers, **shared}


def candles(application: Application, name: str, limit: int = 1000) -> list[dict[str, Any]]:
    time.sleep(POLL_SECONDS)
    found = application.find(f"/candles/{name}/BTCUSDT", interval="1m", limit=str(limit))
    return list(found["candles"]) if found else []


def has_history(application: Application, name: str, minutes: int) -> bool:
    return [each["source"] for each in candles(application, name)].count("venue") >= minutes


def result(application: Application, name: str, verified: bool, begun: str) -> dict[str, Any] | None:
    """The newest minute after the one of the start that was compared with this result."""
    found = [
        each
        for each in candles(application, name, 10)
        if each["time"][:19] > begun[:19] and each["verified"] is verified
    ]
    return found[-1] if found else None  # times are of one format, so they compare as text


def test_history_appears_and_minutes_become_verified(
    tmp_path: Path, servers: dict[str, object], rows: Callable[[], Rows]
) -> None:
    with ExitStack() as stack:
        ports = {venue: stack.enter_context(simulated_venue(venue, tmp_path)) for venue in VENUES}
        tampered = stack.enter_context(tampering(ports["kraken"]))
        exchanges = [exchange(venue, venue, port, port) for venue, port in ports.items()]
        exchanges.append(exchange("tampered", "kraken", ports["kraken"], tampered))
        begun = datetime.fromtimestamp(minute_start(now_ms()) / 1000, UTC).isoformat(timespec="seconds")
        application = stack.enter_context(Application(tmp_path, settings(servers, *exchanges)))
        for venue in VENUES:
            minutes = 700 if venue == "kraken" else 990  # of the thousand that one answer has
            wait_until(lambda venue=venue, least=minutes: has_history(application, venue, least), HISTORY_SECONDS)  # type: ignore[misc]
        assert application.log.count("history is shorter than configured") == 2

        for venue in VENUES:
            minute = wait_until(lambda venue=venue: result(application, venue, True, begun), VERIFIED_SECONDS)  # type: ignore[misc]
            assert minute is not None
            assert (minute["source"], minute["version"], minute["venue"]) == ("ticks", 1, None)
            assert minute["volume"] > 0
        minute = wait_until(lambda: result(application, "tampered", False, begun), VERIFIED_SECONDS)
        assert minute is not None
        assert minute["venue"]["volume"] == pytest.approx(minute["volume"] + 3)
        assert {name: minute["venue"][name] for name in ("open", "high", "low", "close", "ticks")} == {
            name: minute[name] for name in ("open", "high", "low", "close", "ticks")
        }
        assert "a candle differs from the venue's: " in application.log

        samples = samples_of(application.http.get("/metrics").text)
        for venue in VENUES:
            assert (samples.of("candles_verified_total", exchange=venue, result="verified") or 0) > 0
        assert (samples.of("candles_verified_total", exchange="tampered", result="different") or 0) > 0
        assert application.stop()[0] == 0
        assert "Traceback" not in application.log

        before = len(rows())
        (tmp_path / "again").mkdir()
        with Application(tmp_path / "again", settings(servers, exchanges[0]) | {"LOG__LEVEL": "DEBUG"}) as again:
            wait_until(lambda: "history is fetched" in again.log, HISTORY_SECONDS)
            fetched = int(again.log.split("history is fetched minutes=")[1].split()[0])
            assert fetched <= 5
            assert len(rows()) <= before + fetched + 5
