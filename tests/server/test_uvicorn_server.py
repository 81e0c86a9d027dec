"""Binding of ports: shared, taken, and just released; waiting for the shutdown."""

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from marketflow.errors import StartError
from marketflow.server.listeners import bind, bind_each
from marketflow.server.uvicorn_server import Server
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


async def no_application(*_: object) -> None:
    pass


def server() -> Server:
    def nothing() -> None:
        pass

    return Server(no_application, False, nothing, nothing, nothing, nothing)


def test_idle_server_sets_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def timers() -> list[float]:
        loop, timers = asyncio.get_running_loop(), list[float]()
        waiting = asyncio.create_task(server().main_loop())
        call_at = loop.call_at

        def counted(at: float, *given: Any) -> asyncio.TimerHandle:
            timers.append(at)
            return call_at(at, *given)

        monkeypatch.setattr(loop, "call_at", counted)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not waiting.done()
        waiting.cancel()
        return timers

    assert asyncio.run(timers()) == []


def test_date_header_is_of_the_current_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_763_690_000.25
    monkeypatch.setattr(time, "time", lambda: now)
    state = server().server_state
    first = state.default_headers
    assert first == [(b"date", b"Fri, 21 Nov 2025 01:53:20 GMT")]
    now += 0.7
    assert state.default_headers is first
    now += 0.1
    assert state.default_headers == [(b"date", b"Fri, 21 Nov 2025 01:53:21 GMT")]
    now -= 3600
    assert state.default_headers == [(b"date", b"Fri, 21 Nov 2025 00:53:21 GMT")]


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

    assert asyncio.run(seconds_until_exit()) < 0.5


def test_signal_before_the_loop_ends_the_wait() -> None:
    async def run() -> None:
        early = server()
        early.handle_exit(signal.SIGTERM, None)
        await asyncio.wait_for(early.main_loop(), 5)

    asyncio.run(run())


def test_connections_may_be_idle_for_longer_than_proxies_keep_them() -> None:
    a_minute_of_proxies = 60
    assert server().config.timeout_keep_alive > a_minute_of_proxies
