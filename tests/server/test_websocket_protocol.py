"""What a WebSocket client may send at once, on a real server."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from websockets.frames import Frame

from marketflow.server.http_protocol import LimitedHttpProtocol
from marketflow.server.websocket_protocol import LimitedWebSocketProtocol
from tests.support.servers import HOST, wait_until

UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
MESSAGE, FIRST, NEXT = b"\x81\x80mask", b"\x01\x80mask", b"\x00\x80mask"


class Counting(LimitedWebSocketProtocol):
    """Counts the frames of messages that were parsed."""

    parsed = 0

    def handle_text(self, event: Frame) -> None:
        Counting.parsed += 1
        super().handle_text(event)

    def handle_cont(self, event: Frame) -> None:
        Counting.parsed += 1
        super().handle_cont(event)


async def accepting(scope: Scope, receive: Receive, send: Send) -> None:
    """Accept, and drop what is received."""
    await send({"type": "websocket.accept"})
    while (await receive())["type"] != "websocket.disconnect":
        pass


Connect = Callable[[], socket.socket]


@pytest.fixture
def connect() -> Iterator[Connect]:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((HOST, 0)))
        config = uvicorn.Config(
            accepting, interface="asgi3", http=LimitedHttpProtocol, ws=Counting, lifespan="off", log_config=None
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        stack.callback(thread.join, 10)
        stack.callback(setattr, server, "should_exit", True)
        wait_until(lambda: server.started)
        yield lambda: stack.enter_context(socket.create_connection(listener.getsockname(), 10))


@pytest.mark.parametrize("sent", [MESSAGE * 40_000, FIRST + NEXT * 40_000], ids=["messages", "fragments"])
def test_frames_behind_one_too_many_are_not_parsed(connect: Connect, sent: bytes) -> None:
    client = connect()
    client.sendall(UPGRADE)
    assert client.recv(12) == b"HTTP/1.1 101"
    Counting.parsed = 0
    with suppress(OSError):  # it is cut off
        client.sendall(sent)
        while client.recv(65536):
            pass
    assert 32 < Counting.parsed <= LimitedWebSocketProtocol.PART_BYTES / len(MESSAGE) + 1
