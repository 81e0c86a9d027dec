"""Clients of the stream on real sockets, as simple as they can be, so that nothing happens that a test does not see."""

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

from tests.support.servers import HOST


class Event(NamedTuple):
    """One event."""

    name: str
    id: str
    data: Any


class Stream:
    """GET /stream/prices.

    Args:
        port: of the application.
        query: without the question mark.
        headers: more of them.
        receive_bytes: of the buffer in which the kernel keeps what was not read yet; as it likes where that is 0.
    """

    def __init__(
        self, port: int, query: str = "", headers: Mapping[str, str] | None = None, receive_bytes: int = 0
    ) -> None:
        self.socket = socket.socket()
        if receive_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(20)
        self.socket.connect((HOST, port))
        given = {"Host": "localhost", **(headers or {})}
        lines = [f"GET /stream/prices?{query} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode())
        self._received = b""
        self.head = ""
        self.ended = False
        """Whether the answer has come to its proper end."""
        self._events = self._read()
        self.last_id = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def __iter__(self) -> Iterator[Event]:
        return self._events

    def next(self, *names: str) -> Event:
        """The next event with one of these names, or at all."""
        for event in self._events:
            if not names or event.name in names:
                return event
        raise AssertionError(f"the stream ended before {names or 'any event'}")

    def until(self, condition: Callable[[Event], object], seconds: float = 20.0) -> list[Event]:
        """All events up to the one of which the condition is true."""
        deadline = time.monotonic() + seconds
        seen = []
        for event in self._events:
            seen.append(event)
            if condition(event):
                return seen
            assert time.monotonic() < deadline, seen
        raise AssertionError(f"the stream ended before: {seen}")

    def _read(self) -> Iterator[Event]:
        while b"\r\n\r\n" not in self._received:
            self._receive()
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        self.head = head.decode().lower()
        assert self.head.startswith("http/1.1 200"), self.head
        text = b""
        for chunk in self._chunks():
            text += chunk
            *blocks, text = text.split(b"\n\n")
            for block in blocks:
                fields = dict(line.split(": ", 1) for line in block.decode().split("\n"))
                if "data" in fields:
                    self.last_id = fields["id"]
                    yield Event(fields["event"], fields["id"], json.loads(fields["data"]))
        assert text == b""
        self.ended = True

    def _chunks(self) -> Iterator[bytes]:
        while True:
            while b"\r\n" not in self._received:
                self._receive()
            size, _, self._received = self._received.partition(b"\r\n")
            length = int(size, 16)
            while len(self._received) < length + 2:
                self._receive()
            chunk, self._received = self._received[:length], self._received[length + 2 :]
            if not length:
                return
            yield chunk

    def _receive(self) -> None:
        received = self.socket.recv(1 << 16)
        if not received:
            raise ConnectionError("the answer was cut")
        self._received += received


def prices_in(event: Event) -> dict[tuple[str, str], float]:
    """The prices of an event by exchange and symbol."""
    return {(each["exchange"], each["symbol"]): each["price"] for each in event.data.get("prices", ())}
