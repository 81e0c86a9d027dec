"""Writes log lines in a thread of its own, so that logging never waits for the reader of the log.

A pipe with a stalled reader takes 64 KiB, and then a write blocks. Lines wait in a bounded queue meanwhile; those that
do not fit are dropped and counted, and a line in their place has the number.
"""

import atexit
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable

QUEUE_BYTES = 1 << 20
"""Size of the queue: about 8,000 lines."""

FLUSH_STALL_SECONDS = 0.25
"""Time that a flush waits for a reader without progress."""

FLUSH_SECONDS = 1.0
"""Time that a flush takes at most."""


class LogWriter:
    """Writes to a file descriptor, in the order of `put`. Safe in threads and signal handlers.

    Args:
        descriptor: of the log; it is neither closed nor changed.
        dropped: returns the line that replaces a number of dropped lines.
    """

    def __init__(self, descriptor: int, dropped: Callable[[int], str]) -> None:
        self._descriptor = descriptor
        self._dropped_line = dropped
        self._reset()
        os.register_at_fork(after_in_child=self._reset)
        atexit.register(self.flush)

    def _reset(self) -> None:
        """Start with an empty queue, also in a forked child, whose parent writes the queued lines."""
        self._changed = threading.Condition()
        self._queue: deque[tuple[int, bytes]] = deque()  # the number of lines dropped before it, and a line
        self._bytes = 0
        self._dropped = 0  # since the last queued line
        self._taken = 0  # bytes written
        self._closed = False
        self._thread: threading.Thread | None = None

    def put(self, line: str) -> None:
        """Queue a line, or drop it if the queue is full. Never blocks, never raises."""
        data = _encode(line)
        with self._changed:
            if self._closed:
                return
            if self._queue and self._bytes + len(data) > QUEUE_BYTES:
                self._dropped += 1
                return
            self._queue.append((self._dropped, data))
            self._dropped = 0
            self._bytes += len(data)
            if self._thread is None:
                self._start()
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all lines are written, but not for a stalled reader."""
        deadline = time.monotonic() + FLUSH_SECONDS
        with self._changed:
            while self._queue and self._thread is not None and time.monotonic() < deadline:
                taken, waiting = self._taken, len(self._queue)
                self._changed.wait(FLUSH_STALL_SECONDS)
                if (self._taken, len(self._queue)) == (taken, waiting):
                    return

    def close(self) -> None:
        """Flush, and ignore further lines."""
        self.flush()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        atexit.unregister(self.flush)

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="log", daemon=True)
        # Signals are for other threads, some of which wait for them with all signals blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            thread.start()
        except RuntimeError:  # no thread can be started; the next line tries again
            return
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._thread = thread

    def _run(self) -> None:
        changed, lost = self._changed, 0
        while True:
            with changed:
                lost += self._take_dropped()
            if lost and self._write(_encode(self._dropped_line(lost))):
                lost = 0
            with changed:
                while not self._queue:
                    if self._closed:
                        return
                    changed.wait()
                dropped, data = self._queue[0]
            lost += dropped
            if lost and self._write(_encode(self._dropped_line(lost))):
                lost = 0
            if not self._write(data):
                lost += 1
            with changed:
                self._queue.popleft()
                self._bytes -= len(data)
                changed.notify_all()

    def _take_dropped(self) -> int:
        """Return and reset the number of lines dropped after the last one, once that is written."""
        if self._queue:
            return 0
        dropped, self._dropped = self._dropped, 0
        return dropped

    def _write(self, data: bytes) -> bool:
        """Write all data, however long it takes; return whether there is a reader."""
        while data:
            try:
                written = os.write(self._descriptor, data)
            except BlockingIOError:  # another process has made the descriptor non-blocking
                self._wait_until_writable()
                continue
            except OSError:  # the reader has closed the pipe, or the disk is full
                return False
            data = data[written:]
            with self._changed:
                self._taken += written
        return True

    def _wait_until_writable(self) -> None:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        poll.poll(1000)


def _encode(line: str) -> bytes:
    return line.encode(errors="backslashreplace") + b"\n"
