"""The cache in Redis as the pipeline writes it: one writer for each bucket, of which a plain Redis has one.

Each bucket has its own recovery and its own `complete`. When a master of a Redis Cluster fails, the writes of its
buckets fail and those of all others succeed; only buckets that lack something are refilled. A master that does not
answer delays only its own writes, see WritesByMaster.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from marketflow.clock import Clock
from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS, Candle, Candles, Series, Slot, Tick, put_more_complete
from marketflow.stores.ports import RecoveredCandles, Wanted, every_series
from marketflow.stores.redis import keys
from marketflow.stores.redis.buckets.bucket_count import BucketCount
from marketflow.stores.redis.buckets.slot_map import SlotMap
from marketflow.stores.redis.buckets.writes_by_master import CALLS_AT_ONCE, Write, WritesByMaster
from marketflow.stores.redis.calls import redis_outage
from marketflow.stores.redis.connection import buckets_of
from marketflow.stores.redis.writer import RedisWriter
from marketflow.stores.unwritten_slices import UnwrittenSlices

_T = TypeVar("_T")
_K = TypeVar("_K", Series, Slot)
_Given = TypeVar("_Given", dict[Series, int], list[Series])
_Work = tuple[RedisWriter, Callable[[], _T]]


class BucketedWriter:
    """A CacheWriter of one bucket or of many; for any number of threads.

    Args:
        parts: the writer of each bucket, by its number.
        series: all configured series.
        slot_map: of the cluster; None for a plain Redis.
        bucket_count: of the cluster.
    """

    def __init__(
        self,
        parts: Sequence[RedisWriter],
        series: Iterable[Series],
        slot_map: SlotMap | None = None,
        bucket_count: BucketCount | None = None,
    ) -> None:
        self._parts = parts
        self.unwritten = UnwrittenSlices()
        """Slices that could not be written, of all buckets."""
        for part in parts:
            part.unwritten = self.unwritten
            part.refusal = lambda: self._refusal
        self._sole = parts[0] if len(parts) == 1 else None
        self._slot_map = slot_map
        self._bucket_count = bucket_count
        self._part_of: dict[Series, RedisWriter] = {}
        self._lacking: frozenset[RedisWriter] = frozenset(parts)
        self._threads = _Threads(CALLS_AT_ONCE, "redis") if slot_map else None
        self._writes = WritesByMaster(self._threads, self._master_of) if self._threads else None
        self.take_series(series)

    @classmethod
    def connect(
        cls,
        keywords: Mapping[str, Any],
        series: Iterable[Series],
        clock: Clock,
        ttl_seconds: int,
        max_connections: int = 100,
        is_shared: bool = False,
    ) -> "BucketedWriter":
        """Return a writer with clients of its own, which connect when first used; see RedisWriter.connect."""
        series, buckets, outage = list(series), buckets_of(keywords), redis_outage()
        options: dict[str, Any] = {"buckets": len(buckets), "outage": outage, "is_shared": is_shared}
        parts = [
            RedisWriter.connect(keywords, series, clock, ttl_seconds, max_connections, bucket, **options)
            for bucket in buckets
        ]
        slot_map = keywords.get("slot_map")
        return cls(parts, series, slot_map, slot_map and BucketCount(keywords, ttl_seconds))

    @property
    def recovered(self) -> bool:
        """Whether the slices of earlier runs have been read."""
        return all(part.recovered for part in self._parts)

    @property
    def complete(self) -> bool:
        """Whether the cache has all that was written to it; while it has not, read from memory instead."""
        return not self._refusal and all(part.complete for part in self._parts)

    def unavailable(self, symbols: Iterable[str]) -> tuple[str, ...]:
        """Return the symbols whose bucket is not complete, while others are."""
        if all(not part.complete for part in self._parts):
            return ()
        return tuple(each for each in symbols if not self._of_symbol(each).complete)

    @property
    def answers(self) -> bool:
        """Whether each bucket has answered the last probe."""
        return all(part.answers for part in self._parts)

    def lacks(self, series: Series) -> bool:
        """Whether the last probe found that the cache lacks something of the bucket of a series."""
        return self._part(series) in self._lacking

    def take_series(self, series: Iterable[Series]) -> None:
        """Replace the configured series; from any thread. What is written is not limited to them."""
        of_part: defaultdict[RedisWriter, list[Series]] = defaultdict(list)
        for each in series:
            of_part[self._part(each)].append(each)
        for part in self._parts:
            part.take_series(of_part[part])

    def close(self) -> None:
        """Close all connections, also under running calls; these raise Unavailable."""
        if self._writes is not None:
            self._writes.wait_for_late()
        for part in self._parts:
            part.close()
        if self._bucket_count is not None:
            self._bucket_count.close()
        if self._threads is not None:
            self._threads.shutdown(wait=False)

    # Writes

    def put_newest(self, newest: dict[Series, Tick]) -> bool:
        """Store the newest tick of each series, and publish them; return whether Redis has confirmed it.

        Raises:
            Unavailable: not all are written, or an earlier write was not.
        """
        if self._sole is not None and self._writes is None:
            return self._sole.put_newest(newest)
        divided: defaultdict[RedisWriter, dict[Series, Tick]] = defaultdict(dict)
        for series, tick in newest.items():
            divided[self._part(series)][series] = tick
        return self._put(RedisWriter.put_newest, divided)

    def put_slices(self, slices: Candles) -> None:
        """Store whole slices and publish them; see RedisWriter.

        Raises:
            Unavailable: not all are written.
        """
        self._put(RedisWriter.put_slices, self._divided(slices))

    def put_minutes(self, minutes: Candles) -> bool:
        """Store closed minutes, publish them, and trim what is older than a day; return whether Redis has confirmed it.

        Raises:
            Unavailable: not all are written.
        """
        return self._put(RedisWriter.put_minutes, self._divided(minutes))

    def note_stored(self, minutes: Iterable[Slot]) -> None:
        """Allow the slices of recovered minutes to be trimmed: the minutes are stored, here or in the archive."""
        for part, of_part in self._divided(dict.fromkeys(minutes)).items():
            part.note_stored(of_part)

    def mark_archived(self, until: int, shards: Collection[str]) -> None:
        """Store before which minute the archive is complete of shards, once their backlog has been read.

        Raises:
            Unavailable: not written everywhere.
        """
        self._each([(part, partial(part.mark_archived, until, shards)) for part in self._parts])

    # Until when trades are complete

    def complete_until(self, exchange: str) -> dict[str, int]:
        """Return until when (Unix ms) all trades of the symbols of an exchange are on record, as it was put last.

        Raises:
            Unavailable: Redis cannot be reached.
        """
        found = self._each([(part, partial(part.complete_until, exchange)) for part in self._parts])
        return {symbol: until for of_part in found for symbol, until in of_part.items()}

    def put_complete_until(self, exchange: str, until: Mapping[str, int]) -> None:
        """Store until when (Unix ms) all trades of the symbols of an exchange are on record.

        Raises:
            Unavailable: not all is written, or Redis lacks what was written before.
        """
        divided: defaultdict[RedisWriter, dict[str, int]] = defaultdict(dict)
        for symbol, each in until.items():
            divided[self._of_symbol(symbol)][symbol] = each
        work = [(part, partial(part.put_complete_until, exchange, of_part)) for part, of_part in divided.items()]
        self._each(work)

    # Recovery

    def recover(self, minute_ms: int = MINUTE_MS, wanted: Wanted = every_series) -> RecoveredCandles:
        """Return the candles that earlier runs left of some series; see RedisWriter. A bucket is written once read.

        Raises:
            Unavailable: not all of Redis can be reached, or processes run that have another number of buckets.
        """
        if self._bucket_count is not None and not self.recovered:
            self._bucket_count.settle()
        found = self._each([(part, partial(part.recover, minute_ms, wanted)) for part in self._parts])
        return _all_recovered(found)

    def between(
        self, since: int, until: int, minute_ms: int = MINUTE_MS, wanted: Wanted = every_series
    ) -> RecoveredCandles:
        """See RecoveryReader."""
        work = [(part, partial(part.between, since, until, minute_ms, wanted)) for part in self._parts]
        return _all_recovered(self._each(work))

    def slices_since(self, starts: Mapping[Series, int], until: int) -> tuple[Candles, set[Series]]:
        """See RecoveryReader; the second item is the series of buckets that cannot be read."""
        divided: defaultdict[RedisWriter, dict[Series, int]] = defaultdict(dict)
        for series, start in starts.items():
            divided[self._part(series)][series] = start
        return self._readable(divided, lambda part, of_part: part.slices_since(of_part, until))

    def last_before(self, series: Iterable[Series], before: int) -> tuple[Candles, set[Series]]:
        """See RecoveryReader; otherwise as `slices_since`."""
        divided: defaultdict[RedisWriter, list[Series]] = defaultdict(list)
        for each in series:
            divided[self._part(each)].append(each)
        return self._readable(divided, lambda part, of_part: part.last_before(of_part, before))

    def _readable(
        self, divided: Mapping[RedisWriter, _Given], read: Callable[[RedisWriter, _Given], Candles]
    ) -> tuple[Candles, set[Series]]:
        unread: set[Series] = set()

        def read_or_note(part: RedisWriter, of_part: _Given) -> Candles:
            try:
                return read(part, of_part)
            except Unavailable:
                unread.update(of_part)
                return {}

        work = [(part, partial(read_or_note, part, of_part)) for part, of_part in divided.items()]
        return _union(self._each(work)), unread

    def unarchived(self, shards: Collection[str], shard_of: Callable[[Series], str]) -> Candles:
        """See RecoveryReader."""
        return _union(self._each([(part, partial(part.unarchived, shards, shard_of)) for part in self._parts]))

    def needs_refill(self) -> bool:
        """Probe Redis: True when it answers and may lack what was written; `lacks` says of which series."""
        if self._threads is not None and self._bucket_count is not None and self.recovered:
            self._threads.submit(self._bucket_count.hold)  # not awaited: it must not delay the probe
        needed = self._each([(part, part.needs_refill) for part in self._parts])
        self._lacking = frozenset(part for part, needs in zip(self._parts, needed, strict=True) if needs)
        return bool(self._lacking)

    # Buckets

    @property
    def _refusal(self) -> str:
        return "" if self._bucket_count is None else self._bucket_count.refusal

    def _part(self, series: Series) -> RedisWriter:
        if (part := self._part_of.get(series)) is None:
            part = self._part_of[series] = self._of_symbol(series.symbol)
        return part

    def _of_symbol(self, symbol: str) -> RedisWriter:
        return self._parts[keys.bucket_of(symbol, len(self._parts))]

    def _divided(self, slots: Mapping[Slot, Any]) -> dict[RedisWriter, Any]:
        if self._sole is not None:
            return {self._sole: slots}
        divided: defaultdict[RedisWriter, dict[Slot, Any]] = defaultdict(dict)
        for slot, value in slots.items():
            divided[self._part(slot.series)][slot] = value
        return divided

    def _put(self, write: Write, divided: Mapping[RedisWriter, dict[Any, Any]]) -> bool:
        """Write the items of each bucket; return whether Redis has confirmed all of them."""
        if self._writes is not None:
            return self._writes.write(write, divided)
        return all(write(part, of_part) for part, of_part in divided.items())

    def _each(self, work: "Sequence[_Work[_T]]") -> list[_T]:
        """Do the work of some buckets, those of different masters at the same time; return the results in order.

        Raises:
            Unavailable: that of some bucket failed; all others have been done.
        """
        if self._threads is None or len(work) == 1:
            return [act() for _, act in work]
        by_master: defaultdict[object, list[int]] = defaultdict(list)
        for number, (part, _) in enumerate(work):
            by_master[self._master_of(part)].append(number)
        results: list[Any] = [None] * len(work)
        futures = [self._threads.submit(_do, work, numbers, results) for numbers in by_master.values()]
        for future in futures:
            future.result()
        for result in results:
            if isinstance(result, Unavailable):
                raise result
        return results

    def _master_of(self, part: RedisWriter) -> object:
        assert self._slot_map is not None, "a plain Redis has one bucket"
        return self._slot_map.known_owner(part.bucket.slot)


class _Threads(ThreadPoolExecutor):
    """Threads for calls; once they are shut down, a call is refused with the error of a closed client."""

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> "Future[_T]":
        """Call a function on a thread.

        Raises:
            Unavailable: they are shut down, or the system cannot start one.
        """
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError as error:
            raise Unavailable(f"Redis cannot be used: {error}") from error


def _do(work: "Sequence[_Work[_T]]", numbers: Sequence[int], results: list[Any]) -> None:
    for number in numbers:
        try:
            results[number] = work[number][1]()
        except Unavailable as error:
            results[number] = error


def _all_recovered(found: Sequence[RecoveredCandles]) -> RecoveredCandles:
    slices, minutes = _union(each.slices for each in found), _union(each.minutes for each in found)
    return RecoveredCandles(slices, minutes, max(each.whole_from for each in found))


def _union(found: Iterable[Candles]) -> Candles:
    """Return all candles; of two versions in different buckets the more complete one."""
    union: dict[Slot, Candle] = {}
    for each in found:
        for slot, candle in each.items():
            put_more_complete(union, slot, candle)
    return union
