"""The lock on a data folder: two MarketFlows on one folder would stop each other's servers.

A kernel lock on a file, so nothing needs cleaning up after a crash. The pid in the file only serves the error message
of a second process.
"""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from marketflow.embedded.ownership import refuse_foreign
from marketflow.errors import StartError

LOCK = "lock"

PRIVATE = 0o700
PASSABLE = 0o711
"""As root: PostgreSQL, which runs as another user, must get to its own folder in there."""

PARENT = 0o755
"""As root, of the folders above it that are made."""

NO_HOME = "this user has no home folder, in which the data of the embedded servers would be"


@contextmanager
def claim(data_dir: Path) -> Iterator[Path]:
    """Lock a data folder, created if missing; yield its absolute path.

    The kernel releases the lock when the process ends, in whatever way; children do not inherit it.

    Raises:
        StartError: another process has it, it cannot be created or written, or another user may write to it.
    """
    if not data_dir.is_absolute():
        raise StartError(f"{NO_HOME}; set data_dir")
    try:
        refuse_foreign(data_dir)  # before a link is followed
        data_dir = data_dir.resolve()
        _make(data_dir)
        refuse_foreign(data_dir)
        # O_NONBLOCK: a FIFO in its place is opened without waiting, and refused.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        lock = os.open(data_dir / LOCK, flags, 0o600)
    except OSError as error:
        raise StartError(f"the data folder {data_dir} cannot be used: {error.strerror}; set data_dir") from error
    try:
        refuse_foreign(data_dir / LOCK)
        if not stat.S_ISREG(os.fstat(lock).st_mode) or os.fstat(lock).st_nlink != 1:
            raise StartError(f"{data_dir / LOCK} is not a regular file of its own; remove it, or set another data_dir")
        _lock_for_this_process(lock, data_dir)
        yield data_dir
    finally:
        os.close(lock)


def lock_owner(data_dir: Path) -> str | None:
    """Return the process id of the MarketFlow that owns a data folder, "unknown" if it cannot be read; else None."""
    try:
        # O_NONBLOCK: a FIFO in its place would wait for a writer.
        lock = os.open(data_dir / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        # Shared, so that two processes that ask never take each other for the owner.
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(lock, 20, 0).decode(errors="replace").strip() or "unknown"
    finally:
        os.close(lock)
    return None


def _make(data_dir: Path) -> None:
    """Create the folder and its missing parents; as root, passable for other users."""
    mode = PASSABLE if os.geteuid() == 0 else PRIVATE
    for folder in reversed(data_dir.parents) if os.geteuid() == 0 else ():
        if not folder.exists():
            folder.mkdir(exist_ok=True)
            folder.chmod(PARENT)  # whatever the umask is
    try:
        data_dir.mkdir(PRIVATE, parents=True)
    except FileExistsError:
        if not data_dir.is_dir():
            raise
        return
    data_dir.chmod(mode)


def _lock_for_this_process(lock: int, data_dir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d\n" % os.getpid(), 0)
    except BlockingIOError:
        owner = os.pread(lock, 20, 0).decode(errors="replace").strip() or "unknown"
        raise StartError(
            f"data folder {data_dir} is in use by another MarketFlow (process {owner}); "
            "stop it, or set another data_dir"
        ) from None
    except OSError as error:
        raise StartError(f"the data folder {data_dir} cannot be used: {error.strerror}; set data_dir") from error
