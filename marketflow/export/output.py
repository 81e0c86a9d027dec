"""Where an export goes: stdout, or a file that has its name only once it is whole."""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from marketflow.errors import SettingsError, StartError


@contextmanager
def standard_output() -> Iterator[IO[bytes]]:
    """Stdout for bytes.

    Raises:
        StartError: it could not be written to the end.
        BrokenPipeError: nobody reads on.
    """
    if sys.stdout is None:
        raise StartError("stdout is closed; set --output FILE")
    try:
        # With a buffer of its own, as Python would write what is left in that of sys.stdout once more at its end.
        with open(sys.stdout.fileno(), "wb", closefd=False) as file:
            yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StartError(f"stdout cannot be written: {error.strerror}") from error


@contextmanager
def whole_file(path: Path, force: bool) -> Iterator[IO[bytes]]:
    """A file that is written beside its place, as FILE.partial, and moved there at the end; removed after an error.

    Raises:
        SettingsError: there is a file already, which only `force` replaces, or there can be none.
        StartError: it could not be written to the end.
    """
    path = path.resolve()  # what a link leads to is replaced, not the link
    if path.exists() and not (force and path.is_file()):
        hint = "--force replaces it" if path.is_file() else "it is no file"
        raise SettingsError(f"argument --output: {path} exists; {hint}")
    partial = path.with_name(f"{path.name}.partial")
    file = _own(partial)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StartError(f"{path} cannot be written: {error.strerror}") from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _own(partial: Path) -> IO[bytes]:
    """The file, emptied, as the only process that writes it; the remains of a killed one are taken over."""
    try:
        file = partial.open("ab")
    except OSError as error:
        raise SettingsError(f"argument --output: {partial} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise SettingsError(f"argument --output: {partial} is being written by another process") from None
    file.truncate(0)
    return file
