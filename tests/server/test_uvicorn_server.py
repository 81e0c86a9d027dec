"""Binding of ports: shared, taken, and just released; waiting for the shutdown."""

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from marketflow.errors import StartError
from marketflow.server.listeners import bind, bind_each
from marketflow.server.uvicorn_server import TICK_SECONDS, Server
from tests.support.servers import HOST


def alone(port: int) -> list[socket.socket]:
    return [bind(HOST, port)]


def together(port: int) -> list[socket.socket]:
    return bind_each(HOST, port, 2)


Binding = Callable[[int], list[socket.socket]]


@pytest.fixture
def served() -> Iterator[Callable[[Binding], int]]:
    """Return a function that accepts and closes connections on a free port, and returns the port."""
    clients: list[socket.socket] = []

    def serve(binding: Binding) -> int:
        listeners = binding(0)
        port: int = listeners[0].getsockname()[1]
        for _ in range(16):
            client = socket.create_connection((HOST, port))
            clients.append(client)
        for listener in listeners:
            listener.settimeout(0)
            while True:
                try:
                    listener.accept()[0].close()
                except BlockingIOError:
                    break
            listener.close()
        return port

    yield serve
    for client in clients:
        client.close()


@pytest.mark.parametrize("before", [alone, together])
@pytest.mark.parametrize("after", [alone, together])
def test_port_with_connections_in_time_wait_can_be_bound(
    before: Binding, after: Binding, served: Callable[[Binding], int]
) -> None:
    port = served(before)
    for listener in after(port):
        listener.close()


@pytest.mark.parametrize("before", [alone, together])
@pytest.mark.parametrize("after", [alone, together])
def test_port_of_another_listener_cannot_be_bound(before: Binding, after: Binding) -> None:
    listeners = before(0)
    with pytest.raises(StartError, match="Address already in use"):
        after(listeners[0].getsockname()[1])
    for listener in listeners:
        listener.close()


# Waiting for the shutdown


class CountingServer(Server):
    """Counts how often it wakes."""

    ticks = 0

    async def on_tick(self, counter: int) -> bool:
        self.ticks += 1
        return await super().on_tick(counter)


async def no_application(*_: object) -> None:
    pass


def server() -> CountingServer:
    def nothing() -> None:
        pass

    return CountingServer(no_application, False, nothing, nothing, nothing, nothing)


def test_idle_server_wakes_once_a_second() -> None:
    async def ticks_in(seconds: float) -> int:
        idle = server()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await idle.main_loop()
        return idle.ticks

    assert asyncio.run(ticks_in(2.5)) <= 3


def test_signal_wakes_a_waiting_server_at_once() -> None:
    async def seconds_until_exit() -> float:
        waiting = server()
        waiting._loop = asyncio.get_running_loop()
        main_loop = asyncio.create_task(waiting.main_loop())
        await asyncio.sleep(0)  # it waits
        began = time.monotonic()
        waiting.handle_exit(signal.SIGTERM, None)
        await main_loop
        return time.monotonic() - began

    assert asyncio.run(seconds_until_exit()) < TICK_SECONDS / 2
