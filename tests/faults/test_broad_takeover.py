"""A takeover of more series than memory or a recovery has all slices of, in the running minute."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from marketflow.model import MINUTE_MS, Mode, Series, Tick
from tests.faults.conftest import LATE_MS, Record
from tests.support.application import exchanges_setting, now_ms
from tests.support.oracle import Rows, differences
from tests.support.roles import Broadcasting, IngestProcess, Roles, stop_all
from tests.support.servers import RedisServer, wait_until

pytestmark = [pytest.mark.timeout(400), pytest.mark.alone]

PROGRAM = """
from marketflow.stores import cache_limits
cache_limits.SLICES_HELD = {}
from marketflow.cli.main import main
raise SystemExit(main())
"""
"""Starts MarketFlow with another limit of slices, which is to be filled within 17 s."""

PARTS = 10
"""Number of parts in which the ticks of a second are sent, each of other symbols."""


class BroadTraffic:
    """A tick a second of each symbol of each exchange, until it ends; remembers what it has sent."""

    def __init__(self, exchanges: list[Broadcasting], symbols: list[str]) -> None:
        self._exchanges = exchanges
        self._symbols = symbols
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self.sent: list[tuple[Series, Tick]] = []
        self.late_ms = 0
        """How late the latest part was sent, by this machine's fault."""

    def __enter__(self) -> "BroadTraffic":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(10)

    def _send(self) -> None:
        symbols = self._symbols
        series = {
            exchange: [Series(Mode.LIVE, exchange.name, symbol) for symbol in symbols] for exchange in self._exchanges
        }
        begun, count = time.monotonic(), 0
        while not self._ended.wait(max(begun + count / PARTS - time.monotonic(), 0)):
            self.late_ms = max(self.late_ms, round((time.monotonic() - begun - count / PARTS) * 1000))
            for exchange, of_exchange in series.items():
                at, lines = now_ms(), []
                for number in range(count % PARTS, len(symbols), PARTS):
                    price = 1000.0 + (count * 7919 + number) % 12_501
                    lines.append(f'{{"symbol":"{symbols[number]}","price":{price},"timestamp":{at}}}\n')
                    self.sent.append((of_exchange[number], Tick(price, at, len(self.sent))))
                exchange.send_raw("".join(lines).encode())
            count += 1


@pytest.fixture
def exchanges() -> Iterator[list[Broadcasting]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Broadcasting(f"exchange{n}")) for n in (1, 2, 3)]


@pytest.fixture
def roles(server_folder: Path, servers: dict[str, object], exchanges: list[Broadcasting]) -> Iterator[Roles]:
    settings: dict[str, object] = {
        "MODE": "live",
        "EXCHANGES": exchanges_setting(*exchanges),
        "FLOW__LATE_AFTER_SECONDS": LATE_MS / 1000,
    }
    with ExitStack() as stack:
        yield Roles(stack, server_folder, servers | settings)


def wait_until_second(start: int, second: float) -> None:
    """Wait for a second of the minute that begins at `start`."""
    wait_until(lambda: now_ms() >= start + second * 1000, 125)


def assert_minute_is_exact(
    start: int, traffic: BroadTraffic, owner: IngestProcess, standby: IngestProcess, rows: Callable[[], Rows]
) -> None:
    """Wait for the rows of a minute, and compare them with what was sent."""
    expected = [(series, tick) for series, tick in traffic.sent if start <= tick.at < start + MINUTE_MS]

    def wrong() -> list[str]:
        of_minute = {slot: row for slot, row in rows().items() if slot.start == start}
        return differences(of_minute, expected)

    with suppress(AssertionError):  # which would not say what is wrong
        wait_until(lambda: not wrong(), 60)
    stop_all(standby)
    complaints = wrong()
    assert not complaints, (
        f"{len(complaints)} rows are wrong: {complaints[:5]}\n{owner.log[-8000:]}\n{standby.log[-8000:]}"
    )


def test_owner_holds_evicted_slices_that_redis_lacks(
    roles: Roles, exchanges: list[Broadcasting], redis_db: RedisServer, rows: Callable[[], Rows]
) -> None:
    """Redis is frozen for longer than slices are held. The standby begins when it is refilled; the owner is killed."""
    symbols = [f"COIN{number}" for number in range(500)]
    roles.settings["SYMBOLS"] = ",".join(symbols)
    program = "-c", PROGRAM.format(50 * len(symbols))
    owner = roles.ingest(program)
    wait_until(lambda: all(exchange.clients for exchange in exchanges), 20)
    with BroadTraffic(exchanges, symbols) as traffic:
        start = now_ms() - now_ms() % MINUTE_MS + MINUTE_MS
        wait_until_second(start, 2)
        redis_db.pause()
        try:
            wait_until_second(start, 22)
        finally:
            redis_db.resume()
        wait_until(lambda: "Redis can be used again" in owner.log)
        standby = roles.ingest(program)
        wait_until(lambda: all(len(exchange.clients) == 2 for exchange in exchanges), 15)
        warm_at = now_ms() + 2000
        wait_until(lambda: now_ms() >= warm_at)
        # On a busy machine writes time out again: a kill then loses what came since, as the documentation says.
        wait_until(lambda: owner.log.count("Redis can be used again") == owner.log.count("Redis cannot be used"))
        owner.kill()
        wait_until_second(start, 62)
    assert_minute_is_exact(start, traffic, owner, standby, rows)


@pytest.mark.parametrize("count", [500, pytest.param(5000, marks=pytest.mark.slow)])
def test_standby_that_has_evicted_slices_of_the_minute_loses_no_tick(
    count: int, roles: Roles, exchanges: list[Broadcasting], rows: Callable[[], Rows], record_property: Record
) -> None:
    """It began in the middle of the minute; the owner is killed 20 s later. The limit of slices is in proportion.

    Args:
        count: symbols of each of three exchanges; with 5,000 the limit is the real one.
    """
    symbols = [f"COIN{number}" for number in range(count)]
    roles.settings["SYMBOLS"] = ",".join(symbols)
    program = "-c", PROGRAM.format(50 * count)
    owner = roles.ingest(program)
    wait_until(lambda: all(exchange.clients for exchange in exchanges), 20)
    with BroadTraffic(exchanges, symbols) as traffic:
        start = now_ms() - now_ms() % MINUTE_MS + MINUTE_MS
        wait_until_second(start, 30)
        standby = roles.ingest(program)
        wait_until(lambda: all(len(exchange.clients) == 2 for exchange in exchanges), 15)
        wait_until_second(start, 50)
        owner.kill()
        wait_until_second(start, 62)
    record_property("sent late by ms", traffic.late_ms)
    assert_minute_is_exact(start, traffic, owner, standby, rows)
