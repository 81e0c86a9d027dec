"""REST of a venue that hangs or fails: live trades, /health and the stop do not wait for it."""

from datetime import datetime
from functools import partial
from pathlib import Path
from signal import SIGTERM

import pytest

from marketflow.feeds.simulated.rest_side import RestAnswer
from tests.faults.test_venue_kill import SYMBOLS, Trading, venue_settings
from tests.support.application import Application, now_ms
from tests.support.servers import wait_until
from tests.support.venue_server import VenueServer


def has_price_of(application: Application, at: int) -> bool:
    """Return whether the newest price is of that time (Unix ms) or later."""
    newest = application.get("/prices/latest/BTCUSDT")["timestamp"]
    return datetime.fromisoformat(newest).timestamp() * 1000 >= at


@pytest.mark.parametrize("fault", ["hangs", "fails"])
def test_rest_that_answers_nothing_delays_neither_trades_nor_stop(
    server_folder: Path, servers: dict[str, object], fault: str
) -> None:
    with VenueServer("binance", SYMBOLS) as server:
        trading = Trading(server)
        with trading.running(), Application(server_folder, servers | venue_settings(server, "binance")) as application:
            wait_until(server.has_subscriber, timeout=20)
            asked = len(server.rest_requests)
            if fault == "hangs":
                server.rest_hangs.set()
            else:
                server.rest_answers.extend([RestAnswer(b"<html>", 502)] * 10_000)
            wait_until(lambda: len(server.rest_requests) > asked, timeout=30)
            for _ in range(20):
                wait_until(partial(has_price_of, application, now_ms()), timeout=1.5)
            assert application.get("/health")["exchanges"] == {"binance": "connected"}
            code, seconds = application.stop(SIGTERM)
            assert (code, seconds < 5) == (0, True)
        server.rest_hangs.clear()
        assert "Traceback" not in application.log
