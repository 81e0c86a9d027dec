"""Ports for servers of tests are given once, and can be bound by the server they were given to."""

import random
import socket
import subprocess
import sys

import pytest

from tests.support.servers import HOST, free_port

OTHER_PROCESS = """
import random, sys
from tests.support.servers import free_port
ports = iter(map(int, sys.argv[1:]))
random.randrange = lambda low, high: next(ports)
print(free_port())
"""


def test_free_port_is_given_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    first = free_port()
    drawn = iter([first, first, first + 1, first + 2, first + 3])
    monkeypatch.setattr(random, "randrange", lambda low, high: next(drawn))
    assert free_port() > first


def test_free_port_is_given_to_one_process_alone() -> None:
    port = free_port()
    drawn = [str(port + more) for more in (0, 0, 1, 2, 3)]
    found = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, *drawn], capture_output=True, text=True, check=True
    ).stdout
    assert int(found) > port


def test_free_port_can_be_listened_on_and_refuses_until_then() -> None:
    port = free_port()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, port), timeout=5)
    with socket.create_server((HOST, port)), socket.create_connection((HOST, port), timeout=5) as client:
        assert client.getpeername() == (HOST, port)
    with socket.create_server(("", port)):
        pass
