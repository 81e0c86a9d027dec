"""A takeover of so many series that neither memory nor a recovery has all slices of the running minute."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from marketflow.model import MINUTE_MS, Mode, Series, Tick
from tests.faults.conftest import LATE_MS, Record
from tests.faults.test_roles import Broadcasting, Roles, stop_all
from tests.support.application import exchanges_setting, now_ms
from tests.support.oracle import Rows, differences
from tests.support.servers import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SYMBOLS = [f"COIN{number}" for number in range(5000)]
PARTS = 10
"""A second's ticks are sent in so many parts, each of other symbols."""


class BroadTraffic:
    """A tick a second of each symbol of each exchange, until it ends; remembers what it has sent."""

    def __init__(self, exchanges: list[Broadcasting]) -> None:
        self._exchanges = exchanges
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
        series = {
            exchange: [Series(Mode.LIVE, exchange.name, symbol) for symbol in SYMBOLS] for exchange in self._exchanges
        }
        begun, count = time.monotonic(), 0
        while not self._ended.wait(max(begun + count / PARTS - time.monotonic(), 0)):
            self.late_ms = max(self.late_ms, round((time.monotonic() - begun - count / PARTS) * 1000))
            for exchange, of_exchange in series.items():
                at, lines = now_ms(), []
                for number in range(count % PARTS, len(SYMBOLS), PARTS):
                    price = 1000.0 + (count * 7919 + number) % 12_501
                    lines.append(f'{{"symbol":"{SYMBOLS[number]}","price":{price},"timestamp":{at}}}\n')
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
        "SYMBOLS": ",".join(SYMBOLS),
        "FLOW__LATE_AFTER_SECONDS": LATE_MS / 1000,
    }
    with ExitStack() as stack:
        yield Roles(stack, server_folder, servers | settings)


def wait_until_second(start: int, second: float) -> None:
    """Wait for a second of the minute that begins at `start`."""
    wait_until(lambda: now_ms() >= start + second * 1000, 125)


def test_killed_owner_of_15000_series_loses_no_tick(
    roles: Roles, exchanges: list[Broadcasting], rows: Callable[[], Rows], record_property: Record
) -> None:
    """Its standby began in the middle of the minute, and has evicted slices of it since."""
    owner = roles.feeds()
    wait_until(lambda: all(exchange.clients for exchange in exchanges), 20)
    with BroadTraffic(exchanges) as traffic:
        start = now_ms() - now_ms() % MINUTE_MS + MINUTE_MS
        wait_until_second(start, 30)
        standby = roles.feeds()
        wait_until(lambda: all(len(exchange.clients) == 2 for exchange in exchanges), 15)
        wait_until_second(start, 50)
        owner.kill()
        wait_until_second(start, 62)
    record_property("sent late by ms", traffic.late_ms)
    expected = [(series, tick) for series, tick in traffic.sent if start <= tick.at < start + MINUTE_MS]

    def wrong() -> list[str]:
        of_minute = {slot: row for slot, row in rows().items() if slot.start == start}
        return differences(of_minute, expected)

    wait_until(lambda: len([slot for slot in rows() if slot.start == start]) == 3 * len(SYMBOLS), 30)
    stop_all(standby)
    complaints = wrong()
    assert not complaints, f"{len(complaints)} rows are wrong: {complaints[:5]}"
