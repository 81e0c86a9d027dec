"""Feeds that lag behind rest in proportion to the CPU time of the event loop; others never do."""

import socket
import threading
import time
from collections.abc import Callable

import pytest

from marketflow.feeds.cpu.pacing import LONGEST_REST, LOOP_TIME, Pacing
from marketflow.feeds.tcp import LONGEST_LAG_MS, RECEIVE_BYTES, TcpFeed
from marketflow.model import Candles, Mode
from tests.feeds.test_contract import make_decoder
from tests.support.servers import HOST

LINE = b'{"symbol":"BTCUSDT","price":1.5,"timestamp":"%d"}\n'


class Machine:
    """Time and CPU times, which only the test moves on."""

    def __init__(self) -> None:
        self.now = self.loop = self.own = 100.0
        self.rests: list[float] = []
        self.pacing = Pacing(lambda: self.loop, lambda: self.own, lambda: self.now, self.sleep)

    def sleep(self, seconds: float) -> None:
        self.rests.append(round(seconds, 9))
        self.now += seconds

    def decode(self, loop_seconds: float) -> None:
        """Decode a chunk of a feed that lags, while the event loop works as well."""
        with self.pacing.decoding():
            self.own += 0.004
            self.loop += loop_seconds


def test_rest_is_in_proportion_to_the_cpu_of_the_event_loop() -> None:
    machine = Machine()
    for loop_seconds in (0.002, 0.001, 0.0):
        machine.decode(loop_seconds)
    assert machine.rests == [0.002 * LOOP_TIME, 0.001 * LOOP_TIME]


def test_idle_event_loop_causes_no_rest() -> None:
    machine = Machine()
    for _ in range(3):
        machine.decode(0.0)
    assert machine.rests == []


def test_busy_event_loop_leaves_feeds_a_seventh_of_the_time() -> None:
    machine = Machine()
    machine.decode(60.0)
    machine.decode(0.0)
    assert machine.rests == [0.004 * LONGEST_REST]


def test_rests_of_several_feeds_add_up() -> None:
    machine = Machine()
    with machine.pacing.decoding():
        machine.own += 0.004
        with machine.pacing.decoding():  # as another feed
            machine.own += 0.004
            machine.loop += 0.002
        machine.loop += 0.002
    machine.decode(0.0)
    assert machine.rests == [round(2 * 0.002 * LOOP_TIME, 9)]


def test_rest_that_has_passed_is_not_made_up_for() -> None:
    machine = Machine()
    machine.decode(0.002)
    machine.now += 1.0
    machine.decode(0.0)
    assert machine.rests == []


MANY = 30 * RECEIVE_BYTES // len(LINE)
"""Lines of several chunks, some of which are whole however the kernel divides what is sent."""


@pytest.mark.parametrize(
    ("lines", "late_ms", "rests"), [(100, 0, False), (MANY, 0, True), (MANY, LONGEST_LAG_MS + 500, False)]
)
def test_feed_rests_while_it_lags_unless_ticks_are_late(lines: int, late_ms: int, rests: bool) -> None:
    """No tick is lost, which one that comes too late would be."""
    machine = Machine()
    busy = iter(range(1_000_000))
    pacing = Pacing(lambda: float(next(busy)), monotonic=lambda: machine.now, sleep=machine.sleep)
    with socket.create_server((HOST, 0)) as server:
        feed = TcpFeed("exchange1", HOST, server.getsockname()[1], make_decoder(Mode.LIVE), 15.0, pacing=pacing)
        ticks, ended = _received(feed)
        client, _ = server.accept()
        with client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
            client.sendall(LINE % (time.time_ns() // 1_000_000 - late_ms) * lines)
        assert ended.wait(10)
    assert ticks() == lines
    assert bool(machine.rests) is rests


def _received(feed: TcpFeed) -> tuple[Callable[[], int], threading.Event]:
    """Subscribe to a feed; gives the ticks so far, and what is set at its end."""
    batches: list[Candles] = []
    ended = threading.Event()
    feed.batches().subscribe(batches.append, lambda _: ended.set(), ended.set)
    return lambda: sum(candle.ticks for batch in batches for candle in batch.values()), ended


def test_pacing_of_an_event_loop_measures_its_thread() -> None:
    pacing = Pacing.of_event_loop()
    if pacing is None:
        pytest.skip("this system does not say how much CPU time a thread has used")
    until = time.thread_time() + 0.05
    while time.thread_time() < until:
        pass

    def decode() -> None:
        with pacing.decoding():
            own = time.thread_time() + 0.02
            while time.thread_time() < own:
                pass

    other = threading.Thread(target=decode)
    other.start()
    other.join()
    assert pacing._rest_until - time.monotonic() > 0.02
