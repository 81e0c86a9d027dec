"""What earlier runs left in Redis, as the pipeline reads it back."""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import cast

from loguru import logger

from marketflow.clock import Clock, milliseconds
from marketflow.model import MINUTE_MS, Candles, Series, Slot, minute_start
from marketflow.stores.ports import MINUTES_KEPT_MS, SLICES_HELD, RecoveredCandles
from marketflow.stores.redis import codec, keys
from marketflow.stores.redis.calls import RedisCalls
from marketflow.stores.redis.run_marker import RunMarker
from marketflow.stores.redis.slice_folding import candles, minutes_of_window, slices_of


class RecoveryReader:
    """Reads slices and closed minutes of earlier runs and of other processes.

    Args:
        calls: of Redis.
        run_marker: knows all series.
        series: the configured ones.
        clock: limits how far back is read.
    """

    def __init__(self, calls: RedisCalls, run_marker: RunMarker, series: Sequence[Series], clock: Clock) -> None:
        self._calls = calls
        self._run_marker = run_marker
        self._series = series
        self._clock = clock

    def recent(self, minute_ms: int = MINUTE_MS) -> RecoveredCandles:
        """The slices of the last minutes; folded into minutes where they are more than SLICES_HELD.

        Raises:
            Unavailable: Redis cannot be reached.
        """
        with self._calls.calling():
            series = self._run_marker.known_series()
            # A run that was killed before it noticed that Redis had been emptied may have left keys without expiry.
            for key_of in (keys.window_key, keys.minutes_key):
                expired = self._calls.each(series, key_of, lambda pipe, key: pipe.pexpire(key, keys.EXPIRY_MS))
                deque(expired, maxlen=0)
            counts = self._calls.each(series, keys.window_key, lambda pipe, key: pipe.zcard(key))
            found = sum(count for _, count in counts)
            windows = self._calls.each(series, keys.window_key, lambda pipe, key: pipe.zrange(key, 0, -1))
            recovered = self._minutes(windows, minute_ms) if found > SLICES_HELD else _slices(windows)
        if found:
            logger.info("recovered {} slices of the last minutes from Redis", found)
        return recovered

    def _minutes(self, windows: "Iterable[tuple[Series, list[bytes]]]", minute_ms: int) -> RecoveredCandles:
        minutes = {
            Slot(series, start): candle
            for series, members in windows
            for start, candle in minutes_of_window(members, minute_ms).items()
        }
        return RecoveredCandles({}, minutes, whole_from=milliseconds(self._clock()))

    def slices_between(self, since: int, until: int) -> Candles:
        """The slices that begin at or after `since` and before `until` (Unix ms), of all processes.

        Empty where they are more than SLICES_HELD.

        Raises:
            Unavailable: Redis cannot be reached.
        """
        until -= 1
        with self._calls.calling():
            counts = self._calls.each(self._series, keys.window_key, lambda pipe, key: pipe.zcount(key, since, until))
            if sum(count for _, count in counts) > SLICES_HELD:
                return {}
            return self._slots(self._series, keys.window_key, since, until)

    def unarchived(self) -> Candles:
        """The closed minutes since the one before which the archive is known to be complete.

        Raises:
            Unavailable: Redis cannot be reached.
        """
        with self._calls.calling() as client:
            mark = client.get(keys.ARCHIVED_KEY)
            since = codec.decode_start(cast("bytes | None", mark))
            now_ms = milliseconds(self._clock())
            oldest = minute_start(now_ms) - MINUTES_KEPT_MS
            # A mark ahead of the clock was set before the clock was set back, and proves nothing.
            first = oldest if since > now_ms else max(since, oldest)
            return self._slots(self._run_marker.known_series(), keys.minutes_key, first, "+inf")

    def _slots(self, series: Sequence[Series], key_of: keys.KeyOf, since: int, until: int | str) -> Candles:
        found = self._calls.each(
            series, key_of, lambda pipe, key: pipe.zrangebyscore(key, since, until, withscores=True)
        )
        return {
            Slot(each, start): candle
            for each, entries in found
            for start, candle in codec.decode_slots(entries).items()
        }


def _slices(windows: "Iterable[tuple[Series, list[bytes]]]") -> RecoveredCandles:
    return RecoveredCandles(
        {
            Slot(series, start): candle
            for series, members in windows
            for start, candle in slices_of(candles(members)).items()
        }
    )
