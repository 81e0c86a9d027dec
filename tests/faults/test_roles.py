"""Ingest and API in separate processes: they share state and mode, and killed or frozen ones are replaced."""

import signal
import time
from collections.abc import Callable

import pytest

from marketflow.cluster.shard_table import LEASE_SECONDS
from marketflow.model import MINUTE_MS
from tests.faults.conftest import (
    RATE,
    WINDOW_MS,
    says,
    through,
    wait_for_windows,
    wait_until_connected,
)
from tests.support.application import Application, ScriptedExchange, Traffic, exchanges_setting, now_ms, switches
from tests.support.core_waits import CoreWaits
from tests.support.oracle import Rows, assert_rows_equal
from tests.support.proxy import Proxy
from tests.support.roles import IngestProcess, Roles, stop_all
from tests.support.servers import RedisServer, wait_until

# Apart


def test_api_processes_serve_what_the_ingest_process_writes(
    roles: Roles, exchanges: list[ScriptedExchange], rows: Callable[[], Rows]
) -> None:
    feeds, one, other = roles.ingest(), roles.api(), roles.api()
    for api in (one, other):
        wait_until(lambda api=api: api.get("/health")["status"] == "ok")  # type: ignore[misc]
        wait_until_connected(api, exchanges)
    for number, exchange in enumerate(exchanges):
        exchange.send(100.0 + number, 200.0 + number)
    for api in (one, other):
        wait_until(lambda api=api: api.find("/prices/latest/exchange3/BTCUSDT"))  # type: ignore[misc]
        assert api.get("/prices/latest/exchange3/BTCUSDT")["price"] == 202.0
        wait_until(lambda api=api: api.find("/prices/average/BTCUSDT", period="1m"))  # type: ignore[misc]
        assert api.get("/prices/highest/exchange2/BTCUSDT", period="1m")["price"] == 201.0
        assert api.get("/mode") == {"mode": "live"}
    exchanges[0].close()
    for api in (one, other):
        wait_until(lambda api=api: api.get("/health")["exchanges"]["exchange1"] == "connecting")  # type: ignore[misc]
    exchanges[0].open()
    stop_all(feeds, one, other)
    assert_rows_equal(rows(), [tick for exchange in exchanges for tick in exchange.sent], WINDOW_MS)


def test_mode_switch_reaches_every_api_process(roles: Roles) -> None:
    feeds, one, other = roles.ingest(), roles.api(), roles.api()
    wait_until(lambda: other.get("/mode") == {"mode": "live"})
    assert one.switch("test") == {"mode": "test", "previous": "live"}
    assert one.get("/mode") == {"mode": "test"}
    assert other.get("/mode") == {"mode": "test"}
    wait_until(lambda: set(other.get("/health")["exchanges"].values()) == {"generated"})
    assert other.switch("test") == {"mode": "test", "previous": "test"}
    wait_until(lambda: other.find("/prices/latest/BTCUSDT"))
    assert other.switch("live") == {"mode": "live", "previous": "test"}
    assert other.http.get("/prices/latest/BTCUSDT").status_code == 404
    stop_all(feeds, one, other)
    both = ["mode switched to test by", "mode switched to live by"]
    assert [switches(process.log) for process in (feeds, one, other)] == [both, both[:1], both[1:]]


def test_missing_leader_degrades_health_and_refuses_switch(roles: Roles) -> None:
    api = roles.api()

    def assert_alone(mode: str) -> None:
        health = api.get("/health")
        assert (health["status"], health["mode"], set(health["exchanges"].values())) == (
            "degraded",
            mode,
            {"connecting"},
        )
        answer = api.http.post("/mode/test")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.headers["content-type"] == "application/problem+json"

    assert_alone("live")
    feeds = roles.ingest()
    wait_until(lambda: api.get("/health")["status"] == "ok")
    api.switch("test")
    stop_all(feeds)
    wait_until(lambda: api.get("/health")["status"] == "degraded")
    assert_alone("test")  # still about what ran last
    stop_all(api)


def test_frozen_owner_adopts_the_mode_when_it_can(roles: Roles) -> None:
    feeds, api = roles.ingest(), roles.api()
    wait_until(lambda: api.get("/health")["status"] == "ok")
    feeds.process.send_signal(signal.SIGSTOP)
    answer = api.http.post("/mode/test")
    assert answer.status_code == 503
    assert "not yet adopted by the owners of exchange1, exchange2, exchange3" in answer.json()["detail"]
    feeds.process.send_signal(signal.SIGCONT)
    wait_until(lambda: set(api.get("/health")["exchanges"].values()) == {"generated"})
    assert api.get("/mode") == {"mode": "test"}
    assert api.switch("test") == {"mode": "test", "previous": "test"}
    stop_all(feeds, api)


def test_api_process_restart_changes_nothing(
    roles: Roles, exchanges: list[ScriptedExchange], rows: Callable[[], Rows]
) -> None:
    feeds, api = roles.ingest(), roles.api(MODE="test")
    wait_until_connected(api, exchanges)
    with Traffic(exchanges, rate=RATE) as traffic:
        for _ in range(2):
            wait_for_windows(1)
            api.kill()
            api.start()
            assert api.get("/mode") == {"mode": "live"}  # the configured one is that of the feeds
    stop_all(feeds, api)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)


# Standing by


def shards(api: Application) -> dict[str, tuple[str, str, str]]:
    """Return owner, standby and its state of each shard."""
    listed = api.get("/health").get("shards", [])
    return {each["shard"]: (each["owner"], each["standby"], each["standby_state"]) for each in listed}


def are_warm(api: Application) -> bool:
    return {state for _, _, state in shards(api).values()} == {"warm"}


def are_spread(api: Application) -> bool:
    """Return whether all standbys are warm and two processes share the shards: no shard moves then."""
    return are_warm(api) and len({owner for owner, _, _ in shards(api).values()}) == 2


def test_standby_takes_over_minute_and_mode_of_killed_owner(
    roles: Roles, broadcasting: list[ScriptedExchange], rows: Callable[[], Rows]
) -> None:
    roles.settings |= {"FLOW__WINDOW_SECONDS": 60, "MODE": "test"}
    wait_until(lambda: now_ms() % MINUTE_MS < 40_000, timeout=21)
    first, second, api = roles.ingest(), roles.ingest(), roles.api()
    wait_until(lambda: {state for _, _, state in shards(api).values()} == {"cold"})
    assert api.switch("live")["previous"] == "test"
    wait_until_connected(api, broadcasting)
    wait_until(lambda: are_warm(api))
    with Traffic(broadcasting, rate=RATE) as traffic:
        enough = traffic.count + 300
        wait_until(lambda: traffic.count >= enough)
        first.kill()
        wait_until(lambda: {state for _, _, state in shards(api).values()} == {"none"})
        wait_until_connected(api, broadcasting)
        assert api.get("/mode") == {"mode": "live"}
        enough = traffic.count + 100
        wait_until(lambda: traffic.count >= enough)
    stop_all(second, api)
    assert_rows_equal(live(rows()), traffic.sent, MINUTE_MS)


def live(rows: Rows) -> Rows:
    return {slot: row for slot, row in rows.items() if slot.series.mode == "live"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_one_process_and_leaves_others_alone(roles: Roles, number: int) -> None:
    first, second, api = roles.ingest(), roles.ingest(), roles.api()
    wait_until(lambda: len(shards(api)) == 3)
    code, seconds = second.stop(number)
    assert (code, first.process.poll()) == (0, None)
    assert seconds < 3
    third = roles.ingest()
    owner = f"/{first.process.pid}"
    wait_until(lambda: any(each[0].endswith(owner) for each in shards(api).values()))
    stop_all(first, third, api)


def test_emptied_redis_changes_no_owner(
    roles: Roles, broadcasting: list[ScriptedExchange], redis_db: RedisServer, rows: Callable[[], Rows]
) -> None:
    first, second, api = roles.ingest(), roles.ingest(), roles.api()
    wait_until_connected(api, broadcasting)
    wait_until(lambda: are_spread(api))
    before = shards(api)
    with Traffic(broadcasting, rate=RATE) as traffic, redis_db.client() as client:
        for _ in range(3):
            client.flushall()
            wait_for_windows(1)
            wait_until(lambda: shards(api) == before)
    api.switch("test")
    stop_all(second, first)
    assert_rows_equal(live(rows()), traffic.sent, WINDOW_MS)
    roles.ingest()
    wait_until(lambda: api.get("/mode") == {"mode": "live"})


def frozen_for(feeds: IngestProcess, seconds: float) -> int:
    """Freeze until `thaw`, for at least `seconds`; return when it began (Unix ms)."""
    frozen_at = now_ms()
    feeds.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: now_ms() >= frozen_at + seconds * 1000, timeout=seconds + 1)
    return frozen_at


def test_frozen_owner_not_replaced_writes_all(
    roles: Roles, exchanges: list[ScriptedExchange], rows: Callable[[], Rows], redis_proxy: Proxy
) -> None:
    roles.settings |= {"FLOW__MAX_CLOCK_SKEW_SECONDS": 1}
    feeds = roles.ingest(REDIS__PORT=redis_proxy.port)
    with Traffic(exchanges, rate=RATE):
        wait_for_windows(1)
    redis_proxy.refuse()
    frozen_for(feeds, 3)
    feeds.process.send_signal(signal.SIGCONT)
    with Traffic(exchanges, rate=RATE) as traffic:
        wait_for_windows(2)
        redis_proxy.heal()
    stop_all(feeds)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)


def test_process_of_both_roles_never_stands_by(
    roles: Roles, exchanges: list[ScriptedExchange], redis_proxy: Proxy
) -> None:
    both = roles.both(REDIS__PORT=redis_proxy.port)
    api, standing, second = roles.api(), roles.ingest(), roles.both()
    assert standing.stands_by()
    wait_until(lambda: "takes ticks into the same Redis, too" in second.log)
    stop_all(second)
    assert "takes ticks into" not in both.log
    wait_until(lambda: api.get("/health")["status"] == "ok")
    assert api.switch("test") == {"mode": "test", "previous": "live"}
    assert both.get("/mode") == {"mode": "test"}
    assert both.switch("live") == {"mode": "live", "previous": "test"}
    wait_until(lambda: api.get("/mode") == {"mode": "live"})
    stop_all(standing)
    redis_proxy.refuse()
    assert both.switch("test") == {"mode": "test", "previous": "live"}
    wait_until(lambda: api.http.post("/mode/live").status_code == 503)
    redis_proxy.heal()
    wait_until(lambda: api.get("/mode") == {"mode": "test"})
    stop_all(both, api)


# Outages of Redis


def test_redis_outage_of_both_roles_keeps_rows_exact(
    roles: Roles, broadcasting: list[ScriptedExchange], redis_proxy: Proxy, rows: Callable[[], Rows]
) -> None:
    roles.settings = through(roles.settings, redis=redis_proxy)
    first, second, api = roles.ingest(), roles.ingest(), roles.api()
    wait_until_connected(api, broadcasting)
    questions = ("/prices/latest/BTCUSDT", "/prices/average/BTCUSDT?period=1m", "/prices/highest/BTCUSDT", "/mode")
    with Traffic(broadcasting, rate=RATE) as traffic:
        wait_until(rows)
        for fault in (redis_proxy.refuse, redis_proxy.swallow):
            fault()
            wait_until(says(api, "redis", "down"))
            until = time.monotonic() + LEASE_SECONDS + 2
            with CoreWaits.of_tests() as waits:
                while time.monotonic() < until:
                    for question in questions:
                        began = time.monotonic()
                        answer = api.http.get(question)
                        assert answer.status_code == 200, (question, answer.text)
                        assert waits.seconds_since(began) < 1.5, question
                    answer = api.http.post("/mode/test")
                    assert (answer.status_code, answer.headers.get("retry-after")) == (503, "1")
            assert api.get("/mode") == {"mode": "live"}
            assert set(api.get("/health")["exchanges"].values()) == {"connecting"}
            redis_proxy.heal()
            wait_until_connected(api, broadcasting)
            wait_until(says(api, "redis", "ok"))
    stop_all(second, first, api)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)


def test_api_process_starts_without_redis(roles: Roles, exchanges: list[ScriptedExchange], redis_proxy: Proxy) -> None:
    feeds = roles.ingest()
    redis_proxy.refuse()
    api = roles.api(MODE="test", REDIS__PORT=redis_proxy.port)
    assert api.get("/mode") == {"mode": "test"}  # nothing else is known
    redis_proxy.heal()
    wait_until_connected(api, exchanges)
    assert api.get("/mode") == {"mode": "live"}
    stop_all(feeds, api)


def test_ingest_started_without_redis_yields_to_the_owner(
    roles: Roles, broadcasting: list[ScriptedExchange], redis_proxy: Proxy, rows: Callable[[], Rows]
) -> None:
    exchanges = broadcasting[:1]
    roles.settings["EXCHANGES"] = exchanges_setting(*exchanges)
    first = roles.ingest()
    wait_until(lambda: exchanges[0].clients)
    redis_proxy.refuse()
    with Traffic(exchanges, rate=RATE) as traffic:
        second = roles.ingest(REDIS__PORT=redis_proxy.port)
        assert second.takes_ticks()
        wait_for_windows(2)
        redis_proxy.heal()
        wait_until(second.stands_by)
        wait_for_windows(1)
    stop_all(first, second)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)


def test_one_failed_call_of_the_table_makes_no_second_owner(
    roles: Roles, exchanges: list[ScriptedExchange], redis_proxy: Proxy
) -> None:
    first = roles.ingest()
    wait_until(lambda: all(exchange.clients for exchange in exchanges))
    redis_proxy.cut_after(b"EVAL")
    second = roles.ingest(REDIS__PORT=redis_proxy.port)
    assert redis_proxy.was_cut.is_set()
    assert "ingesting all shards" not in second.log
    stop_all(second, first)


def test_takeover_by_one_that_wrote_meanwhile_counts_no_tick_twice(
    roles: Roles, broadcasting: list[ScriptedExchange], redis_proxy: Proxy, rows: Callable[[], Rows]
) -> None:
    """It has ticks of its own when it reads those of the other process."""
    wait_until(lambda: now_ms() % MINUTE_MS < 40_000, timeout=21)
    exchanges = broadcasting[:1]
    roles.settings |= {"EXCHANGES": exchanges_setting(*exchanges), "FLOW__WINDOW_SECONDS": 60}
    first = roles.ingest()
    wait_until(lambda: exchanges[0].clients)
    with Traffic(exchanges, rate=RATE) as traffic:
        wait_until(lambda: traffic.count >= 100)
        redis_proxy.refuse()
        second = roles.ingest(REDIS__PORT=redis_proxy.port)
        wait_until(lambda: len(exchanges[0].clients) == 2)
        enough = traffic.count + 100
        wait_until(lambda: traffic.count >= enough)
        redis_proxy.heal()
        wait_until(second.stands_by)
        enough = traffic.count + 300
        wait_until(lambda: traffic.count >= enough)
        assert first.stop()[0] == 0
        wait_until(lambda: second.log.count("takes ticks in") == 2)
        enough = traffic.count + 100
        wait_until(lambda: traffic.count >= enough)
    stop_all(second)
    assert_rows_equal(rows(), traffic.sent, MINUTE_MS)


STUCK = """
import sys, threading
from marketflow.cli import main
from marketflow.runtime import engine
from marketflow.pipeline import branches
branches.STALLED_SECONDS = 2.0
write = engine._StartingArchive.write
def stuck(self, minutes, on_written=None):
    return threading.Event().wait() if minutes and self.available else write(self, minutes, on_written)
engine._StartingArchive.write = stuck
sys.exit(main.main())
"""
"""Writes of rows to PostgreSQL never end, as in a bug, once it has answered."""


@pytest.mark.parametrize("apart", [True, False])
def test_stalled_branch_is_logged_counted_and_degrades_health(roles: Roles, apart: bool) -> None:
    program = ("-c", STUCK)
    roles.settings["MODE"] = "test"
    feeds: Application = roles.ingest(program) if apart else roles.both(program)
    api = roles.api() if apart else feeds
    wait_until(lambda: 'marketflow_branch_stalls_total{branch="archive"} 1.0' in api.http.get("/metrics").text)

    def stores() -> list[str]:
        health = api.get("/health")
        assert health["status"] == "degraded"
        return [health["redis"], health["postgres"]]

    wait_until(lambda: stores() == ["ok", "ok"])
    assert api.get("/health")["stalled"] == ["archive"]
    wait_until(lambda: "a branch has stalled: work has waited for 2 s branch=archive" in feeds.log)


def test_standby_ingests_in_redis_outage_and_steps_back_after(
    roles: Roles, broadcasting: list[ScriptedExchange], redis_proxy: Proxy, rows: Callable[[], Rows]
) -> None:
    impatient = (
        "import sys; from marketflow.cli import main; from marketflow.cluster import member;"
        "member.ALONE_SECONDS = 1.0; sys.exit(main.main())"
    )
    exchanges = broadcasting[:1]
    roles.settings["EXCHANGES"] = exchanges_setting(*exchanges)
    first, second = roles.ingest(), roles.ingest(("-c", impatient), REDIS__PORT=redis_proxy.port)
    assert second.stands_by()
    with Traffic(exchanges, rate=RATE) as traffic:
        redis_proxy.refuse()
        wait_until(second.takes_ticks)
        wait_for_windows(2)
        redis_proxy.heal()
        wait_until(lambda: second.log.count("stands by: ") == 2)
        wait_for_windows(1)
    stop_all(first, second)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)


def test_second_signal_ends_ingest_process_at_once(
    roles: Roles, exchanges: list[ScriptedExchange], redis_proxy: Proxy, postgres_proxy: Proxy
) -> None:
    roles.settings = through(roles.settings, redis_proxy, postgres_proxy)
    feeds = roles.ingest()
    with Traffic(exchanges, rate=RATE, coming_and_going=True):
        wait_for_windows(1)
        redis_proxy.swallow()
        postgres_proxy.swallow()
        wait_for_windows(1)
        feeds.process.send_signal(signal.SIGINT)
        wait_until(lambda: "stopping" in feeds.log)
        code, seconds = feeds.stop()
    assert code == 0
    assert seconds < 2
    assert "second signal: stopping at once" in feeds.log
