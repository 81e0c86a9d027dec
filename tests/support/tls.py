"""TLS for tests: certificates that vouch for themselves, and a TLS front of a server that has none."""

import shutil
import socket
import socketserver
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.servers import HOST

OPENSSL = shutil.which("openssl")


def certificate(folder: Path, name: str, alternative: str) -> tuple[Path, Path]:
    """A key and a certificate that vouches for itself."""
    assert OPENSSL is not None
    key, crt = folder / f"{name}.key", folder / f"{name}.crt"
    command = [OPENSSL, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName={alternative}"]
    subprocess.run([*command, "-keyout", key, "-out", crt], check=True, capture_output=True)
    return key, crt


class TlsFront(socketserver.ThreadingTCPServer):
    """Speaks TLS in front of a server on 127.0.0.1."""

    daemon_threads = True

    def __init__(self, port: int, key: Path, crt: Path, handler: "type[TlsSession] | None" = None) -> None:
        self.server_port = port
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(crt, key)
        super().__init__((HOST, 0), handler or TlsSession)


class TlsSession(socketserver.BaseRequestHandler):
    """One connection."""

    def is_asked_for(self) -> bool:
        """Whether the client asks for TLS; what it says before that is read."""
        return True

    def handle(self) -> None:
        assert isinstance(self.server, TlsFront)
        with suppress(OSError):
            if not self.is_asked_for():
                return
            with (
                self.server.context.wrap_socket(self.request, server_side=True) as client,
                socket.create_connection((HOST, self.server.server_port)) as server,
            ):
                back = threading.Thread(target=_pass_on, args=(server, client), daemon=True)
                back.start()
                _pass_on(client, server)
                server.shutdown(socket.SHUT_RDWR)
                back.join(5)


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)


@contextmanager
def tls_front(port: int, key: Path, crt: Path, handler: type[TlsSession] | None = None) -> Iterator[int]:
    """The port at which a server on 127.0.0.1 is reached by TLS."""
    with TlsFront(port, key, crt, handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join(5)
