"""Reads what earlier runs and other processes left in Redis back into the pipeline."""

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, cast

import msgspec
from loguru import logger

from marketflow.clock import Clock, milliseconds
from marketflow.model import (
    MINUTE_MS,
    Candle,
    Candles,
    Series,
    Slot,
    Tick,
    candle_of,
    merge_all,
    minute_start,
    put_more_complete,
    slice_start,
)
from marketflow.stores.cache_limits import MINUTES_KEPT_MS, SLICES_HELD
from marketflow.stores.ports import RecoveredCandles, Wanted, every_series
from marketflow.stores.redis import codec, keys
from marketflow.stores.redis.calls import SHORT_ANSWERS, RedisCalls
from marketflow.stores.redis.run_marker import RunMarker
from marketflow.stores.tick_folding import minutes_of_ticks

UNFOLDED_MS = 10_000
"""How far back slices are read unfolded where there are too many: a standby has those itself, and merges both."""

SERIES_A_SCRIPT = 500
"""Series whose new slices one script reads, in about a millisecond of the server."""

_SLICES_SINCE = """
local found = {}
for number, key in ipairs(KEYS) do
    local entries = redis.call('zrangebyscore', key, ARGV[number + 1], ARGV[1], 'withscores')
    if #entries > 0 then
        found[#found + 1] = number
        found[#found + 1] = entries
    end
end
return found
"""
"""Read slices of many series, most of which have few or none.

KEYS: the sorted sets. ARGV: the last start that is wanted; then for each key the first one. Returns numbers of keys,
each followed by members and scores in turn. One script, since packing a command for each series and parsing its answer
costs more.
"""

_decode_ticks = msgspec.json.Decoder(list[Tick]).decode


class RecoveryReader:
    """Reads slices and closed minutes of earlier runs and of other processes.

    Args:
        calls: of Redis.
        run_marker: returns all series that may have keys.
        clock: limits how far back is read.
        bucket: names the keys.
        buckets: how many there are; each has an equal share of SLICES_HELD.
    """

    def __init__(
        self,
        calls: RedisCalls,
        run_marker: RunMarker,
        clock: Clock,
        bucket: keys.Bucket = keys.PLAIN,
        buckets: int = 1,
    ) -> None:
        self._calls = calls
        self._run_marker = run_marker
        self._clock = clock
        self._bucket = bucket
        self._buckets = buckets
        self._window_key = cache(bucket.window_key)  # each step of the alerts reads thousands
        self._last_decoded: dict[Series, tuple[bytes, Slot, Candle]] = {}  # the newest member that was read

    def recent(self, minute_ms: int = MINUTE_MS, wanted: Wanted = every_series) -> RecoveredCandles:
        """Return the slices of some series; where they are too many, older ones folded into minutes.

        Raises:
            Unavailable: Redis cannot be reached.
        """
        with self._calls.calling():
            series = [each for each in self._run_marker.known_series() if wanted(each)]
            # A run that was killed before it noticed that Redis had been emptied may have left keys without expiry.
            for key_of in (self._bucket.window_key, self._bucket.minutes_key):
                expired = self._calls.each(
                    series, key_of, lambda pipe, key: pipe.pexpire(key, keys.EXPIRY_MS), SHORT_ANSWERS
                )
                deque(expired, maxlen=0)
            counts = self._calls.each(series, self._bucket.window_key, lambda pipe, key: pipe.zcard(key), SHORT_ANSWERS)
            found = sum(count for _, count in counts)
            if found > self._slices_held:
                recovered = self._folded(series, minute_ms)
            else:
                windows = self._calls.each(series, self._bucket.window_key, lambda pipe, key: pipe.zrange(key, 0, -1))
                recovered = _slices(windows)
        if found:
            level = "INFO" if self._buckets == 1 else "DEBUG"  # else a line for each bucket
            logger.log(level, "recovered {} slices of an earlier run or another process from Redis", found)
        return recovered

    def _folded(
        self, series: Sequence[Series], minute_ms: int, since: int | str = "-inf", until: int | str = "+inf"
    ) -> RecoveredCandles:
        whole_from = slice_start(milliseconds(self._clock())) - UNFOLDED_MS
        if isinstance(until, int):
            whole_from = min(whole_from, until + 1)
        windows = self._calls.each(
            series, self._bucket.window_key, lambda pipe, key: pipe.zrangebyscore(key, since, f"({whole_from}")
        )
        minutes = {
            Slot(series, start): candle
            for series, members in windows
            for start, candle in minutes_of_window(members, minute_ms).items()
        }
        slices = self._slots(series, self._bucket.window_key, whole_from, until)
        return RecoveredCandles(slices, minutes, whole_from)

    @property
    def _slices_held(self) -> int:
        return SLICES_HELD // self._buckets

    def between(
        self, since: int, until: int, minute_ms: int = MINUTE_MS, wanted: Wanted = every_series
    ) -> RecoveredCandles:
        """Return the slices of some series, of all processes, that begin from `since` on and before `until` (Unix ms).

        Where they are too many, older ones are folded into minutes, as by `recent`.

        Raises:
            Unavailable: Redis cannot be reached.
        """
        until -= 1
        series = [each for each in self._run_marker.series if wanted(each)]
        if not series:  # `calling` without a command would count as an answer of Redis
            return RecoveredCandles({})
        with self._calls.calling():
            counts = self._calls.each(
                series, self._bucket.window_key, lambda pipe, key: pipe.zcount(key, since, until), SHORT_ANSWERS
            )
            if sum(count for _, count in counts) > self._slices_held:
                return self._folded(series, minute_ms, since, until)._replace(whole_from=0)  # only a part was read
            return RecoveredCandles(self._slots(series, self._bucket.window_key, since, until))

    def slices_since(self, starts: Mapping[Series, int], until: int) -> Candles:
        """Return the slices of each series, of all processes, that begin from its time on and before `until` (Unix ms).

        Raises:
            Unavailable: Redis cannot be reached.
        """
        found: Candles = {}
        series = list(starts)
        with self._calls.calling() as client:
            for begin in range(0, len(series), SERIES_A_SCRIPT):
                some = series[begin : begin + SERIES_A_SCRIPT]
                names = [self._window_key(each) for each in some]
                since = [str(starts[each]) for each in some]
                reply = cast("list[Any]", client.eval(_SLICES_SINCE, len(names), *names, str(until - 1), *since))
                for number, entries in zip(reply[::2], reply[1::2], strict=True):
                    self._decode(some[number - 1], entries, found)
        return found

    def _decode(self, series: Series, entries: Sequence[bytes], found: Candles) -> None:
        """Add the slices of members and scores. The first is often the last of the previous call: not decoded again."""
        last = self._last_decoded.get(series)
        if last is not None and entries[0] == last[0]:
            found[last[1]] = last[2]
            entries = entries[2:]
        slots = codec.decode_slots(zip(entries[::2], map(float, entries[1::2]), strict=True))
        if slots:
            found |= {Slot(series, start): candle for start, candle in slots.items()}
            newest = max(slots)
            self._last_decoded[series] = entries[-2], Slot(series, newest), slots[newest]

    def last_before(self, series: Sequence[Series], before: int) -> Candles:
        """Return the newest slice of each series, of all processes, that begins before a time (Unix ms).

        Raises:
            Unavailable: Redis cannot be reached.
        """
        key_of = self._bucket.window_key
        with self._calls.calling():
            counts = self._calls.each(
                series, key_of, lambda pipe, key: pipe.zcount(key, "-inf", before - 1), SHORT_ANSWERS
            )
            count = {key_of(each): number for each, number in counts if number}
            # Each slice that is trimmed meanwhile shifts the rank by one, to the next newer slice.
            return _slots(
                self._calls.each(
                    [each for each in series if key_of(each) in count],
                    key_of,
                    lambda pipe, key: pipe.zrange(key, count[key] - 1, count[key] - 1, withscores=True),
                )
            )

    def unarchived(self, shards: Collection[str], shard_of: Callable[[Series], str]) -> Candles:
        """Return the closed minutes of shards from the mark on before which the archive has all of them.

        Raises:
            Unavailable: Redis cannot be reached.
        """
        found: Candles = {}
        with self._calls.calling() as client:
            by_shard: defaultdict[str, list[Series]] = defaultdict(list)
            for series in self._run_marker.known_series():
                by_shard[shard_of(series)].append(series)
            for shard in by_shard.keys() & {*shards}:
                names = self._bucket.archived_key(shard), self._bucket.earlier_archived_key
                mark = client.get(names[0]) or client.get(names[1])
                first = self._first_unarchived(codec.decode_start(cast("bytes | None", mark)))
                found |= self._slots(by_shard[shard], self._bucket.minutes_key, first, "+inf")
        return found

    def _first_unarchived(self, mark: int) -> int:
        now_ms = milliseconds(self._clock())
        oldest = minute_start(now_ms) - MINUTES_KEPT_MS
        # A mark ahead of the clock was set before the clock was set back, and proves nothing.
        return oldest if mark > now_ms else max(mark, oldest)

    def _slots(self, series: Sequence[Series], key_of: keys.KeyOf, since: int, until: int | str) -> Candles:
        return _slots(
            self._calls.each(series, key_of, lambda pipe, key: pipe.zrangebyscore(key, since, until, withscores=True))
        )


def _slots(found: "Iterable[tuple[Series, Any]]") -> Candles:
    return {
        Slot(each, start): candle for each, entries in found for start, candle in codec.decode_slots(entries).items()
    }


def _slices(windows: "Iterable[tuple[Series, list[bytes]]]") -> RecoveredCandles:
    return RecoveredCandles(
        {
            Slot(series, start): candle
            for series, members in windows
            for start, candle in _slices_of(_candles(members)).items()
        }
    )


def minutes_of_window(members: Sequence[bytes], minute_ms: int) -> dict[int, Candle]:
    """Return the minutes of a window, by start; invalid members are skipped.

    Without scores, which take Redis and Python long: members are in the order of their time and contain it.

    Args:
        members: slices in the order of their start.
        minute_ms: length of a minute.
    """
    try:
        ticks = _decode_ticks(b"[" + b",".join(members) + b"]")
    except msgspec.MsgspecError:
        return _minutes_of(_candles(members), minute_ms)
    times = [tick.at for tick in ticks]
    if times != sorted(times) or (times and not 0 <= times[0] <= times[-1] < codec.LATEST_MS):
        return _minutes_of(_candles(members), minute_ms)  # another program wrote some of them
    if len({slice_start(at) for at in times}) < len(ticks):  # a slice is there in two versions
        return _minutes_of(map(candle_of, ticks), minute_ms)
    return minutes_of_ticks(ticks, minute_ms)


def _candles(members: Iterable[bytes]) -> Iterator[Candle]:
    for member in members:
        if (candle := codec.valid_candle("slot", member)) is not None:
            yield candle


def _slices_of(found: Iterable[Candle]) -> dict[int, Candle]:
    """Return slices by start; of two versions of a slice the more complete one."""
    slices: dict[int, Candle] = {}
    for candle in found:
        put_more_complete(slices, slice_start(candle.first_at), candle)
    return slices


def _minutes_of(found: Iterable[Candle], minute_ms: int) -> dict[int, Candle]:
    return merge_all({minute_start(start, minute_ms): candle} for start, candle in _slices_of(found).items())
