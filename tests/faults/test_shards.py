"""Ingest processes on one Redis, each the standby of another: a kill or freeze of any of them loses no tick."""

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import msgspec
import pytest

from marketflow.model import SLICE_MS
from marketflow.stores.redis import keys
from tests.faults.conftest import (
    RATE,
    WINDOW_MS,
    Record,
    lost,
    seconds_until,
    wait_for_windows,
    wait_until_warm,
)
from tests.support.application import ScriptedExchange, Traffic, exchanges_setting, now_ms
from tests.support.oracle import Rows, assert_rows_equal
from tests.support.proxy import Proxy
from tests.support.roles import Roles, stop_all
from tests.support.servers import RedisServer, wait_until

GAP_SECONDS = 1.5
"""Longest time without new slices of an exchange after its owner was killed or frozen."""

NAMES = ("exchange1", "exchange2", "exchange3")

BALANCED_SECONDS = 2.0
"""How long after a process has joined or left the shards are spread evenly."""


class Gaps:
    """Measures the longest time between two writes of slices, by exchange."""

    def __init__(self, redis_db: RedisServer, exchanges: Iterable[str]) -> None:
        self._redis_db = redis_db
        self._last = {exchange: time.monotonic() for exchange in exchanges}
        self.longest = dict.fromkeys(self._last, 0.0)
        self._ended = threading.Event()

    @contextmanager
    def measured(self) -> Iterator["Gaps"]:
        with self._redis_db.client() as client, client.pubsub(ignore_subscribe_messages=True) as heard:
            heard.subscribe(keys.PLAIN.slices_channel)
            thread = threading.Thread(target=self._listen, args=(heard,))
            thread.start()
            try:
                yield self
            finally:
                self._ended.set()
                thread.join(5)
        for exchange in self._last:
            self._note(exchange)

    def _listen(self, heard: object) -> None:
        while not self._ended.is_set():
            message = heard.get_message(timeout=0.1)  # type: ignore[attr-defined]
            if message is not None:
                since = now_ms() - 500  # others are written once more
                for (series, start), _ in msgspec.json.decode(message["data"]):
                    if start >= since:
                        self._note(series[1])

    def _note(self, exchange: str) -> None:
        now = time.monotonic()
        self.longest[exchange] = max(self.longest[exchange], now - self._last[exchange])
        self._last[exchange] = now


def test_killed_owner_loses_no_tick(
    roles: Roles,
    broadcasting: list[ScriptedExchange],
    rows: Callable[[], Rows],
    redis_db: RedisServer,
    record_property: Record,
) -> None:
    first, second = roles.ingest(), roles.ingest()
    wait_until_warm(broadcasting)
    with Traffic(broadcasting, rate=RATE) as traffic:
        wait_for_windows(2)
        with Gaps(redis_db, NAMES).measured() as gaps:
            first.kill()
            wait_for_windows(3)
    stop_all(second)
    record_property("longest gap in new slices", gaps.longest)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)
    assert max(gaps.longest.values()) <= GAP_SECONDS


@pytest.mark.parametrize("seconds", [3.0, 8.0])
def test_frozen_owner_loses_no_tick(
    roles: Roles,
    broadcasting: list[ScriptedExchange],
    rows: Callable[[], Rows],
    redis_db: RedisServer,
    record_property: Record,
    seconds: float,
) -> None:
    """Thawed, it writes ticks that the new owner has written, or drops them as stale; neither does harm."""
    first, second = roles.ingest(), roles.ingest()
    wait_until_warm(broadcasting)
    with Traffic(broadcasting, rate=RATE) as traffic:
        wait_for_windows(2)
        with Gaps(redis_db, NAMES).measured() as gaps:
            first.process.send_signal(signal.SIGSTOP)
            thaw_at = now_ms() + seconds * 1000
            wait_until(lambda: now_ms() >= thaw_at, timeout=seconds + 1)
            first.process.send_signal(signal.SIGCONT)
            wait_for_windows(3)
    stop_all(first, second)
    record_property("longest gap in new slices", gaps.longest)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)
    assert max(gaps.longest.values()) <= GAP_SECONDS


def test_owners_killed_one_after_the_other_lose_no_tick(
    roles: Roles, broadcasting: list[ScriptedExchange], rows: Callable[[], Rows]
) -> None:
    processes = [roles.ingest(), roles.ingest()]
    wait_until_warm(broadcasting)
    with Traffic(broadcasting, rate=RATE) as traffic:
        for number in range(4):
            wait_for_windows(1)
            processes[number % 2].kill()
            wait_for_windows(2)
            processes[number % 2].start()
            wait_until_warm(broadcasting)
    stop_all(*processes)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)


def test_owner_and_standby_killed_together_lose_the_gap_only(
    roles: Roles, broadcasting: list[ScriptedExchange], rows: Callable[[], Rows]
) -> None:
    first, second = roles.ingest(), roles.ingest()
    wait_until_warm(broadcasting)
    with Traffic(broadcasting, rate=RATE, coming_and_going=True) as traffic:
        wait_for_windows(2)
        killed_at = now_ms()
        first.kill()
        second.kill()
        first.start()
        second.start()
        wait_until_warm(broadcasting)
        connected_at = now_ms() - 1000
        wait_for_windows(2)
    stop_all(first, second)
    times = [tick.at for tick in lost(rows(), traffic.sent)]
    late = [at - killed_at for at in times if not killed_at - 2 * SLICE_MS <= at <= connected_at]
    assert not late, (late, connected_at - killed_at, first.log, second.log)


def test_third_process_joins_and_leaves_without_loss(
    roles: Roles,
    broadcasting: list[ScriptedExchange],
    rows: Callable[[], Rows],
    record_property: Record,
) -> None:
    first, second = roles.ingest(), roles.ingest()
    wait_until_warm(broadcasting)
    with Traffic(broadcasting, rate=RATE) as traffic:
        wait_for_windows(1)
        third = roles.ingest()
        record_property("joined after seconds", seconds_until(third.takes_ticks, BALANCED_SECONDS))
        wait_for_windows(2)
        assert third.stop()[0] == 0
        wait_for_windows(2)
        third.start()
        seconds_until(third.takes_ticks, BALANCED_SECONDS)
        wait_for_windows(1)
        third.kill()
        wait_for_windows(3)
    stop_all(first, second)
    assert "Traceback" not in third.log
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)


def test_clean_stop_loses_no_tick(
    roles: Roles,
    broadcasting: list[ScriptedExchange],
    rows: Callable[[], Rows],
    redis_db: RedisServer,
    record_property: Record,
) -> None:
    first, second = roles.ingest(), roles.ingest()
    wait_until_warm(broadcasting)
    with Traffic(broadcasting, rate=RATE) as traffic:
        wait_for_windows(1)
        with Gaps(redis_db, NAMES).measured() as gaps:
            assert first.stop()[0] == 0
            wait_for_windows(3)
    stop_all(second)
    record_property("longest gap in new slices", gaps.longest)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)


@pytest.mark.parametrize("cut_off", ["one", "both"])
def test_processes_cut_off_from_redis_lose_no_tick(
    roles: Roles, broadcasting: list[ScriptedExchange], rows: Callable[[], Rows], redis_proxy: Proxy, cut_off: str
) -> None:
    """A process that is cut off alone is replaced; where all are, each goes on with its shards."""
    first = roles.ingest(REDIS__PORT=redis_proxy.port)
    second = roles.ingest(REDIS__PORT=redis_proxy.port) if cut_off == "both" else roles.ingest()
    wait_until_warm(broadcasting)
    with Traffic(broadcasting, rate=RATE) as traffic:
        wait_for_windows(1)
        redis_proxy.refuse()
        wait_for_windows(4)
        redis_proxy.heal()
        wait_for_windows(3)
    stop_all(first, second)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)


def test_shards_of_one_exchange_are_divided_and_lose_no_tick(
    roles: Roles, broadcasting: list[ScriptedExchange], rows: Callable[[], Rows]
) -> None:
    exchange = broadcasting[0]
    roles.settings["EXCHANGES"] = f'[{{name="exchange1",address="{exchange.address}",shards=4}}]'
    first, second = roles.ingest(), roles.ingest()
    wait_until_warm([exchange])
    for process in (first, second):
        wait_until(lambda process=process: "of4" in process.log)  # type: ignore[misc]
    symbols = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "TONUSDT", "DOGEUSDT")
    with Traffic([exchange], symbols=symbols, rate=RATE) as traffic:
        wait_for_windows(2)
        first.kill()
        wait_for_windows(3)
    stop_all(second)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)
    assert "unknown_symbol" not in second.log


def test_unstamped_ticks_are_not_counted_twice(
    roles: Roles, broadcasting: list[ScriptedExchange], rows: Callable[[], Rows]
) -> None:
    """Each process would date them differently, so that their standbys are cold."""
    exchange = broadcasting[0]
    roles.settings["EXCHANGES"] = exchanges_setting(exchange)
    first, second = roles.ingest(), roles.ingest()
    wait_until_warm([exchange])
    sent = 0

    def send(count: int) -> None:
        nonlocal sent
        for _ in range(count):
            sent += 1
            exchange.send_raw(b'{"symbol":"BTCUSDT","price":%d}\n' % sent)
            time.sleep(0.01)

    send(150)
    wait_until(lambda: len(exchange.clients) == 1, timeout=5, message="the standby is still connected")
    send(50)
    owner = first if "takes ticks in" in first.log else second
    owner.kill()
    exchange.cut()
    lost_from = sent
    wait_until(lambda: exchange.clients, timeout=5)
    send(100)
    stop_all(second if owner is first else first)
    found = rows().values()
    assert sum(row["tick_count"] for row in found) <= sent
    assert sum(row["tick_count"] for row in found) >= sent - 20, lost_from
    assert sum(row["average_price"] * row["tick_count"] for row in found) <= sent * (sent + 1) / 2


def test_generated_ticks_come_from_one_process_only(
    roles: Roles, rows: Callable[[], Rows], redis_db: RedisServer
) -> None:
    roles.settings |= {"MODE": "test", "GENERATOR__RATE": 20}
    first, second = roles.ingest(), roles.ingest()
    wait_for_windows(3)
    first.kill()
    wait_for_windows(5)
    stop_all(second)
    per_exchange: dict[tuple[str, int], int] = {}
    for slot, row in rows().items():
        key = slot.series.exchange, slot.start
        per_exchange[key] = per_exchange.get(key, 0) + row["tick_count"]
    assert {exchange for exchange, _ in per_exchange} == {"exchange1", "exchange2", "exchange3"}
    assert max(per_exchange.values()) <= 24  # a second's ticks of one generator, and never those of two
