"""The engine as other processes see it."""

import gc
import socket
import sys
import threading
from collections.abc import Collection, Iterator

import pytest

from marketflow.clock import system_clock
from marketflow.errors import Starting, Unavailable
from marketflow.resources import resource
from marketflow.runtime import engine as engine_module
from marketflow.runtime.engine import Engine
from marketflow.settings import load
from tests.support.servers import HOST, free_port, wait_until


@pytest.fixture
def interpreter() -> Iterator[None]:
    """The settings of the interpreter, which an engine changes."""
    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    yield
    gc.set_threshold(*threshold)
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("interpreter")
def test_shard_has_an_owner_once_its_feeds_have_begun() -> None:
    """Before that, there is nothing that the owner could report of it. Here it waits for a Redis that hangs."""
    settings = load()
    with socket.create_server((HOST, 0)) as hanging:
        redis, postgres = {"host": HOST, "port": hanging.getsockname()[1]}, {"host": HOST, "port": free_port()}
        ddl = resource("ddl")
        engine = Engine(settings, redis, postgres, ddl, system_clock, settings.mode, lambda: None, is_alone=False)
        engine.start()
        try:
            engine.assign(["exchange1"], [], leads=True)
            assert engine.shards()["exchange1"].state == "connecting"
            wait_until(lambda: engine.shards()["exchange1"].state == "owner")
            assert [feed.exchange for feed in engine.feeds[settings.mode]] == ["exchange1"]
        finally:
            engine.force_stop()
            engine.stop()


def test_published_state_waits_for_no_assignment() -> None:
    """The lease is renewed by the call that publishes it."""
    settings = load()
    down = {"host": HOST, "port": free_port()}
    engine = Engine(settings, down, down, resource("ddl"), system_clock, settings.mode, lambda: None, is_alone=False)
    assigning, assigned = threading.Event(), threading.Event()

    def assign_slowly(_: object) -> None:
        assigning.set()
        assigned.wait(10)

    published: list[Collection[str]] = []

    def publish() -> None:
        published.extend([engine.ready(), engine.shards(), engine.state().exchanges, engine.counters().exchanges])

    engine.ownership.changes().subscribe(assign_slowly)
    try:
        assignment = threading.Thread(target=engine.assign, args=(["exchange1"], [], False))
        assignment.start()
        assert assigning.wait(10)
        publication = threading.Thread(target=publish, daemon=True)
        publication.start()
        publication.join(5)
        assert published == [frozenset(), {}, {}, {}]
        assigned.set()
        assignment.join(10)
        assert {*engine.shards()} == {"exchange1"}
    finally:
        assigned.set()
        engine.stop()


def test_archive_that_starts_for_a_minute_is_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "ARCHIVE_START_SECONDS", 0.01)
    monkeypatch.setattr(engine_module, "ARCHIVE_OUTAGE_SECONDS", 0.1)
    archive = engine_module._StartingArchive({"host": HOST, "port": free_port()}, resource("ddl"), 200)
    archive.started = threading.Event()
    with pytest.raises(Starting):
        archive.write({})

    def is_outage() -> bool:
        with pytest.raises(Unavailable) as raised:
            archive.write({})
        return not isinstance(raised.value, Starting)

    wait_until(is_outage)
