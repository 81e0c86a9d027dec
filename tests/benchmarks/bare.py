"""What the machine can do at all: a route of Starlette that does nothing, under the server MarketFlow has, an echo, and
a stream that only writes.

Each runs in a process of its own and ends with it.
"""

import asyncio
import multiprocessing
import re
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from marketflow.api.streaming.cpu_share import CpuShare
from tests.benchmarks.rawhttp import Client, request_of
from tests.support.servers import HOST, wait_until

PATH = "/bare"

_BACKLOG = 1024  # a thousand clients connect at once

_LINE = re.compile(rb'"symbol":"([^"]+)","price":([0-9.]+)')


class Running(NamedTuple):
    """A server of this module."""

    port: int
    pid: int


@contextmanager
def bare_route(body: bytes) -> Iterator[Running]:
    """A route at PATH without I/O, which answers with a fixed body of JSON."""
    with _process(_serve_route, body) as running:
        with Client(running.port) as client:  # waits in the backlog until the server is up
            client.get(request_of(PATH))
        yield running


@contextmanager
def echo() -> Iterator[Running]:
    """A server that sends back what it gets, to one client after the other."""
    with _process(_serve_echo) as running:
        yield running


@contextmanager
def stream() -> Iterator[Running]:
    """A server that streams ticks to all clients as MarketFlow does, without validation, stores or subscriptions.

    A connection that begins with a line of the feed format is an exchange, any other a client. A pass writes the newest
    price of each series that has changed to each client, in the bytes of MarketFlow, and rests as long as MarketFlow.
    """
    with _process(_serve_stream) as running:
        yield running


def _serve_route(listener: socket.socket, body: bytes) -> None:
    async def fixed(_: Request) -> Response:
        return Response(body, media_type="application/json")

    app = Starlette(routes=[Route(PATH, fixed)])
    config = uvicorn.Config(
        app, loop="uvloop", http="httptools", ws="none", lifespan="off", log_level="warning", access_log=False
    )
    uvicorn.Server(config).run(sockets=[listener])


def _serve_echo(listener: socket.socket) -> None:
    while True:
        client, _ = listener.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with client:
            while data := client.recv(65536):
                client.sendall(data)


def _serve_stream(listener: socket.socket) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    uvloop.run(_stream(listener))


async def _stream(listener: socket.socket) -> None:
    clients: dict[asyncio.Transport, None] = {}
    newest: dict[tuple[int, bytes], bytes] = {}
    due = asyncio.Event()
    await asyncio.get_running_loop().create_server(lambda: _Streaming(clients, newest, due), sock=listener)
    share = CpuShare()
    while True:
        await due.wait()
        due.clear()
        began = time.thread_time()
        prices = b",".join(newest.values())
        newest.clear()
        event = b'id: 0123456789ab-live-0-123456-0123456789abcdef\nevent: prices\ndata: {"prices":[%s]}\n\n' % prices
        chunk = b"%x\r\n%s\r\n" % (len(event), event)
        for client in clients:
            client.write(chunk)
        await asyncio.sleep(share.rest_after(time.thread_time() - began))


class _Streaming(asyncio.Protocol):
    def __init__(
        self, clients: dict[asyncio.Transport, None], newest: dict[tuple[int, bytes], bytes], due: asyncio.Event
    ) -> None:
        self._clients, self._newest, self._due = clients, newest, due

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"GET "):
            self._transport.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nevent: snapshot\n\n")
            self._clients[self._transport] = None
            return
        for symbol, price in _LINE.findall(data):
            self._newest[id(self), symbol] = (
                b'{"symbol":"%s","exchange":"exchange1","price":%s,"timestamp":"2026-11-21T05:12:57.069Z"}'
                % (symbol, price)
            )
        self._due.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._clients.pop(self._transport, None)


@contextmanager
def _process(serve: Callable[..., None], *arguments: Any) -> Iterator[Running]:
    with socket.create_server((HOST, 0), backlog=_BACKLOG) as listener:
        port = listener.getsockname()[1]
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(listener, *arguments), daemon=True)
        process.start()
    try:
        wait_until(process.is_alive)
        assert process.pid is not None
        yield Running(port, process.pid)
    finally:
        process.kill()
        process.join(5)
