"""Backpressure of slow and stalled clients, on real sockets with short deadlines."""

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import pytest
import uvicorn
from starlette.types import Message, Receive, Scope, Send

from marketflow.api.streaming.sse_route import STREAMING
from marketflow.server import write_buffer
from marketflow.server.http_protocol import LimitedHttpProtocol
from marketflow.server.websocket_protocol import LimitedWebSocketProtocol
from marketflow.server.write_buffer import StreamingProtocol
from tests.support.servers import HOST, wait_until

STALL_SECONDS = 0.4
CHUNK = 1000
GET = b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n"
UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


class App:
    """Sends as fast as backpressure allows; records the bytes sent and the disconnect."""

    def __init__(self) -> None:
        self.sent = 0
        self.gone = threading.Event()
        self.lose_connections: Callable[[], None] = lambda: None
        self.states: list[str] = []  # of the output

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.sent = 0
        self.gone.clear()
        if scope["query_string"] == b"lost":
            self.lose_connections()
        try:
            await self._stream(scope, receive, send)
        finally:
            self.gone.set()

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept"})
            piece: Message = {"type": "websocket.send", "bytes": b"x" * CHUNK}
        else:
            if scope["path"] == "/stream":
                scope["extensions"][STREAMING]["begin"]()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            piece = {"type": "http.response.body", "body": b"x" * CHUNK, "more_body": True}
        if scope["query_string"] == b"output":
            self._fill(scope["extensions"][STREAMING]["begin"]())
            await self._gone(receive)
            return
        gone = asyncio.create_task(self._gone(receive))
        try:
            while not gone.done():
                await send(piece)
                self.sent += CHUNK
                await asyncio.sleep(0)
        except OSError:
            pass
        finally:
            gone.cancel()

    def _fill(self, output: StreamingProtocol) -> None:
        """Write to the output of a stream until its buffer is full, and note its states from then on."""

        def changed() -> None:
            try:
                self.states.append("full" if output.sink() is None else "open")
            except ConnectionAbortedError:
                self.states.append("closed")

        output.on_change = changed
        while (sink := output.sink()) is not None:
            sink.write(b"x" * CHUNK)

    async def _gone(self, receive: Receive) -> None:
        while not (await receive())["type"].endswith("disconnect"):
            pass


class Server:
    """uvicorn in a thread."""

    def __init__(self) -> None:
        self.app = App()
        self._listener = socket.create_server((HOST, 0))
        config = uvicorn.Config(
            self.app,
            interface="asgi3",
            http=LimitedHttpProtocol,
            ws=LimitedWebSocketProtocol,
            ws_per_message_deflate=False,
            lifespan="off",
            log_config=None,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self.app.lose_connections = self._abort_connections
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]})
        self._thread.start()

    def _abort_connections(self) -> None:
        for connection in self._server.server_state.connections:
            connection.transport.abort()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._listener.close()

    def connect(self, request: bytes) -> socket.socket:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(5)
        client.connect(self._listener.getsockname())
        client.sendall(request)
        return client


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(write_buffer, "STALL_SECONDS", STALL_SECONDS)
    with closing(Server()) as server:
        yield server


@pytest.mark.long
@pytest.mark.parametrize("request_", [GET % b"stream", UPGRADE], ids=["http", "websocket"])
def test_stalled_stream_client_is_disconnected_with_small_buffers(server: Server, request_: bytes) -> None:
    with server.connect(request_) as client:
        assert client.recv(12)
        assert server.app.gone.wait(10 * STALL_SECONDS)
        assert server.app.sent < 100_000
        left = sum(map(len, iter(lambda: client.recv(65536), b"")))
        assert left < 200_000


@pytest.mark.long
@pytest.mark.parametrize("request_", [GET % b"stream", UPGRADE], ids=["http", "websocket"])
def test_slow_stream_client_stays_connected(server: Server, request_: bytes) -> None:
    with server.connect(request_) as client:
        assert client.recv(12)
        end = time.monotonic() + 5 * STALL_SECONDS
        while time.monotonic() < end:
            assert client.recv(4096)
            assert not server.app.gone.wait(STALL_SECONDS / 4)


@pytest.mark.long
def test_stalled_response_that_is_no_stream_is_kept(server: Server) -> None:
    with server.connect(GET % b"long") as client:
        assert client.recv(12)
        assert not server.app.gone.wait(5 * STALL_SECONDS)
        assert client.recv(65536)


@pytest.mark.long
def test_pings_of_a_client_that_reads_nothing_are_dropped(server: Server) -> None:
    """Otherwise pongs would fill the write buffer without bound."""
    ping = b"\x89\xfd\0\0\0\0" + b"x" * 125
    with server.connect(UPGRADE) as client:
        assert client.recv(12)
        with suppress(OSError):  # it is cut after a while
            while not server.app.gone.is_set():
                client.sendall(ping * 100)
        assert server.app.gone.wait(10)
        received = 0
        with suppress(ConnectionResetError):  # pings were on their way when it was cut
            while data := client.recv(65536):
                received += len(data)
        assert received < 200_000


@pytest.mark.parametrize(
    ("request_", "close"),
    [(GET % b"stream?output", b""), (UPGRADE.replace(b"/ws", b"/ws?output"), b"\x88\x82\0\0\0\0\x03\xe8")],
    ids=["http", "websocket"],
)
def test_output_reports_when_it_is_full_open_and_closed(server: Server, request_: bytes, close: bytes) -> None:
    with server.connect(request_) as client:
        wait_until(lambda: server.app.states == ["full"])
        client.setblocking(False)
        while server.app.states == ["full"]:
            with suppress(BlockingIOError):  # all was read, and is about to be reported
                assert client.recv(65536)
        assert server.app.states[:2] == ["full", "open"]
        client.sendall(close)
    wait_until(lambda: server.app.states[2:3] == ["closed"])


@pytest.mark.parametrize(
    "request_", [GET % b"stream?lost", UPGRADE.replace(b"/ws", b"/ws?lost")], ids=["http", "websocket"]
)
def test_client_lost_before_its_response_leaves_no_error(
    server: Server, caplog: pytest.LogCaptureFixture, request_: bytes
) -> None:
    with server.connect(request_) as client, suppress(ConnectionResetError):
        assert client.recv(12) == b""
    assert server.app.gone.wait(5)
    server.close()  # all is logged
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
