"""HTTP without a library: one connection kept alive, one request as bytes, so that what is measured is the server."""

import socket
from typing import Self

from tests.support.servers import HOST


def request_of(path: str) -> bytes:
    """A GET request."""
    return b"GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % path.encode()


def length_of(answer: bytes) -> int | None:
    """How long an answer is, head and body, given what has come of it; None while its head is not whole.

    Raises:
        ValueError: it is not a 200 with a Content-Length.
    """
    head, end, _ = answer.partition(b"\r\n\r\n")
    if not end:
        return None
    status, *fields = head.split(b"\r\n")
    if status[:12] != b"HTTP/1.1 200":
        raise ValueError(f"no good answer: {answer!r}")
    for field in fields:
        name, _, value = field.partition(b":")
        if name.lower() == b"content-length":
            return len(head) + 4 + int(value)
    raise ValueError(f"no Content-Length: {answer!r}")


class Client:
    """A connection to a port of this machine, opened again when the server has closed it while it was idle."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket = self._connected()

    def _connected(self) -> socket.socket:
        connection = socket.create_connection((HOST, self._port), timeout=5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def get(self, request: bytes) -> bytes:
        """Send a request of `request_of` and give the body of the answer.

        Raises:
            ValueError: the answer is not a good one.
            OSError: there is none within 5 s.
        """
        try:
            answer = self._first_of_answer(request)
        except ConnectionError:
            self._socket.close()
            self._socket = self._connected()
            answer = self._first_of_answer(request)
        while (length := length_of(answer)) is None or len(answer) < length:
            answer += self._receive()
        return answer.partition(b"\r\n\r\n")[2]

    def _first_of_answer(self, request: bytes) -> bytes:
        self._socket.sendall(request)
        return self._receive()

    def _receive(self) -> bytes:
        if not (data := self._socket.recv(65536)):
            raise ConnectionResetError("the server ended the connection")
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
