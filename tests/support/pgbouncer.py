"""A real PgBouncer in front of a real PostgreSQL, for tests; Debian's package has the program."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import HOST, free_port, wait_until


def _program() -> str:
    path = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if path is None:
        pytest.skip("there is no pgbouncer (Debian's package of this name)")
    return path


@contextmanager
def pgbouncer(folder: Path, place: dict[str, Any], **settings: object) -> Iterator[dict[str, Any]]:
    """Keywords of connections to a PgBouncer that lends two sessions of `place`, each for a transaction."""
    program, port = _program(), free_port()
    (folder / "users").write_text(f'"{place["user"]}" "{place["password"]}"\n')
    options = {
        "listen_addr": HOST,
        "listen_port": port,
        "auth_type": "scram-sha-256",
        "auth_file": folder / "users",
        "pool_mode": "transaction",
        "default_pool_size": 2,
        "unix_socket_dir": "",
        "logfile": folder / "pgbouncer.log",
        **settings,
    }
    lines = [
        "[databases]",
        f"{place['dbname']} = host={place['host']} port={place['port']} dbname={place['dbname']}",
        "[pgbouncer]",
        *(f"{name} = {value}" for name, value in options.items()),
    ]
    (folder / "pgbouncer.ini").write_text("\n".join(lines) + "\n")
    command = [program, "-q", str(folder / "pgbouncer.ini")]
    if os.geteuid() == 0:  # which it refuses to run as
        for path in (folder, *folder.iterdir()):
            shutil.chown(path, "nobody")
        command[1:1] = ["--user", "nobody"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            log = folder / "pgbouncer.log"
            wait_until(lambda: log.exists() and "process up" in log.read_text(), 10, "PgBouncer did not start")
            yield place | {"host": HOST, "port": port}
        finally:
            process.terminate()
            process.wait(10)
