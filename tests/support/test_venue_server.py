"""The scripted venue server does to a client what its documentation says."""

import threading
import time
from typing import Any

import httpx
import msgspec
import pytest
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from marketflow.feeds.simulated.rest_side import RestAnswer
from tests.support.servers import wait_until
from tests.support.venue_server import VenueServer

SUBSCRIBE = '{"method":"SUBSCRIBE","params":["btcusdt@trade"],"id":1}'


def client_of(server: VenueServer, timeout: float = 5.0) -> ClientConnection:
    return connect(server.url, open_timeout=timeout, close_timeout=0.2, compression=None)


@pytest.mark.parametrize("status", [403, 418, 429, 451, 502])
def test_handshakes_are_refused_in_order(status: int) -> None:
    with VenueServer("binance", ["BTCUSDT"], refusals=[(429, {"Retry-After": "7"})]) as server:
        server.refuse(status, {"X-Reason": "test"}, b"<html>no</html>")
        with pytest.raises(InvalidStatus) as first, client_of(server):
            pass
        with pytest.raises(InvalidStatus) as second, client_of(server):
            pass
        assert first.value.response.headers["Retry-After"] == "7"
        answer = second.value.response
        assert (answer.status_code, answer.headers["X-Reason"]) == (status, "test")
        assert answer.body == b"<html>no</html>"
        assert answer.headers["Content-Type"] == "text/html"
        with client_of(server):
            pass
        assert server.handshakes == len(server.handshake_times) == 3


def test_handshake_hangs_before_the_answer() -> None:
    with VenueServer("okx", ["BTCUSDT"]) as server:
        server.hang()
        with pytest.raises(TimeoutError), client_of(server, timeout=0.3):
            pass
        with client_of(server):
            pass


def test_connection_hangs_after_the_handshake() -> None:
    with VenueServer("okx", ["BTCUSDT"]) as server:
        server.hang(after_101=True)
        with client_of(server) as client:
            wait_until(lambda: bool(server.connections))
            assert not client.ping().wait(0.3)
        with client_of(server) as other:
            assert other.ping().wait(5)


def test_frozen_connection_answers_after_the_thaw() -> None:
    with VenueServer("okx", ["BTCUSDT"]) as server, client_of(server) as client:
        wait_until(lambda: bool(server.connections))
        assert client.ping().wait(5)
        server.freeze()
        ping = client.ping()
        assert not ping.wait(0.3)
        server.thaw()
        assert ping.wait(5)


def test_acknowledgements_come_late_and_in_any_order() -> None:
    with VenueServer("bybit", ["BTCUSDT", "ETHUSDT"], acknowledging=False) as server, client_of(server) as client:
        for symbol in ("BTCUSDT", "NOPEUSDT"):
            client.send(msgspec.json.encode({"op": "subscribe", "args": [f"publicTrade.{symbol}"]}).decode())
        wait_until(lambda: len(server.unanswered) == 2)
        with pytest.raises(TimeoutError):
            client.recv(timeout=0.1)
        server.acknowledge(newest_first=True)
        assert [msgspec.json.decode(client.recv(timeout=5))["success"] for _ in range(2)] == [False, True]


def test_frames_are_sent_in_every_form() -> None:
    with VenueServer("binance", ["BTCUSDT"]) as server, client_of(server) as client:
        client.send(SUBSCRIBE)
        assert client.recv(timeout=5) == '{"result":null,"id":1}'
        server.send("text", b"\x00\xff")
        server.send_fragmented("a long message")
        server.send_together("one", "two")
        assert [client.recv(timeout=5) for _ in range(5)] == ["text", b"\x00\xff", "a long message", "one", "two"]
        assert server.connections[-1].ping(b"payload").wait(5)


@pytest.mark.parametrize("code", [1000, 1001, 1008, 1009, 1011, 1012, 4004, 4008])
def test_connections_are_closed_with_any_code(code: int) -> None:
    with VenueServer("okx", ["BTCUSDT"]) as server, client_of(server) as client:
        wait_until(lambda: bool(server.connections))
        server.close(code, "reason")
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=5)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (code, "reason")


def test_reset_ends_a_connection_without_a_close() -> None:
    with VenueServer("okx", ["BTCUSDT"]) as server, client_of(server) as client:
        wait_until(lambda: bool(server.connections))
        server.reset()
        with pytest.raises(ConnectionClosedError) as closed:
            client.recv(timeout=5)
        assert closed.value.rcvd is None
        assert isinstance(closed.value.__cause__, ConnectionResetError)


def test_trades_are_kept_for_rest_and_sent() -> None:
    with VenueServer("binance", ["BTCUSDT"]) as server, client_of(server) as client:
        client.send(SUBSCRIBE)
        client.recv(timeout=5)
        server.trade(server.make(1), server.make(2))
        server.book.add(server.make(3))
        assert [msgspec.json.decode(client.recv(timeout=5))["t"] for _ in range(2)] == [1, 2]

        def ids() -> Any:
            body = httpx.get(f"{server.rest_url}/api/v3/trades?symbol=BTCUSDT").json()
            return [row["id"] for row in body]

        assert ids() == [1, 2, 3]
        server.book.lag_seconds = 0.3
        server.book.add(server.make(4))
        assert ids() == [1, 2, 3]
        wait_until(lambda: ids() == [1, 2, 3, 4])
        assert server.rest_requests[0] == "/api/v3/trades?symbol=BTCUSDT"


def test_rest_answers_are_scripted() -> None:
    with VenueServer("kraken", ["BTCUSDT"]) as server:
        html = RestAnswer(b"<html>bad gateway</html>", 502)
        server.rest_answers += [html, RestAnswer(b'{"error":[]}'), None]
        url = f"{server.rest_url}/0/public/Time"
        assert [httpx.get(url).status_code for _ in range(2)] == [502, 200]
        assert "unixtime" in httpx.get(url).json()["result"]
        server.rest_hangs.set()
        with pytest.raises(httpx.TimeoutException):
            httpx.get(url, timeout=0.2)
        threading.Timer(0.2, server.rest_hangs.clear).start()
        began = time.monotonic()
        assert httpx.get(url, timeout=5).status_code == 200
        assert time.monotonic() - began < 4


def test_limits_are_kept_where_asked_for() -> None:
    with VenueServer("kraken", ["BTCUSDT"], limited=True) as server:
        with httpx.Client(base_url=server.rest_url) as client:
            answers = [client.get("/0/public/Time").json() for _ in range(11)]
        assert answers[-1] == {"error": ["EGeneral:Too many requests"]}
        assert answers[-2]["error"] == []
