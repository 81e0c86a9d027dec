"""Which of cache and memory answers."""

import asyncio
from collections.abc import Sequence

from marketflow.errors import Unavailable
from marketflow.model import Candle, Series, Tick, candle_of
from marketflow.stores.fallback import FallbackReader
from tests.support.market import BTC


class Scripted:
    """Answers with one price, or not at all."""

    def __init__(self, price: float, unavailable: bool = False) -> None:
        self.unavailable = unavailable
        self.asked = 0
        self.tick = Tick(price, 1, 1)

    async def newest(self, series: Sequence[Series]) -> list[Tick | None]:
        self._ask()
        return [self.tick for _ in series]

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        self._ask()
        return [candle_of(self.tick) for _ in series]

    async def by_minute(self, series: Sequence[Series], since: int, until: int) -> list[dict[int, Candle]]:
        self._ask()
        return [{since: candle_of(self.tick)} for _ in series]

    def newest_in_memory(self, series: Sequence[Series]) -> list[Tick | None] | None:
        return [self.tick for _ in series]

    def summary_in_memory(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None] | None:
        return [candle_of(self.tick) for _ in series]

    def _ask(self) -> None:
        self.asked += 1
        if self.unavailable:
            raise Unavailable("unavailable")


def prices(cache: Scripted, memory: Scripted, complete: bool) -> set[float]:
    """What all questions are answered with."""
    reader = FallbackReader(cache, memory, lambda: complete)

    async def ask() -> set[float]:
        (newest,) = await reader.newest([BTC])
        (candle,) = await reader.summary([BTC], 0, 1)
        (minutes,) = await reader.by_minute([BTC], 0, 1)
        assert newest is not None
        assert candle is not None
        return {newest.price, candle.close, minutes[0].close}

    return asyncio.run(ask())


def prices_in_memory(cache: Scripted, memory: Scripted, complete: bool) -> set[float]:
    """What is answered at once."""
    reader = FallbackReader(cache, memory, lambda: complete)
    (newest,) = reader.newest_in_memory([BTC]) or [None]
    (candle,) = reader.summary_in_memory([BTC], 0, 1) or [None]
    assert newest is not None
    assert candle is not None
    return {newest.price, candle.close}


def test_a_complete_cache_answers() -> None:
    memory = Scripted(2.0)
    assert prices(Scripted(1.0), memory, complete=True) == {1.0}
    assert prices_in_memory(Scripted(1.0), memory, complete=True) == {1.0}
    assert memory.asked == 0


def test_memory_answers_for_an_incomplete_cache() -> None:
    cache = Scripted(1.0)
    assert prices(cache, Scripted(2.0), complete=False) == {2.0}
    assert prices_in_memory(cache, Scripted(2.0), complete=False) == {2.0}
    assert cache.asked == 0


def test_memory_answers_during_cache_outage() -> None:
    assert prices(Scripted(1.0, unavailable=True), Scripted(2.0), complete=True) == {2.0}
