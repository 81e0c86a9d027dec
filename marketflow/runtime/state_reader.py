"""Reads the window state of this process for the API, as the stores are read."""

from collections.abc import Sequence

from marketflow.errors import Unavailable
from marketflow.model import Candle, Series, Tick
from marketflow.pipeline.state import WindowState
from marketflow.stores.candle_window import CandleWindow


class StateReader:
    """RecentReader of the window state; unavailable where a range begins before the slices that are held."""

    def __init__(self, state: WindowState) -> None:
        self._state = state

    async def newest(self, series: Sequence[Series]) -> list[Tick | None]:
        """The newest tick of each series, however old."""
        return self.newest_in_memory(series)

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        """One candle for each series of what is held from `since` on.

        Raises:
            Unavailable: of so long ago there are only whole minutes.
        """
        return self._summary(series, since, until)

    async def by_minute(self, series: Sequence[Series], since: int, until: int) -> list[dict[int, Candle]]:
        """The minutes of each series from `since` on, by their start; `since` is the start of one."""
        return [
            CandleWindow(recent.slices, recent.minutes, self._state.minute_ms).by_minute(since, until, recent.newest)
            for recent in (self._state.recent(each, since) for each in series)
        ]

    def newest_in_memory(self, series: Sequence[Series]) -> list[Tick | None]:
        """The newest tick of each series, however old."""
        known = self._state.newest_of(series)
        return [known.get(each) for each in series]

    def summary_in_memory(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None] | None:
        """One candle for each series of what is held from `since` on, unless there are only whole minutes."""
        try:
            return self._summary(series, since, until)
        except Unavailable:
            return None

    def _summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        return [
            CandleWindow(recent.slices, recent.minutes, self._state.minute_ms).covered(since, until, recent.newest)
            for recent in (self._state.recent(each, since) for each in series)
        ]
