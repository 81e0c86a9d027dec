"""Feeds and API in processes of their own: what one does the others see, and who is killed or frozen is replaced."""

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from marketflow.cluster.shard_table import LEASE_SECONDS
from marketflow.model import MINUTE_MS, SLICE_MS
from marketflow.stores.redis import keys
from tests.faults.conftest import (
    LATE_MS,
    RATE,
    WINDOW_MS,
    WINDOW_SECONDS,
    Record,
    lost,
    says,
    seconds_until,
    through,
    wait_for_windows,
    wait_until_connected,
)
from tests.support.application import Application, ScriptedExchange, Traffic, exchanges_setting, now_ms
from tests.support.oracle import Rows, assert_rows_equal
from tests.support.proxy import Proxy
from tests.support.servers import RedisServer, wait_until

TAKEOVER_SECONDS = 5.0
"""How long after the process that takes ticks was killed another one takes them."""


class Feeds(Application):
    """A process that takes ticks or stands by; it has no port, so its log is what it says."""

    def ready(self) -> bool:
        assert self.process.poll() is None, f"the feeds ended with {self.process.returncode}:\n{self.log}"
        return self.takes_ticks() or self.stands_by()

    def takes_ticks(self) -> bool:
        return "takes ticks in" in self.log

    def stands_by(self) -> bool:
        return "stands by: " in self.log


class Broadcasting(ScriptedExchange):
    """Sends each tick to everybody who is connected, as exchanges do; to nobody in particular."""

    def send_raw(self, data: bytes) -> None:
        for client in list(self.clients):
            try:
                client.sendall(data)
            except OSError:
                self.clients.remove(client)
                client.close()


class Roles:
    """Starts processes of either role; they end with the test."""

    def __init__(self, stack: ExitStack, folder: Path, settings: dict[str, object]) -> None:
        self._stack = stack
        self._folder = folder
        self.settings = settings
        self._numbers = itertools.count(1)

    def feeds(self, program: tuple[str, ...] = ("-m", "marketflow"), **settings: object) -> Feeds:
        feeds = Feeds(self._own_folder(), self.settings | settings, ("--role", "ingest"), program)
        return self._stack.enter_context(feeds)

    def api(self, *arguments: str, **settings: object) -> Application:
        return self._stack.enter_context(
            Application(self._own_folder(), self.settings | settings, ("--role", "api", *arguments))
        )

    def both(self, program: tuple[str, ...] = ("-m", "marketflow"), **settings: object) -> Application:
        return self._stack.enter_context(Application(self._own_folder(), self.settings | settings, program=program))

    def _own_folder(self) -> Path:
        folder = self._folder / f"process{next(self._numbers)}"
        folder.mkdir(mode=0o711)
        return folder


@pytest.fixture
def roles(server_folder: Path, servers: dict[str, object], exchanges: list[ScriptedExchange]) -> Iterator[Roles]:
    settings: dict[str, object] = {
        "MODE": "live",
        "EXCHANGES": exchanges_setting(*exchanges),
        "FLOW__WINDOW_SECONDS": WINDOW_SECONDS,
        "FLOW__LATE_AFTER_SECONDS": LATE_MS / 1000,
        "FLOW__RECONNECT_AFTER_SECONDS": 0.1,
    }
    with ExitStack() as stack:
        yield Roles(stack, server_folder, servers | settings)


def stop_all(*processes: Application) -> None:
    for process in processes:
        assert process.stop(signal.SIGTERM)[0] == 0
        assert "Traceback" not in process.log, process.log


# Apart


def test_api_processes_serve_what_the_ingest_process_writes(
    roles: Roles, exchanges: list[ScriptedExchange], rows: Callable[[], Rows]
) -> None:
    feeds, one, other = roles.feeds(), roles.api(), roles.api()
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
    feeds, one, other = roles.feeds(), roles.api(), roles.api()
    wait_until(lambda: other.get("/mode") == {"mode": "live"})
    assert one.switch("test") == {"mode": "test", "previous": "live"}
    assert one.get("/mode") == {"mode": "test"}
    wait_until(lambda: other.get("/mode") == {"mode": "test"}, timeout=1)
    wait_until(lambda: set(other.get("/health")["exchanges"].values()) == {"generated"})
    assert other.switch("test") == {"mode": "test", "previous": "test"}
    wait_until(lambda: other.find("/prices/latest/BTCUSDT"))
    assert other.switch("live") == {"mode": "live", "previous": "test"}
    assert other.http.get("/prices/latest/BTCUSDT").status_code == 404
    stop_all(feeds, one, other)


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
    feeds = roles.feeds()
    wait_until(lambda: api.get("/health")["status"] == "ok")
    api.switch("test")
    stop_all(feeds)
    assert_alone("test")  # still about what ran last
    stop_all(api)


def test_expired_command_is_never_executed(roles: Roles, redis_db: RedisServer) -> None:
    feeds, api = roles.feeds(), roles.api()
    wait_until(lambda: api.get("/health")["status"] == "ok")
    feeds.process.send_signal(signal.SIGSTOP)
    assert api.http.post("/mode/test").status_code == 503
    feeds.process.send_signal(signal.SIGCONT)
    with redis_db.client() as client:
        wait_until(lambda: client.exists(keys.STATE_KEY) and not client.exists(keys.COMMANDS_KEY))
        state = client.get(keys.STATE_KEY)
        wait_until(lambda: client.get(keys.STATE_KEY) != state)
    assert api.get("/mode") == {"mode": "live"}
    assert api.switch("live") == {"mode": "live", "previous": "live"}
    stop_all(feeds, api)


def test_api_process_restart_changes_nothing(
    roles: Roles, exchanges: list[ScriptedExchange], rows: Callable[[], Rows]
) -> None:
    feeds, api = roles.feeds(), roles.api(MODE="test")
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


def test_standby_takes_over_killed_leader_minute_and_mode(
    roles: Roles, exchanges: list[ScriptedExchange], rows: Callable[[], Rows], record_property: Record
) -> None:
    roles.settings |= {"FLOW__WINDOW_SECONDS": 60, "MODE": "test"}
    wait_until(lambda: now_ms() % MINUTE_MS < 45_000, timeout=16)
    first, second, api = roles.feeds(), roles.feeds(), roles.api()
    assert second.stands_by()
    assert api.switch("live")["previous"] == "test"
    wait_until_connected(api, exchanges)
    with Traffic(exchanges, rate=RATE, coming_and_going=True) as traffic:
        enough = traffic.count + 300
        wait_until(lambda: traffic.count >= enough)
        killed_at = now_ms()
        first.kill()
        connections = [len(exchange.accepted_at) for exchange in exchanges]

        def taken() -> bool:
            return all(
                len(exchange.accepted_at) > before for exchange, before in zip(exchanges, connections, strict=True)
            )

        record_property("takes over after seconds", seconds_until(taken, TAKEOVER_SECONDS))
        wait_until_connected(api, exchanges)
        assert api.get("/mode") == {"mode": "live"}
        enough = traffic.count + 100
        wait_until(lambda: traffic.count >= enough)
    stop_all(second, api)
    missing = [tick.at for tick in lost(live(rows()), traffic.sent, MINUTE_MS)]
    assert all(killed_at - 2 * SLICE_MS <= at <= killed_at + SLICE_MS for at in missing)


def live(rows: Rows) -> Rows:
    return {slot: row for slot, row in rows.items() if slot.series.mode == "live"}


def test_clean_stop_releases_lease_to_standby_at_once(
    roles: Roles, exchanges: list[ScriptedExchange], rows: Callable[[], Rows], record_property: Record
) -> None:
    first, second = roles.feeds(), roles.feeds()
    with Traffic(exchanges, rate=RATE, coming_and_going=True) as traffic:
        wait_for_windows(1)
        assert first.stop()[0] == 0
        record_property("takes over after seconds", seconds_until(second.takes_ticks, 1.0))
        for exchange in exchanges:
            wait_until(exchange.connected)
        wait_for_windows(1)
    stop_all(second)
    assert "Traceback" not in first.log
    # A connection that the first had closed may have been sent a last tick.
    assert len(lost(rows(), traffic.sent)) <= 2 * len(exchanges)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_standby_and_leaves_leader_alone(roles: Roles, number: int) -> None:
    first, second = roles.feeds(), roles.feeds()
    code, seconds = second.stop(number)
    assert (code, first.process.poll()) == (0, None)
    assert seconds < 2
    third = roles.feeds()
    assert third.stands_by()
    stop_all(first, third)


def test_emptied_redis_hands_the_lease_to_no_standby(
    roles: Roles, exchanges: list[ScriptedExchange], redis_db: RedisServer, rows: Callable[[], Rows]
) -> None:
    first, api = roles.feeds(), roles.api()
    wait_until_connected(api, exchanges)
    second = roles.feeds()
    with Traffic(exchanges, rate=RATE) as traffic, redis_db.client() as client:
        for _ in range(3):
            client.flushall()
            wait_until(lambda: client.get(keys.LEASE_KEY))
            wait_for_windows(1)
    assert not second.takes_ticks()
    api.switch("test")
    stop_all(second, first)
    assert_rows_equal(live(rows()), traffic.sent, WINDOW_MS)
    roles.feeds()
    wait_until(lambda: api.get("/mode") == {"mode": "live"})


@pytest.mark.parametrize("skew_seconds", [60, 3])
def test_frozen_leader_steps_back_and_no_row_gets_worse(
    roles: Roles, rows: Callable[[], Rows], redis_db: RedisServer, skew_seconds: int
) -> None:
    """Ticks that have waited for longer than the allowed skew would be taken for new ones: those it gives up."""
    with ExitStack() as stack:
        exchanges = [stack.enter_context(Broadcasting(f"exchange{n}")) for n in (1, 2, 3)]
        roles.settings |= {"EXCHANGES": exchanges_setting(*exchanges), "FLOW__MAX_CLOCK_SKEW_SECONDS": skew_seconds}
        first, second, api = roles.feeds(), roles.feeds(), roles.api()
        wait_until_connected(api, exchanges)
        with Traffic(exchanges, rate=RATE) as traffic:
            wait_for_windows(1)
            frozen_at = now_ms()
            first.process.send_signal(signal.SIGSTOP)
            wait_until(second.takes_ticks, timeout=TAKEOVER_SECONDS)
            wait_until(lambda: all(len(exchange.clients) == 2 for exchange in exchanges))
            taken_over_at = now_ms()
            wait_until(lambda: now_ms() > frozen_at + 6000)
            first.process.send_signal(signal.SIGCONT)
            wait_until(first.stands_by)
            with redis_db.client() as client:
                holder = client.get(keys.LEASE_KEY)
                wait_for_windows(2)
                assert client.get(keys.LEASE_KEY) == holder
        stop_all(first, second, api)
        times = [tick.at for tick in lost(rows(), traffic.sent)]
        if skew_seconds == 60:
            assert not times
        assert all(frozen_at - 2 * SLICE_MS <= at <= taken_over_at for at in times)


def frozen_for(feeds: Feeds, seconds: float) -> int:
    """Freeze until `thaw`; gives when it began (Unix ms). It lasts at least so many seconds."""
    frozen_at = now_ms()
    feeds.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: now_ms() >= frozen_at + seconds * 1000, timeout=seconds + 1)
    return frozen_at


@pytest.mark.parametrize("unreachable_seconds", [1.0, 4.0])
def test_frozen_leader_writes_nothing_until_redis_answers(
    roles: Roles, rows: Callable[[], Rows], redis_proxy: Proxy, unreachable_seconds: float
) -> None:
    """A question that fails is no answer: the ticks that waited belong to minutes of the other process."""
    with ExitStack() as stack:
        exchanges = [stack.enter_context(Broadcasting(f"exchange{n}")) for n in (1, 2, 3)]
        roles.settings |= {"EXCHANGES": exchanges_setting(*exchanges), "FLOW__MAX_CLOCK_SKEW_SECONDS": 3}
        first, second = roles.feeds(REDIS__PORT=redis_proxy.port), roles.feeds()
        wait_until(lambda: all(exchange.clients for exchange in exchanges))
        with Traffic(exchanges, rate=RATE) as traffic:
            wait_for_windows(1)
            frozen_at = frozen_for(first, 1)
            wait_until(second.takes_ticks, timeout=TAKEOVER_SECONDS)
            wait_until(lambda: all(len(exchange.clients) == 2 for exchange in exchanges))
            taken_over_at = now_ms()
            wait_until(lambda: now_ms() > frozen_at + 12_000, timeout=13)
            redis_proxy.refuse()
            first.process.send_signal(signal.SIGCONT)
            thawed_at = time.monotonic()
            wait_until(lambda: time.monotonic() > thawed_at + unreachable_seconds)
            redis_proxy.heal()
            wait_until(first.stands_by)
            wait_for_windows(2)
        stop_all(first, second)
        times = [tick.at for tick in lost(rows(), traffic.sent)]
        assert all(frozen_at - 2 * SLICE_MS <= at <= taken_over_at for at in times)


def test_frozen_leader_not_replaced_writes_all(
    roles: Roles, exchanges: list[ScriptedExchange], rows: Callable[[], Rows], redis_proxy: Proxy
) -> None:
    roles.settings |= {"FLOW__MAX_CLOCK_SKEW_SECONDS": 1}
    feeds = roles.feeds(REDIS__PORT=redis_proxy.port)
    with Traffic(exchanges, rate=RATE):
        wait_for_windows(1)
    wait_for_windows(1)
    before = rows()
    redis_proxy.refuse()
    frozen_for(feeds, 3)
    feeds.process.send_signal(signal.SIGCONT)
    wait_until(lambda: "writes are held until Redis answers" in feeds.log)
    with Traffic(exchanges, rate=RATE) as traffic:
        wait_for_windows(2)
        assert rows() == before
    redis_proxy.heal()
    wait_until(lambda: len(rows()) > len(before), timeout=5)
    stop_all(feeds)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)


@pytest.mark.parametrize("fault", [Proxy.refuse, Proxy.swallow])
def test_signal_ends_frozen_leader_while_redis_is_down(
    roles: Roles,
    exchanges: list[ScriptedExchange],
    rows: Callable[[], Rows],
    redis_proxy: Proxy,
    fault: Callable[[Proxy], None],
) -> None:
    """Rows that another process may have are left to that one."""
    roles.settings |= {"FLOW__MAX_CLOCK_SKEW_SECONDS": 1}
    feeds = roles.feeds(REDIS__PORT=redis_proxy.port)
    with Traffic(exchanges, rate=RATE):
        wait_for_windows(1)
    wait_for_windows(1)
    before = rows()
    fault(redis_proxy)
    frozen_for(feeds, 3)
    feeds.process.send_signal(signal.SIGCONT)
    wait_until(lambda: "writes are held until Redis answers" in feeds.log)
    with Traffic(exchanges, rate=RATE):
        wait_for_windows(1)
    code, seconds = feeds.stop()
    assert code == 0
    assert seconds < 5
    assert "minute rows are not written" in feeds.log
    assert "Traceback" not in feeds.log
    assert rows() == before


def test_process_of_both_roles_never_stands_by(
    roles: Roles, exchanges: list[ScriptedExchange], redis_proxy: Proxy
) -> None:
    both = roles.both(REDIS__PORT=redis_proxy.port)
    api, standing, second = roles.api(), roles.feeds(), roles.both()
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


# Redis away


def test_redis_outage_of_both_roles_keeps_rows_exact(
    roles: Roles, exchanges: list[ScriptedExchange], redis_proxy: Proxy, rows: Callable[[], Rows]
) -> None:
    roles.settings = through(roles.settings, redis=redis_proxy)
    first, second, api = roles.feeds(), roles.feeds(), roles.api()
    wait_until_connected(api, exchanges)
    questions = ("/prices/latest/BTCUSDT", "/prices/average/BTCUSDT?period=1m", "/prices/highest/BTCUSDT", "/mode")
    with Traffic(exchanges, rate=RATE) as traffic:
        wait_until(rows)
        for fault in (redis_proxy.refuse, redis_proxy.swallow):
            fault()
            wait_until(says(api, "redis", "down"))
            until = time.monotonic() + LEASE_SECONDS + 2
            while time.monotonic() < until:
                for question in questions:
                    began = time.monotonic()
                    answer = api.http.get(question)
                    assert answer.status_code == 200, (question, answer.text)
                    assert time.monotonic() - began < 1.5, question
                answer = api.http.post("/mode/test")
                assert (answer.status_code, answer.headers.get("retry-after")) == (503, "1")
            assert api.get("/mode") == {"mode": "live"}
            assert set(api.get("/health")["exchanges"].values()) == {"connecting"}
            redis_proxy.heal()
            wait_until_connected(api, exchanges)
            wait_until(says(api, "redis", "ok"))
    assert not second.takes_ticks()
    stop_all(second, first, api)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)


def test_api_process_starts_without_redis(roles: Roles, exchanges: list[ScriptedExchange], redis_proxy: Proxy) -> None:
    feeds = roles.feeds()
    redis_proxy.refuse()
    api = roles.api(MODE="test", REDIS__PORT=redis_proxy.port)
    assert api.get("/mode") == {"mode": "test"}  # nothing else is known
    redis_proxy.heal()
    wait_until_connected(api, exchanges)
    assert api.get("/mode") == {"mode": "live"}
    stop_all(feeds, api)


def test_ingest_started_without_redis_yields_to_the_leader(
    roles: Roles, server_folder: Path, redis_proxy: Proxy, rows: Callable[[], Rows]
) -> None:
    with ExitStack() as stack:
        exchanges = [stack.enter_context(Broadcasting("exchange1"))]
        roles.settings["EXCHANGES"] = exchanges_setting(*exchanges)
        first = roles.feeds()
        wait_until(lambda: exchanges[0].clients)
        redis_proxy.refuse()
        with Traffic(exchanges, rate=RATE) as traffic:
            second = roles.feeds(REDIS__PORT=redis_proxy.port)
            assert second.takes_ticks()
            wait_for_windows(2)
            redis_proxy.heal()
            wait_until(second.stands_by)
            wait_for_windows(1)
        stop_all(first, second)
        assert_rows_equal(rows(), traffic.sent, WINDOW_MS)


def holds_the_lease(redis_db: RedisServer, feeds: Feeds) -> bool:
    with redis_db.client() as client:
        return f"/{feeds.process.pid}/".encode() in (client.get(keys.LEASE_KEY) or b"")


def test_one_failed_lease_request_makes_no_second_leader(
    roles: Roles, exchanges: list[ScriptedExchange], redis_proxy: Proxy
) -> None:
    first = roles.feeds()
    wait_until(lambda: all(exchange.clients for exchange in exchanges))
    redis_proxy.cut_after(b"EVAL")
    second = roles.feeds(REDIS__PORT=redis_proxy.port)
    assert redis_proxy.was_cut.is_set()
    assert second.stands_by()
    assert not second.takes_ticks()
    stop_all(second, first)


def test_lease_gained_beside_another_writer_counts_no_tick_twice(
    roles: Roles, redis_db: RedisServer, redis_proxy: Proxy, rows: Callable[[], Rows]
) -> None:
    """One refused answer at the start suffices: it has ticks itself when it reads those of the other."""
    wait_until(lambda: now_ms() % MINUTE_MS < 40_000, timeout=21)
    with ExitStack() as stack:
        exchanges = [stack.enter_context(Broadcasting("exchange1"))]
        roles.settings |= {"EXCHANGES": exchanges_setting(*exchanges), "FLOW__WINDOW_SECONDS": 60}
        first = roles.feeds()
        wait_until(lambda: exchanges[0].clients)
        with Traffic(exchanges, rate=RATE) as traffic, redis_db.client() as client:
            wait_until(lambda: traffic.count >= 100)
            redis_proxy.refuse()
            second = roles.feeds(REDIS__PORT=redis_proxy.port)
            wait_until(lambda: len(exchanges[0].clients) == 2)
            enough = traffic.count + 100
            wait_until(lambda: traffic.count >= enough)
            redis_proxy.heal()

            def gained() -> bool:
                client.set(keys.LEASE_KEY, "", px=10_000)
                time.sleep(0.3)  # either may take it
                return holds_the_lease(redis_db, second)

            wait_until(gained, timeout=20)
            wait_until(lambda: "recovered" in second.log)
            enough = traffic.count + 100
            wait_until(lambda: traffic.count >= enough)
        stop_all(second, first)
        assert_rows_equal(rows(), traffic.sent, MINUTE_MS)


@pytest.mark.parametrize("fault", ["frozen", "cut off"])
def test_replaced_and_stopped_leader_leaves_a_whole_row(
    roles: Roles, redis_proxy: Proxy, rows: Callable[[], Rows], fault: str
) -> None:
    """Until it stops it alone has the ticks from before the other one began, which then reads them."""
    wait_until(lambda: now_ms() % MINUTE_MS < 30_000, timeout=31)
    with ExitStack() as stack:
        exchanges = [stack.enter_context(Broadcasting(f"exchange{n}")) for n in (1, 2, 3)]
        roles.settings |= {"EXCHANGES": exchanges_setting(*exchanges), "FLOW__MAX_CLOCK_SKEW_SECONDS": 60}
        roles.settings["FLOW__WINDOW_SECONDS"] = 60
        first, second = roles.feeds(REDIS__PORT=redis_proxy.port), roles.feeds()
        wait_until(lambda: all(exchange.clients for exchange in exchanges))
        with Traffic(exchanges, rate=RATE) as traffic:
            wait_until(lambda: traffic.count >= 300)
            if fault == "frozen":
                first.process.send_signal(signal.SIGSTOP)
            else:
                redis_proxy.refuse()
            wait_until(second.takes_ticks, timeout=TAKEOVER_SECONDS)
            wait_until(lambda: all(len(exchange.clients) == 2 for exchange in exchanges))
            enough = traffic.count + 300
            wait_until(lambda: traffic.count >= enough)
            if fault == "frozen":
                first.process.send_signal(signal.SIGCONT)
            else:
                redis_proxy.heal()
            wait_until(lambda: "has taken over" in first.log)
            enough = traffic.count + 300
            wait_until(lambda: traffic.count >= enough)
            stop_all(first)
            enough = traffic.count + 300
            wait_until(lambda: traffic.count >= enough)
        stop_all(second)
        assert_rows_equal(rows(), traffic.sent, MINUTE_MS)


STUCK = """
import sys, threading
from marketflow.cli import main
from marketflow.runtime import engine
from marketflow.pipeline import branches
branches.STALLED_SECONDS = 2.0
write = engine._LeasedArchive.write
engine._LeasedArchive.write = lambda self, minutes: threading.Event().wait() if minutes else write(self, minutes)
sys.exit(main.main())
"""
"""Writes of rows to PostgreSQL never end, as in a bug."""


@pytest.mark.parametrize("apart", [True, False])
def test_stalled_branch_is_logged_counted_and_degrades_health(roles: Roles, apart: bool) -> None:
    program = ("-c", STUCK)
    roles.settings["MODE"] = "test"
    feeds: Application = roles.feeds(program) if apart else roles.both(program)
    api = roles.api() if apart else feeds
    wait_until(lambda: 'marketflow_branch_stalls_total{branch="archive"} 1.0' in api.http.get("/metrics").text)
    health = api.get("/health")
    assert (health["status"], health["redis"], health["postgres"]) == ("degraded", "ok", "ok")
    assert "a branch has stalled: work has waited for 2 s branch=archive" in feeds.log


def test_standby_ingests_in_redis_outage_and_steps_back_after(
    roles: Roles, redis_proxy: Proxy, rows: Callable[[], Rows]
) -> None:
    impatient = (
        "import sys; from marketflow.cli import main; from marketflow.runtime import leader_election;"
        "leader_election.ALONE_SECONDS = 1.0; sys.exit(main.main())"
    )
    with ExitStack() as stack:
        exchanges = [stack.enter_context(Broadcasting("exchange1"))]
        roles.settings["EXCHANGES"] = exchanges_setting(*exchanges)
        first, second = roles.feeds(), roles.feeds(("-c", impatient), REDIS__PORT=redis_proxy.port)
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
    feeds = roles.feeds()
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
