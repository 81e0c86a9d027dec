"""The application on a real Redis Cluster of six nodes, in one process and in two roles."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.cluster_watch import (
    LOOK_SECONDS,
    SYMBOLS,
    THEIRS_SECONDS,
    Watch,
    assert_not_disturbed,
    fill_memory,
    on_cluster,
    seconds_until_replaced,
    started,
    symbols_of,
)
from tests.faults.conftest import RATE, WINDOW_MS, Record, StartApplication, seconds_until, wait_for_windows, wrong_rows
from tests.support.application import Application, ScriptedExchange, Traffic, now_ms
from tests.support.oracle import Rows, assert_rows_equal
from tests.support.redis_cluster import RedisCluster
from tests.support.roles import Roles, stop_all
from tests.support.servers import wait_until


@pytest.fixture
def servers(redis_cluster: RedisCluster, postgres_db: dict[str, Any]) -> dict[str, object]:
    return on_cluster(redis_cluster, postgres_db)


def test_one_process_runs_on_a_cluster(
    start: StartApplication, servers: dict[str, object], exchanges: list[ScriptedExchange], rows: Callable[[], Rows]
) -> None:
    application = start(servers)
    with Traffic(exchanges, SYMBOLS, rate=RATE) as traffic:
        seconds_until(lambda: application.get("/health")["status"] == "ok", 10)
        wait_for_windows(2)
        for symbol in SYMBOLS:
            application.get(f"/prices/latest/{symbol}")
            assert application.get(f"/prices/average/{symbol}?period=1s")["ticks"] > 0
        traffic.end()
        at = now_ms()
        wait_for_windows(1)
        seconds_until(lambda: not wrong_rows(rows(), traffic.sent, at), 5)
    assert application.stop()[0] == 0
    assert "Traceback" not in application.log


def test_both_roles_meet_in_a_cluster(
    roles: Roles, broadcasting: list[ScriptedExchange], rows: Callable[[], Rows]
) -> None:
    ingest, api = started(roles, broadcasting)
    with Traffic(broadcasting, SYMBOLS, rate=RATE) as traffic:
        wait_for_windows(2)
        for symbol in SYMBOLS:
            assert api.get(f"/prices/latest/{symbol}")["symbol"] == symbol
            assert api.get(f"/prices/average/{symbol}?period=1s")["ticks"] > 0
    stop_all(ingest, api)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)


def test_mode_switch_is_confirmed_through_a_cluster(roles: Roles, broadcasting: list[ScriptedExchange]) -> None:
    _, api = started(roles, broadcasting)
    assert api.switch("test") == {"mode": "test", "previous": "live"}
    wait_until(lambda: api.find("/prices/latest/COIN0"))
    assert api.switch("live") == {"mode": "live", "previous": "test"}


# Node loss


@pytest.mark.parametrize("number", range(3))
def test_killed_master_costs_its_buckets_three_seconds(
    roles: Roles,
    redis_cluster: RedisCluster,
    broadcasting: list[ScriptedExchange],
    rows: Callable[[], Rows],
    record_property: Record,
    number: int,
) -> None:
    """With a cluster-node-timeout of a second; all others go on, rows are exact and no answer is a 500.

    Also while the new master is refilled, with a minute of slices.
    """
    roles.settings["FLOW__MAX_CLOCK_SKEW_SECONDS"] = 600
    ingest, api = started(roles, broadcasting)
    fill_memory(broadcasting, rows)
    master = redis_cluster.masters()[number]
    theirs = symbols_of(redis_cluster, master)
    others = set(SYMBOLS) - theirs
    assert theirs
    assert others
    with Traffic(broadcasting, SYMBOLS, rate=300) as traffic, Watch(api, ingest) as watch:
        quiet_since = time.monotonic()
        wait_for_windows(4)
        watch.note_quiet(quiet_since)
        killed_at = time.monotonic()
        master.kill()
        promoted = seconds_until_replaced(redis_cluster, master)
        wait_for_windows(3)
        gap = watch.longest_gap(theirs, killed_at)
        record_property("seconds until the replica was promoted", promoted)
        record_property("gap of the dead master's symbols", gap)
        assert_not_disturbed(record_property, watch, others, killed_at)
        record_property("slowest answer", watch.slowest)
        record_property("answers", dict(watch.statuses))
        seconds_until(lambda: api.get("/health")["redis"] == "ok", 10)
        traffic.end()
        at = now_ms()
        wait_for_windows(1)
    master.start()
    assert wrong_rows(rows(), traffic.sent, at) == []
    assert watch.statuses.keys() <= {200, 503}, watch.refused[:10]
    # On a busy machine the cluster itself takes longer than the 2.2 to 2.5 s that it needs at this timeout.
    assert gap <= max(THEIRS_SECONDS, promoted + LOOK_SECONDS + 0.5)
    assert {*watch.health[-1].get("unavailable_symbols", [])} == set()
    assert theirs in [{*each.get("unavailable_symbols", [])} for each in watch.health]
    stop_all(ingest, api)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)


# Losses without a dead node


def is_refilled(api: Application) -> bool:
    return bool(api.get("/health")["redis"] == "ok")


def test_emptied_master_is_refilled_under_load(
    roles: Roles,
    redis_cluster: RedisCluster,
    broadcasting: list[ScriptedExchange],
    rows: Callable[[], Rows],
) -> None:
    ingest, api = started(roles, broadcasting)
    with Traffic(broadcasting, SYMBOLS, rate=300) as traffic, Watch(api) as watch:
        wait_for_windows(3)
        emptied = redis_cluster.masters()[0]
        theirs = symbols_of(redis_cluster, emptied)
        before = {symbol: api.get(f"/prices/average/{symbol}?period=10s")["ticks"] for symbol in theirs}
        emptied.call("FLUSHALL")
        seconds_until(lambda: int(emptied.call("DBSIZE")) > 0, 5)
        seconds_until(lambda: is_refilled(api), 5)
        for symbol, ticks in before.items():
            seconds_until(lambda s=symbol, t=ticks: api.get(f"/prices/average/{s}?period=10s")["ticks"] >= 0.8 * t, 5)  # type: ignore[misc]
    assert watch.statuses.keys() <= {200, 503}, watch.refused[:10]
    assert not watch.counted_twice(traffic.sent)
    stop_all(ingest, api)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)


def test_resharding_under_load_keeps_rows_and_answers(
    roles: Roles,
    redis_cluster: RedisCluster,
    broadcasting: list[ScriptedExchange],
    rows: Callable[[], Rows],
) -> None:
    """All slots of a master, the buckets of its symbols among them, move to another one."""
    ingest, api = started(roles, broadcasting)
    source, target, *_ = redis_cluster.masters()
    moving = symbols_of(redis_cluster, source)
    with Traffic(broadcasting, SYMBOLS, rate=100) as traffic, Watch(api) as watch:
        redis_cluster.reshard(
            source, target, sum(b - a + 1 for a, b, p in redis_cluster.slot_ranges() if p == source.port)
        )
        redis_cluster.wait_until_settled()
        moved_at = time.monotonic()
        assert moving
        assert moving <= symbols_of(redis_cluster, target)
        seconds_until(lambda: is_refilled(api), 10)
        seconds_until(lambda: all(watch.arrivals[symbol][-1] > moved_at for symbol in SYMBOLS), 5)
    assert watch.statuses.keys() <= {200, 503}, watch.refused[:10]
    assert not watch.counted_twice(traffic.sent)
    stop_all(ingest, api)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)
