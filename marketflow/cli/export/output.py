"""Where an export goes: stdout, or a file that has its name only once it is whole."""

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
    if path.is_symlink() and not path.exists():
        # Somebody else may have planted it, for a file that is not there yet.
        raise SettingsError(f"argument --output: {path} is a link to a file that does not exist")
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
    """The file, emptied, as the only process that writes it; the remains of a killed one are taken over.

    Raises:
        SettingsError: it is not a regular file of this user with this one name: somebody else may have put it there.
    """
    # O_NONBLOCK: a FIFO is opened without waiting for a reader, and refused.
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.fdopen(os.open(partial, flags, 0o666), "wb")
    except OSError as error:
        reason = "is a link" if error.errno == errno.ELOOP else f"cannot be written: {error.strerror}"
        raise SettingsError(f"argument --output: {partial} {reason}") from None
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_nlink != 1:
        file.close()
        raise SettingsError(f"argument --output: {partial} is there already, and is not a file of your own")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise SettingsError(f"argument --output: {partial} is being written by another process") from None
    file.truncate(0)
    return file
