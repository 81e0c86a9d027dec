"""Candles as users meet them: fed ticks, real stores, real sockets."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from marketflow.model import MINUTE_MS, merge, minute_start
from tests.support.application import Application, ScriptedExchange, exchanges_setting, now_ms, sent_by
from tests.support.oracle import Rows, candles_of_ticks
from tests.support.servers import PostgresServer, RedisServer, wait_until

INTERVALS = {"1m": MINUTE_MS, "5m": 5 * MINUTE_MS, "15m": 15 * MINUTE_MS, "1h": 60 * MINUTE_MS, "1d": 1440 * MINUTE_MS}


@pytest.fixture
def given(servers: dict[str, object], exchanges: list[ScriptedExchange]) -> dict[str, object]:
    """Settings: live mode, three exchanges, event times of minutes ago believed, so that none need be waited for."""
    return servers | {
        "MODE": "live",
        "EXCHANGES": exchanges_setting(*exchanges),
        "FLOW__MAX_CLOCK_SKEW_SECONDS": 300,
    }


@pytest.fixture
def live(server_folder: Path, given: dict[str, object]) -> Iterator[Application]:
    with Application(server_folder, given) as application:
        wait_until(lambda: application.get("/health")["status"] == "ok", message="not all exchanges are connected")
        yield application


def candles(application: Application, interval: str = "1m", exchange: str = "", **query: str) -> list[dict[str, Any]]:
    path = f"/candles/{exchange}/BTCUSDT" if exchange else "/candles/BTCUSDT"
    answer: list[dict[str, Any]] = application.get(path, interval=interval, **query)["candles"]
    return answer


def told(answer: list[dict[str, Any]]) -> list[list[float]]:
    names = ("open", "high", "low", "close", "average", "ticks")
    return [[each[name] for name in names] for each in answer]


def expected(exchanges: list[ScriptedExchange], length: int) -> list[list[Any]]:
    """Of all that was sent; no two ticks at once, or nobody could say which came first."""
    by_start: dict[int, Any] = {}
    for slot, candle in candles_of_ticks(sent_by(exchanges), length).items():
        held = by_start.get(slot.start)
        by_start[slot.start] = candle if held is None else merge(held, candle)
    return [
        [each.open, each.high, each.low, each.close, pytest.approx(each.average), each.ticks]
        for _, each in sorted(by_start.items())
    ]


def feed(exchanges: list[ScriptedExchange]) -> None:
    """Ticks of the last minutes, each at a time of its own, and none within a second of the one that runs."""
    begin = minute_start(now_ms()) - 3 * MINUTE_MS
    for number in range(30):
        price = 100.0 + number * 7919 % 31
        exchanges[number % 3].send(price, at=begin + number * 5_003)


def test_tick_extends_the_open_candle(live: Application, exchanges: list[ScriptedExchange]) -> None:
    for number in range(5):
        exchanges[number % 2].send(100.0 + number)
        wait_until(lambda close=100.0 + number: candles(live)[-1:] and candles(live)[-1]["close"] == close)  # type: ignore[misc]
    newest = candles(live, "1d")[-1]
    assert (newest["close"], newest["closed"]) == (104.0, False)
    wait_until(lambda: candles(live, "1d")[-1]["ticks"] == 5)


def test_candles_hold_all_ticks_through_outages_and_restart(
    server_folder: Path,
    given: dict[str, object],
    exchanges: list[ScriptedExchange],
    redis_db: RedisServer,
    postgres_server: PostgresServer,
    rows: Callable[[], Rows],
) -> None:
    def right(application: Application) -> bool:
        return all(
            told(candles(application, interval, exchange)) == expected(some, length)
            for interval, length in INTERVALS.items()
            for exchange, some in (("", exchanges), ("exchange2", exchanges[1:2]))
        )

    with Application(server_folder, given) as live:
        wait_until(lambda: live.get("/health")["status"] == "ok")
        feed(exchanges)
        wait_until(lambda: right(live), timeout=10, message="not the candles of all ticks")
        minutes = len(candles_of_ticks(sent_by(exchanges), MINUTE_MS))
        wait_until(lambda: len(rows()) == minutes, timeout=15, message="not all minutes are rows")
        postgres_server.pause()
        try:
            wait_until(lambda: right(live), timeout=10, message="the cache has not all of them")
        finally:
            postgres_server.resume()
        redis_db.pause()
        try:
            wait_until(lambda: right(live), timeout=10, message="memory and rows have not all of them")
        finally:
            redis_db.resume()
        wait_until(lambda: live.get("/health")["status"] == "ok", timeout=10)
        live.stop()
    with redis_db.client() as client:
        client.flushall()
    with Application(server_folder, given) as live:
        wait_until(lambda: right(live), timeout=10, message="the rows have not all of them")
        live.switch("test")
        wait_until(lambda: live.find("/prices/latest/BTCUSDT"))
        assert all(each["high"] > 1000 for each in candles(live, "1d"))  # of the generator, and none of those fed


def test_api_processes_answer_the_same_candles(
    server_folder: Path, given: dict[str, object], exchanges: list[ScriptedExchange]
) -> None:
    for name in ("feeds", "api"):
        (server_folder / name).mkdir(mode=0o711)
    with ExitStack() as stack:
        feeds = Application(server_folder / "feeds", given, ("--role", "ingest")).start(wait=False)
        stack.push(feeds.__exit__)
        api = stack.enter_context(Application(server_folder / "api", given, ("--role", "api")))
        wait_until(lambda: api.get("/health")["status"] == "ok", timeout=15)
        feed(exchanges)
        wait_until(lambda: told(candles(api)) == expected(exchanges, MINUTE_MS), timeout=10)
        price = 555.0
        exchanges[0].send(price)
        wait_until(lambda: candles(api)[-1]["close"] == price)
        assert not candles(api)[-1]["closed"]
