"""The number of buckets into which the keys of a Redis Cluster are divided, and the move of the keys to another number.

Processes with different numbers would look for a series in different buckets. So while some write, a process with
another number is refused. The first one after a change moves all keys to their new buckets before it reads or writes
any of them. A move that was interrupted is finished by the next start: nothing is deleted before it has been copied,
and copying again changes nothing.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, cast

import redis
from loguru import logger

from marketflow.errors import StartError, Unavailable
from marketflow.model import Series
from marketflow.stores.redis import codec, keys
from marketflow.stores.redis.connection import sync_client

HELD_SECONDS = 3.0
"""How long a number is held after the last probe of a process that has it: several missed probes."""

MOVE_SECONDS = 5.0
"""Limit of each answer during a move."""

_SERIES_AT_ONCE = 10  # up to 60,000 members, which a master reads or writes within 0.1 s

_CLAIM = """
local held = redis.call('get', KEYS[2])
if held and held ~= ARGV[1] then return {held, 1} end
redis.call('set', KEYS[2], ARGV[1], 'px', ARGV[2])
local kept = redis.call('get', KEYS[1])
if kept and kept ~= ARGV[1] and ARGV[4] == '' then return {kept, 0} end
redis.call('set', KEYS[1], ARGV[1], 'px', ARGV[3])
return {ARGV[1], 0}
"""
"""Hold a number of buckets; return the number that the keys have, and 1 if others hold that.

KEYS: the number that the keys have, the number that is held. ARGV: the own number; for how long it is held, and for how
long that of the keys is kept (ms); whether the keys have it from now on (empty: no).
"""


class BucketCount:
    """The number of buckets of one process that writes; for one thread at a time.

    Args:
        keywords: of a cluster, see cluster_keywords.
        ttl_seconds: expiry of a newest price.
    """

    def __init__(self, keywords: Mapping[str, Any], ttl_seconds: int) -> None:
        self._keywords = keywords
        self._count: int = keywords["buckets"]
        self._ttl_ms = ttl_seconds * 1000
        self._client = sync_client(keywords)
        self.refusal = ""
        """Why nothing may be written: processes with another number run. Empty if none does."""

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def settle(self) -> None:
        """Hold the number, and move all keys to buckets of this number if they have another one.

        Raises:
            Unavailable: Redis cannot be reached, or processes with another number run.
        """
        try:
            if (before := self._hold()) != self._count:
                logger.info("moving all keys from {} to {} buckets", before, self._count)
                for number in range(before):
                    self._move(number)
                self._hold(has_moved=True)
                logger.info("all keys are in {} buckets", self._count)
            self.refusal = ""
        except redis.RedisError as error:
            raise Unavailable(f"Redis cannot be used: {error}") from error

    def hold(self) -> None:
        """Continue to hold the number; sets `refusal`. Without Redis nothing changes.

        A process that is refused, as it was suspended during a change, settles again once the others have ended.
        """
        try:
            if self.refusal:
                self.settle()
            else:
                self._hold(has_moved=True)
        except (redis.RedisError, Unavailable) as error:
            logger.debug("the number of buckets is not held: {}", error)

    def _hold(self, has_moved: bool = False) -> int:
        number, by_others = _claim(self._client, self._count, has_moved)
        if by_others:
            if not self.refusal:
                self.refusal = refusal(self._count, number)
                logger.error(self.refusal)
            raise Unavailable(self.refusal)
        return number

    # The move

    def _move(self, number: int) -> None:
        """Move the keys of a bucket that are in another bucket by the new number."""
        bucket = keys.Bucket(number)
        with ExitStack() as stack:

            def client_of(number: int) -> "redis.Redis":
                client = sync_client(self._keywords, MOVE_SECONDS, slot=keys.Bucket(number).slot)
                stack.callback(client.close)
                return client

            source = client_of(number)
            indexed = cast("list[tuple[bytes, float]]", source.zrange(bucket.series_key, 0, -1, withscores=True))
            moving: defaultdict[int, list[tuple[Series, float]]] = defaultdict(list)
            for entry in indexed:
                for series in codec.decode_series([entry]):
                    if (target := keys.bucket_of(series.symbol, self._count)) != number:
                        moving[target].append((series, entry[1]))
            for target, entries in moving.items():
                client = client_of(target)
                self._move_times(source, bucket, client, keys.Bucket(target), [series for series, _ in entries])
                for begin in range(0, len(entries), _SERIES_AT_ONCE):
                    self._move_series(
                        source, bucket, client, keys.Bucket(target), entries[begin : begin + _SERIES_AT_ONCE]
                    )
                    self._hold()
            if number >= self._count:
                source.delete(bucket.series_key)

    def _move_series(
        self,
        source: "redis.Redis",
        before: keys.Bucket,
        target: "redis.Redis",
        after: keys.Bucket,
        entries: Sequence[tuple[Series, float]],
    ) -> None:
        """Move slices, minutes and newest prices."""
        with source.pipeline(transaction=False) as read:
            for series, _ in entries:
                read.hgetall(before.latest_key(series))
                read.zrange(before.window_key(series), 0, -1, withscores=True)
                read.zrange(before.minutes_key(series), 0, -1, withscores=True)
            answers = read.execute()
        with target.pipeline(transaction=True) as write:
            index = {codec.encode_series(series): at for series, at in entries}
            write.zadd(after.series_key, cast("dict[Any, float]", index))
            write.pexpire(after.series_key, keys.EXPIRY_MS)
            for number, (series, _) in enumerate(entries):
                latest, *slots = answers[3 * number : 3 * number + 3]
                if latest:
                    write.hset(after.latest_key(series), mapping=latest)
                    write.pexpire(after.latest_key(series), self._ttl_ms)
                for key, members in zip((after.window_key(series), after.minutes_key(series)), slots, strict=True):
                    if members:
                        write.zadd(key, dict(members))
                        write.pexpire(key, keys.EXPIRY_MS)
            write.execute()
        of_series = (before.latest_key, before.window_key, before.minutes_key)
        source.delete(*(key_of(series) for series, _ in entries for key_of in of_series))

    def _move_times(
        self,
        source: "redis.Redis",
        before: keys.Bucket,
        target: "redis.Redis",
        after: keys.Bucket,
        moving: Iterable[Series],
    ) -> None:
        """Copy until when trades are complete. The marks of archived minutes are the same in all buckets."""
        symbols: defaultdict[str, set[str]] = defaultdict(set)
        for series in moving:
            symbols[series.exchange].add(series.symbol)
        for exchange, of_exchange in symbols.items():
            key = after.complete_key(exchange)
            found = codec.decode_times(cast("bytes | None", source.get(before.complete_key(exchange))))
            moved = {symbol: at for symbol, at in found.items() if symbol in of_exchange}
            if moved:
                known = codec.decode_times(cast("bytes | None", target.get(key)))
                target.set(key, codec.encode_times({**known, **moved}), px=keys.EXPIRY_MS)


def refuse_other_number(keywords: Mapping[str, Any]) -> None:
    """Wait until no process with another number runs: those that have just ended still hold theirs.

    Raises:
        StartError: one does.
    """
    until = time.monotonic() + HELD_SECONDS + 1.0
    with sync_client(keywords) as client, suppress(redis.RedisError):  # the start goes on without Redis
        while True:
            number, by_others = _claim(client, keywords["buckets"], has_moved=False)
            if not by_others:
                return
            if time.monotonic() > until:
                raise StartError(refusal(keywords["buckets"], number))
            time.sleep(0.1)


def _claim(client: "redis.Redis", count: int, has_moved: bool) -> tuple[int, bool]:
    """Hold a number of buckets; return the one that the keys have, and whether others hold that."""
    times = [round(HELD_SECONDS * 1000), keys.EXPIRY_MS]
    names = keys.BUCKETS_KEY, keys.BUCKETS_HELD_KEY
    answer = client.eval(_CLAIM, 2, *names, count, *times, "1" if has_moved else "")
    number, by_others = cast("tuple[bytes, int]", answer)
    return int(number), bool(by_others)


def refusal(own: int, other: int) -> str:
    """Return the error message about another number of buckets."""
    return (
        f"redis.buckets is {own}, but the keys in Redis are divided into {other}, which other processes use: see "
        '"Changing redis.buckets" in deploy/README.md'
    )
