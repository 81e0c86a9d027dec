"""The application behind a web proxy: what is wrong with the proxy is in /health, its credentials are nowhere."""

from pathlib import Path
from typing import Any

from tests.support.application import Application
from tests.support.servers import wait_until
from tests.support.venue_server import VenueServer
from tests.support.web_proxy import web_proxy

PASSWORD = "s3cret-word"


def started(folder: Path, servers: dict[str, object], server: VenueServer, proxy: str) -> Application:
    exchange = f'[{{name="binance",venue="binance",url="{server.url}",rest_url="{server.rest_url}"}}]'
    settings = servers | {"MODE": "live", "EXCHANGES": exchange, "SYMBOLS": "['BTCUSDT']", "HISTORY": "0s"}
    return Application(folder, settings, variables={"ALL_PROXY": proxy})


def words(application: Application) -> Any:
    problem = application.get("/health").get("feeds", {}).get("binance")
    return problem and problem["error"]


def test_proxy_that_refuses_is_named_in_health(tmp_path: Path, servers: dict[str, object]) -> None:
    with VenueServer("binance", ["BTCUSDT"]) as server, web_proxy(tmp_path, "me:other-word") as proxy:
        with started(tmp_path, servers, server, proxy.url_of("me", PASSWORD)) as application:
            text = wait_until(lambda: words(application), timeout=20)
            assert f"through the proxy {proxy.url} failed: 407" in text
            assert application.get("/health")["exchanges"] == {"binance": "connecting"}
            assert application.stop()[0] == 0
        assert "through the proxy" in application.log
        assert PASSWORD not in application.log
        assert "Traceback" not in application.log
        assert (server.handshakes, server.rest_requests) == (0, [])


def test_trades_come_through_the_proxy(tmp_path: Path, servers: dict[str, object]) -> None:
    with VenueServer("binance", ["BTCUSDT"]) as server, web_proxy(tmp_path, f"me:{PASSWORD}") as proxy:
        with started(tmp_path, servers, server, proxy.url_of("me", PASSWORD)) as application:
            wait_until(server.has_subscriber, timeout=20)
            server.trade(server.make(1, price=123.5))
            newest = wait_until(lambda: application.find("/prices/latest/binance/BTCUSDT"), timeout=10)
            assert newest["price"] == 123.5
            assert application.stop()[0] == 0
        assert PASSWORD not in application.log
        wait_until(lambda: f"CONNECT 127.0.0.1:{server.port}" in proxy.log)
