"""What goes wrong on the way to a server: a TCP proxy in front of it that refuses, cuts, stalls and swallows."""

import socket
import struct
import threading
from contextlib import suppress
from typing import Self

from tests.support.servers import HOST

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Proxy:
    """A TCP proxy at 127.0.0.1:`port`; the port stays the same whatever happens.

    Args:
        target: port of the server on 127.0.0.1.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.accepted = 0
        self._lock = threading.Lock()
        self._pairs: list[_Pair] = []
        self._fillers: list[socket.socket] = []
        self._flowing = threading.Event()
        self._flowing.set()
        self._swallowing = False
        self._cut_after = b""
        self.was_cut = threading.Event()
        """Set once the connection was cut that `cut_after` waits for."""
        self._stall_within = b""
        self.was_stalled = threading.Event()
        """Set once the answer was stalled that `stall_within` waits for."""
        self._listener: socket.socket | None = None
        self._accepting: threading.Thread | None = None
        self.heal()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._flowing.set()
        self._stop_listening()
        self.cut()

    @property
    def open_connections(self) -> int:
        """How many clients are connected now."""
        with self._lock:
            return sum(pair.open for pair in self._pairs)

    # Faults

    def heal(self) -> None:
        """Let everything through from now on. What was stalled arrives late, what was swallowed is cut."""
        if self._swallowing:
            self.cut()
        self._swallowing = False
        self._flowing.set()
        if self._listener is None or self._fillers:
            self._stop_listening()
            self._listen(backlog=128)
            self._accepting = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
            self._accepting.start()

    def refuse(self) -> None:
        """Nobody listens any more, and who is connected is cut off."""
        self._stop_listening()
        self.cut()

    def cut(self) -> None:
        """Reset all connections; new ones are welcome."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            pair.reset()

    def forget(self) -> None:
        """Drop all bytes of open connections for good, without a reset, as a firewall that has lost its table does.

        New connections are accepted.
        """
        with self._lock:
            for pair in self._pairs:
                pair.forgotten = True

    def cut_after(self, request: bytes) -> None:
        """Forward the next request that holds these bytes, wait for the server's answer, and reset instead of it."""
        self.was_cut.clear()
        self._cut_after = request

    def stall(self) -> None:
        """Hold back everything in both directions; connections stay open, new ones are accepted, nothing is lost."""
        self._flowing.clear()

    def stall_within(self, request: bytes) -> None:
        """Forward the next request that holds these bytes and at most 64 KiB of its answer; then stall."""
        self.was_stalled.clear()
        self._stall_within = request

    def swallow(self) -> None:
        """A black hole behind an open door: connections are accepted, and nothing that is sent ever arrives."""
        self._swallowing = True

    def vanish(self) -> None:
        """A black hole: no answer to a new connection, not even a refusal; open connections fall silent."""
        self._stop_listening()
        self._swallowing = True
        self._listen(backlog=0)
        # A full backlog makes the kernel drop what knocks.
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex((HOST, self.port))
            self._fillers.append(filler)

    def passed(self, data: bytes, from_client: bool) -> bytes:
        """What is forwarded of data; for subclasses."""
        return data

    # Machinery

    def _listen(self, backlog: int) -> None:
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((HOST, self.port))
        self._listener.listen(backlog)
        self.port = self._listener.getsockname()[1]

    def _stop_listening(self) -> None:
        for filler in self._fillers:
            filler.close()
        self._fillers.clear()
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        if self._accepting is not None:
            self._accepting.join(5)
            self._accepting = None

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self.accepted += 1
            try:
                server = socket.create_connection((HOST, self.target), timeout=2)
            except OSError:
                _reset(client)
                continue
            pair = _Pair(client, server)
            with self._lock:
                self._pairs = [pair for pair in self._pairs if pair.open] + [pair]
            threading.Thread(target=self._forward, args=(pair, client, server), daemon=True).start()
            threading.Thread(target=self._forward, args=(pair, server, client), daemon=True).start()

    def _forward(self, pair: "_Pair", source: socket.socket, target: socket.socket) -> None:
        from_client = source is pair.client
        try:
            while data := source.recv(65536):
                self._flowing.wait()
                if self._swallowing or pair.forgotten:
                    continue
                if from_client and self._cut_after and self._cut_after in data:
                    self._cut_after = b""
                    pair.doomed = True
                if from_client and self._stall_within and self._stall_within in data:
                    self._stall_within = b""
                    pair.stalling = True
                stalls = pair.stalling and not from_client  # before the client can have sent its next request
                if pair.doomed and not from_client:  # the answer: what was asked for has been done
                    pair.reset()
                    self.was_cut.set()
                    return
                target.sendall(self.passed(data, from_client))
                if stalls:
                    pair.stalling = False
                    self.stall()
                    self.was_stalled.set()
            self._flowing.wait()
            if pair.forgotten or not pair.open:  # a connection that is reset must not end as if it was closed
                return
        except OSError:
            pair.reset()  # as it came: a reset is passed on as one
        else:
            with suppress(OSError):
                target.shutdown(socket.SHUT_WR)
        pair.ended(from_client)


class _Pair:
    """A client's connection and the one to the server that belongs to it."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.open = True
        self.doomed = False
        self.stalling = False
        self.forgotten = False
        self._lock = threading.Lock()
        self._ended: set[bool] = set()
        for each in (client, server):
            each.settimeout(None)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ended(self, from_client: bool) -> None:
        """One direction is over; with the second both sockets are closed."""
        with self._lock:
            self._ended.add(from_client)
            over = len(self._ended) == 2
        if over:
            self.open = False
            self.client.close()
            self.server.close()

    def reset(self) -> None:
        """Reset both sockets at once; the threads that read them end by the error."""
        self.open = False
        for each in (self.client, self.server):
            _reset(each)


def _reset(each: socket.socket) -> None:
    with suppress(OSError):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    with suppress(OSError):
        each.shutdown(socket.SHUT_RD)  # wakes the thread that reads it
    each.close()
