"""Announcements of newest ticks within a process."""

import asyncio
import threading
from collections.abc import Sequence

from marketflow.model import Series, Tick
from marketflow.runtime.local_announcements import LocalAnnouncements
from tests.api.world import MemoryAnnouncements
from tests.support.market import BTC, ETH

Announced = list[tuple[Series, Tick]]


def tick(number: int) -> Tick:
    return Tick(float(number), number, number)


def test_ticks_of_another_thread_reach_listeners_on_the_loop() -> None:
    got: Announced = []
    threads: set[int] = set()

    async def listen() -> None:
        announcements, done = LocalAnnouncements(asyncio.get_running_loop(), MemoryAnnouncements()), asyncio.Event()

        def take(announced: Sequence[tuple[Series, Tick]]) -> None:
            threads.add(threading.get_ident())
            got.extend(announced)
            if (ETH, tick(1)) in announced:
                done.set()

        def feed() -> None:
            for number in range(1000):
                announcements.publish({BTC: tick(number)})
            announcements.publish({ETH: tick(1)})

        announcements.publish({BTC: tick(0)})
        with announcements.announcing(take):
            await asyncio.to_thread(feed)
            await asyncio.wait_for(done.wait(), 5)

    asyncio.run(listen())
    assert threads == {threading.get_ident()}
    numbers = [each.at for series, each in got if series == BTC]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 999


def test_listener_that_ends_does_not_end_an_equal_one() -> None:
    got: Announced = []

    async def listen() -> None:
        announcements = LocalAnnouncements(asyncio.get_running_loop(), MemoryAnnouncements())
        earlier, later = announcements.announcing(got.extend), announcements.announcing(got.extend)
        with later:
            with earlier:
                pass
            announcements.publish({BTC: tick(1)})
            await asyncio.sleep(0)

    asyncio.run(listen())
    assert got == [(BTC, tick(1))]


def test_ticks_that_wait_for_the_loop_are_conflated() -> None:
    got: list[Announced] = []

    async def listen() -> None:
        announcements = LocalAnnouncements(asyncio.get_running_loop(), MemoryAnnouncements())
        with announcements.announcing(lambda announced: got.append(list(announced))):
            for number in range(100):
                announcements.publish({BTC: tick(number)})
            announcements.publish({ETH: tick(5)})
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    asyncio.run(listen())
    assert got == [[(BTC, tick(99)), (ETH, tick(5))]]


def test_nothing_is_kept_without_listeners() -> None:
    got: list[Announced] = []

    async def listen() -> None:
        announcements = LocalAnnouncements(asyncio.get_running_loop(), MemoryAnnouncements())
        announcements.publish({BTC: tick(1)})
        with announcements.announcing(lambda announced: got.append(list(announced))):
            await asyncio.sleep(0)
        announcements.publish({BTC: tick(2)})
        await asyncio.sleep(0)

    asyncio.run(listen())
    assert got == []


def test_publish_after_the_end_of_the_loop_is_ignored() -> None:
    loop = asyncio.new_event_loop()
    announcements = LocalAnnouncements(loop, MemoryAnnouncements())
    with announcements.announcing(lambda _: None):
        loop.close()
        announcements.publish({BTC: tick(1)})
