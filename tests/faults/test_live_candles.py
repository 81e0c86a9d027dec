"""Candles in the streams of real processes equal what GET /candles answers, with late and corrected ticks."""

import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

from marketflow.model import MINUTE_MS, minute_start
from tests.support.application import Application, ScriptedExchange, exchanges_setting, now_ms
from tests.support.roles import Roles
from tests.support.servers import HOST, PATIENCE_SECONDS, RedisServer, wait_until

INTERVALS = ("1m", "3m", "5m", "15m", "30m", "1h", "4h", "1d", "1w", "1M")
CLOSED_AFTER_MS = 5_500
KEYS = ("symbol", "exchange", "interval")


class Watcher:
    """A client of the candles of one symbol on /ws, on a thread of its own."""

    def __init__(self, port: int) -> None:
        self.known: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.closed: list[tuple[Any, ...]] = []
        self._port = port
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        query = f"symbols=BTCUSDT&intervals={','.join(INTERVALS)}"
        exchanges = ["exchange1", "exchange2", "reference"]
        command = {"op": "subscribe", "symbols": ["BTCUSDT"], "intervals": [*INTERVALS], "exchanges": exchanges}
        with connect(f"ws://{HOST}:{self._port}/ws?{query}") as connection:
            connection.send(json.dumps(command))
            while not self._ended.is_set():
                with suppress(TimeoutError):
                    self._take(json.loads(connection.recv(0.1)))

    def _take(self, message: dict[str, Any]) -> None:
        if message["event"] not in ("snapshot", "candles"):
            return
        if message["event"] == "snapshot":
            self.known.clear()
        for candle in message["data"]["candles"]:
            key = (candle["exchange"], candle["interval"], candle["time"])
            self.known[key] = candle
            if candle["closed"] and message["event"] == "candles":
                self.closed.append((*key, candle["version"]))

    def close_of(self, exchange: str | None) -> float | None:
        """The close of the newest minute."""
        times = [time for name, interval, time in [*self.known] if (name, interval) == (exchange, "1m")]
        return self.known[exchange, "1m", max(times)]["close"] if times else None

    def close(self) -> None:
        self._ended.set()
        self._thread.join(5)


@pytest.fixture(params=["one process", "two roles"])
def application(
    request: pytest.FixtureRequest, server_folder: Path, servers: dict[str, object], exchanges: list[ScriptedExchange]
) -> Iterator[Application]:
    given = servers | {"MODE": "live", "EXCHANGES": exchanges_setting(*exchanges)}
    with ExitStack() as stack:
        roles = Roles(stack, server_folder, given)
        if request.param == "two roles":
            ingest, application = roles.ingest(), roles.api()
            yield application
            assert ingest.stop()[0] == 0
        else:
            application = roles.both()
            yield application
    assert " ERROR " not in application.log, application.log
    assert "Traceback" not in application.log


def differences(application: Application, watcher: Watcher) -> list[tuple[Any, Any]]:
    """Return the candles since the client's snapshot that differ between stream and answer."""
    found: list[tuple[Any, Any]] = []
    for exchange in (None, "exchange1", "exchange2", "reference"):
        for interval in INTERVALS:
            path = "/".join(["/candles", *([exchange] if exchange else []), "BTCUSDT"])
            for candle in application.get(path, interval=interval, limit="3")["candles"]:
                known = watcher.known.get((exchange, interval, candle["time"]))
                if known is None or {name: known[name] for name in candle} != candle:
                    found.append((known, candle))
    return found


def test_streamed_candles_equal_the_answers(application: Application, exchanges: list[ScriptedExchange]) -> None:
    chance = random.Random(20)
    for exchange in exchanges[:2]:
        exchange.send(100.0)
    wait_until(lambda: application.find("/candles/exchange2/BTCUSDT"))
    with closing(Watcher(application.port)) as watcher:
        began = now_ms()
        end = minute_start(began) + MINUTE_MS
        if end - began < 5_000:
            end += MINUTE_MS
        while now_ms() < end + CLOSED_AFTER_MS + 500:
            exchange = chance.choice(exchanges[:2])
            late_ms = chance.choice((0, 0, 0, 500, 1_900, 3_500))
            exchange.send(100 + chance.randrange(100) / 4, at=now_ms() - late_ms)
            time.sleep(0.02)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while wrong := differences(application, watcher):
            assert time.monotonic() < deadline, wrong
            time.sleep(0.1)
        time.sleep(2.0)  # rows and closed minutes have been written again meanwhile
        assert not differences(application, watcher)
        minutes = {(exchange, "1m") for exchange in (None, "exchange1", "exchange2", "reference")}
        wait_until(lambda: minutes <= {(exchange, interval) for exchange, interval, *_ in [*watcher.closed]})
        assert len(watcher.closed) == len({*watcher.closed})


def test_candles_equal_the_answers_after_a_redis_outage(
    request: pytest.FixtureRequest,
    application: Application,
    exchanges: list[ScriptedExchange],
    redis_db: RedisServer,
) -> None:
    """During the outage one process makes them from memory."""
    for exchange in exchanges[:2]:
        exchange.send(100.0)
    wait_until(lambda: application.find("/candles/exchange2/BTCUSDT"))
    with closing(Watcher(application.port)) as watcher:
        exchanges[0].send(110.0)
        wait_until(lambda: watcher.close_of("exchange1") == 110.0)
        redis_db.kill()
        try:
            wait_until(lambda: application.get("/health")["redis"] == "down")
            exchanges[0].send(120.0)
            exchanges[1].send(130.0, at=now_ms() + 50)  # surely the later one
            if "one process" in request.node.name:
                wait_until(lambda: watcher.close_of("exchange1") == 120.0)
                wait_until(lambda: watcher.close_of(None) == 130.0)
        finally:
            redis_db.start()
        wait_until(lambda: application.get("/health")["redis"] == "ok")
        wait_until(lambda: watcher.close_of("exchange1") == 120.0)
        exchanges[0].send(140.0)
        wait_until(lambda: watcher.close_of("exchange1") == 140.0)
        wait_until(lambda: not differences(application, watcher))


def test_mode_switch_begins_with_candles_of_the_other_mode(
    application: Application, exchanges: list[ScriptedExchange]
) -> None:
    exchanges[0].send(100.0)
    with closing(Watcher(application.port)) as watcher:
        wait_until(lambda: watcher.close_of("exchange1") == 100.0)
        application.switch("test")
        wait_until(lambda: (watcher.close_of("exchange1") or 0.0) > 1_000)  # a generated price
        application.switch("live")
        wait_until(lambda: watcher.close_of("exchange1") == 100.0)
