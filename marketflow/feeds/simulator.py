"""`marketflow exchange`: the generator on a TCP port, for any number of clients.

All clients get the same ticks. One that does not read is disconnected when MAX_UNSENT_BYTES are buffered for it, as
real exchanges do: it must not delay the others, and memory stays bounded.
"""

import asyncio
import signal
import socket
from collections.abc import Sequence

import msgspec
from loguru import logger

from marketflow.clock import milliseconds, system_clock
from marketflow.errors import StartError
from marketflow.feeds.generator import Market
from marketflow.tasks import cancel

MAX_UNSENT_BYTES = 4 * 1024 * 1024

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
    return asyncio.run(_Exchange(name, Market(symbols, rate, seed)).run(host, port))


class _Exchange:
    def __init__(self, name: str, market: Market) -> None:
        self._log = logger.bind(exchange=name)
        self._market = market
        self._clients: set[asyncio.StreamWriter] = set()

    async def run(self, host: str, port: int) -> int:
        stopped = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
        try:
            server = await asyncio.start_server(self._welcome, host, port)
        except OSError as error:
            raise StartError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
        self._log.info("exchange listens on {}:{}", *server.sockets[0].getsockname()[:2])
        ticking = asyncio.create_task(self._tick())
        await stopped.wait()
        await cancel(ticking)
        server.close()
        for client in list(self._clients):
            client.close()
        return 0

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        raw: socket.socket = writer.get_extra_info("socket")
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._clients.add(writer)
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

    async def _tick(self) -> None:
        while True:
            lines = _encode_lines(self._market.due(milliseconds(system_clock())))
            for client in list(self._clients):
                client.write(lines)
                if client.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
                    self._log.warning(
                        "client {}:{} does not read, disconnected", *client.get_extra_info("peername")[:2]
                    )
                    self._clients.discard(client)
                    client.transport.abort()
            await asyncio.sleep(self._market.pause_seconds)
