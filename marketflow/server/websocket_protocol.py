"""WebSocket connections of `marketflow`: uvicorn's, with an end to what a client may do to the process.

uvicorn answers pings for ever to a client that takes no answers, logs a traceback for a text that is no UTF-8, forgets
about a handshake that cannot be read, and closes before the application could say why.
"""

import asyncio
import time
from asyncio.transports import BaseTransport
from typing import Any, ClassVar, cast

from uvicorn._types import ASGISendEvent
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from marketflow.server.write_buffer import Watched


class LimitedWebSocketProtocol(Watched, WebSocketsSansIOProtocol):
    """A WebSocket connection that takes no more than it can be given, and says goodbye."""

    END_SECONDS: ClassVar[float] = 0.3
    """How long the client may take to say goodbye as well, once the server is to end."""

    MAX_QUEUED: ClassVar[int] = 32
    """How many messages may wait for the application."""

    MAX_FRAGMENTS: ClassVar[int] = 64
    """How many frames a message may consist of: empty ones would go on for ever, since they have no length."""

    answering = True
    """Like a connection with an answer under way: it's not idle."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.used_at = time.monotonic()

    def connection_made(self, transport: BaseTransport) -> None:
        """Begin with the handshake."""
        self.watch_outflow(cast("asyncio.Transport", transport))
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            self.handshake_initiated = self.handshake_complete = self.close_sent = True
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()

    def handle_ping(self) -> None:
        """Answer it, unless the client takes no answers."""
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()

    def send_receive_event_to_app(self) -> None:
        """Pass on a message, unless too many wait already, or it says that it is text and is not."""
        if self.close_sent:
            self.frames = []
        elif self.queue.qsize() >= self.MAX_QUEUED:
            self._refuse(1008, "too many messages")
        elif self.curr_msg_data_type == "text" and not _is_utf8(b"".join(self.frames)):
            self._refuse(1007, "invalid UTF-8")
        else:
            super().send_receive_event_to_app()

    def handle_cont(self, event: Frame) -> None:
        """Take one more frame of a message, unless there are too many."""
        if self.close_sent:
            return
        super().handle_cont(event)
        if len(self.frames) > self.MAX_FRAGMENTS:
            self._refuse(1008, "too many fragments")

    def _refuse(self, code: int, reason: str) -> None:
        self.frames = []
        self.conn.fail(code, reason)
        if self.conn.close_sent is None:  # nobody has accepted it yet, so that there is no way to say why
            self.close_sent = True
            self.transport.abort()
        else:
            self.handle_parser_exception()

    def shutdown(self) -> None:
        """The server is to end: the application says so, and closes."""
        self.close_timeout = self.END_SECONDS
        if not self.handshake_complete or self.close_sent:
            super().shutdown()

    async def send(self, message: ASGISendEvent) -> None:
        """Send what the application has to say.

        Raises:
            ClientDisconnected: the connection is closed, by whichever side.
        """
        await self.writable.wait()
        if self.close_sent:
            raise ClientDisconnected
        await super().send(message)
        # uvicorn does not notice that it has refused the handshake with an answer of the application.
        self.handshake_complete = self.handshake_complete or self.close_sent


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
