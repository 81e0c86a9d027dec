"""Keys typed on the terminal, without waiting for the end of a line."""

import asyncio
import os
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum, auto

ESCAPE_SECONDS = 0.05
"""Time after which an escape character is the key Esc: sequences of other keys begin with it, and arrive at once."""


class Key(Enum):
    """What a key means."""

    QUIT = auto()
    UP = auto()
    DOWN = auto()
    LEFT = auto()
    RIGHT = auto()
    PAGE_UP = auto()
    PAGE_DOWN = auto()
    HOME = auto()
    END = auto()
    ENTER = auto()
    ESCAPE = auto()
    SORT = auto()
    REVERSE = auto()
    INTERVAL = auto()


# The sequences of xterm, in its two modes of arrow keys, and the letters of vi and less.
_SEQUENCES = {
    b"\x1b": Key.ESCAPE,
    **{
        start + end: key
        for start in (b"\x1b[", b"\x1bO")
        for end, key in (
            (b"A", Key.UP),
            (b"B", Key.DOWN),
            (b"C", Key.RIGHT),
            (b"D", Key.LEFT),
            (b"H", Key.HOME),
            (b"F", Key.END),
        )
    },
    **{b"\x1b[1~": Key.HOME, b"\x1b[4~": Key.END, b"\x1b[5~": Key.PAGE_UP, b"\x1b[6~": Key.PAGE_DOWN},
    **dict.fromkeys((b"\r", b"\n", b"c"), Key.ENTER),
    **dict.fromkeys((b"q", b"Q", b"\x04"), Key.QUIT),
    **{b"\x7f": Key.ESCAPE, b"\x08": Key.ESCAPE, b" ": Key.PAGE_DOWN, b"b": Key.PAGE_UP},
    **{b"k": Key.UP, b"j": Key.DOWN, b"h": Key.LEFT, b"l": Key.RIGHT, b"g": Key.HOME, b"G": Key.END},
    **{b"s": Key.SORT, b"r": Key.REVERSE, b"i": Key.INTERVAL},
}
_LONGEST = 8


class KeyDecoder:
    """Decodes typed bytes into keys; unknown sequences are skipped as a whole."""

    def __init__(self) -> None:
        self._begun = b""

    @property
    def is_waiting(self) -> bool:
        """Whether a sequence has begun that the next bytes may complete."""
        return bool(self._begun)

    def feed(self, typed: bytes) -> list[Key]:
        """Return the keys that are complete."""
        data, keys = self._begun + typed, []
        self._begun = b""
        while data:
            length = _length(data)
            if length is None:
                self._begun = data
                break
            if (key := _SEQUENCES.get(data[:length])) is not None:
                keys.append(key)
            data = data[length:]
        return keys

    def flush(self) -> list[Key]:
        """Return the key Esc if that is what was typed, and drop an incomplete sequence."""
        begun, self._begun = self._begun, b""
        return [Key.ESCAPE] if begun == b"\x1b" else []


def _length(data: bytes) -> int | None:
    """Return the length of the first sequence; None while it is incomplete. ECMA-48: it ends with @ to ~."""
    if data[:1] != b"\x1b":
        return 1
    if len(data) == 1:
        return None
    if data[1:2] == b"O":
        return 3 if len(data) >= 3 else None
    if data[1:2] != b"[":
        return 1  # Esc, and another key after it
    for place, byte in enumerate(data[2:_LONGEST], 2):
        if 0x40 <= byte <= 0x7E:
            return place + 1
    return None if len(data) < _LONGEST else _LONGEST


@contextmanager
def keys(press: Callable[[Key], None]) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Call `press` with each key if stdin is a terminal; yield a context manager that restores its mode meanwhile."""
    if sys.stdin is None or not sys.stdin.isatty():  # None where it is closed
        yield nullcontext
        return
    loop, file, decoder = asyncio.get_running_loop(), sys.stdin.fileno(), KeyDecoder()
    before = termios.tcgetattr(file)
    waiting: asyncio.TimerHandle | None = None

    def take(pressed: list[Key]) -> None:
        for key in pressed:
            press(key)

    def read() -> None:
        nonlocal waiting
        if waiting is not None:
            waiting.cancel()
            waiting = None
        typed = os.read(file, 1024)
        if not typed:
            loop.remove_reader(file)
        take(decoder.feed(typed))
        if decoder.is_waiting:
            waiting = loop.call_later(ESCAPE_SECONDS, lambda: take(decoder.flush()))

    @contextmanager
    def restored() -> Iterator[None]:
        termios.tcsetattr(file, termios.TCSADRAIN, before)
        yield
        tty.setcbreak(file)

    tty.setcbreak(file)
    loop.add_reader(file, read)
    try:
        yield restored
    finally:
        loop.remove_reader(file)
        if waiting is not None:
            waiting.cancel()
        termios.tcsetattr(file, termios.TCSADRAIN, before)
