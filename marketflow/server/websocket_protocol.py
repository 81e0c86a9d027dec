"""uvicorn's WebSocket protocol with limits on what a client may queue in the process.

What uvicorn 0.54 does itself stays with it: `ws_max_size`, keepalive pings (`ws_ping_interval`, `ws_ping_timeout`),
pausing reads while a message is queued. What it lacks is here: it answers pings of a client that reads nothing, logs a
traceback for invalid UTF-8, leaves a malformed handshake open, and closes on shutdown before the application can send
its last event.

Uses no private name of uvicorn. Overridden or read beyond the asyncio callbacks: `conn`, `queue`, `frames`, `writable`,
`close_sent`, `close_timeout`, `handshake_*`, `handle_*`, `send_receive_event_to_app`. They are public but
undocumented, so pyproject.toml bounds uvicorn above.
"""

import asyncio
import time
from asyncio.transports import BaseTransport
from typing import Any, ClassVar, cast

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame
from websockets.http11 import Request

from marketflow.api.streaming.sse_route import STREAMING
from marketflow.server.write_buffer import StreamingProtocol


class LimitedWebSocketProtocol(StreamingProtocol, WebSocketsSansIOProtocol):
    """A WebSocket connection with bounded queues in both directions and a closing handshake on shutdown."""

    CLOSE_SECONDS: ClassVar[float] = 0.3
    """Time for the closing handshake on shutdown."""

    MAX_QUEUED: ClassVar[int] = 32
    """Received messages that may wait for the application."""

    MAX_FRAGMENTS: ClassVar[int] = 64
    """Frames of a message; `ws_max_size` does not bound the number of empty ones."""

    PART_BYTES: ClassVar[int] = 4096
    """Received bytes that are parsed at once: up to 700 frames of 10 us each."""

    answering = True
    """Evicted like a connection that sends a response: it is never idle."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.used_at = time.monotonic()
        self._extensions: dict[str, Any] = {}

    def connection_made(self, transport: BaseTransport) -> None:
        """Limit the write buffer, and start the handshake."""
        self.limit_write_buffer(cast("asyncio.Transport", transport))
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Free what the application was passed."""
        super().connection_lost(exc)
        self._extensions.pop(STREAMING, None)  # a reference cycle, which only the garbage collector would free

    def handle_connect(self, event: Request) -> None:
        """Start the application, which may write frames itself."""
        super().handle_connect(event)
        if not self.close_sent:  # it runs in a task, later
            self._extensions = cast("dict[str, Any]", self.scope["extensions"])
            self._extensions[STREAMING] = {"begin": lambda: self}

    def sink(self) -> asyncio.Transport | None:
        """Return what takes frames; None while its buffer is not empty.

        Raises:
            ConnectionAbortedError: the connection is closed, or a close frame was sent.
        """
        if self.close_sent:
            raise ConnectionAbortedError
        return super().sink()

    def data_received(self, data: bytes) -> None:
        """Parse received bytes in parts, up to a frame that ends the connection; close after a malformed handshake.

        One read can hold 40,000 empty frames, which take half a second of the event loop.
        """
        for start in range(0, len(data), self.PART_BYTES):
            if self.transport.is_closing():
                return
            super().data_received(data[start : start + self.PART_BYTES])
            if self.conn.handshake_exc is not None and not self.handshake_initiated:
                self.handshake_initiated = self.handshake_complete = self.close_sent = True
                self.transport.write(b"".join(self.conn.data_to_send()))
                self.transport.close()

    def handle_ping(self) -> None:
        """Send a pong, unless the write buffer is full."""
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()

    def send_receive_event_to_app(self) -> None:
        """Queue a message; close if the queue is full or a text is no UTF-8."""
        if self.close_sent:
            self.frames = []
        elif self.queue.qsize() >= self.MAX_QUEUED:
            self._refuse(1008, "too many messages")
        elif self.curr_msg_data_type == "text" and not _is_utf8(b"".join(self.frames)):
            self._refuse(1007, "invalid UTF-8")
        else:
            super().send_receive_event_to_app()

    def handle_cont(self, event: Frame) -> None:
        """Store a frame of a fragmented message; close if there are too many."""
        if self.close_sent:
            return
        super().handle_cont(event)
        if len(self.frames) > self.MAX_FRAGMENTS:
            self._refuse(1008, "too many fragments")

    def _refuse(self, code: int, reason: str) -> None:
        self.frames = []
        self.conn.fail(code, reason)
        if self.conn.close_sent is None:  # not accepted yet, so no close frame can be sent
            self.close_sent = True
            self.transport.abort()
        else:
            self.handle_parser_exception()

    def shutdown(self) -> None:
        """Leave the close to the application, which sends its last event first; close only unfinished handshakes."""
        self.close_timeout = self.CLOSE_SECONDS
        if not self.handshake_complete or self.close_sent:
            super().shutdown()

    async def send(self, message: Any) -> None:
        """Send a message of the application once the write buffer has drained.

        Raises:
            ClientDisconnected: the connection is closed.
        """
        await self.writable.wait()
        if self.close_sent or self.transport.is_closing():  # uvicorn would ignore an accept, and raise at what follows
            raise ClientDisconnected
        await super().send(message)
        # uvicorn does not set it after a denial response, and would log an incomplete handshake.
        self.handshake_complete = self.handshake_complete or self.close_sent


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
