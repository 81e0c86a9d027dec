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
    """One connection to a port of this machine, open as long as the client."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection((HOST, port), timeout=5)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get(self, request: bytes) -> bytes:
        """Send a request of `request_of` and give the body of the answer.

        Raises:
            ValueError: the answer is not a good one.
            OSError: there is none within 5 s.
        """
        self._socket.sendall(request)
        answer = self._receive()
        while (length := length_of(answer)) is None or len(answer) < length:
            answer += self._receive()
        return answer.partition(b"\r\n\r\n")[2]

    def _receive(self) -> bytes:
        if not (data := self._socket.recv(65536)):
            raise ConnectionResetError("the server ended the connection")
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
