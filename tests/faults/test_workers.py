"""Several API processes on one port: each answers, each is replaced, and none outlives its parent."""

import functools
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from http.client import HTTPConnection
from pathlib import Path

import psutil
import pytest

from marketflow.errors import StartError
from marketflow.server import listeners as listening_sockets
from marketflow.server.listeners import bind, bind_each
from tests.support.application import Application
from tests.support.servers import HOST, free_port, wait_until
from tests.support.workers import ask_workers, children


@pytest.fixture
def workers(server_folder: Path, servers: dict[str, object]) -> Iterator[Application]:
    """Two API processes and their parent."""
    with Application(server_folder, servers, ("--role", "api", "--workers", "2")) as application:
        wait_until(lambda: len(children(application)) == 2)
        yield application


def all_serve(application: Application) -> bool:
    return set(ask_workers(application, "/livez")) == children(application)


def gone(pids: set[int]) -> bool:
    return not any(psutil.pid_exists(pid) for pid in pids)


def test_killed_worker_is_replaced(workers: Application) -> None:
    wait_until(lambda: all_serve(workers), message="a worker never answered")
    before = children(workers)
    killed = before.pop()
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: len(children(workers)) == 2 and killed not in children(workers))
    wait_until(lambda: all_serve(workers), message="the new worker never answered")
    assert before < children(workers)
    pids = children(workers)
    assert workers.stop()[0] == 0
    assert gone(pids)
    assert "was ended by SIGKILL; starting another" in workers.log
    assert "Traceback" not in workers.log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_parent_ends_all_workers(workers: Application, number: int) -> None:
    pids = children(workers)
    code, seconds = workers.stop(number)
    assert code == 0
    assert seconds < 5
    assert gone(pids)
    assert "Traceback" not in workers.log


def test_ctrl_c_in_a_terminal_ends_all_cleanly(
    server_folder: Path, servers: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal goes to all processes of the terminal's foreground group."""
    in_a_group = functools.partial(subprocess.Popen, process_group=0)
    monkeypatch.setattr(subprocess, "Popen", in_a_group)
    with Application(server_folder, servers, ("--role", "api", "--workers", "2")) as application:
        wait_until(lambda: len(children(application)) == 2)
        pids = children(application)
        os.killpg(application.process.pid, signal.SIGINT)
        assert application.process.wait(5) == 0
        assert gone(pids)
        assert "second time" not in application.log
        assert "Traceback" not in application.log


def test_no_worker_outlives_a_killed_parent(workers: Application) -> None:
    pids = children(workers)
    workers.kill()
    wait_until(lambda: gone(pids), message="a worker was left behind")
    assert "Traceback" not in workers.log


def test_hanging_worker_is_killed_after_the_deadline(workers: Application) -> None:
    pids = children(workers)
    os.kill(min(pids), signal.SIGSTOP)
    code, seconds = workers.stop()
    assert code == 0
    assert seconds < 8
    assert gone(pids)


@pytest.mark.parametrize("arguments", [("--role", "api", "--workers", "2"), ("--role", "api"), ()])
def test_port_shared_by_workers_is_refused_to_others(workers: Application, arguments: tuple[str, ...]) -> None:
    folder = workers.folder / "other"
    folder.mkdir()
    other = Application(folder, {"HTTP__PORT": workers.port}, arguments)
    assert other.fails() == 1
    assert other.log.count("\n") == 1
    assert "cannot listen on" in other.log
    assert workers.ready()


def test_simultaneous_starts_on_a_port_leave_one_listening(server_folder: Path, servers: dict[str, object]) -> None:
    """Also with workers: these share a port with each other, but with no other start."""
    kinds = [("--role", "api", "--workers", "2"), ("--role", "api", "--workers", "3"), ("--role", "api")]
    port = free_port()
    with ExitStack() as stack:
        started = []
        for number, arguments in enumerate(kinds * 2):
            folder = server_folder / str(number)
            folder.mkdir()
            application = Application(folder, servers | {"HTTP__PORT": port}, arguments)
            stack.push(application)
            started.append(application.start(wait=False))
        wait_until(lambda: sum(each.process.poll() is None for each in started) == 1, timeout=30)
        (first,) = (each for each in started if each.process.poll() is None)
        with closing(HTTPConnection(HOST, port, timeout=5)) as connection:
            wait_until(lambda: connects(connection), timeout=20)
        assert [each.process.returncode for each in started if each is not first] == [1] * 5
        assert all("cannot listen on" in each.log for each in started if each is not first)
        assert first.stop()[0] == 0


def connects(connection: HTTPConnection) -> bool:
    with suppress(OSError):
        connection.request("GET", "/livez")
        return connection.getresponse().read() == b'{"status":"ok"}'
    return False


@pytest.mark.parametrize("other", [1, 2])
def test_start_during_another_start_is_refused_the_port(monkeypatch: pytest.MonkeyPatch, other: int) -> None:
    port = free_port()
    refused = 0

    def bind_with_another_start(host: str, port: int, shared: bool = False) -> socket.socket:
        nonlocal refused
        if shared:
            with monkeypatch.context() as meanwhile:
                meanwhile.setattr(listening_sockets, "bind", bind)
                with pytest.raises(StartError, match="cannot listen on"):
                    listening_sockets.bind_each(HOST, port, other)
            refused += 1
        return bind(host, port, shared)

    monkeypatch.setattr(listening_sockets, "bind", bind_with_another_start)
    for listener in listening_sockets.bind_each(HOST, port, 3):
        listener.close()
    assert refused == 2


def test_every_listener_of_a_start_gets_connections() -> None:
    listeners = bind_each(HOST, free_port(), 3)
    with ExitStack() as stack:
        for listener in listeners:
            stack.enter_context(listener)
        address = listeners[0].getsockname()
        for _ in range(200):
            stack.enter_context(socket.create_connection(address, timeout=2))
        for listener in listeners:
            stack.enter_context(listener.accept()[0])
