"""uvicorn's server, as MarketFlow runs it: bound first, ended in good order, and never by the signal itself."""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import uvicorn
from loguru import logger
from starlette.types import ASGIApp

from marketflow.errors import StartError
from marketflow.server.connection_limits import max_open_files
from marketflow.server.http_protocol import LimitedHttpProtocol
from marketflow.server.websocket_protocol import LimitedWebSocketProtocol
from marketflow.server.write_buffer import Watched
from marketflow.tasks import cancel
from marketflow.text import host_port

CONNECTIONS_CLOSE_SECONDS = 1
"""How long running requests may take once the application is to end."""

STREAMS_END_SECONDS = 0.6
"""How long of it those have who are told that it is over, before their connections are cut."""

MAX_MESSAGE_BYTES = 64 * 1024
"""Of a message that a WebSocket client may send."""

BACKLOG = 2048
"""How many connections may wait to be accepted; fewer where the process may not open four times as many files."""


class Server(uvicorn.Server):
    """Serves one application on a socket that is bound already.

    uvicorn's own server would end the process by the signal that stopped it: here that is exit code 0.

    Args:
        application: what is served.
        debug: whether requests are logged.
        told: called when it is told to stop, also while it starts.
        force: called when the end must not take its time any more.
        on_started: called once it accepts connections.
        on_stopping: called once when it begins to end.
        orphaned: a descriptor that becomes readable when the process that started this one has gone.
    """

    def __init__(
        self,
        application: ASGIApp,
        debug: bool,
        told: Callable[[], None],
        force: Callable[[], None],
        on_started: Callable[[], None],
        on_stopping: Callable[[], None],
        orphaned: int | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                application,
                http=LimitedHttpProtocol,
                ws=LimitedWebSocketProtocol,
                ws_max_size=MAX_MESSAGE_BYTES,
                ws_per_message_deflate=False,  # 50 KB a client, and a bomb may be in it
                backlog=min(BACKLOG, max_open_files() // 4),
                log_config=None,
                log_level="debug" if debug else "warning",
                access_log=debug,
                lifespan="on",
                server_header=False,
                proxy_headers=False,  # nothing here asks who the client is
                timeout_graceful_shutdown=CONNECTIONS_CLOSE_SECONDS,
            )
        )
        self._tell = told
        self._force = force
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_started = on_started
        self._on_stopping = on_stopping
        self._orphaned = orphaned

    def serve_until_told(self, listener: socket.socket) -> bool:
        """Run until SIGINT, SIGTERM or SIGHUP; gives whether one ended it. A second signal makes the end a quick one.

        The listener is closed.
        """
        # uvicorn takes the first two as well, but gives them back while the loop still closes.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup would have it
                signal.signal(number, self.handle_exit)
        with listener, suppress(SystemExit):  # uvicorn's own exit code for a start that fails is not ours
            self.run(sockets=[listener])
        ignore_signals()
        return self.started or self.should_exit

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop in good order. A second signal says that there is no time for it."""
        self.force_exit = self.should_exit
        self.should_exit = True
        with suppress(RuntimeError):  # the loop has ended, too
            if self._loop is not None:  # it may be waiting for the start, and must be woken
                self._loop.call_soon_threadsafe(self._force if self.force_exit else self._tell)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop; at once, when told a second time, but never without ending what the application has begun."""
        self._loop = None
        self._on_stopping()
        forcing = asyncio.create_task(self._force_when_told())
        cutting = asyncio.create_task(self._cut_streams())
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves it out then
            await self.lifespan.shutdown()
        await cancel(forcing, cutting)

    async def _cut_streams(self) -> None:
        """End the connections of those who do not take what they are told in the end."""
        await asyncio.sleep(STREAMS_END_SECONDS)
        for connection in list(self.server_state.connections):
            if isinstance(connection, Watched) and connection.streams:
                connection.transport.abort()

    async def _force_when_told(self) -> None:
        while not self.force_exit:  # noqa: ASYNC110 - set by a signal handler, which may do no more than that
            await asyncio.sleep(0.05)
        logger.warning("second signal: stopping at once")
        self._force()
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        logging.getLogger("uvicorn.error").addFilter(_is_news)
        self._loop = asyncio.get_running_loop()
        if self.should_exit:  # told before
            self._tell()
        if self._orphaned is not None:
            asyncio.get_running_loop().add_reader(self._orphaned, self._end_as_orphan, self._orphaned)
        await super().startup(sockets)
        if self.started:
            self._on_started()

    def _end_as_orphan(self, descriptor: int) -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        logger.error("the parent has gone")
        self.should_exit = True


def _is_news(record: logging.LogRecord) -> bool:
    """The application says by itself why it did not start, or that it was to stop."""
    return record.msg != "Application startup failed. Exiting."


def ignore_signals() -> None:
    """From now on, when all is done but the end of Python itself: a signal would replace the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def bind(host: str, port: int, shared: bool = False) -> socket.socket:
    """A socket that listens there, `shared` with others of this kind.

    Raises:
        StartError: it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartError(f"http.host = {host!r}: {error.strerror or error}") from error
    try:
        # On shared ones, too: what is left of their connections for a minute would keep the next start from the port.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        # At once: a port that is only bound may still be bound by another process as well.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise StartError(f"cannot listen on {host}:{port} (http.host, http.port): {error.strerror}") from error
    return listener


def bind_each(host: str, port: int, number: int) -> list[socket.socket]:
    """So many sockets that listen there, over which the kernel spreads the connections.

    Of one socket for all, 16 connections that come together end in one process as often as not: whoever is awake takes
    them, and serves them for as long as they are open while the other processes have nothing to do.

    Raises:
        StartError: they cannot be had.
    """
    # The first is not shared when it begins to listen, or it would not tell that the port is taken by such a one. It
    # stays, so that another start that asks in the same way finds the port taken from here on.
    listeners = [bind(host, port)]
    try:
        listeners[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        port = listeners[0].getsockname()[1]
        for _ in range(number - 1):
            listeners.append(bind(host, port, shared=True))
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def place_of(listener: socket.socket) -> str:
    """Where it listens, as part of a URL."""
    host, port = listener.getsockname()[:2]
    return host_port(host, port)
