"""Real servers for tests, on TCP ports of 127.0.0.1, so that whatever goes wrong on a network can be put in between.

They are the embedded servers with another address: found, started, recovered and stopped by the same code.
"""

import atexit
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from marketflow.embedded import EmbeddedPostgres, EmbeddedRedis
from marketflow.embedded.child_server import ChildServer
from marketflow.embedded.server_process import ServerProcess
from marketflow.stores.redis.connection import connection_keywords

HOST = "127.0.0.1"
USERS = Path(__file__).parents[2] / "deploy/redis/users.acl"
T = TypeVar("T")


_reservations: list[socket.socket] = []
"""Sockets that are bound to the ports given by `free_port`, so that none is given twice; they end with the process."""


def free_port() -> int:
    """Return a TCP port that nobody listens on and that stays reserved for servers of this process's tests.

    Reserved means bound, not listened on: connections are refused, and only a server that sets SO_REUSEADDR can bind
    it, as all under test do. The port is outside the range the kernel gives to clients: within it a client that keeps
    connecting to a stopped server can be given the server's port and meet itself.
    """
    while True:
        port = random.randrange(10_240, 32_768)
        reservation = socket.socket()
        try:
            reservation.bind((HOST, port))
        except OSError:
            reservation.close()
            continue
        reservation.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # after bind: until then no other may share it
        _reservations.append(reservation)
        return port


@atexit.register
def _release() -> None:
    for reservation in _reservations:
        reservation.close()


PATIENCE_SECONDS = 30.0
"""How long a test waits for what no promise has a limit for: several times what it takes on a busy machine."""


def wait_until(
    condition: Callable[[], T], timeout: float = PATIENCE_SECONDS, message: str = "the condition was not met"
) -> T:
    """The first truthy value of a condition, asked every 5 ms; after 100 ms every 5 % of the time so far, up to 25 ms.

    Each question costs a client and a server a millisecond of CPU, which the condition itself may wait for.

    Raises:
        AssertionError: there was none within `timeout` seconds.
    """
    began = time.monotonic()
    while not (value := condition()):
        waited = time.monotonic() - began
        assert waited < timeout, f"{message} (waited {timeout} s)"
        time.sleep(min(max(0.005, 0.05 * waited), 0.025))
    return value


class FaultyServer(ChildServer):
    """What can go wrong with a server: it is killed, it freezes, it is restarted on the same port."""

    host = HOST

    def kill(self) -> None:
        """kill -9 the server and its children; returns when they are gone. `start` brings it back."""
        for process in self.family():
            process.send(signal.SIGKILL)
            assert process.wait(5.0)

    def pause(self) -> None:
        """Freeze it: connections stay open and new ones are accepted by the kernel, but nothing answers."""
        for process in self.family():
            process.send(signal.SIGSTOP)

    def resume(self) -> None:
        for process in self.family():
            process.send(signal.SIGCONT)

    def restart(self) -> None:
        self.stop()
        self.start()

    def family(self) -> list[ServerProcess]:
        """The server's processes, the first one first."""
        return [self.process, *self.process.children()] if self.process else []


class RedisServer(FaultyServer, EmbeddedRedis):
    """A redis-server at 127.0.0.1:`port`; without `persistent` it forgets everything when it stops."""

    def __init__(self, folder: Path, password: str = "", persistent: bool = True) -> None:
        super().__init__(folder)
        self.port = free_port()
        self.password = password
        self.persistent = persistent

    def listen_options(self) -> dict[str, str]:
        options = {"port": str(self.port), "bind": HOST}
        return options | ({"requirepass": self.password} if self.password else {})

    def server_options(self) -> dict[str, str]:
        return super().server_options() | ({} if self.persistent else {"appendonly": "no"})

    def connect(self, process: ServerProcess) -> socket.socket:
        return socket.create_connection((HOST, self.port), timeout=0.5)

    def client(self, **options: Any) -> redis.Redis:
        """A client that neither retries nor waits long; close it (it is a context manager)."""
        defaults: dict[str, Any] = {
            "socket_timeout": 2.0,
            "socket_connect_timeout": 2.0,
            "retry": Retry(NoBackoff(), 0),
        }
        return redis.Redis(host=HOST, port=self.port, password=self.password or None, **(defaults | options))

    def delivered_user(self) -> dict[str, Any]:
        """Add the user of deploy/redis/users.acl; return the keywords of a client that has no other rights."""
        lines = USERS.read_text().splitlines()
        (rights,) = (line.split()[1:] for line in lines if line.startswith("user marketflow "))
        with self.client() as client:
            client.execute_command("ACL", "SETUSER", *rights)
        return connection_keywords(HOST, self.port, "change-me", 0, "marketflow")


class PostgresServer(FaultyServer, EmbeddedPostgres):
    """A PostgreSQL at 127.0.0.1:`port` that wants a password.

    `template` is where the first server of a session keeps a fresh cluster for the others to copy.
    It does not sync, for speed: its data outlives SIGKILL, though not a power cut.
    """

    password = "open sesame"
    settings = EmbeddedPostgres.settings | {"fsync": "off", "shared_buffers": "16MB"}

    def __init__(self, folder: Path, template: Path) -> None:
        super().__init__(folder)
        self.port = free_port()
        self.template = template

    @property
    def keywords(self) -> dict[str, Any]:
        """Connection keywords: host, port, user, password, dbname."""
        return super().keywords | {"host": HOST, "port": self.port, "password": self.password}

    def listen_options(self) -> dict[str, str]:
        return super().listen_options() | {"listen_addresses": HOST, "port": str(self.port)}

    def create_cluster(self) -> None:
        if not self.template.exists():
            password_file = self.folder / "password"
            password_file.write_text(self.password)
            shutil.chown(password_file, self.folder.stat().st_uid)
            self.run_initdb(self.folder / "new", "--auth-host=scram-sha-256", f"--pwfile={password_file}")
            (self.folder / "new").rename(self.template)
        subprocess.run(["cp", "-a", self.template, self.data], check=True)

    def connect(self, **options: Any) -> "psycopg.Connection[tuple[Any, ...]]":
        """A connection in autocommit mode; close it (it is a context manager)."""
        return psycopg.connect(**(self.keywords | {"autocommit": True, "connect_timeout": 2} | options))
