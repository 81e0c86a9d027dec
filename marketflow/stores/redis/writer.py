"""The cache in a Redis, or a bucket of a Redis Cluster, as the pipeline writes it from its threads.

The server's answer may be lost after it has done the work, so every command is absolute: repeating it changes nothing.
There is no INCR, no RPUSH and no hidden retry. Timeouts are short, and after a failure a circuit breaker rejects calls
until a probe succeeds: an outage of Redis costs the pipeline one timeout each half second. The error of a newest price
may be found some time after its write, see UnconfirmedWrites. What was not written is not
queued; memory holds all of it and refills the cache afterwards. A process killed before that loses what only memory
had: ticks since the failure, of minutes that were still open. PostgreSQL has the rest.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, cast

import redis

from marketflow.clock import Clock, milliseconds
from marketflow.errors import Unavailable
from marketflow.logs import Outage
from marketflow.model import MINUTE_MS, Candles, Series, Slot, Tick, minute_start
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
from marketflow.stores.redis.slot_script import REST, SlotScript
from marketflow.stores.redis.unconfirmed_writes import Command, UnconfirmedWrites

EXPIRY_RENEWALS = 10
"""Into how many parts the expiry of a newest price is cut: it is renewed after one, and may come one too early."""

FEW_TICKS = 8
"""Newest ticks up to which each is a command of its own; more are written by a script, which answers once."""

TICKS_A_CALL = 1000
"""Newest ticks that one call of the script writes, within a few milliseconds of the server."""

PUT_NEWEST = """
local at = 5
for _, key in ipairs(KEYS) do
    local held = redis.call('hmget', key, 'timestamp', 'sequence')
    local held_at, held_sequence = tonumber(held[1] or ''), tonumber(held[2] or '') or 0
    local time = tonumber(ARGV[at + 1])
    if not held_at or held_at < time or held_at > tonumber(ARGV[4])
            or (held_at == time and held_sequence <= tonumber(ARGV[at + 3])) then
        redis.call('hset', key, 'price', ARGV[at], 'timestamp', ARGV[at + 1], 'received', ARGV[at + 2],
                   'sequence', ARGV[at + 3])
    end
    if ARGV[at + 4] ~= '' then redis.call('pexpire', key, ARGV[1]) end
    at = at + 5
end
redis.call('PUBLISH', ARGV[2], ARGV[3])
"""
"""Write newest ticks of several series, where they are not older than those of another process.

KEYS: the hashes. ARGV: expiry (ms), channel, message, and a time beyond which those that are held are from before the
clock was set back; then for each key price, timestamp, received, sequence, and
whether its expiry is to be renewed (empty: not now).
"""

SERIES_SECONDS = 25e-6
"""Added to the timeout per series, for a write waits behind those of all others. Without it three writes in 25 s timed
out with 15,000 series on two busy cores.
"""

SERIES_REPLY_SECONDS = 4 * SERIES_SECONDS
"""Added per series to the limit of reading all outstanding replies. A late reply counts as an outage, after which every
slice is written again; that takes so much CPU that the next reply is late as well.
"""


class RedisWriter:
    """Writes newest prices, slices and closed minutes; for any number of threads.

    Args:
        client: shared by all threads.
        series: all configured series.
        clock: the time by which old slots are trimmed.
        ttl_seconds: expiry of a newest price.
        circuit_breaker: returns what rejects calls while Redis is down; None is one of its own.
        bucket: names the keys.
        buckets: as of RecoveryReader.
        outage: as of RedisCalls.
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
        script = partial(SlotScript, clock=clock, publish=bucket.publish, rest=REST if buckets > 1 else 0.0)
        self._slices = script(bucket.window_key, keys.WINDOW_KEPT_MS, bucket.slices_channel)
        self._minutes = script(bucket.minutes_key, keys.MINUTES_TRIMMED_MS, bucket.minutes_channel)
        self._expiry_set_at: dict[Series, int] = {}  # of each newest price (Unix ms)
        self._latest_keys: dict[Series, str] = {}
        self._unstored: dict[Series, set[int]] = {}  # recovered minutes (starts) that are nowhere but in their slices
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
        """A writer with a client of its own, which connects when first used; one connection per thread.

        Args:
            keywords: see connection_keywords and cluster_keywords.
            series: all configured series.
            clock: as of the writer.
            ttl_seconds: as of the writer.
            max_connections: one more raises an error.
            bucket: the one of the series; None where there is but one.
            options: further ones of the writer.
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
        # The expiry costs as much as the price itself, so it is not renewed each time.
        now_ms = milliseconds(self._clock())
        set_at = self._expiry_set_at
        due = {each for each in newest if abs(now_ms - set_at.get(each, 0)) >= self._ttl_ms // EXPIRY_RENEWALS}
        items = list(newest.items())
        if len(items) <= FEW_TICKS and not self._is_shared:
            commands = self._few_commands(items, due)
        else:
            parts = (items[begin : begin + TICKS_A_CALL] for begin in range(0, len(items), TICKS_A_CALL))
            commands = [self._script_call(part, due, now_ms) for part in parts]
        with self._writing():
            confirmed = self._newest.send(commands)
        set_at |= dict.fromkeys(due, now_ms)
        return confirmed

    def _few_commands(self, newest: Sequence[tuple[Series, Tick]], due: Container[Series]) -> list[Command]:
        commands: list[Command] = []
        expires = False
        for series, tick in newest:
            price, at, received, sequence = _texts(tick)
            key = self._latest_key(series)
            commands.append(("HSET", key, "price", price, "timestamp", at, "received", received, "sequence", sequence))
            if series in due:
                expires = True
                commands.append(("PEXPIRE", key, self._ttl_ms))
        commands.append((self._publish, self._newest_channel, codec.encode_announcement(newest)))
        # A transaction, so that no price is ever left without an expiry.
        return [("MULTI",), *commands, ("EXEC",)] if expires else commands

    def _script_call(self, newest: Sequence[tuple[Series, Tick]], due: Container[Series], now_ms: int) -> Command:
        message, latest = codec.encode_announcement(newest), str(now_ms + MINUTE_MS)
        arguments: list[bytes | str] = [str(self._ttl_ms), self._newest_channel, message, latest]
        for series, tick in newest:
            arguments += (*_texts(tick), "1" if series in due else "")
        names = [self._latest_key(series) for series, _ in newest]
        return ("EVAL", self._newest_script, str(len(names)), *names, *arguments)

    def _latest_key(self, series: Series) -> str:
        if (key := self._latest_keys.get(series)) is None:
            key = self._latest_keys[series] = self.bucket.latest_key(series)
        return key

    def put_slices(self, slices: Candles) -> None:
        """Store whole slices, publish them, and trim the minutes that are older than the window.

        A series is trimmed up to its oldest recovered minute that is not stored: until then its slices, however old,
        are the only record of it.

        Raises:
            Unavailable: not written.
        """
        with self._writing() as client:
            self._slices.put(client, slices, self._unstored)

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
        """Until when (Unix ms) all trades of the symbols of an exchange are on record, as it was put last.

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
        """What earlier runs left of the last minutes of some series. Nothing is written before this has succeeded.

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
        """Probe Redis: True when it answers and may lack what was written, because a call failed or it was emptied.

        A failed probe counts as a failed call: it may have set this run's key, and hidden that it was missing.
        """
        if not self.recovered:
            return False
        try:
            alive = self._run_marker.probe()
            with self._calls.calling():  # afterwards: where nothing is outstanding, it proves nothing
                self._newest.confirm()
        except Unavailable:
            self.answers = False
            return False
        self.answers = True
        self._complete_at_probe = alive and not self._calls.incomplete
        if not self._complete_at_probe:
            with suppress(Unavailable):
                self._foreign_keys.remove()
            self._calls.incomplete = False
            self._expiry_set_at = {}
            self._slices.renew_expiry()
            self._minutes.renew_expiry()
        return not self._complete_at_probe

    def lacks(self, _: Series) -> bool:
        """Every series is in the same bucket."""
        return True

    @contextmanager
    def _writing(self) -> Iterator["redis.Redis"]:
        if not self.recovered:
            self._calls.incomplete = True
            raise Unavailable("what an earlier run left in Redis has not been read yet")
        with self._calls.calling() as client:
            yield client


def _texts(tick: Tick) -> tuple[str, str, str, str]:
    """Price, event time, time of receipt and sequence; hiredis packs texts twice as fast as numbers."""
    price, at, sequence = tick
    return repr(price), str(at), str(milliseconds(sequence)), str(sequence)
