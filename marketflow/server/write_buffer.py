"""What waits to be sent on a connection whose answer does not end by itself.

A client that is slow is to get newer prices later, not old ones in the end: so next to nothing is kept for it, here or
in the kernel, and what it cannot take yet is not even made.
"""

import asyncio
import fcntl
import socket
import sys
import termios
from contextlib import suppress

STALL_SECONDS = 30.0
"""A connection of whose data nothing is taken for so long, twice at most, is ended."""

UNSENT_BYTES = 16 * 1024
"""How much the kernel may hold that it has not sent yet."""


class WriteBuffer:
    """Watches a connection from when it may no longer be written to until it may again, and ends one that stalls."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._waiting = 0
        self._timer: asyncio.TimerHandle | None = None
        transport.set_write_buffer_limits(high=0)
        self._socket: socket.socket = transport.get_extra_info("socket")
        with suppress(OSError):  # a socket of another kind
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)

    def pause(self) -> None:
        """It may not be written to."""
        if self._timer is None:
            self._watch()

    def resume(self) -> None:
        """It may be written to, or is closed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch(self) -> None:
        self._waiting = self._not_taken()
        self._timer = self._loop.call_later(STALL_SECONDS, self._look)

    def _not_taken(self) -> int:
        """How many bytes the client's machine has not confirmed."""
        in_kernel = fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, bytes(4))
        return self._transport.get_write_buffer_size() + int.from_bytes(in_kernel, sys.byteorder)

    def _look(self) -> None:
        if self._not_taken() >= self._waiting:
            self._transport.abort()
        else:
            self._watch()


class Watched(asyncio.BaseProtocol):
    """A connection whose write_buffer may be watched, of whichever protocol; to stand before that among the bases."""

    _write_buffer: WriteBuffer | None = None

    @property
    def streams(self) -> bool:
        """Whether an answer of this connection was one that does not end by itself."""
        return self._write_buffer is not None

    def watch_outflow(self, transport: asyncio.Transport) -> None:
        """Watch it from now on."""
        self._write_buffer = WriteBuffer(transport)

    def pause_writing(self) -> None:
        """The client takes less than it is sent."""
        super().pause_writing()
        if self._write_buffer is not None:
            self._write_buffer.pause()

    def resume_writing(self) -> None:
        """The client has taken what it was sent."""
        super().resume_writing()
        if self._write_buffer is not None:
            self._write_buffer.resume()
