"""Connections of `marketflow`: uvicorn's, with an end to what a client may hold without asking for anything.

uvicorn waits for ever for the headers of a first request, takes any amount of them, and takes any number of
connections until there are no files left, when nobody gets in. What ASGI gets to see, bodies and host names, is
limited by middleware of the API, under any server.
"""

import asyncio
import time
from http import HTTPStatus
from typing import Any, ClassVar, cast

from starlette.responses import Response
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from marketflow.api.problems import HeadersTooLarge, MalformedRequest, answer_to, request_timeout
from marketflow.api.streaming.sse_route import STREAMING
from marketflow.api.streaming.websocket_route import PATH as WEBSOCKET_PATH
from marketflow.server.connection_limits import FILES_PER_CONNECTION, Connection, make_room, max_open_files
from marketflow.server.write_buffer import Watched


class _Flow(FlowControl):
    """uvicorn's, but for a transport that is closing already, of which uvloop's raises when it is to be read again."""

    def pause_reading(self) -> None:
        if not self._transport.is_closing():
            super().pause_reading()

    def resume_reading(self) -> None:
        if not self._transport.is_closing():
            super().resume_reading()


class LimitedHttpProtocol(Watched, HttpToolsProtocol):
    """A connection that is closed when headers take too long or grow too large, or when it has to make room.

    An answer that is under way is never cut by a deadline: it is ended first, and then the connection.
    """

    HEADER_SECONDS: ClassVar[float] = 10.0
    """From the opening, or the first byte of a further request, to the end of the headers."""

    MAX_HEADER_BYTES: ClassVar[int] = 64 * 1024

    MAX_PIPELINED: ClassVar[int] = 32
    """How many requests may wait for the answers to those before them; no client of today sends any."""

    MAX_CONNECTIONS: ClassVar[int] = 2500
    """How many there may be at once; fewer where the process may not open FILES_PER_CONNECTION times as many files."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._in_body = False
        self._headers_due = False
        self._unparsed = 0
        self._arrived = 0  # since the headers began, or a little before
        self._pipelined_bytes = 0
        self._heard_of_at: float | None = None
        self._opened_at = time.monotonic()
        self._upgrades = False
        self._begun: RequestResponseCycle | None = None  # of which the answer is under way

    @classmethod
    def most(cls) -> int:
        """How many there may be at once."""
        return min(cls.MAX_CONNECTIONS, max_open_files() // FILES_PER_CONNECTION)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self._expect_headers()
        make_room(self, cast("set[Connection]", self.connections), self.most())

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._headers_are_there()
        self.pipeline.clear()  # nobody waits for these answers any more
        if self._begun is not None and not self._begun.response_complete:  # uvicorn's own ends the last request alone
            self._begun.disconnected = True
            self._begun.message_event.set()
        self._begun = None
        self.resume_writing()
        super().connection_lost(exc)
        if self.scope is not None:
            self.scope.pop("extensions", None)  # it refers to this, and would wait for the garbage collector

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        self._heard_of_at = time.monotonic()
        self._arrived = len(data) + (self._arrived if self._headers_due else 0)
        self._headers_due = not self._in_body
        self._unparsed += len(data)
        super().data_received(data)
        if self._headers_due:  # afterwards, for nearly always they come in one piece
            self._expect_headers()
        if self._unparsed > self.MAX_HEADER_BYTES:
            self._refuse(_headers_too_large())

    def shutdown(self) -> None:
        """The server is to end: answer what has been asked, and nothing that is still arriving."""
        if self._answering_what_arrives:
            self.transport.close()
        else:
            super().shutdown()

    # Answers without an end

    def stream(self) -> None:
        """Keep as little as can be of what the client does not take yet, and end it should it take nothing at all."""
        if not self.streams and not self.transport.is_closing():
            self.watch_outflow(self.transport)

    # The parser's events

    def on_message_begin(self) -> None:
        """A request begins."""
        self._unparsed = 0
        self._headers_due = True
        super().on_message_begin()
        self.scope["extensions"] = {STREAMING: {"begin": self.stream}}

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; what stands behind a body, a trailer, is none."""
        if not self._in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The headers are there, the body may follow."""
        self._hold_pipeline()
        self._unparsed = 0
        self._headers_due = False
        self._headers_are_there()
        if self._arrived > self.MAX_HEADER_BYTES and self._header_bytes > self.MAX_HEADER_BYTES:
            self._refuse(_headers_too_large())
            raise ValueError("too many headers")  # so that the parser goes no further
        self._upgrades = self._may_upgrade
        super().on_headers_complete()
        self._in_body = True
        if self.parser.should_upgrade() and not self._upgrades:  # what follows cannot be told from a request
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """A piece of the body, whose length is limited elsewhere."""
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is there as a whole."""
        self._unparsed = 0
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """It has been answered."""
        self._heard_of_at = time.monotonic()
        super().on_response_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._begun = cycle
        super()._start_asgi_task(cycle, app)

    def _hold_pipeline(self) -> None:
        """Refuse to keep more requests than a client may have waiting.

        Raises:
            ValueError: there are too many, or they are too large; so that the parser goes no further.
        """
        if not self.answering:
            self._pipelined_bytes = 0
            return
        self._pipelined_bytes += self._header_bytes
        if len(self.pipeline) >= self.MAX_PIPELINED or self._pipelined_bytes > self.MAX_HEADER_BYTES:
            raise ValueError("too many requests before an answer")

    # WebSockets

    @property
    def _may_upgrade(self) -> bool:
        """Whether this request may turn the connection into a WebSocket."""
        path = self.url.partition(b"?")[0].decode("latin-1")
        return path == WEBSOCKET_PATH and self.parser.get_method() == b"GET" and not self.answering

    def _should_upgrade(self) -> bool:
        return self._upgrades and super()._should_upgrade()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: it has been answered like any other request."""

    # Refusals

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser does not understand."""
        self._refuse(answer_to(MalformedRequest("This is no valid HTTP request.")))

    def _refuse(self, response: Response) -> None:
        """Answer and close. Where earlier requests wait for their answers, close after those instead."""
        if self.transport.is_closing():
            return
        if self.answering and not self._answering_what_arrives:
            self.flow.pause_reading()
            self.shutdown()
            return
        status = HTTPStatus(response.status_code)
        headers = [*self.server_state.default_headers, *response.raw_headers]
        lines = [f"HTTP/1.1 {status} {status.phrase}".encode(), *(name + b": " + value for name, value in headers)]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
        self.transport.close()

    @property
    def answering(self) -> bool:
        """Whether there is an answer to come, or under way."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _answering_what_arrives(self) -> bool:
        """Whether the only answer to come is that to the request whose body is just arriving."""
        return self._in_body and self.answering and not self.pipeline and not self.cycle.response_started

    @property
    def _header_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    # Deadline

    def _expect_headers(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.HEADER_SECONDS, self._too_slow)

    def _headers_are_there(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if self._heard_of_at is None:  # a browser opens connections in advance and takes anything for an answer
            self.transport.close()
        else:
            self._refuse(request_timeout())

    @property
    def used_at(self) -> float:
        """When it was last heard of, in seconds of the monotonic clock."""
        return self._heard_of_at or self._opened_at


def _headers_too_large() -> Response:
    return answer_to(HeadersTooLarge(f"The headers are larger than {LimitedHttpProtocol.MAX_HEADER_BYTES} bytes."))
