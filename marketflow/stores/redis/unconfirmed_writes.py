"""Writes of newest prices that are sent without waiting for their replies, which are read afterwards.

A reply costs a thread two context switches, more CPU than the write itself. So most writes are only sent, in order, on
one connection; a write waits for all outstanding replies if none was confirmed for CONFIRM_SECONDS. A lone write is
therefore confirmed at once, an error is found within that time while writes follow, and the error of the last write is
found by the probe of the cache.
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import redis

CONFIRM_SECONDS = 0.1
"""How long writes may stay unconfirmed while others follow; a third of the time an unanswered call may take."""

MOST_OUTSTANDING = 1000
"""Replies beyond which a write waits for them; the buffers of the connection hold many times as many."""

REPLIES_SECONDS = 1.0
"""Limit of reading all outstanding replies, of which each may take as long as the timeout of the connection."""

Command = tuple[bytes | str | int | float, ...]


class UnconfirmedWrites:
    """Sends commands on a connection of its own, and reads their replies later; for any number of threads.

    After any error the connection is closed and the outstanding replies are dropped: those writes may or may not have
    been done.

    Args:
        client: provides the connection, with its timeouts.
        monotonic: measures CONFIRM_SECONDS, in seconds.
        more_seconds: added to the limit of reading all outstanding replies.
    """

    def __init__(
        self, client: "redis.Redis", monotonic: Callable[[], float] = time.monotonic, more_seconds: float = 0.0
    ) -> None:
        self._pool = client.connection_pool
        self._monotonic = monotonic
        self._replies_seconds = REPLIES_SECONDS + more_seconds
        self._lock = threading.Lock()
        self._connection: Any = None
        self._outstanding = 0
        self._confirmed_at: float | None = None
        self._closed = False

    def send(self, commands: Sequence[Command]) -> bool:
        """Send commands; return whether they and all earlier ones are confirmed.

        Raises:
            redis.RedisError: these or earlier commands failed, or were not answered in time.
        """
        with self._lock:
            try:
                connection = self._connected()
                connection.send_packed_command(connection.pack_commands(commands), check_health=False)
                self._outstanding += len(commands)
                if self._may_stay_unconfirmed():
                    return False
                self._read_replies()
            except BaseException:
                self._disconnect()
                raise
            return True

    def confirm(self) -> None:
        """Wait for all outstanding replies, unless a call is under way, which finds their errors itself.

        Raises:
            redis.RedisError: a command failed, or was not answered in time.
        """
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._read_replies()
        except BaseException:
            self._disconnect()
            raise
        finally:
            self._lock.release()

    def close(self) -> None:
        """Confirm what is outstanding, and close the connection, unless a call is under way.

        A connection that is closed with unread replies is reset, and Redis may then drop commands it has not read.
        """
        self._closed = True
        with suppress(redis.RedisError):
            self.confirm()

    def _connected(self) -> Any:
        if self._closed:
            raise redis.ConnectionError("closed")
        if self._connection is not None and not self._outstanding and self._is_stale():
            self._disconnect()
        if self._connection is None:
            self._connection = self._pool.get_connection()
        return self._connection

    def _is_stale(self) -> bool:
        """Whether the connection has ended without a loss: nothing is outstanding, and yet there is something to read.

        Otherwise the first write after a restart of Redis would fail, open the circuit breaker, and fail the refill.
        """
        try:
            return bool(self._connection.can_read())
        except redis.RedisError:
            return True

    def _may_stay_unconfirmed(self) -> bool:
        at = self._confirmed_at
        recent = at is not None and self._monotonic() - at < CONFIRM_SECONDS
        return recent and self._outstanding <= MOST_OUTSTANDING

    def _read_replies(self) -> None:
        if not self._outstanding:
            return
        connection, began = self._connection, self._monotonic()
        while self._outstanding:
            if self._monotonic() - began > self._replies_seconds:
                raise redis.TimeoutError(f"{self._outstanding} replies did not come in {self._replies_seconds:g} s")
            reply = connection.read_response()
            self._outstanding -= 1
            if isinstance(reply, list):  # of a transaction
                for each in reply:
                    if isinstance(each, Exception):
                        raise each
        self._confirmed_at = self._monotonic()

    def _disconnect(self) -> None:
        self._outstanding, self._confirmed_at = 0, None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()
            self._pool.release(connection)
