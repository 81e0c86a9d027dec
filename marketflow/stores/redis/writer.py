"""The cache in a Redis, or a bucket of a Redis Cluster, as the pipeline writes it from its threads.

The server's answer may be lost after it has done the work, so every command is absolute: repeating it changes nothing.
There is no INCR, no RPUSH and no hidden retry. Timeouts are short, and after a failure a circuit breaker rejects calls
until a probe succeeds: an outage of Redis costs the pipeline one timeout each half second. The error of a newest price
may be found some time after its write, see UnconfirmedWrites. Failed writes are not queued: memory holds their data
(slices in UnwrittenSlices) and refills the cache afterwards. A process killed before that loses what only memory had:
ticks since the failure, of minutes that were still open. PostgreSQL has the rest.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from typing import Any, cast

import redis

from marketflow.clock import Clock, milliseconds
from marketflow.errors import Unavailable
from marketflow.logs import Outage
from marketflow.model import MINUTE_MS, Candle, Candles, Series, Slot, Tick, minute_start
from marketflow.settings.shards import LEAD
from marketflow.stores.cache_limits import MINUTES_KEPT_MS
from marketflow.stores.circuit_breaker import CircuitBreaker
from marketflow.stores.ports import RecoveredCandles, Wanted, every_series
from marketflow.stores.redis import codec, keys
from marketflow.stores.redis.calls import RedisCalls
from marketflow.stores.redis.connection import TIMEOUT_SECONDS, buckets_of, sync_client
from marketflow.stores.redis.foreign_keys import ForeignKeys
from marketflow.stores.redis.recovery import RecoveryReader
from marketflow.stores.redis.run_marker import RunMarker
from marketflow.stores.redis.slot_script import PAUSE_FACTOR, SlotScript
from marketflow.stores.redis.unconfirmed_writes import Command, UnconfirmedWrites
from marketflow.stores.unwritten_slices import UnwrittenSlices

EXPIRY_RENEWALS = 10
"""Parts of the expiry of a newest price: it is renewed after one part, so a price may expire one part too early."""

FEW_TICKS = 8
"""Newest ticks up to which each is a command of its own; more are written by a script, which has one reply."""

TICKS_A_CALL = 1000
"""Newest ticks that one call of the script writes, within a few milliseconds of the server."""

PUT_NEWEST = """
local ticks, latest, at = tonumber(ARGV[4]), tonumber(ARGV[5]), 6
for tick = 1, ticks do
    local key, price, time, sequence, is_newer = KEYS[tick], ARGV[at], ARGV[at + 1], ARGV[at + 2], true
    if latest then
        local held = redis.call('hmget', key, 'timestamp', 'sequence')
        local held_at, held_sequence = tonumber(held[1] or ''), tonumber(held[2] or '') or 0
        is_newer = not held_at or held_at < tonumber(time) or held_at > latest
            or (held_at == tonumber(time) and held_sequence <= tonumber(sequence))
    end
    if is_newer then
        local received = #sequence > 6 and string.sub(sequence, 1, -7) or '0'
        redis.call('hset', key, 'price', price, 'timestamp', time, 'received', received, 'sequence', sequence)
    end
    at = at + 3
end
for expiring = ticks + 1, #KEYS do redis.call('pexpire', KEYS[expiring], ARGV[1]) end
redis.call('PUBLISH', ARGV[2], ARGV[3])
"""
"""Write newest ticks of several series, where they are not older than those of another process, if there is one.

KEYS: the hash of each tick, then those whose expiry is renewed. ARGV: expiry (ms), channel, message, number of ticks;
a time beyond which a stored tick is from before the clock was set back, empty if no other process writes; then of each
tick price, timestamp, sequence.
"""

SERIES_SECONDS = 25e-6
"""Added to the timeout per series, as a write waits behind those of all others. Without it three writes in 25 s timed
out with 15,000 series on two busy cores."""

SERIES_REPLY_SECONDS = 4 * SERIES_SECONDS
"""Added per series to the limit of reading all outstanding replies. A late reply counts as an outage, after which every
slice is written again; that takes so much CPU that the next reply is late as well."""


class RedisWriter:
    """Writes newest prices, slices and closed minutes; for any number of threads.

    Args:
        client: shared by all threads.
        series: all configured series.
        clock: the time by which old slots are trimmed.
        ttl_seconds: expiry of a newest price.
        circuit_breaker: returns the circuit breaker of the node in use; None creates one.
        bucket: names the keys.
        buckets: see RecoveryReader.
        outage: see RedisCalls.
        monotonic: measures how long writes are unconfirmed, in seconds.
        is_shared: whether another process may write the same series: then no newest price replaces a newer one.
    """

    def __init__(
        self,
        client: "redis.Redis",
        series: Iterable[Series],
        clock: Clock,
        ttl_seconds: int,
        circuit_breaker: Callable[[], CircuitBreaker] | None = None,
        bucket: keys.Bucket = keys.PLAIN,
        buckets: int = 1,
        outage: Outage | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        is_shared: bool = False,
    ) -> None:
        self._is_shared = is_shared
        own_breaker = CircuitBreaker()
        self._calls = RedisCalls(client, circuit_breaker or (lambda: own_breaker), outage, bucket.title)
        series = list(series)
        self._newest = UnconfirmedWrites(client, monotonic, len(series) * SERIES_REPLY_SECONDS)
        self._run_marker = RunMarker(self._calls, series, clock, bucket)
        self._foreign_keys = ForeignKeys(self._calls, self._run_marker, bucket)
        self._recovery = RecoveryReader(self._calls, self._run_marker, clock, bucket, buckets)
        self.bucket = bucket
        """Names the keys."""
        self._clock = clock
        self._ttl_ms = ttl_seconds * 1000
        self._newest_channel, self._publish = bucket.newest_channel, bucket.publish
        self._newest_script = PUT_NEWEST.replace("PUBLISH", bucket.publish)
        pause_factor = PAUSE_FACTOR if buckets > 1 else 0.0
        script = partial(SlotScript, clock=clock, publish=bucket.publish, pause_factor=pause_factor)
        self._slices = script(bucket.window_key, keys.WINDOW_KEPT_MS, bucket.slices_channel)
        self._minutes = script(bucket.minutes_key, keys.MINUTES_TRIMMED_MS, bucket.minutes_channel)
        self._latest = codec.WrittenKeys(bucket.latest_key)
        self.unwritten = UnwrittenSlices()
        """Slices that could not be written."""
        self.refusal: Callable[[], str] = str
        """Returns why nothing may be written; empty if it may."""
        self._unstored: dict[Series, set[int]] = {}  # starts of recovered minutes that exist only as slices
        self._complete_at_probe = False
        self.answers = True
        """Whether the last probe was answered."""
        self.recovered = False
        """Whether the slices of earlier runs have been read."""
        self.backlog_read = False
        """Whether the unarchived minutes of earlier runs have been read."""

    @classmethod
    def connect(
        cls,
        keywords: Mapping[str, Any],
        series: Iterable[Series],
        clock: Clock,
        ttl_seconds: int,
        max_connections: int = 100,
        bucket: keys.Bucket | None = None,
        **options: Any,
    ) -> "RedisWriter":
        """Return a writer with a client of its own, which connects when first used; one connection per thread.

        Args:
            keywords: see connection_keywords and cluster_keywords.
            series: all configured series.
            clock: see the class.
            ttl_seconds: see the class.
            max_connections: one more raises an error.
            bucket: the one of the series; None where there is only one.
            options: further arguments of the class.
        """
        series = list(series)
        timeout_seconds = TIMEOUT_SECONDS + len(series) * SERIES_SECONDS
        bucket = bucket or buckets_of(keywords)[0]
        client = sync_client(keywords, timeout_seconds, max_connections, bucket.slot)
        if slot_map := keywords.get("slot_map"):
            options["circuit_breaker"] = partial(slot_map.circuit_breaker, bucket.slot)
        return cls(client, series, clock, ttl_seconds, bucket=bucket, **options)

    @property
    def complete(self) -> bool:
        """Whether the cache has all that was written to it; while it has not, read from memory instead."""
        return self._complete_at_probe and not self._calls.incomplete

    def take_series(self, series: Iterable[Series]) -> None:
        """Replace the configured series; from any thread. What is written is not limited to them."""
        self._run_marker.take_series(series)

    def close(self) -> None:
        """Close all connections, also under running calls; these raise Unavailable."""
        self._newest.close()
        self._calls.close()

    # Writes

    def put_newest(self, newest: dict[Series, Tick]) -> bool:
        """Store the newest tick of each series, and publish them; return whether Redis has confirmed it.

        Raises:
            Unavailable: not written, or an earlier write was not.
        """
        now_ms, written_keys = milliseconds(self._clock()), self._latest
        written, ticks = [written_keys[each] for each in newest], list(newest.values())
        # Renewing the expiry costs as much as writing the price, so it is not done each time.
        renewed_ms = self._ttl_ms // EXPIRY_RENEWALS
        due = [key for key in written if abs(now_ms - key.renewed_at) >= renewed_ms]
        if len(ticks) <= FEW_TICKS and not self._is_shared:
            commands = self._few_commands(written, ticks, due)
        else:
            expiring = {key.key for key in due}
            parts = (slice(begin, begin + TICKS_A_CALL) for begin in range(0, len(ticks), TICKS_A_CALL))
            commands = [self._script_call(written[part], ticks[part], expiring, now_ms) for part in parts]
        with self._writing():
            confirmed = self._newest.send(commands)
        for key in due:
            key.renewed_at = now_ms
        return confirmed

    def _few_commands(
        self, written: Sequence[codec.WrittenKey], ticks: Sequence[Tick], due: Sequence[codec.WrittenKey]
    ) -> list[Command]:
        commands: list[Command] = []
        message, texts = _encoded(written, ticks)
        following = iter(texts)
        for key in written:
            price, at, sequence = islice(following, 3)
            received = sequence[:-6] or b"0"
            fields = "price", price, "timestamp", at, "received", received, "sequence", sequence
            commands.append(("HSET", key.key, *fields))
        commands += [("PEXPIRE", key.key, self._ttl_ms) for key in due]
        commands.append((self._publish, self._newest_channel, message))
        # A transaction, so that no price is ever left without an expiry.
        return [("MULTI",), *commands, ("EXEC",)] if due else commands

    def _script_call(
        self, written: Sequence[codec.WrittenKey], ticks: Sequence[Tick], expiring: Container[bytes], now_ms: int
    ) -> Command:
        message, texts = _encoded(written, ticks)
        names = [key.key for key in written]
        names += [name for name in names if name in expiring] if expiring else ()
        latest = now_ms + MINUTE_MS if self._is_shared else ""
        fixed = self._ttl_ms, self._newest_channel, message, len(ticks), latest
        return ("EVAL", self._newest_script, len(names), *names, *fixed, *texts)

    def put_slices(self, slices: Candles) -> None:
        """Store whole slices, publish them, and trim the minutes that are older than the window.

        A series is trimmed up to its oldest recovered minute that is not stored: until then its slices, however old,
        are the only record of it.

        Raises:
            Unavailable: not all are written; `unwritten` holds the others.
        """
        written = 0

        def on_written(some: Sequence[tuple[Slot, Candle]]) -> None:
            nonlocal written
            written += len(some)
            self.unwritten.remove(some)

        try:
            with self._writing() as client:
                self._slices.put(client, slices, self._unstored, on_written)
        except BaseException:
            self.unwritten.add(islice(slices.items(), written, None))
            self._calls.incomplete = True  # again: a probe may have reset it meanwhile, for a refill without these
            raise

    def put_minutes(self, minutes: Candles) -> bool:
        """Store closed minutes, publish them, and trim what is older than a day; return True, once that is confirmed.

        Raises:
            Unavailable: not written.
        """
        with self._writing() as client:
            self._minutes.put(client, minutes)
        self.note_stored(minutes)
        return True

    def note_stored(self, minutes: Iterable[Slot]) -> None:
        """Allow the slices of recovered minutes to be trimmed: the minutes are stored, here or in the archive."""
        if not self._unstored:
            return
        for series, start in minutes:
            if (starts := self._unstored.get(series)) is not None:
                starts.discard(start)
                if not starts:
                    self._unstored.pop(series, None)  # another thread may have removed it

    def mark_archived(self, until: int, shards: Collection[str] = (LEAD,)) -> None:
        """Store before which minute the archive is complete of shards, once their backlog has been read.

        Raises:
            Unavailable: not written.
        """
        if self.backlog_read and shards:
            with self._writing() as client:
                for shard in shards:
                    client.set(self.bucket.archived_key(shard), until, px=MINUTES_KEPT_MS)

    # Until when trades are complete

    def complete_until(self, exchange: str) -> dict[str, int]:
        """Return until when (Unix ms) all trades of the symbols of an exchange are on record, as it was put last.

        Raises:
            Unavailable: Redis cannot be reached.
        """
        with self._calls.calling() as client:
            return codec.decode_times(cast("bytes | None", client.get(self.bucket.complete_key(exchange))))

    def put_complete_until(self, exchange: str, until: Mapping[str, int]) -> None:
        """Store until when (Unix ms) all trades of the symbols of an exchange are on record.

        Raises:
            Unavailable: not written, or Redis lacks what was written before.
        """
        if not self.complete:
            raise Unavailable("Redis is not complete")
        with self._writing() as client:
            key = self.bucket.complete_key(exchange)
            # Other symbols of the exchange may be another process's.
            known = codec.decode_times(cast("bytes | None", client.get(key)))
            client.set(key, codec.encode_times({**known, **until}), px=keys.EXPIRY_MS)

    # Recovery

    def recover(self, minute_ms: int = MINUTE_MS, wanted: Wanted = every_series) -> RecoveredCandles:
        """Return the candles that earlier runs left of some series. Nothing is written before this has succeeded.

        Otherwise a late recovery, after an outage of Redis at the start, would count this run's ticks twice.

        Raises:
            Unavailable: Redis cannot be reached.
        """
        if not self.recovered:
            self._foreign_keys.remove()
        recovered = self._recovery.recent(minute_ms, wanted)
        if not self.recovered:
            self._run_marker.mark()
        unstored: defaultdict[Series, set[int]] = defaultdict(set)
        for each, start in (*recovered.slices, *recovered.minutes):
            unstored[each].add(minute_start(start, minute_ms))
        self._unstored = self._unstored | unstored
        if not self.recovered:
            self.recovered = self._complete_at_probe = True
            self._calls.end_outage()
        return recovered

    def between(
        self, since: int, until: int, minute_ms: int = MINUTE_MS, wanted: Wanted = every_series
    ) -> RecoveredCandles:
        """See RecoveryReader."""
        return self._recovery.between(since, until, minute_ms, wanted)

    def slices_since(self, starts: Mapping[Series, int], until: int) -> Candles:
        """See RecoveryReader."""
        return self._recovery.slices_since(starts, until)

    def last_before(self, series: Sequence[Series], before: int) -> Candles:
        """See RecoveryReader."""
        return self._recovery.last_before(series, before)

    def unarchived(
        self, shards: Collection[str] = (LEAD,), shard_of: Callable[[Series], str] = lambda _: LEAD
    ) -> Candles:
        """See RecoveryReader."""
        minutes = self._recovery.unarchived(shards, shard_of)
        self.backlog_read = True
        return minutes

    def needs_refill(self) -> bool:
        """Probe Redis; return True if it answers and may lack data, because a call failed or it was emptied.

        A failed probe counts as a failed call: it may have set this run's key, and hidden that it was missing.
        """
        if not self.recovered or self.refusal():
            return False
        try:
            alive = self._run_marker.probe()
            with self._calls.calling():  # after the probe: without outstanding replies it sends nothing
                self._newest.confirm()
        except Unavailable:
            self.answers = False
            return False
        self.answers = True
        self._complete_at_probe = alive and not self._calls.incomplete
        if self._complete_at_probe:
            self._calls.end_outage()
        else:
            with suppress(Unavailable):
                self._foreign_keys.remove()
            self._calls.incomplete = False
            self._latest = codec.WrittenKeys(self.bucket.latest_key)  # new ones: writes under way change the former
            self._slices.renew_expiry()
            self._minutes.renew_expiry()
        return not self._complete_at_probe

    def lacks(self, _: Series) -> bool:
        """Return True: every series is in the same bucket."""
        return True

    @contextmanager
    def _writing(self) -> Iterator["redis.Redis"]:
        if not self.recovered:
            self._calls.incomplete = True
            raise Unavailable("what an earlier run left in Redis has not been read yet")
        if refusal := self.refusal():
            self._calls.incomplete = True
            raise Unavailable(refusal)
        with self._calls.calling() as client:
            yield client


def _encoded(written: Sequence[codec.WrittenKey], ticks: Sequence[Tick]) -> tuple[bytes, list[bytes]]:
    """Return the message of newest ticks, and price, time and sequence of each in turn.

    As text, which hiredis packs twice as fast as numbers.
    """
    members, texts = codec.encode_ticks(ticks)
    published = [b"[%b,[%b]]" % (key.series, member) for key, member in zip(written, members, strict=False)]
    return codec.announcement(published), texts
