"""The engine as other processes see it."""

import gc
import socket
import sys
from collections.abc import Iterator

import pytest

from marketflow.clock import system_clock
from marketflow.resources import resource
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
