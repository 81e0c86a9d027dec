"""Equal queries of the archive are coalesced, and their answer is cached for a moment."""

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
    """Answers once allowed, with the number of queries so far."""

    def __init__(self) -> None:
        self.queries = 0
        self.may_answer = asyncio.Event()
        self.unavailable = False

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        self.queries += 1
        answer = float(self.queries)
        await self.may_answer.wait()
        if self.unavailable:
            raise Unavailable("down")
        return [candle_of(Tick(answer, since, 0)) for _ in series]

    async def candles(self, series: Sequence[Series], wanted: CandleRange) -> list[dict[int, Candle]]:
        answers = await self.summary(series, wanted.since, wanted.until)
        return [{wanted.since: candle} for candle in answers if candle is not None]

    async def last(self, series: Sequence[Series]) -> list[Tick | None]:
        return [Tick(1.0, 1, 1) for _ in series]


class World:
    """An archive, a coalescing reader on it, and a clock."""

    def __init__(self) -> None:
        self.archive = Archive()
        self.now = 100.0
        self.reader = CoalescingReader(self.archive, lambda: self.now)

    async def price(self, series: Series = BTC, since: int = 0, until: int = 60_000) -> float:
        (candle,) = await self.reader.summary([series], since, until)
        assert candle is not None
        return candle.close

    async def candle(self, wanted: CandleRange) -> float:
        (candles,) = await self.reader.candles([BTC], wanted)
        return candles[wanted.since].close


def run(test: Callable[[World], Awaitable[None]]) -> None:
    async def within() -> None:
        await test(World())

    asyncio.run(within())


def test_equal_concurrent_queries_run_once() -> None:
    async def test(world: World) -> None:
        requests = [asyncio.create_task(world.price()) for _ in range(5)]
        await asyncio.sleep(0)
        requests[0].cancel()  # the first one, which started the query
        world.archive.may_answer.set()
        assert await asyncio.gather(*requests[1:]) == [1.0] * 4
        assert world.archive.queries == 1

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
        assert await world.reader.last([BTC]) == [Tick(1.0, 1, 1)]

    run(test)


def test_candle_queries_are_coalesced_by_their_range() -> None:
    wanted = CandleRange(60_000, 0, 60_000, 9, newest=True)

    async def test(world: World) -> None:
        requests = [asyncio.create_task(world.candle(wanted)) for _ in range(3)]
        await asyncio.sleep(0)
        world.archive.may_answer.set()
        assert await asyncio.gather(*requests) == [1.0] * 3
        assert await world.price() == 2.0
        assert await world.candle(wanted._replace(newest=False)) == 3.0
        assert await world.candle(wanted) == 1.0
        world.now += KEPT_SECONDS + 0.001
        assert await world.candle(wanted) == 4.0

    run(test)


def test_failed_query_is_not_cached() -> None:
    async def test(world: World) -> None:
        world.archive.may_answer.set()
        world.archive.unavailable = True
        with pytest.raises(Unavailable):
            await world.price()
        world.archive.unavailable = False
        assert await world.price() == 2.0

    run(test)


def test_oldest_answer_is_evicted_beyond_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_coalescing, "MAX_KEPT", 2)

    async def test(world: World) -> None:
        world.archive.may_answer.set()
        assert [await world.price(until=until) for until in (1, 2, 3, 3, 2, 1)] == [1.0, 2.0, 3.0, 3.0, 2.0, 4.0]

    run(test)
