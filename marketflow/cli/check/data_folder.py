"""Looks at what the embedded servers need: their programs, the data folder, and whether a MarketFlow has it already.

None is started for that. The kernel's lock on the folder tells whether a MarketFlow runs on it, and /proc whether the
servers do; those that run are looked at like any other.
"""

import fcntl
import getpass
import os
import pwd
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path

from marketflow.cli.check.findings import Check, Finding, State, bytes_text
from marketflow.embedded import EmbeddedPostgres, EmbeddedRedis
from marketflow.embedded.folder_lock import LOCK
from marketflow.embedded.ownership import foreign, unreachable
from marketflow.embedded.programs import postgres_programs, redis_program
from marketflow.embedded.server_process import SYSTEM_USER, claimed_by_others, find_servers
from marketflow.errors import StartError
from marketflow.settings import Settings

SCARCE_BYTES = 1_000_000_000
"""Free space that is a warning: a month of 15 busy series, with room for PostgreSQL to work."""

TOO_LITTLE_BYTES = 100_000_000
"""Free space in which the servers may not even start."""


AS_OWNER = "run this as the user that MarketFlow runs as"


def data_checks(settings: Settings) -> list[Check]:
    """A check of the data folder, where embedded servers are to be used."""
    if settings.redis.host and settings.postgres.host:
        return []
    where = str(settings.data_dir)
    return [Check("data folder", where, partial(_look, where, settings.data_dir, not settings.postgres.host))]


def not_running(server: EmbeddedRedis | EmbeddedPostgres, where: str) -> list[Finding]:
    """What there is to say of an embedded server that does not run; nothing of one that does."""
    if find_servers(server.program, server.data) or claimed_by_others(server.program, server.data):
        return []
    if (pid := holder(server.folder.parent)) is not None:
        found = f"MarketFlow (process {pid}) has the data folder, but its {server.title} does not run"
        return [Finding(server.title, where, State.WARNING, found, "look again in a moment, then see its log")]
    try:
        programs = redis_program() if isinstance(server, EmbeddedRedis) else postgres_programs(server.data)
    except StartError as error:
        return [Finding(server.title, where, State.FAILED, "not installed", str(error))]
    if isinstance(server, EmbeddedPostgres) and (version := _foreign_version(server, programs)):
        found = f"the data are of PostgreSQL {version}, which is not installed"
        return [Finding(server.title, where, State.FAILED, found, "install the version of before, or move the data")]
    return [Finding(server.title, where, State.OK, "not running; MarketFlow starts it")]


def _foreign_version(server: EmbeddedPostgres, programs: Path) -> str:
    """The version that the data ask for, where the programs are of another one."""
    installed = programs.parent.name.removeprefix("pginstall")
    with suppress(OSError):
        asked = (server.data / "PG_VERSION").read_text().strip()
        return asked if installed and asked != installed else ""
    return ""


def holder(data_dir: Path) -> str | None:
    """The id of the process of the MarketFlow that owns a data folder, "unknown" at times; None when there is none."""
    try:
        # O_NONBLOCK: what is in the lock's place may be a FIFO, which nobody writes to.
        lock = os.open(data_dir / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        # Shared, so that two of these looks never take each other for a MarketFlow.
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(lock, 20, 0).decode(errors="replace").strip() or "unknown"
    finally:
        os.close(lock)
    return None


def _own(data_dir: Path) -> list[Path]:
    """What MarketFlow does not share with other users."""
    return [data_dir, *(data_dir / name for name in (LOCK, "redis", "postgres"))]


def _user_of(path: Path) -> int | None:
    """Who else may own it: as root, PostgreSQL's folder is that of the user it runs as."""
    if os.geteuid() == 0 and path.name == "postgres":
        with suppress(KeyError):
            return pwd.getpwnam(SYSTEM_USER).pw_uid
    return None


def _look(where: str, data_dir: Path, needs_postgres: bool) -> list[Finding]:
    def finding(state: State, found: str, advice: str = "") -> list[Finding]:
        return [Finding("data folder", where, state, found, advice)]

    existing = next(folder for folder in (data_dir, *data_dir.parents) if os.path.lexists(folder))
    if not existing.is_dir():
        return finding(State.FAILED, f"{existing} is no folder", "set data_dir")
    refusals = [why for path in _own(data_dir) if (why := foreign(path, _user_of(path))) is not None]
    if os.geteuid() == 0 and needs_postgres and (why := unreachable(data_dir)) is not None:
        refusals.append(why)
    if refusals:
        return finding(State.FAILED, refusals[0], "do that, or set another data_dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        found = f"{existing} may not be written to by {_user()}"
        return finding(State.FAILED, found, f"set data_dir, change the folder's owner, or {AS_OWNER}")
    free = shutil.disk_usage(existing).free
    space = f"{bytes_text(free)} free"
    if (pid := holder(data_dir)) is not None:
        use = f"in use by MarketFlow (process {pid}); a second one needs another data_dir"
    elif existing == data_dir:
        use = "can be written to"
    else:
        use = "not there yet, and can be made"
    if free < SCARCE_BYTES:
        state = State.FAILED if free < TOO_LITTLE_BYTES else State.WARNING
        return finding(state, f"{use}; {space}", "make room on the disk")
    return finding(State.OK, f"{use}; {space}")


def _user() -> str:
    with suppress(KeyError, OSError):
        return f"the user {getpass.getuser()}"
    return f"the user {os.geteuid()}"
