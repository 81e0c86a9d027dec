"""The configurations of nginx and Caddy, with the real proxies in front of the real application."""

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

from tests.deploy.configuration import DEPLOY
from tests.support.application import Application
from tests.support.servers import HOST, free_port, wait_until

Start = Callable[[str, int, int, Path], list[str]]
"""The command for a configuration, the port to listen on, that of the application, and a folder."""


def _program(name: str) -> str:
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if path is None:
        pytest.skip(f"there is no {name} (Debian's package of this name)")
    return path


def nginx(text: str, port: int, application: int, folder: Path) -> list[str]:
    text = text.replace("listen 80;", f"listen {HOST}:{port};").replace("127.0.0.1:8080;", f"{HOST}:{application};")
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
    text = text.replace("prices.example.com {", f"http://prices.example.com:{port} {{")
    text = text.replace("127.0.0.1:8080", f"{HOST}:{application}")
    (folder / "Caddyfile").write_text(f"{{\n admin off\n auto_https off\n}}\n{text}")
    return [_program("caddy"), "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


@contextmanager
def proxy(start: Start, text: str, application: int, folder: Path) -> Iterator[int]:
    """The port of a proxy in front of an application."""
    port = free_port()
    home = {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            start(text, port, application, folder), stdout=log, stderr=log, env=os.environ | home
        )
    try:
        wait_until(lambda: _answers(port), 20, "the proxy does not answer")
        yield port
    finally:
        process.terminate()
        process.wait(20)


def _answers(port: int) -> bool:
    try:
        return (
            httpx.get(f"http://{HOST}:{port}/livez", headers={"Host": f"prices.example.com:{port}"}).status_code < 500
        )
    except httpx.TransportError:
        return False


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
    with (
        Application(server_folder, servers | given) as application,
        proxy(start, (DEPLOY / "proxy" / name).read_text(), application.port, server_folder) as port,
    ):
        host = f"prices.example.com:{port}"
        with httpx.Client(base_url=f"http://{HOST}:{port}", headers={"Host": host}, timeout=10) as client:
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
                with connect(f"ws://{host}/ws", sock=sock, origin=Origin(f"http://{host}")) as websocket:
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
