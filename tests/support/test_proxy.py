"""The proxy does what its methods say: a fault that does not happen would prove nothing."""

import socket
import threading
from collections.abc import Iterator

import pytest

from tests.support.proxy import Proxy
from tests.support.servers import HOST, wait_until


class EchoServer:
    """Answers each message with itself and remembers it."""

    def __init__(self) -> None:
        self.received = b""
        self._listener = socket.create_server((HOST, 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(client,), daemon=True).start()

    def _echo(self, client: socket.socket) -> None:
        with client:
            try:
                while data := client.recv(1000):
                    self.received += data
                    client.sendall(data)
            except OSError:
                pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def server() -> Iterator[EchoServer]:
    server = EchoServer()
    yield server
    server.close()


@pytest.fixture
def proxy(server: EchoServer) -> Iterator[Proxy]:
    with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    with connected(proxy) as client:
        assert asked(client, b"hello") == b"hello"
        yield client


def connected(proxy: Proxy) -> socket.socket:
    return socket.create_connection((HOST, proxy.port), timeout=2)


def asked(client: socket.socket, message: bytes) -> bytes:
    client.sendall(message)
    return client.recv(1000)


def test_refused_connections_are_refused_and_open_ones_reset(proxy: Proxy, client: socket.socket) -> None:
    proxy.refuse()
    with pytest.raises(ConnectionError):
        asked(client, b"more")
    with pytest.raises(ConnectionRefusedError):
        connected(proxy)
    proxy.heal()
    with connected(proxy) as again:
        assert asked(again, b"again") == b"again"


def test_cut_resets_connections_and_accepts_new_ones(proxy: Proxy, client: socket.socket) -> None:
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        client.recv(1000)
    with connected(proxy) as again:
        assert asked(again, b"again") == b"again"
    wait_until(lambda: proxy.open_connections == 0)


def test_answer_can_be_cut_after_the_request_is_executed(
    proxy: Proxy, server: EchoServer, client: socket.socket
) -> None:
    proxy.cut_after(b"commit")
    assert asked(client, b"begin") == b"begin"
    with pytest.raises(ConnectionResetError):
        asked(client, b"now commit this")
    assert proxy.was_cut.wait(2)
    assert server.received.endswith(b"now commit this")
    with connected(proxy) as again:
        assert asked(again, b"commit") == b"commit"


def test_stalled_data_arrives_late(proxy: Proxy, client: socket.socket) -> None:
    proxy.stall()
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):
        asked(client, b"late")
    proxy.heal()
    client.settimeout(2)
    assert client.recv(1000) == b"late"


def test_answer_is_stalled_within_and_arrives_late(proxy: Proxy, client: socket.socket) -> None:
    proxy.stall_within(b"copy")
    assert asked(client, b"begin") == b"begin"
    long = b"copy" + b"." * 2**20
    sending = threading.Thread(target=client.sendall, args=(long,))
    sending.start()
    assert proxy.was_stalled.wait(2)
    assert 0 < len(client.recv(2**20)) <= 65536
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):
        client.recv(1)
    proxy.heal()
    client.settimeout(5)
    assert client.recv(1) == b"."
    proxy.cut()
    sending.join(5)


def test_swallowed_data_never_arrives(proxy: Proxy, server: EchoServer, client: socket.socket) -> None:
    proxy.swallow()
    with connected(proxy) as another:
        for each in (client, another):
            each.settimeout(0.2)
            with pytest.raises(TimeoutError):
                asked(each, b"lost")
        proxy.heal()
        with pytest.raises(ConnectionResetError):
            client.recv(1000)
    assert b"lost" not in server.received


def test_vanished_server_does_not_refuse_connections(proxy: Proxy, client: socket.socket) -> None:
    proxy.vanish()
    with pytest.raises(TimeoutError):
        socket.create_connection((HOST, proxy.port), timeout=0.3)
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):
        asked(client, b"lost")
    proxy.heal()
    with connected(proxy) as again:
        assert asked(again, b"again") == b"again"


def test_forgotten_connections_fall_silent_new_ones_work(
    proxy: Proxy, server: EchoServer, client: socket.socket
) -> None:
    proxy.forget()
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):
        asked(client, b"lost")
    with connected(proxy) as again:
        assert asked(again, b"again") == b"again"
    client.close()
    assert b"lost" not in server.received
