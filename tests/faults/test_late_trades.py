"""Trades of a venue that come minutes late, through the whole application: closed minutes, hours and days follow."""

import json
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from marketflow.feeds.venues.venue import Trade
from marketflow.model import MINUTE_MS, Mode, Series, Slot, minute_start
from marketflow.stores.redis.keys import PLAIN
from tests.faults.test_venue_kill import all_holes
from tests.support.application import Application, now_ms
from tests.support.oracle import Rows
from tests.support.servers import RedisServer, wait_until
from tests.support.venue_server import VenueServer

LATE_MS = 125_000
"""How late after the begin of its minute the trade is sent: over two minutes, when the minute is long closed."""

BITCOIN = Series(Mode.LIVE, "binance", "BTCUSDT")


def settings(server: VenueServer) -> dict[str, object]:
    exchange = {"name": "binance", "venue": "binance", "url": server.url, "rest_url": server.rest_url}
    return {"MODE": "live", "SYMBOLS": "['BTCUSDT']", "EXCHANGES": json.dumps([exchange]), "HISTORY": "1h"} | {
        "FLOW__STALE_AFTER_SECONDS": 600  # few trades come
    }


def trades_of(server: VenueServer, start: int, first_id: int) -> list[Trade]:
    """Ten trades, and one more that has the greatest price and comes late."""
    made = [server.make(first_id + n, price=100.0 + n, quantity=0.125, at=start + 100 * n) for n in range(10)]
    return [*made, server.make(first_id + 10, price=500.0, quantity=2.5, at=start + 10_000, side="sell")]


def rfc3339(at: int) -> str:
    return datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def candle(application: Application, interval: str, start: int) -> Any:
    """The candle that holds the minute at `start`; None if there is none."""
    length = {"1m": 60_000, "1h": 3_600_000, "1d": 86_400_000}[interval]
    found = wait_until(lambda: application.find("/candles/binance/BTCUSDT", interval=interval, limit="100"))
    return next((each for each in found["candles"] if each["time"] == rfc3339(start - start % length)), None)


def candles(application: Application, start: int) -> dict[str, Any]:
    return {interval: candle(application, interval, start) for interval in ("1m", "1h", "1d")}


def check_corrected(
    application: Application, rows: Callable[[], Rows], trades: list[Trade], before: dict[str, Any]
) -> None:
    """The row of the minute is that of all its trades; minute, hour and day have a higher version, for clients too."""
    slot = Slot(BITCOIN, minute_start(trades[0].at))
    expected: dict[str, Any] = {
        "tick_count": 11,
        "open_price": 100.0,
        "max_price": 500.0,
        "close_price": 500.0,
        "volume": 3.75,
    }
    expected |= {"buy_volume": 1.25, "turnover": sum(trade.price * trade.quantity for trade in trades)}
    expected |= {"source": "ticks"}

    def found() -> dict[str, Any]:
        row = rows()[slot]
        return {name: row[name] for name in expected}

    with suppress(AssertionError):
        wait_until(lambda: found() == expected)
    assert found() == expected
    for interval, old in before.items():

        def is_corrected(interval: str = interval, old: dict[str, Any] = old) -> bool:
            """Not by the high, which the day has already, or the version alone, which a verification raises, too."""
            now = candle(application, interval, slot.start) or old
            return bool(now["high"] == 500 and now["version"] > old["version"] and now["volume"] >= old["volume"] + 2.5)

        with suppress(AssertionError):
            wait_until(is_corrected)
        assert is_corrected(), (old, candle(application, interval, slot.start))


@pytest.mark.timeout(300)
def test_late_trades_correct_minute_hour_and_day(
    tmp_path: Path,
    servers: dict[str, object],
    rows: Callable[[], Rows],
    redis_db: RedisServer,
    postgres_db: dict[str, Any],
) -> None:
    with VenueServer("binance", ["BTCUSDT"]) as server, ExitStack() as stack:
        # 40 minutes late, by the fill of a hole that an earlier run has left
        long_ago = minute_start(now_ms()) - 40 * MINUTE_MS
        trades = trades_of(server, long_ago, 100)
        for trade in trades[:-1]:  # before the start, which asks for the history once
            server.book.add(trade)
        application = stack.enter_context(Application(tmp_path, servers | settings(server)))
        wait_until(lambda: candle(application, "1m", long_ago))
        before = candles(application, long_ago)
        assert (before["1m"]["source"], before["1m"]["ticks"]) == ("venue", 10)
        assert application.stop()[0] == 0
        server.book.add(trades[-1])
        with psycopg.connect(**postgres_db) as connection:
            connection.execute(
                "insert into holes (exchange, pair_name, mode, after_id, before_id, from_time, to_time, state,"
                " found_at, changed_at) values ('binance', 'BTCUSDT', 'live', 109, 111, %s, %s, 'open', now(), now())",
                [rfc3339(trades[-2].at), rfc3339(trades[-1].at)],
            )
        application.start()
        check_corrected(application, rows, trades, before)
        corrected = wait_until(lambda: candle(application, "1m", long_ago))

        # Minutes late, by the stream
        wait_until(lambda: server.has_subscriber(2))
        start = minute_start(now_ms()) + MINUTE_MS
        wait_until(lambda: now_ms() > start + 1_200, timeout=70)
        trades = trades_of(server, start, 1_000)
        server.trade(*trades[:-1])
        wait_until(lambda: Slot(BITCOIN, start) in rows(), timeout=90)
        wait_until(lambda: (candle(application, "1m", start) or {"closed": False})["closed"])
        before = candles(application, start)
        assert (before["1m"]["ticks"], before["1m"]["source"]) == (10, "ticks")
        wait_until(lambda: now_ms() > start + LATE_MS, timeout=80)
        with redis_db.client() as client, client.pubsub() as heard:
            heard.subscribe(PLAIN.minutes_channel)
            server.trade(trades[-1])
            check_corrected(application, rows, trades, before)
            told = list(iter(lambda: heard.get_message(timeout=0.2), None))
        assert any(each["type"] == "message" and b"BTCUSDT" in each["data"] for each in told)

        def states() -> set[tuple[str, str]]:
            return {(each["after_id"], each["state"]) for each in all_holes(application)}

        # The minute may have been made again for another reason before its hole is on record.
        wait_until(lambda: states() == {("109", "filled"), ("1009", "filled")})

        def verified() -> Any:
            found = candle(application, "1m", long_ago)
            return found if found and found["verified"] else None

        assert wait_until(verified, timeout=90)["version"] == corrected["version"]
