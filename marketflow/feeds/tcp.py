"""An exchange on a TCP port: newline-delimited JSON, received in large chunks by one thread for each connection.

A thread, because decoding is CPU work in C on whole chunks: the larger the chunk, the cheaper the tick, and a thread
that lags behind receives large chunks. A receive that fills its buffer means that more is waiting: its candles are
merged with those that follow for up to BATCH_SECONDS, since a batch costs the pipeline more than a chunk costs to
decode. Every wait has a deadline: a peer that disappears is noticed by its silence, which TCP may never report.
"""

import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import reactivex as rx
from reactivex import Observable, abc
from reactivex.disposable import Disposable

from marketflow.clock import milliseconds
from marketflow.feeds.cpu.pacing import Pacing
from marketflow.feeds.decoder import Decoder
from marketflow.feeds.feed import FeedReport, Record
from marketflow.feeds.line_framing import Framer
from marketflow.model import Candles, FeedState, merge_into

RECEIVE_BYTES = 128 * 1024
"""Largest chunk, whose decoding holds Python's lock. With twice as many, ticks of other exchanges took a tenth longer
beside a flood; with half as many, a core-second ingested a tenth fewer ticks of three floods.
"""

CONNECT_TIMEOUT_SECONDS = 3.0

BATCH_SECONDS = 0.05
"""How long a batch may grow while a feed lags behind."""

decoding = threading.Lock()
"""Held by the one feed that decodes. Several flooded feeds would contend for Python's lock, which halves their
throughput, and a feed with few ticks would wait behind all of them."""

LONGEST_LAG_MS = 1000
"""Lag of a feed beyond which it is not paced any more."""

EMPTY_CHECK_SECONDS = 2.0
"""How often a feed without data checks that its socket is empty, see `_Link.waited_ms`. Each check wakes a thread."""

LOOKUP_WAIT_SECONDS = 0.3
"""How long an attempt waits for the DNS lookup of an earlier one, which cannot be cancelled."""

_UNPACED = nullcontext()


class ConnectionLost(Exception):
    """The exchange ended the connection."""


class ConnectionSilent(Exception):
    """No data for so long that the connection counts as dead."""


class TcpFeed:
    """The ticks of one exchange, received over TCP.

    Args:
        exchange: its name.
        host, port: where it listens.
        decoder: validates and folds what is received.
        stale_after_seconds: silence after which the connection is closed.
        monotonic: measures silence, in seconds.
        pacing: pauses between the chunks of a feed that lags behind.
    """

    absent = ()
    pause_seconds = 0.0

    def __init__(
        self,
        exchange: str,
        host: str,
        port: int,
        decoder: Decoder,
        stale_after_seconds: float,
        monotonic: Callable[[], float] = time.monotonic,
        pacing: Pacing | None = None,
    ) -> None:
        self.exchange = exchange
        self.decoder = decoder
        self.record: Record | None = None
        """Called with the whole lines of each chunk that is received."""
        self._address = _Address(host, port)
        self._stale_after_seconds = stale_after_seconds
        self._monotonic = monotonic
        self._pacing = pacing
        self._link: _Link | None = None
        self._stopped = False
        self._silent = False
        self._last_tick = 0.0
        self._lag_ms = 0  # of the last chunk

    @property
    def place(self) -> str:
        """Its address, for the log."""
        return f"{self._address.host}:{self._address.port}"

    @property
    def state(self) -> FeedState:
        """Connected while ticks arrive; after silence stale until the next tick, whatever the connection does."""
        if self._silent:
            return FeedState.STALE
        if self._link is None or not self._link.connected:
            return FeedState.CONNECTING
        fresh = self._monotonic() - self._last_tick <= self._stale_after_seconds
        return FeedState.CONNECTED if fresh else FeedState.STALE

    @property
    def connections(self) -> "tuple[TcpFeed]":
        """Itself."""
        return (self,)

    @property
    def refusals(self) -> Mapping[str, str]:
        """Empty: there are no subscriptions that the exchange could refuse."""
        return {}

    def take_symbols(self, symbols: Mapping[str, str]) -> None:
        """Replace the symbols; the exchange sends all that it has, so the connection stays."""
        self.decoder.take_symbols(symbols)

    def report(self) -> FeedReport:
        """Return the offset of the exchange's clock, which is known where it is wrong."""
        return FeedReport(clock_offset_ms=self.decoder.clock_offset_ms or None)

    def measure_clock(self) -> None:
        """Do nothing: the exchange offers no way to read its clock."""

    def doubles_by_symbol(self) -> dict[str, int] | None:
        """Return the number of repeated trades, by their ids; None while no trade has one."""
        ids = self.decoder.ids
        return ids.doubles_by_symbol() if ids is not None and ids.has_any else None

    def batches(self) -> Observable[Candles]:
        """Emit the candles of one connection; ends with ConnectionLost, ConnectionSilent or an OSError."""
        return rx.create(self._subscribe)

    def stop(self) -> None:
        """Stop receiving and complete, after what was received is emitted."""
        self._stopped = True
        if self._link is not None:
            self._link.shut_down()

    def _subscribe(
        self, observer: abc.ObserverBase[Candles], scheduler: abc.SchedulerBase | None = None
    ) -> abc.DisposableBase:
        link = self._link = _Link(self._address, self._stale_after_seconds, self._monotonic)
        thread = threading.Thread(target=self._run, args=(link, observer), name=f"feed-{self.exchange}", daemon=True)
        thread.start()
        return Disposable(link.abort)

    def _run(self, link: "_Link", observer: abc.ObserverBase[Candles]) -> None:
        try:
            self._receive(link, observer)
        except Exception as error:  # noqa: BLE001 - passed on
            if self._stopped and isinstance(error, OSError):
                observer.on_completed()  # a socket that is shut down may fail in any way
                return
            if link is self._link:  # an earlier connection may end after the next has begun
                # Stale until the next tick, or until the exchange refuses a connection: then the state is connecting.
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
            batch: Candles = {}
            due = 0.0
            try:
                for data in link.received():
                    with self._paced(data), decoding:
                        now = self._monotonic()
                        lines = framer.push(data)
                        if lines and self.record is not None:
                            self.record([lines])
                        if lines and (candles := self.decoder.decode(lines, link.waited_ms())):
                            self._last_tick = now
                            self._silent = False
                            if len(data) == RECEIVE_BYTES:
                                self._lag_ms = self._lag_of(candles)
                            batch = _merged(batch, candles)
                        if batch and (len(data) < RECEIVE_BYTES or now >= due):
                            due = now + BATCH_SECONDS
                            complete, batch = batch, {}
                            observer.on_next(complete)
            finally:
                if not link.aborted and (batch := _merged(batch, self._decode_rest(framer.rest(), link.waited_ms()))):
                    observer.on_next(batch)
        if not (self._stopped or link.aborted):
            raise ConnectionLost("the exchange closed the connection")

    def _paced(self, data: bytes) -> AbstractContextManager[None]:
        if self._pacing is None or len(data) < RECEIVE_BYTES or self._lag_ms > LONGEST_LAG_MS:
            return _UNPACED
        return self._pacing.decoding()

    def _lag_of(self, candles: Candles) -> int:
        """Return the delay (ms) between the newest tick's event time and its receipt."""
        received = self.decoder.last_received
        return 0 if received is None else milliseconds(received) - max(each.last_at for each in candles.values())

    def _decode_rest(self, line: bytes, waited_ms: int) -> Candles:
        """Decode the last line of a connection, which needs no newline; a truncated one is rejected as malformed."""
        # Unless `stop` has truncated it, which must not count as malformed.
        if not line or (self._stopped and not line.rstrip().endswith(b"}")):
            return {}
        return self.decoder.decode(line, waited_ms)


def _merged(batch: Candles, candles: Candles) -> Candles:
    """Merge candles into a batch, which may be changed; in the usual case it is empty and nothing is copied."""
    if not batch:
        return candles
    merge_into(batch, candles)
    return batch


class _Address:
    """Address of an exchange. One thread at a time looks up its host: a resolver may block for long."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._looking_up = threading.Lock()

    def look_up(self) -> list[Any]:
        """Resolve the host, as socket.getaddrinfo does; never empty.

        Raises:
            OSError: the lookup failed, or that of another thread is still under way.
        """
        if not self._looking_up.acquire(timeout=LOOKUP_WAIT_SECONDS):
            raise OSError(f"{self.host} is still being looked up")
        try:
            return socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        finally:
            self._looking_up.release()


class _Link:
    """One TCP connection, opened on entry and closed on exit by the thread that reads it."""

    def __init__(self, address: _Address, silence_seconds: float, monotonic: Callable[[], float]) -> None:
        self._address = address
        self._silence_seconds = silence_seconds
        self._most_checks = math.ceil(silence_seconds / EMPTY_CHECK_SECONDS)
        self._check_seconds = silence_seconds / self._most_checks
        self._monotonic = monotonic
        self._empty_at = 0.0
        self._socket: socket.socket | None = None
        self._shut_down = False
        self.connected = False
        self.aborted = False

    def __enter__(self) -> "_Link":
        failed = OSError("no address")
        for family, kind, protocol, _, address in self._address.look_up():
            # Assigned before connecting, so that `shut_down` ends that as well: a host that is down does not refuse.
            self._socket = socket.socket(family, kind, protocol)
            self._socket.settimeout(CONNECT_TIMEOUT_SECONDS)
            try:
                if self._shut_down:
                    raise ConnectionAbortedError("shut down")
                self._empty_at = self._monotonic()
                self._socket.connect(address)
            except OSError as error:
                self._socket.close()
                failed = error
            else:
                # By the kernel: Python's own timeout polls before each receive, which releases the GIL twice.
                seconds, fraction = divmod(self._check_seconds, 1)
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
        """Yield what is received until the exchange or `shut_down` ends the connection, kernel buffer included.

        An item of RECEIVE_BYTES is followed by another one at once, an empty one if no more has arrived.
        """
        assert self._socket is not None
        flags, empty_at, checks = 0, self._empty_at, 0
        while not self.aborted:
            called_at = self._monotonic()
            try:
                data = self._socket.recv(RECEIVE_BYTES, flags)
            except BlockingIOError:
                if flags:
                    flags, empty_at = 0, called_at
                    yield b""
                    continue
                checks += 1
                if checks == self._most_checks:
                    raise ConnectionSilent(f"no data for {self._silence_seconds:g} s") from None
                # Not the time now: this thread may have waited for the GIL since the socket was found empty.
                empty_at = called_at + self._check_seconds
                continue
            checks = 0
            if not data:
                return
            flags = socket.MSG_DONTWAIT if len(data) == RECEIVE_BYTES else 0
            self._empty_at = empty_at
            if not flags:
                empty_at = called_at
            yield data

    def waited_ms(self) -> int:
        """Return how long the last item may have waited for this thread in the kernel, without pauses of the exchange.

        A thread that gets no CPU, or waits to decode, reads data that much later. As the socket is checked every
        EMPTY_CHECK_SECONDS, a longer time since it was last empty is this thread's: the exchange was not silent then.
        """
        return max(0, round(1000 * (self._monotonic() - self._empty_at - self._check_seconds)))

    def shut_down(self) -> None:
        """End a wait for a connection or for data.

        Only the reading thread closes the socket: its descriptor may be reused.
        """
        self._shut_down = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def abort(self) -> None:
        """End the connection without emitting anything more."""
        self.aborted = True
        self.shut_down()
