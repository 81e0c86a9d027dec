"""Backpressure of connections that stream without end.

A slow client should receive the newest prices, not a queue of old ones. So the write buffers of process and kernel are
kept nearly empty, the broadcaster makes the next batch only when the last one was written, and a stalled client is
disconnected.
"""

import asyncio
import fcntl
import socket
import sys
import termios
from collections.abc import Callable
from contextlib import suppress

STALL_SECONDS = 30.0
"""Interval of stall checks; a client that reads nothing is disconnected after one to two of them."""

UNSENT_BYTES = 16 * 1024
"""Unsent bytes in the kernel (TCP_NOTSENT_LOWAT)."""


class WriteBuffer:
    """Limits the buffers of a transport, and aborts it when no byte is acknowledged while writing is paused."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._unacknowledged = 0
        self._timer: asyncio.TimerHandle | None = None
        transport.set_write_buffer_limits(high=0)
        self._socket: socket.socket = transport.get_extra_info("socket")
        with suppress(OSError):  # not a TCP socket
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)

    def pause(self) -> None:
        """Start stall checks: writing is paused."""
        if self._timer is None:
            self._schedule_check()

    def resume(self) -> None:
        """Stop stall checks: writing may resume, or the connection is lost."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _schedule_check(self) -> None:
        self._unacknowledged = self._unacknowledged_bytes()
        self._timer = self._loop.call_later(STALL_SECONDS, self._check)

    def _unacknowledged_bytes(self) -> int:
        """Return the bytes that the peer has not acknowledged, in process and kernel."""
        in_kernel = fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, bytes(4))
        return self._transport.get_write_buffer_size() + int.from_bytes(in_kernel, sys.byteorder)

    def _check(self) -> None:
        if self._unacknowledged_bytes() >= self._unacknowledged:
            self._transport.abort()
        else:
            self._schedule_check()


class StreamingProtocol(asyncio.Protocol):
    """Mixin for protocols that may stream without end; stands before the protocol among the base classes."""

    transport: asyncio.Transport
    on_change: Callable[[], None] | None = None
    """Called when the write buffer is no longer empty, when it is empty again, and when the connection is closed."""

    _is_writable = True
    _write_buffer: WriteBuffer | None = None

    @property
    def is_stream(self) -> bool:
        """Whether the connection streams without end."""
        return self._write_buffer is not None

    def limit_write_buffer(self, transport: asyncio.Transport) -> None:
        """Limit the write buffer from now on."""
        self._write_buffer = WriteBuffer(transport)

    def sink(self) -> asyncio.Transport | None:
        """Return what takes parts of a stream, framed as the protocol wants them; None while its buffer is not empty.

        It needs no task of the connection.

        Raises:
            ConnectionAbortedError: the connection is closed.
        """
        if self.transport.is_closing():
            raise ConnectionAbortedError
        return self.transport if self._is_writable else None

    def pause_writing(self) -> None:
        """Pause the application, and watch for a stall."""
        self._is_writable = False
        super().pause_writing()
        if self._write_buffer is not None:
            self._write_buffer.pause()
        self._changed()

    def resume_writing(self) -> None:
        """Resume the application."""
        super().resume_writing()
        if self._write_buffer is not None:
            self._write_buffer.resume()
        self._is_writable = True
        self._changed()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching for a stall."""
        if self._write_buffer is not None:
            self._write_buffer.resume()
        self._changed()
        super().connection_lost(exc)

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()
