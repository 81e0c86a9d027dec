"""`marketflow exchange`: the generator on a TCP port, for any number of clients.

All clients get the same ticks. One that does not read is disconnected when MAX_UNSENT_BYTES are buffered for it, as
real exchanges do: it must not delay the others, and memory stays bounded.
"""

import asyncio
import signal
import socket
from collections.abc import Callable, Coroutine, Sequence

import msgspec
from loguru import logger

from marketflow.clock import milliseconds, system_clock
from marketflow.errors import StartError
from marketflow.feeds.generator import Market
from marketflow.tasks import cancel

MAX_UNSENT_BYTES = 4 * 1024 * 1024

Send = Callable[[bytes], None]
LineSource = Callable[[asyncio.Event, Send], Coroutine[None, None, None]]

_encode_lines = msgspec.json.Encoder().encode_lines


def serve(name: str, host: str, port: int, symbols: Sequence[str], rate: float, seed: int | None) -> int:
    """Run a simulated exchange until SIGINT or SIGTERM.

    Args:
        name: shown in the log; the default seeds of two exchanges differ anyway.
        host: address to listen on.
        port: port to listen on; 0 takes any free one and logs which.
        symbols: what is traded.
        rate: ticks a second over all symbols.
        seed: None for a random one.

    Raises:
        StartError: the port cannot be bound.
    """
    market = Market(symbols, rate, seed)

    async def run(first_client: asyncio.Event, send: Send) -> None:
        while True:
            send(_encode_lines(market.due(milliseconds(system_clock()))))
            await asyncio.sleep(market.pause_seconds)

    return serve_lines(name, host, port, run)


def serve_lines(name: str, host: str, port: int, run: LineSource) -> int:
    """Serve the lines of a source until SIGINT or SIGTERM.

    Args:
        name: shown in the log.
        host: address to listen on.
        port: port to listen on; 0 takes any free one and logs which.
        run: sends lines when they are due; the event is set once a client is connected.

    Raises:
        StartError: the port cannot be bound.
    """
    return asyncio.run(_until_signal(LineExchange(name, run), host, port))


async def _until_signal(exchange: "LineExchange", host: str, port: int) -> int:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    try:
        await exchange.start(host, port)
    except OSError as error:
        raise StartError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    await stopped.wait()
    await exchange.stop()
    return 0


class LineExchange:
    """The lines of a source on a TCP port; all clients get the same.

    Args:
        name: shown in the log.
        source: sends lines when they are due.
    """

    def __init__(self, name: str, source: LineSource) -> None:
        self._log = logger.bind(exchange=name)
        self._source = source
        self._first_client = asyncio.Event()
        self._clients: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._sending: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> None:
        """Listen, and begin to send.

        Raises:
            OSError: the port cannot be bound.
        """
        self._server = await asyncio.start_server(self._welcome, host, port)
        self._log.info("exchange listens on {}:{}", *self._server.sockets[0].getsockname()[:2])
        self._sending = asyncio.create_task(self._source(self._first_client, self._send))

    async def stop(self) -> None:
        """Close all connections."""
        if self._sending is not None:
            await cancel(self._sending)
        if self._server is not None:
            self._server.close()
        for client in list(self._clients):
            client.close()

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        raw: socket.socket = writer.get_extra_info("socket")
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._clients.add(writer)
        self._first_client.set()
        self._log.info("client connected from {}:{}", *peer[:2])
        try:
            while await reader.read(4096):
                pass  # what clients send is ignored
        except (ConnectionError, asyncio.CancelledError):
            pass  # asyncio would log the cancellation at the end as an error
        finally:
            self._clients.discard(writer)
            writer.close()
            self._log.info("client {}:{} disconnected", *peer[:2])

    def _send(self, lines: bytes) -> None:
        for client in list(self._clients):
            client.write(lines)
            if client.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
                self._log.warning("client {}:{} does not read, disconnected", *client.get_extra_info("peername")[:2])
                self._clients.discard(client)
                client.transport.abort()
