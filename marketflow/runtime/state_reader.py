"""Reads the window state of this process for the API, by the interface of the stores."""

import asyncio
from collections.abc import Iterator, Sequence

from marketflow.errors import Unavailable
from marketflow.model import Candle, Series, Tick
from marketflow.pipeline.state import WindowState
from marketflow.stores.candle_window import CandleWindow

SERIES_AT_ONCE = 50
"""Series that are read before others run: some milliseconds."""


class StateReader:
    """RecentReader of the window state; unavailable where a range begins before the slices that are held."""

    def __init__(self, state: WindowState) -> None:
        self._state = state

    async def newest(self, series: Sequence[Series]) -> list[Tick | None]:
        """Return the newest tick of each series, however old."""
        return self.newest_in_memory(series)

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        """Return one candle for each series, of what is held from `since` on.

        Raises:
            Unavailable: `since` is so long ago that only whole minutes are held.
        """
        found: list[Candle | None] = []
        for begin in range(0, len(series), SERIES_AT_ONCE):
            found += self._summary(series[begin : begin + SERIES_AT_ONCE], since, until)
            await asyncio.sleep(0)
        return found

    async def by_minute(self, series: Sequence[Series], since: int, until: int) -> list[dict[int, Candle]]:
        """Return the minutes of each series from `since` on, by their start; `since` is the start of one."""
        return [window.by_minute(since, until, newest) for window, newest in self._windows(series, since)]

    def newest_in_memory(self, series: Sequence[Series]) -> list[Tick | None]:
        """Return the newest tick of each series, however old."""
        known = self._state.newest_of(series)
        return [known.get(each) for each in series]

    def summary_in_memory(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None] | None:
        """Return one candle for each series, of what is held from `since` on; None if only whole minutes are held."""
        try:
            return self._summary(series, since, until)
        except Unavailable:
            return None

    def _summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        return [window.covered(since, until, newest) for window, newest in self._windows(series, since)]

    def _windows(self, series: Sequence[Series], since: int) -> Iterator[tuple[CandleWindow, Tick | None]]:
        """Yield the candles of each series from `since` on and its newest tick; slices only if needed."""
        state = self._state
        read = state.recent if since % state.minute_ms else state.recent_minutes
        for each in series:
            recent = read(each, since)
            yield CandleWindow(recent.slices, recent.minutes, state.minute_ms), recent.newest
