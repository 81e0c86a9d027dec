"""Outputs of an export: stdout, or a file that gets its name once it is complete."""

import errno
import fcntl
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from marketflow.errors import SettingsError, StartError


@contextmanager
def standard_output() -> Iterator[IO[bytes]]:
    """Yield stdout as a binary file.

    Raises:
        StartError: it is closed, or a write failed.
        BrokenPipeError: the reader has closed it.
    """
    if sys.stdout is None:
        raise StartError("stdout is closed; set --output FILE")
    try:
        # With its own buffer: Python flushes the buffer of sys.stdout again at exit.
        with open(sys.stdout.fileno(), "wb", closefd=False) as file:
            yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StartError(f"stdout cannot be written: {error.strerror}") from error


@contextmanager
def complete_file(path: Path, force: bool) -> Iterator[IO[bytes]]:
    """Yield a file that is written as FILE.partial, and renamed at the end; removed after an error.

    Raises:
        SettingsError: the file exists, which only `force` replaces, or it cannot be created.
        StartError: a write failed.
    """
    if path.is_symlink() and not path.exists():
        # Another user may have planted it, to make this process create a file.
        raise SettingsError(f"argument --output: {path} is a link to a file that does not exist")
    path = path.resolve()  # the target of a link is replaced, not the link
    if path.exists() and not (force and path.is_file()):
        hint = "--force replaces it" if path.is_file() else "it is not a file"
        raise SettingsError(f"argument --output: {path} exists; {hint}")
    partial = path.with_name(f"{path.name}.partial")
    file = _open_exclusively(partial)
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


def _open_exclusively(partial: Path) -> IO[bytes]:
    """Open the partial file, emptied, as its only writer; the file of a killed process is reused.

    Raises:
        SettingsError: it is not a regular file of this user with one name: another user may have planted it.
    """
    # O_NONBLOCK: a FIFO is opened without waiting for a reader, and then refused.
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.fdopen(os.open(partial, flags, 0o666), "wb")
    except OSError as error:
        reason = "is a link" if error.errno == errno.ELOOP else f"cannot be written: {error.strerror}"
        raise SettingsError(f"argument --output: {partial} {reason}") from None
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_nlink != 1:
        file.close()
        raise SettingsError(f"argument --output: {partial} exists, and is not a file of your own")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise SettingsError(f"argument --output: {partial} is being written by another process") from None
    file.truncate(0)
    return file
