"""What the machine can do at all: a route of Starlette that does nothing, under the server MarketFlow has, and an echo.

Each runs in a process of its own and ends with it.
"""

import multiprocessing
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.benchmarks.rawhttp import Client, request_of
from tests.support.servers import HOST, wait_until

PATH = "/bare"


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


@contextmanager
def _process(serve: Callable[..., None], *arguments: Any) -> Iterator[Running]:
    with socket.create_server((HOST, 0), backlog=128) as listener:
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
