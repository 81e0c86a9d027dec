"""uvicorn's server on sockets that are bound first, with an orderly shutdown and exit code 0 after a signal.

Uses no private name of uvicorn; overrides `handle_exit`, `startup`, `main_loop` and `shutdown`.
"""

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from email.utils import formatdate
from types import FrameType
from typing import Any, cast

import uvicorn
from loguru import logger
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from marketflow.server.connection_limits import max_open_files
from marketflow.server.hangup import Hangup
from marketflow.server.http_protocol import LimitedHttpProtocol
from marketflow.server.listeners import BACKLOG
from marketflow.server.write_buffer import StreamingProtocol
from marketflow.tasks import cancel

CONNECTIONS_CLOSE_SECONDS = 1
"""Time for running requests on shutdown."""

STREAMS_END_SECONDS = 0.6
"""Part of it after which streams that have not sent their last event are aborted."""

KEEP_ALIVE_SECONDS = 75
"""How long a connection may be idle between two requests: longer than proxies keep one by default, a minute.

A request on one that is closed in the same moment is answered with 502 there, and fails for clients that repeat none.
"""

MAX_MESSAGE_BYTES = 64 * 1024
"""Size limit of a message from a WebSocket client."""


class _State(ServerState):
    """State of all connections; the Date header is made by the first response of a second, and not by a timer."""

    def __init__(self) -> None:
        self._second = 0
        self._dated: list[tuple[bytes, bytes]] = []
        super().__init__()

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """Headers that the server adds to each response; the same list within a second."""
        if (second := int(time.time())) != self._second:
            self._second = second
            self._dated = [(b"date", formatdate(second, usegmt=True).encode())]
        return self._dated

    @default_headers.setter
    def default_headers(self, _: list[tuple[bytes, bytes]]) -> None:
        """Ignore what uvicorn sets: nothing, to begin with."""


class Server(uvicorn.Server):
    """Serves an application on a bound socket.

    uvicorn's own server raises the signal again after a shutdown; here the process exits with code 0.

    Args:
        application: the ASGI application.
        debug: whether requests are logged.
        on_signal: called on the first signal, also during startup.
        force: called on a second signal, which forces the shutdown.
        on_started: called when it accepts connections.
        on_stopping: called when the shutdown begins.
        orphaned: a descriptor that becomes readable when the parent process has ended.
        reload: called on SIGHUP, once it accepts connections.
    """

    def __init__(
        self,
        application: ASGIApp,
        debug: bool,
        on_signal: Callable[[], None],
        force: Callable[[], None],
        on_started: Callable[[], None],
        on_stopping: Callable[[], None],
        orphaned: int | None = None,
        reload: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                application,
                http=LimitedHttpProtocol,
                ws=cast("type[asyncio.Protocol]", _web_socket_protocol),
                ws_max_size=MAX_MESSAGE_BYTES,
                ws_per_message_deflate=False,  # it costs 50 KB per client, and allows decompression bombs
                backlog=min(BACKLOG, max_open_files() // 4),
                log_config=None,
                log_level="debug" if debug else "warning",
                access_log=debug,
                lifespan="on",
                server_header=False,
                proxy_headers=False,  # addresses of clients are resolved by the API, from http.trusted_proxies
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=CONNECTIONS_CLOSE_SECONDS,
            )
        )
        self.server_state = _State()
        self._on_signal = on_signal
        self._force = force
        self._loop: asyncio.AbstractEventLoop | None = None
        self._exit_requested = asyncio.Event()
        self._on_started = on_started
        self._on_stopping = on_stopping
        self._orphaned = orphaned
        self._reload = reload
        self._hangup = Hangup()

    def serve_until_stopped(self, listener: socket.socket) -> bool:
        """Run until SIGINT or SIGTERM, or its terminal is closed; return whether it had started or a signal stopped it.

        A second signal forces the shutdown. The listener is closed.
        """
        # uvicorn handles the first two as well, but restores the handlers while the loop still closes.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # ignored by nohup
                signal.signal(number, self.handle_hangup if number is signal.SIGHUP else self.handle_exit)
        with listener, suppress(SystemExit):  # the caller chooses the exit code of a failed start
            self.run(sockets=[listener])
        ignore_signals()
        return self.started or self.should_exit

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin an orderly shutdown; force it on a second signal."""
        self.force_exit = self.should_exit
        self.should_exit = True
        with suppress(RuntimeError):  # the loop is closed
            if self._loop is not None:  # wakes a pending startup
                self._loop.call_soon_threadsafe(self._force if self.force_exit else self._on_signal)
                self._loop.call_soon_threadsafe(self._exit_requested.set)

    def handle_hangup(self, sig: int, frame: FrameType | None) -> None:
        """Have the settings read again, unless the terminal was closed. During a start they have just been read."""
        if self._hangup.is_of_terminal:
            self.handle_exit(sig, frame)
        elif self.started and self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._reload)

    async def main_loop(self) -> None:
        """Wait for the shutdown; uvicorn's own loop looks for it ten times a second, half the CPU of an idle server."""
        if not self.should_exit:
            await self._exit_requested.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Shut down connections and lifespan; the lifespan also when forced."""
        self._loop = None
        self._on_stopping()
        forcing = asyncio.create_task(self._force_on_second_signal())
        aborting = asyncio.create_task(self._abort_streams())
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn skips it then
            await self.lifespan.shutdown()
        await cancel(forcing, aborting)

    async def _abort_streams(self) -> None:
        """Abort streams whose clients have not read the last event in time."""
        await asyncio.sleep(STREAMS_END_SECONDS)
        for connection in list(self.server_state.connections):
            if isinstance(connection, StreamingProtocol) and connection.is_stream:
                connection.transport.abort()

    async def _force_on_second_signal(self) -> None:
        while not self.force_exit:  # noqa: ASYNC110 - set by a signal handler
            await asyncio.sleep(0.05)
        logger.warning("second signal: stopping at once")
        self._force()
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the lifespan and accept connections."""
        logging.getLogger("uvicorn.error").addFilter(_is_news)
        self._loop = asyncio.get_running_loop()
        if self.should_exit:  # by a signal before the loop ran
            self._on_signal()
        if self._orphaned is not None:
            asyncio.get_running_loop().add_reader(self._orphaned, self._stop_as_orphan, self._orphaned)
        await super().startup(sockets)
        if self.started:
            self._on_started()

    def _stop_as_orphan(self, descriptor: int) -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        logger.error("the parent process has ended")
        self.should_exit = True
        self._exit_requested.set()


def _web_socket_protocol(**keywords: Any) -> asyncio.Protocol:
    """Return the protocol of a new WebSocket."""
    # With the first WebSocket: the library takes a twentieth of the time to the first price.
    from marketflow.server.websocket_protocol import LimitedWebSocketProtocol

    return LimitedWebSocketProtocol(**keywords)


_REDUNDANT = (
    "Application startup failed. Exiting.",  # the application logs why
    "Unsupported upgrade request.",  # it is answered like any other request
    "Cancel %s running task(s), timeout graceful shutdown exceeded",  # they are answered with 503
    "No supported WebSocket library detected.",  # there is one, but not for this path
)


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether a message of uvicorn belongs in the log."""
    return not str(record.msg).startswith(_REDUNDANT)


def ignore_signals() -> None:
    """Ignore signals during the exit of the interpreter, where one would replace the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
