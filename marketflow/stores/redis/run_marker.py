"""The key of this run and the index of its series, both of which are missing once Redis was emptied."""

from collections.abc import Iterable
from typing import cast
from uuid import uuid4

from marketflow.clock import Clock, milliseconds
from marketflow.model import MINUTE_MS, Series
from marketflow.stores.redis import codec, keys
from marketflow.stores.redis.calls import RedisCalls

INDEX_MS = 5 * MINUTE_MS
"""How often the index of the series is written again: it dates when one was last configured, to the day."""

_ALIVE_SECONDS = 3600


class RunMarker:
    """Marks that this run has written to Redis, and checks whether its data are still there.

    Args:
        calls: of Redis.
        series: all configured series.
        clock: dates the index.
        bucket: names the keys.
    """

    def __init__(
        self, calls: RedisCalls, series: Iterable[Series], clock: Clock, bucket: keys.Bucket = keys.PLAIN
    ) -> None:
        self._calls = calls
        self.take_series(series)
        self._clock = clock
        self._run_key, self._series_key = bucket.run_key(uuid4().hex), bucket.series_key
        self._probes = 0

    def take_series(self, series: Iterable[Series]) -> None:
        """Replace the configured series; the next probe adds new ones to the index."""
        self.series = list(series)
        """The configured ones."""
        self._index = [codec.encode_series(each) for each in self.series]
        self._indexed_at: int | None = None

    def probe(self) -> bool:
        """Return whether this run's key has the number of the last probe, and so Redis all that was written before it.

        The key is missing where Redis was emptied, and the number is lower where a server was restarted with older
        data or was replaced by a replica without the last writes. Sets what is missing.

        Raises:
            Unavailable: Redis cannot be reached.
        """
        with self._calls.calling() as client, client.pipeline(transaction=False) as pipe:
            pipe.set(self._run_key, self._probes + 1, ex=_ALIVE_SECONDS, get=True)
            pipe.pexpire(self._series_key, keys.EXPIRY_MS)
            number, indexed = pipe.execute()
        alive = bool(number == str(self._probes).encode())
        self._probes += 1
        due = self._indexed_at is None or abs(milliseconds(self._clock()) - self._indexed_at) >= INDEX_MS
        if not alive or not indexed or due:
            self.mark()
        return alive

    def mark(self) -> None:
        """Set this run's key, and add its series to the index.

        Raises:
            Unavailable: Redis cannot be reached.
        """
        now_ms = milliseconds(self._clock())
        self._indexed_at = None
        with self._calls.calling() as client, client.pipeline(transaction=True) as pipe:
            pipe.set(self._run_key, self._probes, ex=_ALIVE_SECONDS)
            if self._index:
                pipe.zadd(self._series_key, dict.fromkeys(self._index, now_ms))
            pipe.zremrangebyscore(self._series_key, "-inf", now_ms - keys.EXPIRY_MS)
            pipe.pexpire(self._series_key, keys.EXPIRY_MS)
            pipe.execute()
        self._indexed_at = now_ms

    def known_series(self) -> list[Series]:
        """Return all series that may have keys, with those removed from the settings; within `calling`."""
        entries = self._calls.client.zrange(self._series_key, 0, -1, withscores=True)
        written = codec.decode_series(cast("list[tuple[bytes, float]]", entries))
        return list(set(self.series) | written)
