"""A lock that threads get in the order in which they asked for it."""

import threading
from collections import deque


class FairLock:
    """A lock that is handed to the thread that waits for longest.

    A thread that releases a `threading.Lock` and acquires it at once, as one that floods does, mostly gets it again:
    others wait for many of its turns.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._is_held = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._guard:
            if not self._is_held:
                self._is_held = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()

    def __exit__(self, *_: object) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()  # it stays held, by that thread
            else:
                self._is_held = False
