"""The key of this run and the index of its series: both are missing once Redis was emptied."""

from collections.abc import Iterable
from typing import cast
from uuid import uuid4

from marketflow.clock import Clock, milliseconds
from marketflow.model import MINUTE_MS, Series
from marketflow.stores.redis import codec, keys
from marketflow.stores.redis.calls import RedisCalls

INDEX_MS = 5 * MINUTE_MS
"""How often the index of the series is written again: it says when one was last configured, to the day."""

_ALIVE_SECONDS = 3600


class RunMarker:
    """Marks what this run has written to Redis, and finds out whether it is still there.

    Args:
        calls: of Redis.
        series: all configured series.
        clock: dates the index.
    """

    def __init__(self, calls: RedisCalls, series: Iterable[Series], clock: Clock) -> None:
        self._calls = calls
        self.take_series(series)
        self._clock = clock
        self._run_key = keys.run_key(uuid4().hex)

    def take_series(self, series: Iterable[Series]) -> None:
        """Replace the configured series; the next probe adds new ones to the index."""
        self.series = list(series)
        """The configured ones."""
        self._index = [codec.encode_series(each) for each in self.series]
        self._indexed_at: int | None = None

    def probe(self) -> bool:
        """Whether this run's key is there, and with it all that was written before. Sets what is missing.

        Raises:
            Unavailable: Redis cannot be reached.
        """
        with self._calls.calling() as client, client.pipeline(transaction=False) as pipe:
            pipe.expire(self._run_key, _ALIVE_SECONDS)
            pipe.pexpire(keys.SERIES_KEY, keys.EXPIRY_MS)
            alive, indexed = pipe.execute()
        due = self._indexed_at is None or abs(milliseconds(self._clock()) - self._indexed_at) >= INDEX_MS
        if not alive or not indexed or due:
            self.mark()
        return bool(alive)

    def mark(self) -> None:
        """Set this run's key, and add its series to the index.

        Raises:
            Unavailable: Redis cannot be reached.
        """
        now_ms = milliseconds(self._clock())
        self._indexed_at = None
        with self._calls.calling() as client, client.pipeline(transaction=True) as pipe:
            pipe.set(self._run_key, 1, ex=_ALIVE_SECONDS)
            pipe.zadd(keys.SERIES_KEY, dict.fromkeys(self._index, now_ms))
            pipe.zremrangebyscore(keys.SERIES_KEY, "-inf", now_ms - keys.EXPIRY_MS)
            pipe.pexpire(keys.SERIES_KEY, keys.EXPIRY_MS)
            pipe.execute()
        self._indexed_at = now_ms

    def known_series(self) -> list[Series]:
        """All series that may have keys, those removed from the settings included; within `calling`."""
        entries = self._calls.client.zrange(keys.SERIES_KEY, 0, -1, withscores=True)
        written = codec.decode_series(cast("list[tuple[bytes, float]]", entries))
        return list(set(self.series) | written)
