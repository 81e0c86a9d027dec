"""Many who ask the archive the same get one answer, for a moment."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from marketflow.errors import Unavailable
from marketflow.model import Candle, Series, Tick, candle_of
from marketflow.stores.ports import CandleRange
from marketflow.stores.postgres import request_coalescing
from marketflow.stores.postgres.request_coalescing import KEPT_SECONDS, CoalescingReader
from tests.support.market import BTC, ETH


class Archive:
    """Answers when told to, with how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.may_answer = asyncio.Event()
        self.away = False

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        self.asked += 1
        answer = float(self.asked)
        await self.may_answer.wait()
        if self.away:
            raise Unavailable("away")
        return [candle_of(Tick(answer, since, 0)) for _ in series]

    async def candles(self, series: Sequence[Series], walk: CandleRange) -> list[dict[int, Candle]]:
        answers = await self.summary(series, walk.since, walk.until)
        return [{walk.since: candle} for candle in answers if candle is not None]

    async def last(self, series: Sequence[Series]) -> list[Tick | None]:
        return [Tick(1.0, 1, 1) for _ in series]


class World:
    """An archive, what shares it, and a clock."""

    def __init__(self) -> None:
        self.archive = Archive()
        self.now = 100.0
        self.shared = CoalescingReader(self.archive, lambda: self.now)

    async def price(self, series: Series = BTC, since: int = 0, until: int = 60_000) -> float:
        (candle,) = await self.shared.summary([series], since, until)
        assert candle is not None
        return candle.close

    async def candle(self, walk: CandleRange) -> float:
        (candles,) = await self.shared.candles([BTC], walk)
        return candles[walk.since].close


def run(test: Callable[[World], Awaitable[None]]) -> None:
    async def within() -> None:
        await test(World())

    asyncio.run(within())


def test_equal_concurrent_queries_run_once() -> None:
    async def test(world: World) -> None:
        asking = [asyncio.create_task(world.price()) for _ in range(5)]
        await asyncio.sleep(0)
        asking[0].cancel()  # the first one, whose question it was
        world.archive.may_answer.set()
        assert await asyncio.gather(*asking[1:]) == [1.0] * 4
        assert world.archive.asked == 1

    run(test)


def test_answer_is_cached_for_a_moment() -> None:
    async def test(world: World) -> None:
        world.archive.may_answer.set()
        assert await world.price() == 1.0
        world.now += KEPT_SECONDS
        assert await world.price() == 1.0
        world.now += 0.001
        assert await world.price() == 2.0

    run(test)


def test_different_queries_have_different_answers() -> None:
    async def test(world: World) -> None:
        world.archive.may_answer.set()
        assert await world.price() == 1.0
        assert await world.price(ETH) == 2.0
        assert await world.price(since=60_000) == 3.0
        assert await world.price(until=120_000) == 4.0
        assert await world.shared.last([BTC]) == [Tick(1.0, 1, 1)]

    run(test)


def test_candle_queries_are_coalesced_by_their_range() -> None:
    walk = CandleRange(60_000, 0, 60_000, 9, newest=True)

    async def test(world: World) -> None:
        asking = [asyncio.create_task(world.candle(walk)) for _ in range(3)]
        await asyncio.sleep(0)
        world.archive.may_answer.set()
        assert await asyncio.gather(*asking) == [1.0] * 3
        assert await world.price() == 2.0
        assert await world.candle(walk._replace(newest=False)) == 3.0
        assert await world.candle(walk) == 1.0
        world.now += KEPT_SECONDS + 0.001
        assert await world.candle(walk) == 4.0

    run(test)


def test_failed_query_is_not_cached() -> None:
    async def test(world: World) -> None:
        world.archive.may_answer.set()
        world.archive.away = True
        with pytest.raises(Unavailable):
            await world.price()
        world.archive.away = False
        assert await world.price() == 2.0

    run(test)


def test_oldest_answer_is_evicted_beyond_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_coalescing, "MAX_KEPT", 2)

    async def test(world: World) -> None:
        world.archive.may_answer.set()
        assert [await world.price(until=until) for until in (1, 2, 3, 3, 2, 1)] == [1.0, 2.0, 3.0, 3.0, 2.0, 4.0]

    run(test)
