"""Which of cache and memory answers."""

import asyncio
from collections.abc import Sequence

from marketflow.errors import Unavailable
from marketflow.model import Mode, Series, Tick
from marketflow.stores.fallback import Fallback
from marketflow.stores.ports import Recent

BTC = Series(Mode.LIVE, "exchange1", "BTCUSDT")


class Scripted:
    """Answers with one price, or not at all."""

    def __init__(self, price: float, away: bool = False) -> None:
        self.away = away
        self.asked = 0
        self.tick = Tick(price, 1, 1)

    async def newest(self, series: Sequence[Series]) -> list[Tick | None]:
        self._ask()
        return [self.tick for _ in series]

    async def recent(self, series: Sequence[Series], since: int) -> list[Recent]:
        self._ask()
        return [Recent(self.tick, {}, {}) for _ in series]

    def _ask(self) -> None:
        self.asked += 1
        if self.away:
            raise Unavailable("away")


def prices(cache: Scripted, memory: Scripted, complete: bool) -> set[float]:
    """What both questions are answered with."""
    reader = Fallback(cache, memory, lambda: complete)

    async def ask() -> set[float]:
        (newest,) = await reader.newest([BTC])
        (recent,) = await reader.recent([BTC], 0)
        return {tick.price for tick in (newest, recent.newest) if tick is not None}

    return asyncio.run(ask())


def test_a_complete_cache_answers() -> None:
    memory = Scripted(2.0)
    assert prices(Scripted(1.0), memory, complete=True) == {1.0}
    assert memory.asked == 0


def test_memory_answers_for_a_cache_that_lacks_something_which_is_not_even_asked() -> None:
    cache = Scripted(1.0)
    assert prices(cache, Scripted(2.0), complete=False) == {2.0}
    assert cache.asked == 0


def test_memory_answers_for_a_cache_that_is_away() -> None:
    assert prices(Scripted(1.0, away=True), Scripted(2.0), complete=True) == {2.0}
