"""Whether exchanges accept a connection: real sockets, and how often they are asked."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from marketflow.feeds.reachability import KEPT_SECONDS, Reachability, ReachabilityProbe
from marketflow.settings import ExchangeSettings

HOST = "127.0.0.1"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server((HOST, 0)) as server:
        server.setblocking(False)
        yield server


def place(server: socket.socket) -> str:
    return f"{HOST}:{server.getsockname()[1]}"


def accepted(server: socket.socket) -> int:
    """Accept whatever waits; return how much it was."""
    count = 0
    while True:
        try:
            server.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1


def test_listening_exchange_is_reachable_and_another_refuses(listener: socket.socket) -> None:
    with socket.create_server((HOST, 0)) as closed:
        refusing = place(closed)
    exchanges = (
        ExchangeSettings(name="exchange1", address=place(listener)),
        ExchangeSettings(name="exchange2", address=refusing),
        ExchangeSettings(name="exchange3", venue="binance", url=f"ws://user:secret@{refusing}/ws"),
    )
    results = asyncio.run(ReachabilityProbe(lambda: exchanges).results())
    assert results[:2] == [
        Reachability("exchange1", place(listener), None),
        Reachability("exchange2", refusing, "Connection refused"),
    ]
    assert "Connection refused" in (results[2].error or "")
    assert "secret" not in repr(results)


def test_name_that_cannot_be_resolved_is_named() -> None:
    exchanges = (ExchangeSettings(name="exchange1", address="does-not-exist.invalid:40101"),)
    (result,) = asyncio.run(ReachabilityProbe(lambda: exchanges).results())
    assert result.error
    assert "Errno" not in result.error


def test_lookup_that_hangs_takes_no_thread_of_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marketflow.feeds.reachability.CONNECT_SECONDS", 0.05)
    going = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: going.wait(30))
    exchanges = tuple(ExchangeSettings(name=f"e{number}", address="hangs.invalid:1") for number in range(100))

    async def ask() -> str:
        results = await ReachabilityProbe(lambda: exchanges).results()
        assert {result.error for result in results} == {"no answer within 0.05 s"}
        return await asyncio.wait_for(asyncio.to_thread(str, 7), 5)

    began = time.monotonic()
    assert asyncio.run(ask()) == "7"
    assert time.monotonic() - began < 5
    going.set()


def test_silent_venue_is_unreachable_in_time(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    monkeypatch.setattr("marketflow.feeds.reachability.CONNECT_SECONDS", 0.05)
    exchanges = (ExchangeSettings(name="binance", venue="binance", url=f"ws://{place(listener)}/ws"),)
    (result,) = asyncio.run(ReachabilityProbe(lambda: exchanges).results())
    assert result.error == "no answer within 0.05 s"


def test_many_questions_are_one_connection(listener: socket.socket) -> None:
    now = 0.0
    exchanges = (ExchangeSettings(name="exchange1", address=place(listener)),)

    async def ask() -> None:
        nonlocal now
        probe = ReachabilityProbe(lambda: exchanges, lambda: now)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(20):
                tasks.create_task(probe.results())
        assert accepted(listener) == 1
        now += KEPT_SECONDS
        await probe.results()
        assert accepted(listener) == 0
        now += 0.1
        await probe.results()
        assert accepted(listener) == 1

    asyncio.run(ask())


def test_caller_that_leaves_does_not_end_the_attempt(listener: socket.socket) -> None:
    exchanges = (ExchangeSettings(name="exchange1", address=place(listener)),)

    async def ask() -> None:
        probe = ReachabilityProbe(lambda: exchanges)
        first, second = (asyncio.create_task(probe.results()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert [result.error for result in await second] == [None]
        assert accepted(listener) == 1

    asyncio.run(ask())
