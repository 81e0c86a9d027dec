"""The owner of PostgreSQL's folder when MarketFlow runs as root, as in many containers: PostgreSQL refuses to.

It runs as the folder's owner instead, a system user that is created if need be, and for whom the folders on the way
there are made passable.
"""

import os
import pwd
import stat
import subprocess
from contextlib import suppress
from pathlib import Path

from loguru import logger

from marketflow.errors import StartError

SYSTEM_USER = "pgserver"
USERADD_SECONDS = 10.0


def own_for_postgres(folder: Path) -> tuple[int, int]:
    """As root: give a folder to a user that PostgreSQL may run as, unless it has such an owner; user and group.

    Raises:
        StartError: there is no such user and none can be created.
    """
    found = folder.stat()
    if found.st_uid == 0:
        user = _system_user()
        os.chown(folder, user.pw_uid, user.pw_gid)
        found = folder.stat()
    make_passable(folder)
    return found.st_uid, found.st_gid


def _system_user() -> pwd.struct_passwd:
    with suppress(KeyError):
        return pwd.getpwnam(SYSTEM_USER)
    options = ["--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin"]
    try:
        # An exit code would not tell: another process may have been first.
        command = ["useradd", *options, SYSTEM_USER]
        subprocess.run(command, capture_output=True, check=False, timeout=USERADD_SECONDS)
        return pwd.getpwnam(SYSTEM_USER)
    except (OSError, KeyError, subprocess.TimeoutExpired):
        raise StartError(
            f"PostgreSQL refuses to run as root, and the user {SYSTEM_USER} could not be created; "
            "run MarketFlow as an ordinary user, or set postgres.host to a server of your own"
        ) from None


def make_passable(path: Path) -> None:
    """As root: let other users pass through (not read) the folders above a path."""
    for folder in path.resolve().parents:
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            logger.warning("{} is made passable for other users: PostgreSQL does not run as root", folder)
            folder.chmod(mode | stat.S_IXOTH)
