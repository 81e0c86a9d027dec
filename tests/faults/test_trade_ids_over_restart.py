"""Trades with ids that an exchange sends again after a restart of MarketFlow count once."""

import json
from collections.abc import Callable
from typing import Any

from marketflow.model import MINUTE_MS
from tests.faults.conftest import StartApplication
from tests.support.application import ScriptedExchange, now_ms
from tests.support.oracle import Rows
from tests.support.servers import wait_until


def lines(numbers: range, at: int) -> bytes:
    made: list[dict[str, Any]] = [
        {"symbol": "BTCUSDT", "price": 10 + number, "timestamp": at + number, "quantity": 0.5, "id": number}
        for number in numbers
    ]
    return "".join(json.dumps(each) + "\n" for each in made).encode()


def test_trades_sent_again_after_a_kill_count_once(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    rows: Callable[[], Rows],
) -> None:
    wait_until(lambda: now_ms() % MINUTE_MS < 40_000, timeout=21)  # all are in one row
    application = start(servers | {"FLOW__WINDOW_SECONDS": 60, "FLOW__MAX_CLOCK_SKEW_SECONDS": 30})
    at = now_ms()

    def ticks() -> int:
        return application.get("/prices/average/exchange1/BTCUSDT")["ticks"] if has_price() else 0

    def has_price() -> bool:
        return application.find("/prices/latest/exchange1/BTCUSDT") is not None

    exchanges[0].send_raw(lines(range(1, 11), at))
    wait_until(lambda: ticks() == 10)
    application.kill()
    exchanges[0].cut()
    application.start()
    exchanges[0].client()
    exchanges[0].send_raw(lines(range(6, 13), at) + lines(range(9, 15), at))
    wait_until(lambda: ticks() == 14)
    assert application.get("/feeds")["exchanges"][0]["doubles"] == 9
    assert application.stop()[0] == 0
    (row,) = [row for slot, row in rows().items() if slot.series.exchange == "exchange1"]
    assert (row["tick_count"], row["volume"], row["open_price"], row["close_price"]) == (14, 7.0, 11, 24)
