"""Removes keys of another type than MarketFlow writes: another client made them, and every command on them fails."""

import redis
from loguru import logger

from marketflow.stores.redis import keys
from marketflow.stores.redis.calls import SHORT_ANSWERS, RedisCalls
from marketflow.stores.redis.run_marker import RunMarker


class ForeignKeys:
    """Finds and removes keys of the wrong type.

    Args:
        calls: of Redis.
        run_marker: returns all series that may have keys.
        bucket: names the keys.
    """

    def __init__(self, calls: RedisCalls, run_marker: RunMarker, bucket: keys.Bucket = keys.PLAIN) -> None:
        self._calls = calls
        self._run_marker = run_marker
        self._bucket = bucket
        self._may_ask_types = True

    def remove(self) -> None:
        """Remove them; without the right to TYPE, as by the ACL of an earlier version, they stay.

        Raises:
            Unavailable: Redis cannot be reached.
        """
        if not self._may_ask_types:
            return
        with self._calls.calling():
            try:
                self._remove()
            except redis.exceptions.NoPermissionError as error:
                self._may_ask_types = False
                logger.warning("Redis: keys of other types are not removed; permit TYPE to the user: {}", error)

    def _remove(self) -> None:
        bucket = self._bucket
        fixed = {bucket.series_key: b"zset", bucket.earlier_archived_key: b"string"}
        self._delete([key for key, kind in fixed.items() if self._calls.client.type(key) not in (kind, b"none")])
        series = self._run_marker.known_series()
        for key_of, kind in ((bucket.latest_key, b"hash"), (bucket.window_key, b"zset"), (bucket.minutes_key, b"zset")):
            found = self._calls.each(series, key_of, lambda pipe, key: pipe.type(key), SHORT_ANSWERS)
            self._delete([key_of(each) for each, answer in found if answer not in (kind, b"none")])

    def _delete(self, foreign: list[str]) -> None:
        if foreign:
            self._calls.client.delete(*foreign)
            logger.warning("removed keys from Redis that are not of the type MarketFlow writes: {}", ", ".join(foreign))
