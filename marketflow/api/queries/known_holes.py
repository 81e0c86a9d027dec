"""Holes that are not filled, for the candles that they touch: one copy for all requests, renewed when queried."""

import asyncio
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from marketflow.errors import Unavailable
from marketflow.model import Hole, Mode, Series
from marketflow.stores.ports import HoleQuery, HoleReader

RENEWED_SECONDS = 2.0

MOST_HOLES = 10_000
"""Holes of a mode in the copy, the newest ones."""


class Span(NamedTuple):
    """Event times of the trades before and after a hole (Unix ms)."""

    from_ms: int
    to_ms: int


class KnownHoles:
    """The copy; for one event loop.

    Args:
        reader: has all holes.
        monotonic: seconds, by which the copy ages.
    """

    def __init__(self, reader: HoleReader, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._reader = reader
        self._monotonic = monotonic
        self._spans: dict[Mode, dict[Series, list[Span]]] = {}
        self._read_at: dict[Mode, float] = {}
        self._lock = asyncio.Lock()

    async def spans(self, series: Sequence[Series]) -> list[Span]:
        """The holes of some series of one mode, as of RENEWED_SECONDS ago; the last ones known while unavailable."""
        mode = series[0].mode
        async with self._lock:
            if self._monotonic() - self._read_at.get(mode, -RENEWED_SECONDS) >= RENEWED_SECONDS:
                await self._renew(mode)
        known = self._spans.get(mode)
        return [span for each in series for span in known.get(each, ())] if known else []

    async def _renew(self, mode: Mode) -> None:
        try:
            holes = await self._reader.holes(HoleQuery(mode, MOST_HOLES, unfilled=True))
        except Unavailable:
            pass  # a candle is answered without the mark rather than not at all
        else:
            self._spans[mode] = _by_series(holes)
        self._read_at[mode] = self._monotonic()


def touched(spans: Iterable[Span], starts: Sequence[int], end_of: Callable[[int], int]) -> set[int]:
    """The candles in which trades are missing, by their starts (Unix ms, ascending), with the ends of them."""
    found: set[int] = set()
    ends = [end_of(start) for start in starts]
    for span in spans:
        found.update(starts[bisect_right(ends, span.from_ms) : bisect_right(starts, span.to_ms)])
    return found


def _by_series(holes: Iterable[Hole]) -> dict[Series, list[Span]]:
    spans: defaultdict[Series, list[Span]] = defaultdict(list)
    for hole in holes:
        spans[hole.series].append(Span(hole.from_ms, hole.to_ms))
    return dict(spans)
