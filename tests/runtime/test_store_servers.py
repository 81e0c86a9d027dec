"""Embedded servers for as long as the application lives: supervised, and none left when it ends."""

import asyncio
import errno
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from marketflow.embedded import EmbeddedPostgres, EmbeddedRedis
from marketflow.embedded.guardian import guardian
from marketflow.embedded.server_process import find_servers
from marketflow.errors import StartError
from marketflow.runtime.store_servers import running_servers
from marketflow.settings import Settings, load
from tests.support.servers import HOST, wait_until


@pytest.fixture
def settings(server_folder: Path) -> Settings:
    return load(None, {"data_dir": str(server_folder / "data"), "postgres.host": HOST})


def redis_of(settings: Settings) -> list[int]:
    return [process.pid for process in find_servers("redis-server", settings.data_dir / "redis")]


def test_stop_during_a_restart_leaves_no_server(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that starts it again begins only when all servers have been stopped."""
    reviving, stopped, revived = threading.Event(), threading.Event(), threading.Event()
    revive, stop = EmbeddedRedis.revive, EmbeddedRedis.stop

    def late(server: EmbeddedRedis) -> None:
        if reviving.is_set() or server.process is None:
            return revive(server)
        reviving.set()
        stopped.wait(10)
        try:
            return revive(server)
        finally:
            revived.set()

    def stop_and_say_so(server: EmbeddedRedis) -> None:
        stop(server)
        if reviving.is_set():
            stopped.set()

    monkeypatch.setattr(EmbeddedRedis, "revive", late)
    monkeypatch.setattr(EmbeddedRedis, "stop", stop_and_say_so)

    async def run() -> None:
        async with running_servers(settings, asyncio.Event(), asyncio.Event()):
            os.kill(redis_of(settings)[0], signal.SIGKILL)
            await asyncio.to_thread(reviving.wait, 10)

    asyncio.run(run())
    assert revived.wait(10)
    assert redis_of(settings) == []


def test_died_server_is_restarted(settings: Settings, log: list[str]) -> None:
    async def run() -> None:
        async with running_servers(settings, asyncio.Event(), asyncio.Event()):
            (killed,) = redis_of(settings)
            os.kill(killed, signal.SIGKILL)
            await asyncio.to_thread(wait_until, lambda: set(redis_of(settings)) - {killed})

    asyncio.run(run())
    assert redis_of(settings) == []
    assert any("has died; starting it again" in line for line in log)


def test_killed_watcher_is_replaced(settings: Settings) -> None:
    async def run() -> None:
        async with running_servers(settings, asyncio.Event(), asyncio.Event()):
            (killed,) = guardian.watcher_pids
            os.kill(killed, signal.SIGKILL)
            await asyncio.to_thread(wait_until, lambda: guardian.watcher_pids not in ([], [killed]))

    asyncio.run(run())


def test_died_server_is_restarted_where_the_kernel_reports_no_end(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(_: int) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", unknown)
    test_died_server_is_restarted(settings, ["has died; starting it again"])


def test_supervision_leaves_no_descriptor_open(settings: Settings) -> None:
    async def run() -> None:
        async with running_servers(settings, asyncio.Event(), asyncio.Event()):
            (killed,) = redis_of(settings)
            os.kill(killed, signal.SIGKILL)
            await asyncio.to_thread(wait_until, lambda: set(redis_of(settings)) - {killed})

    asyncio.run(run())  # what is loaded and opened once
    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(run())
    assert len(os.listdir("/proc/self/fd")) == before


def test_stop_aborts_a_start(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    told = asyncio.Event()

    async def run() -> None:
        async def tell_once_it_runs() -> None:
            await asyncio.to_thread(wait_until, lambda: redis_of(settings))
            told.set()

        telling = asyncio.create_task(tell_once_it_runs())
        with pytest.raises(StartError):
            async with running_servers(settings, told, asyncio.Event()):
                pytest.fail("it started")
        await telling

    def silent(*_: Any) -> Any:
        from marketflow.embedded.child_server import Answer

        return Answer.BUSY

    monkeypatch.setattr(EmbeddedRedis, "probe", silent)
    asyncio.run(run())
    assert redis_of(settings) == []


def with_postgres(server_folder: Path) -> Settings:
    return load(None, {"data_dir": str(server_folder / "data"), "redis.host": HOST})


def test_block_runs_while_postgres_starts(server_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_start = threading.Event()
    monkeypatch.setattr(EmbeddedPostgres, "revive", lambda _: may_start.wait(10))

    async def run() -> None:
        settings, failures = with_postgres(server_folder), list[StartError]()
        async with running_servers(settings, asyncio.Event(), asyncio.Event(), failures.append) as servers:
            assert not servers.postgres_started.is_set()
            may_start.set()
            await asyncio.to_thread(servers.postgres_started.wait, 10)
        assert not failures

    asyncio.run(run())


def test_postgres_that_cannot_start_is_reported(server_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: EmbeddedPostgres) -> None:
        raise StartError("no space left")

    monkeypatch.setattr(EmbeddedPostgres, "revive", fail)

    async def run() -> StartError:
        reported: asyncio.Future[StartError] = asyncio.get_running_loop().create_future()
        settings = with_postgres(server_folder)
        async with running_servers(settings, asyncio.Event(), asyncio.Event(), reported.set_result) as servers:
            error = await asyncio.wait_for(reported, 10)
            assert not servers.postgres_started.is_set()
        assert servers.postgres_started.is_set(), "a thread would wait for it for ever"
        return error

    assert str(asyncio.run(run())) == "no space left"
