"""Health checks for embedded servers: their programs, the data folder, and the MarketFlow that has it locked.

No server is started. The kernel's lock on the folder shows whether a MarketFlow runs on it, and /proc whether the
servers do; servers that run are checked like external ones.
"""

import getpass
import os
import pwd
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path

from marketflow.cli.check.check_result import Check, CheckResult, CheckState, bytes_text
from marketflow.embedded import EmbeddedPostgres, EmbeddedRedis
from marketflow.embedded.folder_lock import LOCK, NO_HOME, lock_owner
from marketflow.embedded.ownership import foreign, unreachable
from marketflow.embedded.programs import postgres_programs, redis_program
from marketflow.embedded.server_process import SYSTEM_USER, claimed_by_others, find_servers
from marketflow.errors import StartError
from marketflow.settings import Settings

SCARCE_BYTES = 1_000_000_000
"""Free space below which the check warns: a month of 15 busy series, and working space for PostgreSQL."""

TOO_LITTLE_BYTES = 100_000_000
"""Free space below which the servers may not start."""

AS_OWNER = "run this as the user that MarketFlow runs as"


def data_folder_checks(settings: Settings) -> list[Check]:
    """Return the check of the data folder; none where both servers are external."""
    if not settings.redis.is_embedded and settings.postgres.host:
        return []
    where = str(settings.data_dir)
    return [Check("data folder", where, partial(_check_folder, where, settings.data_dir, not settings.postgres.host))]


def results_if_stopped(server: EmbeddedRedis | EmbeddedPostgres, where: str) -> list[CheckResult]:
    """Return the results for an embedded server that is not running; empty for one that is running."""
    if find_servers(server.program, server.data) or claimed_by_others(server.program, server.data):
        return []
    if (pid := lock_owner(server.folder.parent)) is not None:
        found = f"MarketFlow (process {pid}) has the data folder, but its {server.title} is not running"
        return [
            CheckResult(server.title, where, CheckState.WARNING, found, "check again in a moment, then see its log")
        ]
    try:
        programs = redis_program() if isinstance(server, EmbeddedRedis) else postgres_programs(server.data)
    except StartError as error:
        return [CheckResult(server.title, where, CheckState.FAILED, "not installed", str(error))]
    if isinstance(server, EmbeddedPostgres) and (version := _foreign_version(server, programs)):
        found = f"the data were written by PostgreSQL {version}, which is not installed"
        return [CheckResult(server.title, where, CheckState.FAILED, found, "install that version, or move the data")]
    return [CheckResult(server.title, where, CheckState.OK, "not running; MarketFlow starts it")]


def _foreign_version(server: EmbeddedPostgres, programs: Path) -> str:
    """Return the version that wrote the data, if the programs are of another one; otherwise empty."""
    installed = programs.parent.name.removeprefix("pginstall")
    with suppress(OSError):
        needed = (server.data / "PG_VERSION").read_text().strip()
        return needed if installed and needed != installed else ""
    return ""


def _own(data_dir: Path) -> list[Path]:
    """Return the paths that no other user may own or write to."""
    return [data_dir, *(data_dir / name for name in (LOCK, "redis", "postgres"))]


def _user_of(path: Path) -> int | None:
    """Return the other user who may own a path: as root, PostgreSQL's folder belongs to the user it runs as."""
    if os.geteuid() == 0 and path.name == "postgres":
        with suppress(KeyError):
            return pwd.getpwnam(SYSTEM_USER).pw_uid
    return None


def _check_folder(where: str, data_dir: Path, needs_postgres: bool) -> list[CheckResult]:
    def result(state: CheckState, found: str, advice: str = "") -> list[CheckResult]:
        return [CheckResult("data folder", where, state, found, advice)]

    if not data_dir.is_absolute():
        return result(CheckState.FAILED, NO_HOME, "set data_dir")
    existing = next(folder for folder in (data_dir, *data_dir.parents) if os.path.lexists(folder))
    if not existing.is_dir():
        return result(CheckState.FAILED, f"{existing} is not a folder", "set data_dir")
    refusals = [why for path in _own(data_dir) if (why := foreign(path, _user_of(path))) is not None]
    if os.geteuid() == 0 and needs_postgres and (why := unreachable(data_dir)) is not None:
        refusals.append(why)
    if refusals:
        return result(CheckState.FAILED, refusals[0], "do that, or set another data_dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        found = f"{existing} is not writable for {_user()}"
        return result(CheckState.FAILED, found, f"set data_dir, change the folder's owner, or {AS_OWNER}")
    free = shutil.disk_usage(existing).free
    space = f"{bytes_text(free)} free"
    if (pid := lock_owner(data_dir)) is not None:
        use = f"in use by MarketFlow (process {pid}); a second one needs another data_dir"
    elif existing == data_dir:
        use = "writable"
    else:
        use = "does not exist yet, and can be created"
    if free < SCARCE_BYTES:
        state = CheckState.FAILED if free < TOO_LITTLE_BYTES else CheckState.WARNING
        return result(state, f"{use}; {space}", "free space on the disk")
    return result(CheckState.OK, f"{use}; {space}")


def _user() -> str:
    with suppress(KeyError, OSError):
        return f"the user {getpass.getuser()}"
    return f"the user {os.geteuid()}"
