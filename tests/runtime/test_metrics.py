"""/metrics of the real thing: what is sent, lost and asked is counted, whichever process does it."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path

import psutil
import pytest

from tests.support.application import Application, ScriptedExchange, exchanges_setting
from tests.support.exposition import Samples, samples_of
from tests.support.servers import HOST, PostgresServer, RedisServer, wait_until

GOOD = b'{"symbol":"BTCUSDT","price":7}\n'
"""It has no time, which is mended and counted."""

REJECTED = {
    "malformed": b"{\n",
    "no_symbol": b'{"price":1}\n',
    "bad_price": b'{"symbol":"BTCUSDT","price":-1}\n',
    "stale": b'{"symbol":"BTCUSDT","price":1,"timestamp":1}\n',
    "unknown_symbol": b'{"symbol":"NONE","price":1}\n',
    "too_long": b" " * 70_000 + b"\n",
}


@pytest.fixture
def settings(servers: dict[str, object], exchanges: list[ScriptedExchange]) -> dict[str, object]:
    return servers | {"MODE": "live", "EXCHANGES": exchanges_setting(*exchanges), "FLOW__WINDOW_SECONDS": 1}


@pytest.fixture
def live(server_folder: Path, settings: dict[str, object]) -> Iterator[Application]:
    """One process in live mode, whose minutes are seconds."""
    with Application(server_folder, settings) as application:
        yield application


def metrics(application: Application) -> Samples:
    answer = application.http.get("/metrics")
    assert answer.status_code == 200, answer.text
    return samples_of(answer.text)


def test_what_an_exchange_sends_is_counted_to_the_line(live: Application, exchanges: list[ScriptedExchange]) -> None:
    first, second, _ = exchanges
    for number, line in enumerate(REJECTED.values(), 1):
        first.send_raw(line * number)
    first.send_raw(GOOD * 50)
    sent_at = first.send(8.0, 9.0) / 1000
    wait_until(lambda: metrics(live).of("ticks_total", exchange="exchange1") == 52)
    samples = metrics(live)
    for number, reason in enumerate(REJECTED, 1):
        assert samples.of("ticks_rejected_total", exchange="exchange1", reason=reason) == number
    assert samples.of("timestamps_replaced_total", exchange="exchange1") == 50
    assert sent_at <= (samples.of("feed_last_tick_timestamp_seconds", exchange="exchange1") or 0) < sent_at + 5
    assert samples.of("ticks_total", exchange="exchange2") == 0
    assert samples.of("feed_last_tick_timestamp_seconds", exchange="exchange2") is None
    second.send(1.0)
    wait_until(lambda: metrics(live).of("ticks_total", exchange="exchange2") == 1)


def test_a_tick_in_the_cache_and_its_row_in_the_archive_are_counted(
    live: Application, exchanges: list[ScriptedExchange]
) -> None:
    exchanges[0].send(5.0)
    wait_until(lambda: metrics(live).of("tick_to_cache_seconds_count") == 1)
    assert 0 < (metrics(live).of("tick_to_cache_seconds_sum") or 0) < 10
    wait_until(lambda: metrics(live).of("aggregates_written_total") == 1)
    assert metrics(live).of("aggregates_pending") == 0


def test_lost_exchange_is_exposed_until_it_is_back(live: Application, exchanges: list[ScriptedExchange]) -> None:
    def connected(of: Samples) -> list[float | None]:
        return [of.of("feed_connected", exchange=exchange.name) for exchange in exchanges]

    wait_until(lambda: connected(metrics(live)) == [1, 1, 1])
    exchanges[1].close()
    wait_until(lambda: connected(metrics(live)) == [1, 0, 1])
    wait_until(lambda: (metrics(live).of("feed_reconnects_total", exchange="exchange2") or 0) >= 2)
    assert metrics(live).of("feed_reconnects_total", exchange="exchange1") == 0
    exchanges[1].open()
    wait_until(lambda: connected(metrics(live)) == [1, 1, 1])


def test_store_outages_are_exposed_and_pending_rows_counted(
    live: Application,
    exchanges: list[ScriptedExchange],
    redis_db: RedisServer,
    postgres_server: PostgresServer,
) -> None:
    exchanges[0].send(5.0)
    wait_until(lambda: metrics(live).of("aggregates_written_total") == 1)
    stores = (redis_db, postgres_server)
    for store in stores:
        store.pause()
    try:
        exchanges[0].send(6.0)
        wait_until(lambda: _suffering(metrics(live)), timeout=30)
    finally:
        for store in stores:
            store.resume()
    wait_until(lambda: _well(metrics(live)), timeout=30)
    assert metrics(live).of("aggregates_written_total") == 2


def test_counters_cover_both_modes_and_state_the_current_one(live: Application) -> None:
    live.switch("test")
    wait_until(lambda: metrics(live).of("ticks_total", exchange="exchange1"))
    assert metrics(live).of("mode", mode="test") == 1
    before = metrics(live).of("ticks_total", exchange="exchange1") or 0
    live.switch("live")
    samples = metrics(live)
    assert (samples.of("ticks_total", exchange="exchange1") or 0) >= before
    assert samples.of("mode", mode="live") == 1
    assert samples.of("feed_last_tick_timestamp_seconds", exchange="exchange1") is None


def test_one_process_exposes_its_memory_and_open_files(live: Application) -> None:
    samples = metrics(live)
    assert samples["process_resident_memory_bytes", frozenset()] > 10_000_000
    assert samples["process_open_fds", frozenset()] > 5


# Processes of their own


@pytest.fixture
def roles(server_folder: Path, settings: dict[str, object]) -> Iterator[tuple[Application, Application]]:
    """An ingest process, and an API process with two workers."""
    folders = [server_folder / name for name in ("feeds", "api")]
    for folder in folders:
        folder.mkdir()
    with ExitStack() as stack:
        feeds = Application(folders[0], settings, ("--role", "ingest")).start(wait=False)
        stack.push(feeds)
        api = stack.enter_context(Application(folders[1], settings, ("--role", "api", "--workers", "2")))
        wait_until(lambda: metrics(api).of("feeds_up") == 1, timeout=20)
        yield feeds, api


def workers_of(api: Application) -> list[int]:
    return [child.pid for child in psutil.Process(api.process.pid).children()]


def ask_each_worker(api: Application, path: str) -> int:
    """Query on 16 connections, so that each worker gets some; return their number."""
    number = 16
    with ExitStack() as stack:
        for _ in range(number):
            connection = stack.enter_context(closing(HTTPConnection(HOST, api.port, timeout=5)))
            connection.request("GET", path)
            connection.getresponse().read()
    return number


def test_any_worker_exposes_counters_of_ingest_and_all_workers(
    roles: tuple[Application, Application], exchanges: list[ScriptedExchange]
) -> None:
    feeds, api = roles
    exchanges[0].send(1.0, 2.0, 3.0)
    wait_until(lambda: metrics(api).of("ticks_total", exchange="exchange1") == 3)
    asked = ask_each_worker(api, "/livez") + ask_each_worker(api, "/livez")
    for _ in range(4):
        fresh = api.http.build_request("GET", "/metrics", headers={"connection": "close"})
        assert samples_of(api.http.send(fresh).text).requests()["/livez", "GET", "200"] == asked
    feeds.kill()
    wait_until(lambda: metrics(api).of("feeds_up") == 0)
    assert metrics(api).of("ticks_total", exchange="exchange1") is None


def test_a_worker_that_is_replaced_leaves_its_counts(roles: tuple[Application, Application]) -> None:
    _, api = roles
    wait_until(lambda: len(workers_of(api)) == 2)
    asked = ask_each_worker(api, "/livez")
    killed = workers_of(api)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len({*workers_of(api)} - {*killed}) == 2)
    wait_until(lambda: _still_serves(api))
    assert metrics(api).requests()["/livez", "GET", "200"] == asked


def test_the_folder_of_the_counts_goes_with_the_workers(roles: tuple[Application, Application]) -> None:
    _, api = roles
    folders = {
        Path(mapped.path).parent
        for pid in workers_of(api)
        for mapped in psutil.Process(pid).memory_maps()
        if mapped.path.endswith(".db")
    }
    assert len(folders) == 1
    assert api.stop()[0] == 0
    assert not [folder for folder in folders if folder.exists()]


def _still_serves(api: Application) -> bool:
    try:
        return api.http.get("/readyz").status_code == 200
    except OSError:
        return False


def _suffering(of: Samples) -> bool:
    stores = [of.of("store_up", store=store) for store in ("redis", "postgres")]
    errors = [of.of("cache_errors_total"), of.of("archive_errors_total")]
    return of.of("aggregates_pending") == 1 and stores == [0, 0] and all(errors)


def _well(of: Samples) -> bool:
    stores = [of.of("store_up", store=store) for store in ("redis", "postgres")]
    return of.of("aggregates_pending") == 0 and stores == [1, 1]
