"""The configurations of nginx and Caddy, with TLS, as the real proxies in front of the real application."""

import os
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpcore
import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

from tests.deploy.configuration import DEPLOY, program, shell_blocks
from tests.support.application import Application
from tests.support.servers import HOST, free_port, wait_until

Start = Callable[[str, int, int, Path], list[str]]
"""The command for a configuration, the port to listen on, that of the application, and a folder."""


def _program(name: str) -> str:
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if path is None:
        pytest.skip(f"there is no {name} (Debian's package of this name)")
    return path


def certificate(folder: Path) -> ssl.SSLContext:
    """Make key.pem and certificate.pem in a folder as the README does; return a context that trusts it."""
    (command,) = shell_blocks("Behind a proxy")
    program("openssl")
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ssl.create_default_context(cafile=str(folder / "certificate.pem"))


def nginx(text: str, port: int, application: int, folder: Path) -> list[str]:
    text = text.replace("listen 443 ssl;", f"listen {HOST}:{port} ssl;").replace(CERTIFICATES, str(folder))
    text = text.replace("listen 80;", f"listen {HOST}:{port if 'ssl' not in text else free_port()};")
    text = text.replace("127.0.0.1:8080;", f"{HOST}:{application};")
    folders = "".join(
        f"{each}_temp_path {folder}/{each};" for each in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log; {user}\nevents {{}}\n"
        f"http {{ access_log off; {folders}\n{text}\n}}\n"
    )
    return [_program("nginx"), "-p", str(folder), "-c", str(folder / "nginx.conf")]


def caddy(text: str, port: int, application: int, folder: Path) -> list[str]:
    (own,) = re.findall(r"before reverse_proxy: (tls .*)", text)
    text = text.replace("prices.example.com {", f"https://prices.example.com:{port} {{\n\t{own}")
    text = text.replace("127.0.0.1:8080", f"{HOST}:{application}").replace(CERTIFICATES, str(folder))
    (folder / "Caddyfile").write_text(f"{{\n admin off\n auto_https disable_redirects\n}}\n{text}")
    return [_program("caddy"), "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


class Through(httpcore.NetworkBackend):
    """Connects to this machine whatever the name."""

    def connect_tcp(self, host: str, port: int, *arguments: object, **keywords: object) -> httpcore.NetworkStream:
        return httpcore.SyncBackend().connect_tcp(HOST, port)


def client_of(port: int, trust: ssl.SSLContext) -> httpx.Client:
    """A client that reaches https://prices.example.com on this machine, and verifies its certificate."""
    transport = httpx.HTTPTransport(verify=trust)
    transport._pool = httpcore.ConnectionPool(ssl_context=trust, network_backend=Through())
    return httpx.Client(base_url=f"https://prices.example.com:{port}", transport=transport, timeout=10)


@contextmanager
def proxy(
    start: Start, text: str, application: int, folder: Path, trust: ssl.SSLContext | None = None
) -> Iterator[int]:
    """The port of a proxy in front of an application."""
    port = free_port()
    home = {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            start(text, port, application, folder), stdout=log, stderr=log, env=os.environ | home
        )
    try:
        wait_until(lambda: _answers(port, trust), 20, "the proxy does not answer")
        yield port
    finally:
        process.terminate()
        process.wait(20)


def _answers(port: int, trust: ssl.SSLContext | None) -> bool:
    try:
        if trust is not None:
            with client_of(port, trust) as client:
                return client.get("/livez").status_code < 500
        return (
            httpx.get(f"http://{HOST}:{port}/livez", headers={"Host": f"prices.example.com:{port}"}).status_code < 500
        )
    except (httpx.TransportError, httpcore.NetworkError):
        return False


CERTIFICATES = "/etc/ssl/marketflow"

PROXIES = [(nginx, "nginx.conf"), (caddy, "Caddyfile")]


@pytest.mark.parametrize(("start", "name"), PROXIES, ids=["nginx", "caddy"])
def test_page_stream_and_websocket_work_behind_a_proxy(
    server_folder: Path, servers: dict[str, object], start: Start, name: str
) -> None:
    given = {
        "HTTP__ALLOWED_HOSTS": "prices.example.com,127.0.0.1",
        "HTTP__TRUSTED_PROXIES": HOST,
        "HTTP__STREAMS_PER_CLIENT": 1,
    }
    trust = certificate(server_folder)
    with (
        Application(server_folder, servers | given) as application,
        proxy(start, (DEPLOY / "proxy" / name).read_text(), application.port, server_folder, trust) as port,
    ):
        host = f"prices.example.com:{port}"
        with client_of(port, trust) as client:
            assert client.get("/").status_code == 200
            wait_until(lambda: client.get("/prices/latest/BTCUSDT").status_code == 200)
            with client.stream("GET", "/stream/prices") as stream:
                lines = stream.iter_lines()
                assert "event: snapshot" in next(line for line in lines if line.startswith("event:"))
                assert next(line for line in lines if line.startswith("event:")) == "event: prices"
                # The proxy says who the client is: this one has its stream already, another has not.
                assert client.get("/stream/prices").status_code == 429

        def opened() -> bool:
            sock = socket.create_connection((HOST, port))
            try:
                with connect(f"wss://{host}/ws", sock=sock, ssl=trust, origin=Origin(f"https://{host}")) as websocket:
                    return '"event":"snapshot"' in str(websocket.recv(10))
            except InvalidStatus:  # 429 until then
                return False

        wait_until(opened, 10, "the end of the stream does not reach the application")


NO_HOST = """
server {
    listen 80;
    location / {
        proxy_pass http://127.0.0.1:8080;
        proxy_http_version 1.1;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection upgrade;
    }
}
"""


def test_proxy_that_replaces_the_host_header_is_logged(server_folder: Path, servers: dict[str, object]) -> None:
    def opened(port: int, origin: str) -> bool:
        try:
            with connect(f"ws://{HOST}:{port}/ws", origin=Origin(origin), proxy=None) as websocket:
                return '"event":"snapshot"' in str(websocket.recv(10))
        except InvalidStatus as error:
            return error.response.status_code != 403

    folders = [server_folder / each for each in ("refused", "allowed")]
    for folder in folders:
        folder.mkdir()
    with (
        Application(folders[0], servers) as application,
        proxy(nginx, NO_HOST, application.port, folders[0]) as port,
    ):
        origin = f"http://{HOST}:{port}"
        assert not opened(port, origin)
        assert not opened(port, origin)
        (line,) = wait_until(lambda: [line for line in application.log.splitlines() if "http.allowed_origins" in line])
        assert origin in line
        assert f"addressed to {HOST}:{application.port}" in line
    with (
        Application(folders[1], servers | {"HTTP__ALLOWED_ORIGINS": origin}) as application,
        proxy(nginx, NO_HOST, application.port, folders[1]) as again,
    ):
        assert opened(again, origin)
        assert not opened(again, "https://evil.example")
        read = httpx.get(f"http://{HOST}:{application.port}/health", headers={"Origin": origin})
        assert read.headers["access-control-allow-origin"] == origin
        other = httpx.get(f"http://{HOST}:{application.port}/health", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        posted = httpx.post(f"http://{HOST}:{application.port}/mode/test", headers={"Origin": origin})
        assert posted.status_code == 403
        preflight = httpx.options(
            f"http://{HOST}:{application.port}/stream/prices",
            headers={
                "Origin": origin,
                "Access-Control-Request-Method": "GET",
                "Access-Control-Request-Headers": "last-event-id",
            },
        )
        assert preflight.status_code == 200
        assert urlsplit(preflight.headers["access-control-allow-origin"]).netloc == f"{HOST}:{port}"
