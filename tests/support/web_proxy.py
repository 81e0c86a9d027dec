"""A real web proxy, proxy.py, in a process of its own: it forwards requests and tunnels what is asked by CONNECT."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.servers import HOST, wait_until


class WebProxy:
    """A running proxy.

    Args:
        port: where it listens on 127.0.0.1.
        log: its file of requests.
    """

    def __init__(self, port: int, log: Path) -> None:
        self.port = port
        self._log = log

    @property
    def url(self) -> str:
        """Its address, without credentials."""
        return f"http://{HOST}:{self.port}"

    def url_of(self, user: str, password: str) -> str:
        """Its address with credentials, quoted as in a URL."""
        return f"http://{user}:{password}@{HOST}:{self.port}"

    @property
    def log(self) -> str:
        """A line for each connection, once it has ended."""
        return self._log.read_text()


@contextmanager
def web_proxy(folder: Path, credentials: str = "") -> Iterator[WebProxy]:
    """Run a proxy; with `user:password` it refuses all others."""
    port_file, log = folder / "proxy.port", folder / "proxy.log"
    command = [sys.executable, "-m", "proxy", "--hostname", HOST, "--port", "0", "--port-file", str(port_file)]
    command += ["--num-workers", "1", "--num-acceptors", "1", "--log-file", str(log)]
    command += ["--data-dir", str(folder / "proxy-data")]
    command += ["--basic-auth", credentials] if credentials else []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: port_file.exists() and port_file.read_text().strip(), timeout=20)
            yield WebProxy(int(port_file.read_text()), log)
        finally:
            process.terminate()
            process.wait(10)
