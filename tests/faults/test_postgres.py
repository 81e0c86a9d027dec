"""Every kind of PostgreSQL outage; no row is lost or doubled, and everything else continues."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from marketflow.model import Mode, Series
from marketflow.stores.redis import codec, keys
from tests.faults.conftest import (
    RATE,
    ROWS_SECONDS,
    WINDOW_MS,
    WINDOW_SECONDS,
    Asking,
    Record,
    StartApplication,
    in_use,
    lost,
    says,
    seconds_until_written,
    stop_and_compare,
    through,
    wait_for_windows,
    wait_until_connected,
    wrong_rows,
)
from tests.faults.hanging_resolver import HANGS
from tests.support.application import Application, ScriptedExchange, Traffic, exchanges_setting, now_ms, read_rows
from tests.support.oracle import Rows, assert_rows_equal, differences
from tests.support.proxy import Proxy
from tests.support.servers import PostgresServer, RedisServer, wait_until

KILL_MS = 200
"""The ticks that may be lost when the application is killed: those of the last 200 ms."""


@pytest.mark.parametrize("fault", [Proxy.refuse, Proxy.vanish])
def test_start_without_postgres_writes_all_once_it_is_up(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    postgres_proxy: Proxy,
    rows: Callable[[], Rows],
    record_property: Record,
    fault: Callable[[Proxy], None],
) -> None:
    fault(postgres_proxy)
    application = start(through(servers, postgres=postgres_proxy))
    with in_use(application, exchanges, record_property) as traffic:
        assert says(application, "postgres", "down")()
        wait_for_windows(1)
        postgres_proxy.heal()
        record_property("rows written after seconds", seconds_until_written(rows_when_there(rows), traffic))
        wait_until(says(application, "postgres", "ok"), ROWS_SECONDS)
    stop_and_compare(application, rows, traffic)


def rows_when_there(rows: Callable[[], Rows]) -> Callable[[], Rows]:
    """Return the rows; none while there is no table."""

    def read() -> Rows:
        try:
            return rows()
        except psycopg.errors.UndefinedTable:
            return {}

    return read


def test_postgres_network_faults_lose_no_row(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    postgres_proxy: Proxy,
    rows: Callable[[], Rows],
    record_property: Record,
) -> None:
    faults = {postgres_proxy.refuse: 2, postgres_proxy.swallow: 1, postgres_proxy.stall: 1, postgres_proxy.vanish: 1}
    application = start(through(servers, postgres=postgres_proxy))
    with in_use(application, exchanges, record_property) as traffic:
        for fault, windows in faults.items():
            fault()
            wait_for_windows(windows)
            wait_until(says(application, "postgres", "down"))
            postgres_proxy.heal()
            seconds = seconds_until_written(rows, traffic)
            record_property(f"{fault.__name__}: rows written after seconds", seconds)
            wait_until(says(application, "postgres", "ok"), ROWS_SECONDS)
    stop_and_compare(application, rows, traffic)


def test_silent_postgres_connections_are_replaced(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    postgres_proxy: Proxy,
    rows: Callable[[], Rows],
    record_property: Record,
) -> None:
    application = start(through(servers, postgres=postgres_proxy))
    with in_use(application, exchanges, record_property) as traffic:
        postgres_proxy.forget()
        wait_for_windows(1)
        record_property("rows written after seconds", seconds_until_written(rows, traffic))
    stop_and_compare(application, rows, traffic)


@pytest.fixture
def own_server(server_folder: Path, postgres_template: Path) -> Iterator[PostgresServer]:
    """A PostgreSQL for one test."""
    with PostgresServer(server_folder / "postgres", postgres_template) as server:
        yield server


def settings_of(postgres: PostgresServer, redis: RedisServer) -> dict[str, object]:
    settings = {f"POSTGRES__{name.upper()}": value for name, value in postgres.keywords.items()}
    return through(settings | {"REDIS__PORT": redis.port})


def test_postgres_kill_or_freeze_loses_no_row(
    start: StartApplication,
    own_server: PostgresServer,
    redis_db: RedisServer,
    exchanges: list[ScriptedExchange],
    record_property: Record,
) -> None:
    def rows() -> Rows:
        with own_server.connect() as connection:
            return read_rows(connection)

    faults = {own_server.kill: own_server.start, own_server.pause: own_server.resume}
    application = start(settings_of(own_server, redis_db))
    with in_use(application, exchanges, record_property) as traffic:
        for fault, mend in faults.items():
            fault()
            wait_for_windows(2)
            wait_until(says(application, "postgres", "down"))
            mend()
            seconds = seconds_until_written(rows, traffic)
            record_property(f"{fault.__name__}: rows written after seconds", seconds)
            wait_until(says(application, "postgres", "ok"), ROWS_SECONDS)
    stop_and_compare(application, rows, traffic)


def test_repeated_pg_terminate_backend_loses_no_row(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    postgres_db: dict[str, Any],
    rows: Callable[[], Rows],
    record_property: Record,
) -> None:
    terminate = (
        "select pg_terminate_backend(pid) from pg_stat_activity "
        "where application_name = 'marketflow' and datname = current_database()"
    )
    application = start(through(servers))
    with (
        in_use(application, exchanges, record_property) as traffic,
        psycopg.connect(**postgres_db, autocommit=True) as connection,
    ):
        until = now_ms() + 2 * WINDOW_MS
        while now_ms() < until:
            connection.execute(terminate)
        record_property("rows written after seconds", seconds_until_written(rows, traffic))
    stop_and_compare(application, rows, traffic)


def test_cut_commit_answer_neither_loses_nor_doubles_rows(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    postgres_proxy: Proxy,
    rows: Callable[[], Rows],
) -> None:
    application = start(through(servers, postgres=postgres_proxy))
    with Traffic(exchanges, rate=RATE) as traffic:
        for request in (b"COMMIT", b"insert into aggregates"):
            postgres_proxy.cut_after(request)
            assert postgres_proxy.was_cut.wait(WINDOW_SECONDS + 10)
            # Before all is written the next commit is that of the schema.
            seconds_until_written(rows, traffic)
    stop_and_compare(application, rows, traffic)


def test_rows_wait_in_redis_through_kill_and_postgres_outage(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    redis_db: RedisServer,
    postgres_proxy: Proxy,
    rows: Callable[[], Rows],
    record_property: Record,
) -> None:
    kills: list[int] = []

    def kill() -> None:
        kills.append(now_ms())
        application.kill()

    def restart() -> None:
        application.start()
        wait_until_connected(application, exchanges)

    application = start(through(servers, postgres=postgres_proxy))
    with Traffic(exchanges, rate=RATE):
        wait_until(rows)
        postgres_proxy.refuse()
        wait_for_windows(2)
        wait_until(
            lambda: application.get("/health")["redis"] == "ok"
        )  # a machine that is very busy loses touch with it
    kill()
    forget_closed_minutes(redis_db)
    restart()
    with Traffic(exchanges, rate=RATE):
        wait_for_windows(1)
    before = len(rows())
    postgres_proxy.heal()
    wait_until(lambda: len(rows()) > before, ROWS_SECONDS)
    kill()
    restart()
    with Traffic(exchanges, rate=RATE) as traffic:
        wait_for_windows(1)
    assert application.stop()[0] == 0
    ages = [min(abs(killed_at - tick.at) for killed_at in kills) for tick in lost(rows(), traffic.sent)]
    record_property("ticks lost", len(ages))
    assert max(ages, default=0) <= KILL_MS


def forget_closed_minutes(server: RedisServer) -> None:
    """Take the slices of closed minutes from the cache, as hours do: what is left of those is what waits as rows."""
    with server.client() as client:
        for key in client.keys("*:minutes"):
            ((_, last_closed),) = client.zrange(key, -1, -1, withscores=True)
            client.zremrangebyscore(key.replace(b":minutes", b":window"), "-inf", last_closed + WINDOW_MS - 1)


class SharedExchange(ScriptedExchange):
    """An exchange to which two applications are connected."""

    def send(self, *prices: float, symbol: str = "BTCUSDT", at: int | None = None) -> int:
        at = super().send(*prices, symbol=symbol, at=at)
        for price in prices:
            line = json.dumps({"symbol": symbol, "price": price, "timestamp": at}) + "\n"
            for other in self.clients[:-1]:
                other.sendall(line.encode())
        return at


@pytest.fixture
def shared_exchanges() -> Iterator[list[SharedExchange]]:
    with ExitStack() as stack:
        yield [stack.enter_context(SharedExchange(f"exchange{n}")) for n in (1, 2, 3)]


def test_two_applications_share_one_database(
    start: StartApplication,
    servers: dict[str, object],
    shared_exchanges: list[SharedExchange],
    rows: Callable[[], Rows],
) -> None:
    settings = through(servers) | {"EXCHANGES": exchanges_setting(*shared_exchanges)}
    pair = [start(settings | {"REDIS__DB": number}) for number in range(2)]
    with Traffic(shared_exchanges, rate=RATE) as traffic:
        wait_for_windows(2)
        assert not wrong_rows(rows(), traffic.sent, now_ms() - WINDOW_MS)
    for application in pair:
        assert application.stop()[0] == 0
        assert "deadlock" not in application.log
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)


def test_row_refused_by_postgres_costs_that_row_alone(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    redis_db: RedisServer,
    postgres_db: dict[str, Any],
    rows: Callable[[], Rows],
) -> None:
    refused = Series(Mode.LIVE, "exchange2", "ETHUSDT")
    application = start(through(servers))
    with psycopg.connect(**postgres_db, autocommit=True) as connection:
        connection.execute(
            "alter table aggregates add constraint no_ether check (pair_name <> 'ETHUSDT' or exchange <> 'exchange2')"
        )
    with Traffic(exchanges, rate=RATE) as traffic, Asking(application):
        wait_for_windows(1)
        wait_until(lambda: "no_ether" in application.log)
        assert says(application, "postgres", "ok")()
    assert application.stop()[0] == 0
    assert_rows_equal(rows(), [each for each in traffic.sent if each[0] != refused], WINDOW_MS)
    with redis_db.client() as client:
        kept = codec.decode_slots(client.zrange(keys.minutes_key(refused), 0, -1, withscores=True))
    assert sum(candle.ticks for candle in kept.values()) == sum(series == refused for series, _ in traffic.sent)


def _logged(application: Application, text: str, count: int) -> bool:
    return application.log.count(text) == count


@pytest.mark.parametrize("fault", [Proxy.refuse, Proxy.vanish])
def test_postgres_outage_logs_its_beginning_and_end(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    postgres_proxy: Proxy,
    rows: Callable[[], Rows],
    fault: Callable[[Proxy], None],
) -> None:
    application = start(through(servers, postgres=postgres_proxy))
    with Traffic(exchanges, rate=RATE) as traffic:
        wait_for_windows(2)
        for outages in (1, 2):
            fault(postgres_proxy)
            wait_for_windows(12)  # longer than the pause after which repeated lines are logged again
            assert application.log.count("WARNING  PostgreSQL cannot be used") == outages
            postgres_proxy.heal()
            wait_until(partial(_logged, application, "PostgreSQL can be used again, after 1", outages))
        assert application.log.count("PostgreSQL") == 5  # and that it was ready at the start
        assert "days cannot be rolled up" not in application.log
    stop_and_compare(application, rows, traffic)


def test_hanging_lookup_of_postgres_delays_no_stop_and_loses_no_row(
    start: StartApplication, servers: dict[str, object], exchanges: list[ScriptedExchange], rows: Callable[[], Rows]
) -> None:
    application = start(servers | {"POSTGRES__HOST": HANGS}, program=("-m", "tests.faults.hanging_resolver"))
    with Traffic(exchanges, rate=RATE) as traffic:
        wait_for_windows(2)
    assert application.get("/health")["postgres"] == "down"
    code, seconds = application.stop()
    assert code == 0
    assert seconds < 5
    assert f"{HANGS} cannot be looked up" in application.log
    assert "Traceback" not in application.log
    again = start(servers)
    wait_until(says(again, "postgres", "ok"))
    wait_until(lambda: not differences(rows(), traffic.sent, WINDOW_MS))
    assert again.stop()[0] == 0
