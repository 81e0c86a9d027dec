"""The mode that runs: the one Subject of the flow, at its left edge."""

import threading

from reactivex import Observable
from reactivex.subject import BehaviorSubject

from marketflow.model import Mode


class ModeSwitch:
    """Switches between the generator and the exchanges, one switch at a time; ending it ends the flow."""

    def __init__(self, mode: Mode) -> None:
        self._lock = threading.Lock()
        self._modes = BehaviorSubject(mode)
        self._ended = False

    @property
    def current(self) -> Mode:
        """The mode that runs."""
        return self._modes.value

    @property
    def changes(self) -> Observable[Mode]:
        """The mode that runs, then each that follows."""
        return self._modes

    def switch(self, mode: Mode) -> Mode:
        """Run another mode; gives the one before. The feeds of the old mode are closed when it returns."""
        with self._lock:
            previous = self.current
            if mode != previous and not self._ended:
                self._modes.on_next(mode)
            return previous

    def end(self) -> None:
        """Let the flow complete."""
        with self._lock:
            self._ended = True
            self._modes.on_completed()
