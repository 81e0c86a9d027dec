"""What systemd hears of a unit of Type=notify: the real processes, and a socket like systemd's."""

import os
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

import psutil
import pytest

from marketflow.clock import system_clock
from marketflow.model import Mode
from marketflow.resources import resource
from marketflow.runtime.engine import Engine
from marketflow.server.service_notification import ServiceManager, supervisor
from marketflow.settings import Settings
from tests.support.application import Application
from tests.support.servers import HOST, wait_until

WATCHDOG_SECONDS = 0.9

_CREDENTIALS = struct.Struct("3i")


class Message(NamedTuple):
    """A datagram, and the process that sent it, as the kernel says."""

    lines: list[str]
    pid: int


class Manager:
    """Listens as systemd does."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(address.replace("@", "\0"))
        self.messages: list[Message] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def hear(self, seconds: float = 30.0) -> Message | None:
        """The next message, None if there is none for so long."""
        self._socket.settimeout(seconds)
        try:
            data, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(_CREDENTIALS.size))
        except (TimeoutError, BlockingIOError):
            return None
        message = Message(data.decode().splitlines(), _CREDENTIALS.unpack(ancillary[0][2])[0])
        self.messages.append(message)
        return message

    def wait_for(self, line: str) -> Message:
        """The next message with such a line."""
        while (message := self.hear()) is not None:
            if line in message.lines:
                return message
        raise AssertionError(f"{line} was never said, but {self.messages}")

    def hear_all(self) -> list[Message]:
        """All that was ever said."""
        while self.hear(0):
            pass
        return self.messages


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@marketflow-test-{os.getpid()}"
    with Manager(address) as listening:
        yield listening


def supervised(address: str, watchdog: bool = True) -> tuple[str, ...]:
    """What Python is to run: MarketFlow as systemd would start it."""
    variables: dict[str, object] = {"NOTIFY_SOCKET": address}
    if watchdog:
        variables["WATCHDOG_USEC"] = round(WATCHDOG_SECONDS * 1e6)
    setting = "".join(f"os.environ[{name!r}] = {str(value)!r}; " for name, value in variables.items())
    own_pid = "os.environ['WATCHDOG_PID'] = str(os.getpid()); " if watchdog else ""
    return "-c", f"import os, sys; {setting}{own_pid}from marketflow.cli.main import main; sys.exit(main())"


def said(manager: Manager, line: str) -> int:
    return sum(line in message.lines for message in manager.hear_all())


def accepts(port: int) -> bool:
    with socket.create_connection((HOST, port), timeout=5):
        return True


def test_one_process_is_ready_once_it_accepts_connections(
    server_folder: Path, servers: dict[str, object], manager: Manager
) -> None:
    application = Application(server_folder, servers, program=supervised(manager.address))
    application.start(wait=False)
    try:
        ready = manager.wait_for("READY=1")
        assert accepts(application.port)
        assert ready.lines[1:] == [f"STATUS=answers on http://{HOST}:{application.port}"]
        for _ in range(4):
            manager.wait_for("WATCHDOG=1")
        assert application.stop(signal.SIGTERM)[0] == 0
    finally:
        application.__exit__()
    assert said(manager, "READY=1") == said(manager, "STOPPING=1") == 1
    assert {message.pid for message in manager.messages} == {application.process.pid}
    assert "Traceback" not in application.log


def test_workers_are_ready_when_all_accept_and_only_their_parent_says_so(
    server_folder: Path, servers: dict[str, object], manager: Manager
) -> None:
    arguments = ("--role", "api", "--workers", "2")
    application = Application(server_folder, servers, arguments, supervised(manager.address))
    application.start(wait=False)
    try:
        ready = manager.wait_for("READY=1")
        assert ready.lines[1:] == ["STATUS=2 workers answer"]
        wait_until(lambda: application.log.count("answers on") == 2)
        workers = psutil.Process(application.process.pid).children()
        assert len(workers) == 2

        manager.wait_for("WATCHDOG=1")
        workers[0].send_signal(signal.SIGSTOP)
        heard = 0
        while manager.hear(2 * WATCHDOG_SECONDS):  # until there is silence, though the other worker goes on
            heard += 1
            assert heard < 10, "a worker that hangs was not missed"
        workers[0].send_signal(signal.SIGCONT)
        manager.wait_for("WATCHDOG=1")

        workers[0].send_signal(signal.SIGKILL)
        wait_until(lambda: "starting another" in application.log)
        manager.hear_all()
        manager.wait_for("WATCHDOG=1")
        assert application.stop(signal.SIGTERM)[0] == 0
    finally:
        application.__exit__()
    assert said(manager, "READY=1") == said(manager, "STOPPING=1") == 1
    assert {message.pid for message in manager.messages} == {application.process.pid}
    assert "Traceback" not in application.log


def test_feeds_are_ready_when_they_take_ticks_or_stand_by(
    server_folder: Path, servers: dict[str, object], tmp_path: Path
) -> None:
    standing_by = "STATUS=stands by: other processes take ticks"
    taking_ticks = "STATUS=takes ticks"
    folders = server_folder / "first", server_folder / "second"
    for folder in folders:
        folder.mkdir()
    with Manager(str(tmp_path / "1")) as of_first, Manager(str(tmp_path / "2")) as of_second:
        first = Application(folders[0], servers, ("--role", "ingest"), supervised(of_first.address))
        second = Application(folders[1], servers, ("--role", "ingest"), supervised(of_second.address))
        try:
            first.start(wait=False)
            assert of_first.wait_for("READY=1").lines[1] == taking_ticks
            second.start(wait=False)
            assert of_second.wait_for("READY=1").lines[1] == standing_by
            of_second.wait_for("WATCHDOG=1")
            of_first.hear_all()  # the system queues ten messages and refuses more
            assert first.stop(signal.SIGTERM)[0] == 0
            of_second.wait_for(taking_ticks)
            of_second.wait_for("WATCHDOG=1")
            assert second.stop(signal.SIGTERM)[0] == 0
        finally:
            first.__exit__()
            second.__exit__()
        assert said(of_first, "STOPPING=1") == said(of_second, "STOPPING=1") == 1
        assert "WATCHDOG=1" in [message.lines[0] for message in of_first.messages]
        assert "Traceback" not in first.log + second.log


def test_no_signs_of_life_without_watchdog_or_service_manager(
    server_folder: Path, servers: dict[str, object], manager: Manager
) -> None:
    with Application(server_folder, servers, program=supervised(manager.address, watchdog=False)) as application:
        manager.wait_for("READY=1")
        manager.__exit__()
        assert application.stop(signal.SIGTERM)[0] == 0
        assert "the service manager cannot be notified" in application.log
    assert [message.lines[0] for message in manager.messages] == ["READY=1"]


def test_children_and_other_processes_are_not_meant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    found = supervisor()
    assert isinstance(found, ServiceManager)
    assert found.beat_seconds is None
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & os.environ.keys()
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    assert supervisor().beat_seconds == 1.0


@pytest.mark.parametrize("address", ["", "vsock:2:1234"])
def test_no_service_manager_without_a_local_socket(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not isinstance(supervisor(), ServiceManager)


def test_timers_that_hang_are_no_life() -> None:
    engine = Engine(Settings(), {}, {}, resource("ddl"), system_clock, Mode.TEST, lambda: None)
    wait_until(engine.is_alive)
    wait_until(engine.is_alive)
    go_on, hanging = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        hanging.set()
        go_on.wait(10)

    engine._loop.schedule(hang)
    assert hanging.wait(5)
    engine.is_alive()  # what came round before it hung
    assert not engine.is_alive()
    go_on.set()
    wait_until(engine.is_alive)
    engine._close()
