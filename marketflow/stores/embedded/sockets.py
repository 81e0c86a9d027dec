"""The folder of a server's socket; only the server's user may enter it, as there are no passwords."""

import hashlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

from marketflow.errors import StartError
from marketflow.stores.embedded.owner import make_passable

SOCKET_PATH_BYTES = 107  # the kernel's limit, less the closing NUL


class SocketFolder:
    """Where a server puts its socket: its own folder, or a short private one for temporary files.

    The path of a Unix socket has at most 107 bytes, and PostgreSQL takes one with a comma for several. The short
    folder's name follows from the long one's, so that a server left behind is found again; it lives from `create` to
    `remove`.
    """

    def __init__(self, folder: Path, socket_name: str) -> None:
        self._temporary = len(os.fsencode(folder / socket_name)) > SOCKET_PATH_BYTES or "," in str(folder)
        self.path = folder
        self._made = False
        if self._temporary:
            name = "marketflow-" + hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
            places = (Path(tempfile.gettempdir()), Path("/tmp"))  # noqa: S108 - held to the owner below
            short = (p for p in places if len(os.fsencode(p / name / socket_name)) <= SOCKET_PATH_BYTES)
            self.path = next(short) / name

    def create(self, owner: tuple[int, int] | None = None) -> None:
        """Make the folder, for a user and group other than ours if need be.

        Raises:
            StartError: somebody else has made it, to listen in.
        """
        if not self._temporary:
            return
        try:
            self.path.mkdir(mode=0o700)
            if owner is not None:
                os.chown(self.path, *owner)
                make_passable(self.path)
        except FileExistsError:
            found = self.path.lstat()
            mine = found.st_uid == (owner[0] if owner else os.geteuid())
            if not mine or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
                raise StartError(f"{self.path} is not a private folder of this user; remove it") from None
        self._made = True

    def remove(self) -> None:
        """Remove the folder, if it is a temporary one and ours."""
        if self._made:
            shutil.rmtree(self.path, ignore_errors=True)
