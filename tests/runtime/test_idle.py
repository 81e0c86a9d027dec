"""What the default command costs while nothing ticks and nobody asks, in counts that do not depend on the machine."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from marketflow.embedded import EmbeddedRedis
from marketflow.embedded.server_process import find_servers
from tests.support.application import Application, ScriptedExchange, exchanges_setting
from tests.support.process_counters import context_switches, cpu_seconds
from tests.support.servers import wait_until

SECONDS = 10.0

MOST_WAKES = 12.0
"""A second, of all threads: 8 to 9 are expected, with a look of each of three feeds every 2 s, and up to 12 where
twenty processes wait for a core; 16 to 19 with a pool that wakes two threads for each call and a ping of PostgreSQL
each second, 36 with timers of their own for each part."""

MOST_WAKES_OF_REDIS = 8.0
"""The same of the embedded Redis: 5 were measured, and 13 with the default of its `hz`."""

MOST_CPU = 0.008
"""Of a core: 0.003 to 0.004 were measured. With a margin for a machine whose caches others use."""


@pytest.fixture
def idle(server_folder: Path, exchanges: list[ScriptedExchange]) -> Iterator[Application]:
    """Live mode in one process with embedded servers, connected to exchanges that are silent."""
    given = {"MODE": "live", "EXCHANGES": exchanges_setting(*exchanges), "FLOW__STALE_AFTER_SECONDS": 600}
    with Application(server_folder, given) as application:
        for exchange in exchanges:
            exchange.client()
        wait_until(lambda: application.get("/health")["postgres"] == "ok")
        application.http.close()
        yield application


class Use(NamedTuple):
    """How often threads have waited since the start of their process, and the CPU time of the application."""

    wakes: int
    wakes_of_redis: int
    cpu: float


def use_so_far(application: Application) -> Use:
    """Of the application and its embedded Redis."""
    pid = application.process.pid
    (redis,) = find_servers(EmbeddedRedis.program, application.folder / "data" / "redis")
    return Use(context_switches(pid).voluntary, context_switches(redis.pid).voluntary, cpu_seconds(pid))


@pytest.mark.long
def test_idle_application_rarely_wakes(idle: Application) -> None:
    """The first seconds connect and load; after them, the quietest of three times counts."""
    measured = []
    for _ in range(4):
        began, before = time.monotonic(), use_so_far(idle)
        time.sleep(SECONDS / 4)
        elapsed = time.monotonic() - began
        measured.append([(now - then) / elapsed for now, then in zip(use_so_far(idle), before, strict=True)])
    wakes, wakes_of_redis, cpu = (min(values) for values in zip(*measured[1:], strict=True))
    assert wakes < MOST_WAKES
    assert wakes_of_redis < MOST_WAKES_OF_REDIS
    assert cpu < MOST_CPU
