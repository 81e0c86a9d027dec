"""The folder of a server's socket; only the server's user may enter it, as there are no passwords."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from marketflow.errors import StartError

SOCKET_PATH_BYTES = 107  # the kernel's limit, less the closing NUL


class SocketFolder:
    """Where a server puts its socket: its own folder, or a short private one for temporary files.

    The path of a Unix socket has at most 107 bytes, and PostgreSQL takes one with a comma for several. The short
    folder's name follows from the long one's, so that a server left behind is found again; it lives from `create` to
    `remove`.
    """

    def __init__(self, folder: Path, socket_name: str) -> None:
        self._is_temporary = len(os.fsencode(folder / socket_name)) > SOCKET_PATH_BYTES or "," in str(folder)
        self.path = folder
        self._held: int | None = None
        if self._is_temporary:
            name = "marketflow-" + hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
            places = (Path(tempfile.gettempdir()), Path("/tmp"))  # noqa: S108 - held to the owner below
            short = (p for p in places if len(os.fsencode(p / name / socket_name)) <= SOCKET_PATH_BYTES)
            self.path = next(short) / name

    @property
    def temporary(self) -> Path | None:
        """The folder, where it is a temporary one."""
        return self.path if self._is_temporary else None

    def create(self, owner: tuple[int, int] | None = None) -> None:
        """Make the folder, for a user and group other than ours if need be.

        Raises:
            StartError: another user has created it.
        """
        if not self._is_temporary or self._held is not None:
            return
        while self._held is None:
            with suppress(FileExistsError):
                self.path.mkdir(mode=0o700)
                if owner is not None:
                    os.chown(self.path, *owner, follow_symlinks=False)
            self._held = self._hold(owner[0] if owner else os.geteuid())

    def _hold(self, user: int) -> int | None:
        """Lock the folder, so that the watcher of a MarketFlow that was killed leaves it alone; None if it was first.

        Raises:
            StartError: it is not a private folder of this user.
        """
        try:
            held = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError:
            raise self._refusal() from None
        found = os.fstat(held)
        if found.st_uid != user or found.st_mode & 0o077:
            os.close(held)
            raise self._refusal()
        fcntl.flock(held, fcntl.LOCK_SH)
        if not _is(self.path, found):
            os.close(held)
            return None
        return held

    def _refusal(self) -> StartError:
        return StartError(f"{self.path} is not a private folder of this user; remove it")

    def remove(self) -> None:
        """Remove the folder, if it is a temporary one and ours."""
        if self._held is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._held)
            self._held = None


def remove_unless_held(folder: Path) -> None:
    """Remove what is left of the folder, when empty, unless another process has begun to use it."""
    with suppress(OSError):
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder.rmdir()
        finally:
            os.close(held)


def _is(path: Path, found: os.stat_result) -> bool:
    """Return whether a path still leads to the opened file."""
    with suppress(OSError):
        return os.path.samestat(path.lstat(), found)
    return False
