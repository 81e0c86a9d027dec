"""Minutes on their way to the archive: kept until written, however long that takes.

Capacity: `limit` rows. Policy: merge (the fuller version of a minute stays); beyond the limit the oldest are dropped
and counted. The cache keeps a day of minutes as well, so that a restart can bring back what waited here.
"""

import threading

from marketflow.model import Candles, minute_start, put_more_complete
from marketflow.stores.cache_limits import RECENT_MS

DEFAULT_LIMIT = 500_000


class Backlog:
    """Closed minutes that the archive has not confirmed."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._rows: Candles = {}
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, minutes: Candles) -> int:
        """Take minutes in, or fuller versions of minutes that wait already; gives how many had to be dropped."""
        with self._lock:
            for slot, candle in minutes.items():
                put_more_complete(self._rows, slot, candle)
            excess = max(0, len(self._rows) - self._limit)
            if excess:
                for slot in sorted(self._rows, key=lambda slot: slot.start)[:excess]:
                    del self._rows[slot]
            self.dropped += excess
            return excess

    def rows(self) -> Candles:
        """All that waits."""
        with self._lock:
            return dict(self._rows)

    def confirm(self, written: Candles, now_ms: int) -> int:
        """Let go of rows that were written; gives the start (Unix ms) of a minute before which none waits or will come.

        Late ticks bring new versions of a minute for as long as memory holds it.
        """
        with self._lock:
            for slot, candle in written.items():
                if self._rows.get(slot) is candle:
                    del self._rows[slot]
            return min([minute_start(now_ms) - RECENT_MS, *(slot.start for slot in self._rows)])
