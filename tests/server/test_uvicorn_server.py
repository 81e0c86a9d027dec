"""The port: who may have it, and when."""

import socket
from collections.abc import Callable, Iterator

import pytest

from marketflow.errors import StartError
from marketflow.server.uvicorn_server import bind, bind_each
from tests.support.servers import HOST


def alone(port: int) -> list[socket.socket]:
    return [bind(HOST, port)]


def together(port: int) -> list[socket.socket]:
    return bind_each(HOST, port, 2)


Binding = Callable[[int], list[socket.socket]]


@pytest.fixture
def served() -> Iterator[Callable[[Binding], int]]:
    """Serves a client on any port, ends the connection before the client does, and gives the port."""
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
def test_a_port_whose_connections_were_just_ended_can_be_had_at_once(
    before: Binding, after: Binding, served: Callable[[Binding], int]
) -> None:
    port = served(before)
    for listener in after(port):
        listener.close()


@pytest.mark.parametrize("before", [alone, together])
@pytest.mark.parametrize("after", [alone, together])
def test_a_port_on_which_another_listens_cannot_be_had(before: Binding, after: Binding) -> None:
    listeners = before(0)
    with pytest.raises(StartError, match="Address already in use"):
        after(listeners[0].getsockname()[1])
    for listener in listeners:
        listener.close()
