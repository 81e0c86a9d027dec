"""Cuts a byte stream into chunks of whole lines, with bounded memory however long a line gets."""

from collections.abc import Callable

from marketflow.feeds.decoder import MAX_LINE_BYTES


class Framer:
    """Holds back the unfinished last line of what was received.

    A line that outgrows MAX_LINE_BYTES unfinished is forgotten and skipped up to its newline, so that its tail is
    never taken for a line of its own.

    Args:
        on_too_long: told once of each line that is skipped.
    """

    def __init__(self, on_too_long: Callable[[], None]) -> None:
        self._on_too_long = on_too_long
        self._tail = bytearray()
        self._skipping = False

    def rest(self) -> bytes:
        """The last line, which the end of the stream has left without a newline; nothing where there is none."""
        tail, self._tail = bytes(self._tail), bytearray()
        return tail + b"\n" if tail else b""

    def push(self, data: bytes) -> bytes:
        """The whole lines, newlines included, that `data` completes."""
        end = data.rfind(b"\n") + 1
        lines = b""
        if end and self._skipping:
            lines = data[data.index(b"\n") + 1 : end]
            self._skipping = False
        elif end:
            lines = b"".join((self._tail, memoryview(data)[:end])) if self._tail else data[:end]
            self._tail.clear()
        if not self._skipping:
            self._tail += data[end:] if end else data
            if len(self._tail) > MAX_LINE_BYTES:
                self._tail.clear()
                self._skipping = True
                self._on_too_long()
        return lines
