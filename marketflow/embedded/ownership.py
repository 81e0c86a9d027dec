"""Ownership of the files of the embedded servers: only this user or root may own or write them.

When MarketFlow runs as root, as in many containers, PostgreSQL refuses to: it runs as a system user, who owns its
folder and is created if need be. What is above the data folder is not ours: nothing of it is changed, and a folder in
which that user cannot get to its own is refused.
"""

import os
import pwd
import stat
import subprocess
from contextlib import suppress
from pathlib import Path

from loguru import logger

from marketflow.embedded.guardian import environment
from marketflow.embedded.server_process import SYSTEM_USER
from marketflow.errors import StartError

USERADD_SECONDS = 10.0
REACH_SECONDS = 10.0
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def refuse_foreign(path: Path, user: int | None = None) -> None:
    """Refuse a path that belongs to another user than this one, root and `user`, or that others may write to.

    A path that does not exist is accepted.

    Raises:
        StartError: the path is refused.
    """
    if (why := foreign(path, user)) is not None:
        raise StartError(f"{why}; or set another data_dir")


def foreign(path: Path, user: int | None = None) -> str | None:
    """Return why a path is refused and how to fix it; None if it is accepted. Links are not followed."""
    try:
        found = path.lstat()
    except OSError:  # there is nothing, or it will be found to be closed
        return None
    if found.st_uid not in (0, os.geteuid(), user):
        return (
            f"{path} belongs to the user {name_of(found.st_uid)}, not to {name_of(os.geteuid())}: "
            "run MarketFlow as that user, or change its owner (chown -R) if what is in there is yours"
        )
    if not stat.S_ISLNK(found.st_mode) and found.st_mode & WRITABLE_BY_OTHERS:
        mode = stat.S_IMODE(found.st_mode)
        return f"other users may write to {path} (mode {mode:04o}): chmod go-w it once what is in there is yours"
    return None


def refuse_foreign_folder(folder: Path, user: int | None = None) -> None:
    """Refuse a folder likewise, a path that is no folder, and refused entries directly in it.

    Raises:
        StartError: the folder is refused.
    """
    refuse_foreign(folder, user)
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            refuse_foreign(path, user)


def name_of(user: int) -> str:
    """A user's name, or the number where there is none."""
    with suppress(KeyError):
        return pwd.getpwuid(user).pw_name
    return str(user)


def own_for_postgres(folder: Path) -> pwd.struct_passwd:
    """As root: give a folder to the user that PostgreSQL runs as, and give that user.

    The data folder above it, which is ours, is opened for others to pass through.

    Raises:
        StartError: there is no such user and none can be created, or the folder belongs to another user.
    """
    user = system_user()
    refuse_foreign(folder, user.pw_uid)
    if folder.lstat().st_uid == 0:
        os.chown(folder, user.pw_uid, user.pw_gid, follow_symlinks=False)
    data_dir = folder.parent
    found = data_dir.stat()
    if found.st_uid == 0 and not found.st_mode & stat.S_IXOTH:
        logger.info("{} lets others pass through from now on: PostgreSQL does not run as root", data_dir)
        data_dir.chmod(stat.S_IMODE(found.st_mode) | stat.S_IXOTH)
    return user


def refuse_unreachable(data_dir: Path) -> None:
    """As root: refuse a data folder that PostgreSQL's user cannot get to, before anything is made there.

    Raises:
        StartError: it is so, or there is no such user and none can be created.
    """
    if os.geteuid() != 0:
        return
    system_user()
    if (why := unreachable(data_dir)) is not None:
        raise StartError(why)


def unreachable(data_dir: Path) -> str | None:
    """As root: why PostgreSQL's user cannot get to a data folder, and what to do; None when it can."""
    above = next(folder for folder in data_dir.resolve().parents if folder.exists())
    closed = next((each for each in reversed((above, *above.parents)) if not each.stat().st_mode & stat.S_IXOTH), None)
    if closed is None:
        return None
    with suppress(KeyError):
        if reaches(pwd.getpwnam(SYSTEM_USER), above):  # by a group or a list of rights
            return None
    return (
        f"the data folder {data_dir} cannot be used as root: PostgreSQL refuses to run as root, and the user "
        f"{SYSTEM_USER}, as which it runs, may not enter {closed} (mode {stat.S_IMODE(closed.stat().st_mode):04o}); "
        "set data_dir to a folder that it can get to, such as /var/lib/marketflow, "
        "run MarketFlow as an ordinary user, or set postgres.host to a server of your own"
    )


def reaches(user: pwd.struct_passwd, path: Path) -> bool:
    """As root: whether a user can get to a path and enter or run it, as the kernel says.

    Asked in a process of that user, as there are more rules than the modes of folders.
    """
    command = ["/bin/sh", "-c", 'test -x "$1"', "sh", str(path)]
    try:
        asked = subprocess.run(
            command,
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=[],
            cwd="/",
            env=environment(),
            capture_output=True,
            check=False,
            timeout=REACH_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return asked.returncode == 0


def system_user() -> pwd.struct_passwd:
    """The user that PostgreSQL runs as, created if need be.

    Raises:
        StartError: it cannot be created.
    """
    with suppress(KeyError):
        return pwd.getpwnam(SYSTEM_USER)
    options = ["--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin"]
    try:
        # An exit code would not tell: another process may have been first.
        command = ["useradd", *options, SYSTEM_USER]
        subprocess.run(command, capture_output=True, check=False, timeout=USERADD_SECONDS, env=environment())
        return pwd.getpwnam(SYSTEM_USER)
    except (OSError, KeyError, subprocess.TimeoutExpired):
        raise StartError(
            f"PostgreSQL refuses to run as root, and the user {SYSTEM_USER} could not be created; "
            "run MarketFlow as an ordinary user, or set postgres.host to a server of your own"
        ) from None
