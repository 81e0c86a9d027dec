"""Faults of a Redis Cluster other than the death of a master, and of processes that end meanwhile."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from marketflow.stores.redis.buckets.writes_by_master import PATIENCE_SECONDS
from tests.faults.cluster_watch import OTHERS_SECONDS, SYMBOLS, THEIRS_SECONDS, Watch, symbols_of, watched
from tests.faults.conftest import LATE_MS, WINDOW_MS, WINDOW_SECONDS, Record, wait_for_windows, wait_until_connected
from tests.faults.test_roles import Broadcasting, Roles, stop_all
from tests.support.application import Application, ScriptedExchange, Traffic, exchanges_setting
from tests.support.oracle import Rows, assert_rows_equal
from tests.support.redis_cluster import RedisCluster
from tests.support.servers import wait_until


@pytest.fixture
def exchanges() -> Iterator[list[ScriptedExchange]]:
    """Exchanges that send every process the same ticks."""
    with ExitStack() as stack:
        yield [stack.enter_context(Broadcasting(f"exchange{n}")) for n in (1, 2, 3)]


@pytest.fixture
def processes(
    server_folder: Path, postgres_db: dict[str, Any], exchanges: list[ScriptedExchange]
) -> Iterator[Callable[..., Roles]]:
    """Start processes on a Redis Cluster, with these settings."""
    with ExitStack() as stack:

        def on(cluster: RedisCluster, **settings: object) -> Roles:
            given: dict[str, object] = {
                **{f"POSTGRES__{name.upper()}": value for name, value in postgres_db.items()},
                "REDIS__NODES": cluster.addresses[0],
                "SYMBOLS": ",".join(SYMBOLS),
                "MODE": "live",
                "EXCHANGES": exchanges_setting(*exchanges),
                "FLOW__WINDOW_SECONDS": WINDOW_SECONDS,
                "FLOW__LATE_AFTER_SECONDS": LATE_MS / 1000,
                "FLOW__RECONNECT_AFTER_SECONDS": 0.1,
            }
            return Roles(stack, server_folder, given | settings)

        yield on


def started(roles: Roles, exchanges: list[ScriptedExchange]) -> tuple[Application, Application]:
    """An ingest process and an API process, which both work."""
    ingest, api = roles.feeds(), roles.api()
    wait_until_connected(api, exchanges)
    wait_until(lambda: api.get("/health")["status"] == "ok", 10)
    return ingest, api


def assert_answers_good(watch: Watch) -> None:
    """Each answer was a 200, or a 503 that names what is missing."""
    assert watch.statuses.keys() <= {200, 503}, watch.refused[:10]
    assert not [each for each in watch.refused if "unavailable" not in each[2]]
    assert watch.slowest < 1.5


def assert_others_go_on(
    record: Record, watch: Watch, since: float, theirs: set[str], quiet: dict[str, float], promoted: float
) -> None:
    """No gap in the prices is longer than by the death of a master, that of other symbols least of all."""
    gaps = {symbol: watch.longest_gap(symbol, since) for symbol in SYMBOLS}
    gap, others = max(gaps[each] for each in theirs), max(gaps[each] for each in set(SYMBOLS) - theirs)
    record("gap of its symbols", gap)
    record("longest gap of others", others)
    record("longest gap without a fault", max(quiet.values()))
    record("slowest answer", watch.slowest)
    record("answers", dict(watch.statuses))
    record("refused", watch.refused[:3])
    assert gap <= max(THEIRS_SECONDS, promoted + 0.5)
    assert others <= max(OTHERS_SECONDS, 1.5 * max(quiet.values())) + PATIENCE_SECONDS


def test_frozen_master_disturbs_no_others(
    processes: Callable[..., Roles],
    redis_cluster: RedisCluster,
    exchanges: list[ScriptedExchange],
    rows: Callable[[], Rows],
    record_property: Record,
) -> None:
    """It returns with old data and takes itself for a master at first."""
    ingest, api = started(processes(redis_cluster), exchanges)
    master = redis_cluster.masters()[1]
    theirs = symbols_of(redis_cluster, master)
    with Traffic(exchanges, SYMBOLS, rate=300) as traffic, watched(api) as watch:
        quiet_since = time.monotonic()
        wait_for_windows(2)
        quiet = {symbol: watch.longest_gap(symbol, quiet_since) for symbol in SYMBOLS}
        frozen_at = time.monotonic()
        with redis_cluster.frozen(master):
            wait_until(lambda: not symbols_of(redis_cluster, master), 20)
            promoted = time.monotonic() - frozen_at
            wait_for_windows(2)
        wait_for_windows(2)
        assert_others_go_on(record_property, watch, frozen_at, theirs, quiet, promoted)
        wait_until(lambda: api.get("/health")["redis"] == "ok", 10)
    stop_all(ingest, api)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)
    assert_answers_good(watch)
