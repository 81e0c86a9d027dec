"""The lock on a data folder: two MarketFlows on one folder would stop each other's servers.

It is the kernel's lock on a file, not the file's existence or the pid in it, so nothing is left to clean up after a
crash; the pid is there for the message to whoever comes second.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from marketflow.errors import StartError


@contextmanager
def claim(data_dir: Path) -> Iterator[Path]:
    """Own a data folder, created if missing, as the only MarketFlow; yields its absolute path.

    The kernel lets go of the claim when the process ends, however it ends; children do not inherit it.

    Raises:
        StartError: another process has it, or it cannot be created or written.
    """
    try:
        data_dir = data_dir.resolve()
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartError(f"the data folder {data_dir} cannot be used: {error.strerror}; set data_dir") from error
    try:
        _lock_for_this_process(lock, data_dir)
        yield data_dir
    finally:
        os.close(lock)


def _lock_for_this_process(lock: int, data_dir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d\n" % os.getpid(), 0)
    except BlockingIOError:
        holder = os.pread(lock, 20, 0).decode(errors="replace").strip() or "unknown"
        raise StartError(
            f"data folder {data_dir} is in use by another MarketFlow (process {holder}); "
            "stop it, or set another data_dir"
        ) from None
    except OSError as error:
        raise StartError(f"the data folder {data_dir} cannot be used: {error.strerror}; set data_dir") from error
