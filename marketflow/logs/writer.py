"""Writes log lines in a thread of its own, so that nothing ever waits for the reader of the log.

A pipe whose reader has stalled takes no more than 64 KiB, and a write to it blocks. Lines wait in a bounded queue then;
what does not fit is dropped and counted, and the log says so where the lines are missing.
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
"""How much waits for a reader that has stalled: some 8,000 lines."""

END_SECONDS = 0.25
"""How long the end waits for a reader that takes nothing; one that takes something gets the rest."""

END_MOST_SECONDS = 1.0
"""How long it waits at most."""


class LogWriter:
    """Writes to a file descriptor, in the order of `put`. Safe between threads and in signal handlers.

    Args:
        descriptor: of the log; it is neither closed nor changed.
        dropped: the line that says how many lines are missing in its place.
    """

    def __init__(self, descriptor: int, dropped: Callable[[int], str]) -> None:
        self._descriptor = descriptor
        self._dropped_line = dropped
        self._start_anew()
        os.register_at_fork(after_in_child=self._start_anew)
        atexit.register(self.flush)

    def _start_anew(self) -> None:
        """Also in a forked child, which has neither the thread nor a right to lines that its parent writes."""
        self._changed = threading.Condition()
        self._queue: deque[tuple[int, bytes]] = deque()  # how many lines were dropped before it, and a line
        self._bytes = 0
        self._dropped = 0  # since the last line that was not
        self._taken = 0  # bytes that the reader has taken
        self._closed = False
        self._thread: threading.Thread | None = None

    def put(self, line: str) -> None:
        """Have a line written, or drop it when too much waits. Never blocks, never raises."""
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
        """Wait until all is written, but not for a reader that takes nothing."""
        deadline = time.monotonic() + END_MOST_SECONDS
        with self._changed:
            while self._queue and self._thread is not None and time.monotonic() < deadline:
                taken, waiting = self._taken, len(self._queue)
                self._changed.wait(END_SECONDS)
                if (self._taken, len(self._queue)) == (taken, waiting):
                    return

    def close(self) -> None:
        """Write what there is, as `flush` does, and take no more."""
        self.flush()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        atexit.unregister(self.flush)

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="log", daemon=True)
        # Signals are for the other threads: some wait for them with all of theirs blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            thread.start()
        except RuntimeError:  # no thread can be started now; the next line tries again
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
        """How many were dropped after the last line, once that is written."""
        if self._queue:
            return 0
        dropped, self._dropped = self._dropped, 0
        return dropped

    def _write(self, data: bytes) -> bool:
        """Write it all, for as long as that takes; gives whether there is a reader."""
        while data:
            try:
                written = os.write(self._descriptor, data)
            except BlockingIOError:  # somebody else has made the descriptor a non-blocking one
                self._wait_until_writable()
                continue
            except OSError:  # the reader has gone, or the disk is full
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
