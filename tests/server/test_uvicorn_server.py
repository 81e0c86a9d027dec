"""Binding of ports: shared, taken, and just released."""

import socket
from collections.abc import Callable, Iterator

import pytest

from marketflow.errors import StartError
from marketflow.server.listeners import bind, bind_each
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
