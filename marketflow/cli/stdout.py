"""Standard output of the process."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from marketflow.errors import StartError


@contextmanager
def readable_output() -> Iterator[None]:
    """Print what stdout cannot encode as escapes, and end quietly when the reader closes the pipe, as `head` does.

    Raises:
        StartError: the disk behind stdout is full.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        if sys.stdout is not None:  # None where it is closed
            sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # Python flushes once more at its end, and would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.ENOSPC:
            raise StartError(f"stdout cannot be written: {error.strerror}") from error


def open_standard_descriptors() -> None:
    """Open /dev/null where stdin, stdout or stderr is closed; otherwise a socket would get its number."""
    null = os.open(os.devnull, os.O_RDWR)  # the lowest free number: one of the three if one is closed
    while null <= 2:
        null = os.dup(null)
    os.close(null)
    if sys.stderr is None:  # print would take None for stdout
        sys.stderr = os.fdopen(2, "w", closefd=False)
