"""An exchange on a TCP port: newline-delimited JSON, received in large chunks by one thread for each connection.

A thread, because decoding is CPU work done in C on whole chunks: the larger the chunk the cheaper the tick, and a
blocking receive that has fallen behind finds a large chunk waiting. One that comes full tells that there is more: what
it brings is merged with what follows and handed on after HOLD_SECONDS, since a batch costs the flow more than a chunk
costs to decode. Every wait has a deadline: a peer that went away without a word is noticed by its silence, since TCP
may never tell.
"""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import reactivex as rx
from reactivex import Observable, abc
from reactivex.disposable import Disposable

from marketflow.feeds.decoder import Decoder
from marketflow.feeds.line_framing import Framer
from marketflow.model import Candles, FeedState, merge_into

RECEIVE_BYTES = 256 * 1024
CONNECT_TIMEOUT_SECONDS = 3.0

HOLD_SECONDS = 0.05
"""How long a batch may grow while more is waiting than a receive takes."""

_turn = threading.Lock()
"""Had by the one feed that works on what it received. Several that are flooded would take Python's lock from each other
all the time, which halves what they get done; and who has little to do would wait behind all of them."""

LOOKUP_WAIT_SECONDS = 0.3
"""How long an attempt waits for the lookup of an earlier one, which nothing can end."""


class ConnectionLost(Exception):
    """The exchange ended the connection."""


class ConnectionSilent(Exception):
    """Nothing came for so long that the connection is taken for dead."""


class TcpFeed:
    """The ticks of one exchange, received over TCP.

    Args:
        exchange: its name.
        host, port: where it listens.
        decoder: checks and folds what is received.
        stale_after_seconds: silence after which the connection is given up.
        monotonic: measures silence, in seconds.
    """

    def __init__(
        self,
        exchange: str,
        host: str,
        port: int,
        decoder: Decoder,
        stale_after_seconds: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.exchange = exchange
        self.decoder = decoder
        self._address = _Address(host, port)
        self._stale_after_seconds = stale_after_seconds
        self._monotonic = monotonic
        self._link: _Link | None = None
        self._stopped = False
        self._silent = False
        self._last_tick = 0.0

    @property
    def place(self) -> str:
        """Its address, for the log."""
        return f"{self._address.host}:{self._address.port}"

    @property
    def state(self) -> FeedState:
        """Connected means that ticks come; a silent connection stays stale until a tick proves otherwise."""
        if self._silent:
            return FeedState.STALE
        if self._link is None or not self._link.connected:
            return FeedState.CONNECTING
        fresh = self._monotonic() - self._last_tick <= self._stale_after_seconds
        return FeedState.CONNECTED if fresh else FeedState.STALE

    def batches(self) -> Observable[Candles]:
        """One connection: candles of what it brings, then ConnectionLost, ConnectionSilent or an OSError."""
        return rx.create(self._subscribe)

    def stop(self) -> None:
        """Receive no more and complete; what was received is handed on first."""
        self._stopped = True
        if self._link is not None:
            self._link.wake()

    def _subscribe(
        self, observer: abc.ObserverBase[Candles], scheduler: abc.SchedulerBase | None = None
    ) -> abc.DisposableBase:
        link = self._link = _Link(self._address, self._stale_after_seconds)
        thread = threading.Thread(target=self._run, args=(link, observer), name=f"feed-{self.exchange}", daemon=True)
        thread.start()
        return Disposable(link.abort)

    def _run(self, link: "_Link", observer: abc.ObserverBase[Candles]) -> None:
        try:
            self._receive(link, observer)
        except Exception as error:  # noqa: BLE001 - handed on
            if self._stopped and isinstance(error, OSError):
                observer.on_completed()  # a connection that was woken may end in any way
                return
            if link is self._link:  # an old one may end after the next has begun
                # Silence ends with a tick, or with an outright refusal, which is another state.
                lost = isinstance(error, ConnectionLost)
                self._silent = isinstance(error, ConnectionSilent) or (self._silent and lost)
            observer.on_error(error)
        else:
            observer.on_completed()

    def _receive(self, link: "_Link", observer: abc.ObserverBase[Candles]) -> None:
        framer = Framer(on_too_long=lambda: self.decoder.reject("too_long", "an unfinished line"))
        with link:
            self._last_tick = self._monotonic()
            link.connected = True
            if self._stopped:
                return
            held: Candles = {}
            due = 0.0
            try:
                for data in link.received():
                    with _turn:
                        now = self._monotonic()
                        if (lines := framer.push(data)) and (candles := self.decoder.decode(lines)):
                            self._last_tick = now
                            self._silent = False
                            merge_into(held, candles)
                        if held and (len(data) < RECEIVE_BYTES or now >= due):
                            due = now + HOLD_SECONDS
                            batch, held = held, {}
                            observer.on_next(batch)
            finally:
                if not link.aborted:
                    merge_into(held, self._decode_rest(framer.rest()))
                    if held:
                        observer.on_next(held)
        if not (self._stopped or link.aborted):
            raise ConnectionLost("the exchange closed the connection")

    def _decode_rest(self, line: bytes) -> Candles:
        """The last line of a connection, which needs no newline; one that was cut is rejected like any other."""
        # Where `stop` has cut it, that is no fault of the exchange.
        if not line or (self._stopped and not line.rstrip().endswith(b"}")):
            return {}
        return self.decoder.decode(line)


class _Address:
    """Where an exchange listens. Its name is looked up by one thread at a time: a resolver may hang for long."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._looking_up = threading.Lock()

    def look_up(self) -> list[Any]:
        """What the name stands for, as of socket.getaddrinfo; never empty.

        Raises:
            OSError: it cannot be found out, or another thread still tries.
        """
        if not self._looking_up.acquire(timeout=LOOKUP_WAIT_SECONDS):
            raise OSError(f"{self.host} is still being looked up")
        try:
            return socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        finally:
            self._looking_up.release()


class _Link:
    """One TCP connection, opened on entry and closed on exit by the thread that reads it."""

    def __init__(self, address: _Address, silence_seconds: float) -> None:
        self._address = address
        self._silence_seconds = silence_seconds
        self._socket: socket.socket | None = None
        self._woken = False
        self.connected = False
        self.aborted = False

    def __enter__(self) -> "_Link":
        failed = OSError("no address")
        for family, kind, protocol, _, address in self._address.look_up():
            # Known before it connects, so that `wake` ends that as well: a host that is gone does not even refuse.
            self._socket = socket.socket(family, kind, protocol)
            self._socket.settimeout(CONNECT_TIMEOUT_SECONDS)
            try:
                if self._woken:
                    raise ConnectionAbortedError("no longer wanted")
                self._socket.connect(address)
            except OSError as error:
                self._socket.close()
                failed = error
            else:
                # By the kernel: Python's own timeout polls before each receive, which gives its lock away twice.
                seconds, fraction = divmod(self._silence_seconds, 1)
                self._socket.setblocking(True)
                self._socket.setsockopt(
                    socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), int(fraction * 1e6))
                )
                return self
        raise failed

    def __exit__(self, *_: object) -> None:
        self.connected = False
        if self._socket is not None:
            self._socket.close()

    def received(self) -> Iterator[bytes]:
        """What comes, until the other side or `wake` ends it; then what the kernel has received by that time.

        An item of RECEIVE_BYTES is followed by another at once, an empty one if there is nothing more as yet.
        """
        assert self._socket is not None
        flags = 0
        while not self.aborted:
            try:
                data = self._socket.recv(RECEIVE_BYTES, flags)
            except BlockingIOError:
                if not flags:
                    raise ConnectionSilent(f"nothing came for {self._silence_seconds:g} s") from None
                flags = 0
                yield b""
                continue
            if not data:
                return
            flags = socket.MSG_DONTWAIT if len(data) == RECEIVE_BYTES else 0
            yield data

    def wake(self) -> None:
        """End a wait for a connection or for data.

        The reading thread closes the socket, nobody else: its number may be reused.
        """
        self._woken = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def abort(self) -> None:
        """Close without handing anything on."""
        self.aborted = True
        self.wake()
