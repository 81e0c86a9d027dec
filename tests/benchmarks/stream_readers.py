"""Clients of the stream in a process of their own, which read as fast as they can and note how old prices are."""

import multiprocessing
import random
import re
import resource
import select
import socket
from multiprocessing.connection import Connection
from typing import NamedTuple, Self

from tests.benchmarks.feeder import price_now
from tests.support.servers import HOST

LOOKED_AT = 25
"""Number of clients whose prices are read; of the others only events and bytes are counted."""

STREAMS = {
    "prices": ("/stream/prices", rb'"price":([0-9.]+)'),
    "candles": ("/stream/candles?exchanges=exchange1,exchange2,exchange3", rb'"close":([0-9.]+)'),
}
"""Paths of the streams, and the pattern of a newest price in each."""


class Seen(NamedTuple):
    """What came to clients: how old (ms) each price was that was looked at, how many events and bytes."""

    ages: list[float]
    events: int
    received: int


class StreamReaders:
    """Clients of all series; each is connected and has a snapshot when the block begins.

    Args:
        port: of MarketFlow.
        clients: how many.
        stream: which, of STREAMS.
    """

    def __init__(self, port: int, clients: int, stream: str = "prices") -> None:
        self._here, there = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_watch, args=(port, clients, stream, there), daemon=True
        )

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def begin(self) -> None:
        """Count from now on."""
        self._here.send("begin")

    def seen(self) -> Seen:
        """What has come since."""
        self._here.send("end")
        seen: Seen = self._here.recv()
        return seen

    def __enter__(self) -> Self:
        self._process.start()
        assert self._here.poll(60), "the clients got no snapshot"
        self._here.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join(5)


def _watch(port: int, count: int, stream: str, orders: Connection) -> None:
    path, pattern = STREAMS[stream]
    price_of = re.compile(pattern)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, count + 100), hard))
    clients: dict[int, socket.socket] = {}
    poll = select.epoll()
    for _ in range(count):
        client = socket.create_connection((HOST, port), timeout=30)
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        clients[client.fileno()] = client
    for client in clients.values():
        received = b""
        while b"event: snapshot" not in received:
            received += client.recv(1 << 16)
        client.setblocking(False)
        poll.register(client, select.EPOLLIN)
    poll.register(orders, select.EPOLLIN)
    looked_at = dict.fromkeys(random.Random(7).sample([*clients], min(LOOKED_AT, count)), b"")
    ages: list[float] = []
    events = size = 0
    orders.send("ready")
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == orders.fileno():
                if orders.recv() == "end":
                    orders.send(Seen(ages, events, size))
                ages, events, size = [], 0, 0
                continue
            received = clients[descriptor].recv(1 << 18)
            now = price_now()
            assert received, "a stream has ended"
            size += len(received)
            events += received.count(b"\nevent: ")
            if descriptor in looked_at:
                # A price may be cut in two: what is behind the last whole event waits for the rest.
                whole, _, looked_at[descriptor] = (looked_at[descriptor] + received).rpartition(b"\n\n")
                ages += [(now - float(price)) / 1000 for price in price_of.findall(whole)]
