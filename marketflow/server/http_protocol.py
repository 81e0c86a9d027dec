"""uvicorn's HTTP protocol with a deadline and a size limit for headers, a bounded pipeline, and eviction.

What uvicorn 0.54 does itself stays with it: `timeout_keep_alive` closes idle connections, FlowControl pauses reading.
What it lacks is here: it waits for ever for the headers of a first request, reads headers of any size, and parses any
number of pipelined requests out of one read. Its `limit_concurrency` refuses the newest connection with a 503, where
here the connection that is idle for longest is evicted. sse-starlette's `send_timeout` ends a task, not the connection
with its unsent data. Bodies and host names are limited by middleware, under any server.

Uses no private name of uvicorn. Overridden or read beyond the asyncio and httptools callbacks: `flow`, `cycle`,
`pipeline`, `parser`, `scope`, `headers`, `url`, `ws_protocol_class`, `on_response_complete`, `send_400_response`.
They are public but undocumented, so pyproject.toml bounds uvicorn above.
"""

import asyncio
import time
from typing import Any, ClassVar, cast

from starlette.responses import Response
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from marketflow.api.prepared_answers import PREPARED_ANSWERS, PreparedAnswers
from marketflow.api.problems import HeadersTooLarge, MalformedRequest, answer_to, request_timeout
from marketflow.api.rendering import message_of
from marketflow.api.streaming.sse_route import STREAMING
from marketflow.api.streaming.websocket_route import PATH as WEBSOCKET_PATH
from marketflow.server.connection_limits import FILES_PER_CONNECTION, Connection, evict_idle, max_open_files
from marketflow.server.write_buffer import StreamingProtocol


class _FlowControl(FlowControl):
    """uvicorn's flow control, without effect on a closing transport: uvloop's raises on pause and resume then."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self.transport = transport

    def pause_reading(self) -> None:
        if not self.transport.is_closing():
            super().pause_reading()

    def resume_reading(self) -> None:
        if not self.transport.is_closing():
            super().resume_reading()


class LimitedHttpProtocol(StreamingProtocol, HttpToolsProtocol):
    """A connection that is closed when its headers are late or too large, or when it is evicted.

    A deadline never cuts a response that is being sent: the response is completed, then the connection is closed.
    """

    HEADER_SECONDS: ClassVar[float] = 10.0
    """From the start of the connection, or the first byte of a later request, to the end of the headers."""

    MAX_HEADER_BYTES: ClassVar[int] = 64 * 1024

    MAX_PIPELINED: ClassVar[int] = 32
    """Pipelined requests that may wait; current clients send none."""

    MAX_CONNECTIONS: ClassVar[int] = 2500
    """Connections at once; fewer if the limit of open files is below FILES_PER_CONNECTION times as many."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._in_body = False
        self._headers_due = False
        self._unparsed = 0
        self._header_bytes_received = 0  # since the headers began, or slightly before
        self._pipelined_bytes = 0
        self._active_at: float | None = None
        self._opened_at = time.monotonic()
        self._ws_protocol_class = self.ws_protocol_class
        self._prepared: PreparedAnswers | None = self.app_state.get(PREPARED_ANSWERS)
        if self.config.access_log:  # written where the application answers
            self._prepared = None
        self._received = b""  # the read that is being parsed
        self._began_with_read = False  # whether it began with a message
        self._running: RequestResponseCycle | None = None  # `cycle` is the last one of the pipeline

    @classmethod
    def max_connections(cls) -> int:
        """Return the limit of connections at once."""
        return min(cls.MAX_CONNECTIONS, max_open_files() // FILES_PER_CONNECTION)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline of the first request, and evict idle connections above the limit."""
        super().connection_made(transport)
        self.flow = _FlowControl(transport)
        self._start_deadline()
        evict_idle(self, cast("set[Connection]", self.connections), self.max_connections())

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the deadline, and tell the running request that its client has disconnected."""
        self._cancel_deadline()
        self.pipeline.clear()  # never started
        if self._running is not None and not self._running.response_complete:  # uvicorn notifies `cycle` alone
            self._running.disconnected = True
            self._running.message_event.set()
        self._running = None
        super().connection_lost(exc)
        if self.scope is not None:
            self.scope.pop("extensions", None)  # a reference cycle, which only the garbage collector would free

    def data_received(self, data: bytes) -> None:
        """Answer at once if that is prepared; else parse received bytes, and check deadline and size of headers."""
        if self._answer_at_once(data):
            return
        self._active_at = time.monotonic()
        self._received, self._began_with_read = data, self._is_between_messages
        self._header_bytes_received = len(data) + (self._header_bytes_received if self._headers_due else 0)
        self._headers_due = not self._in_body
        self._unparsed += len(data)
        super().data_received(data)
        if self._headers_due:  # after parsing: headers nearly always arrive in one read
            self._start_deadline()
        if self._unparsed > self.MAX_HEADER_BYTES:
            self._refuse(_headers_too_large())

    def shutdown(self) -> None:
        """Complete responses to requests that were received; close at once while a request is still being received."""
        if self._receiving_only:
            self.transport.close()
        else:
            super().shutdown()

    # Streams

    def stream(self) -> StreamingProtocol:
        """Limit the write buffer from now on, and abort the connection when the client stalls.

        Returns:
            what takes chunks of the response, once its headers are sent.
        """
        if not self.is_stream and not self.transport.is_closing():
            self.limit_write_buffer(self.transport)
        return self

    # Parser callbacks

    def on_message_begin(self) -> None:
        """Reset the state of headers, and offer the streaming extension."""
        self._unparsed = 0
        self._headers_due = True
        super().on_message_begin()
        self.scope["extensions"] = {STREAMING: {"begin": self.stream}}

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store a header, but no trailer."""
        if not self._in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Check the size of the headers, and start or queue the request."""
        self._check_pipeline()
        self._unparsed = 0
        self._headers_due = False
        self._cancel_deadline()
        if self._header_bytes_received > self.MAX_HEADER_BYTES and self._header_bytes > self.MAX_HEADER_BYTES:
            self._refuse(_headers_too_large())
            raise ValueError("too many headers")  # stops the parser
        self._prepare()
        answering, may_upgrade = self.answering, self._may_upgrade
        self.ws_protocol_class = self._ws_protocol_class if may_upgrade else None
        super().on_headers_complete()
        if not answering:
            self._running = self.cycle
        self._in_body = True
        if self.parser.should_upgrade() and not may_upgrade:  # bytes that follow may be of another protocol
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Store a part of the body; middleware limits its size."""
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Mark the request as received."""
        self._unparsed = 0
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Start the next request of the pipeline."""
        self._active_at = time.monotonic()
        self._running = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()

    # Prepared answers

    def _answer_at_once(self, request: bytes) -> bool:
        """Send the prepared answer, if what was received is a request that has one; return whether it was sent.

        The parser is not fed with the request: it stays where it is, before the start of a message.
        """
        if self._prepared is None or not self._is_between_messages or self.answering or self.flow.write_paused:
            return False
        message = self._prepared.answer(request, self.server, self.server_state.default_headers)
        if message is None:
            return False
        self._active_at = time.monotonic()
        self._cancel_deadline()
        self.transport.write(message)
        self.server_state.total_requests += 1
        if self.timeout_keep_alive_task is None:
            self._start_keep_alive(self.timeout_keep_alive)
        return True

    def _prepare(self) -> None:
        """Prepare answers to the request whose headers are complete, if it is all that was read.

        Pipelined requests keep their order, limits and errors: none is answered while others wait or follow it.
        """
        if (
            self._prepared is not None
            and self._began_with_read
            and self._received.find(b"\r\n\r\n") == len(self._received) - 4
            and self.parser.get_method() == b"GET"
            and self.parser.get_http_version() == "1.1"
            and self.parser.should_keep_alive()
            and not self.parser.should_upgrade()
        ):
            self._prepared.prepare(self._received, self.url, self.headers, self.server)

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection if it was idle for so long; prepared answers do not start the timer anew."""
        left = self.used_at + self.timeout_keep_alive - time.monotonic()
        if left > 0:
            self._start_keep_alive(left)
        else:
            super().timeout_keep_alive_handler()

    def _start_keep_alive(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def _check_pipeline(self) -> None:
        """Check number and size of pipelined requests.

        Raises:
            ValueError: they exceed a limit; stops the parser.
        """
        if not self.answering:
            self._pipelined_bytes = 0
            return
        self._pipelined_bytes += self._header_bytes
        if len(self.pipeline) >= self.MAX_PIPELINED or self._pipelined_bytes > self.MAX_HEADER_BYTES:
            raise ValueError("too many pipelined requests")

    # WebSockets

    @property
    def _may_upgrade(self) -> bool:
        """Whether this request may upgrade the connection to a WebSocket."""
        path = self.url.partition(b"?")[0].decode("latin-1")
        return path == WEBSOCKET_PATH and self.parser.get_method() == b"GET" and not self.answering

    # Error responses

    def send_400_response(self, msg: str) -> None:
        """Answer a request that the parser rejects with a problem."""
        self._refuse(answer_to(MalformedRequest("This is no valid HTTP request.")))

    def _refuse(self, response: Response) -> None:
        """Send the response and close. If earlier requests are not answered yet, only close after their responses."""
        if self.transport.is_closing():
            return
        if self.answering and not self._receiving_only:
            self.flow.pause_reading()
            self.shutdown()
            return
        self.transport.write(message_of(response, self.server_state.default_headers))
        self.transport.close()

    @property
    def answering(self) -> bool:
        """Whether a response is pending or being sent."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _is_between_messages(self) -> bool:
        """Whether nothing of a request was received that is not complete."""
        return not (self._headers_due or self._in_body)

    @property
    def _receiving_only(self) -> bool:
        """Whether the only pending response is to the request that is being received."""
        return self._in_body and self.answering and not self.pipeline and not self.cycle.response_started

    @property
    def _header_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    # Deadline

    def _start_deadline(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.HEADER_SECONDS, self._on_deadline)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_deadline(self) -> None:
        self._deadline = None
        if self._active_at is None:  # a browser opens connections in advance, and would take a 408 for an answer
            self.transport.close()
        else:
            self._refuse(request_timeout())

    @property
    def used_at(self) -> float:
        """Time of the last activity (seconds, monotonic clock)."""
        return self._active_at or self._opened_at


def _headers_too_large() -> Response:
    return answer_to(HeadersTooLarge(f"The headers are larger than {LimitedHttpProtocol.MAX_HEADER_BYTES} bytes."))
