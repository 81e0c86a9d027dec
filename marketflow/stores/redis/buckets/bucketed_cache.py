"""The cache in Redis as the API reads it: a near cache of each bucket, of which a plain Redis has one.

There is one subscription for each master of a Redis Cluster that has buckets with queries. When a master fails only the
copies of its buckets are dropped; queries about all others go on, and are as fresh as before.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Self, TypeVar

import redis.asyncio

from marketflow.clock import Clock
from marketflow.errors import Unavailable
from marketflow.logs import RateLimit
from marketflow.model import MINUTE_MS, Candle, Series, Tick
from marketflow.stores.ports import SlotListener, TickListener
from marketflow.stores.redis import keys
from marketflow.stores.redis.buckets.bucket_count import refusal
from marketflow.stores.redis.buckets.slot_map import Address, SlotMap
from marketflow.stores.redis.connection import async_client, buckets_of
from marketflow.stores.redis.near_cache import RETRY_SECONDS, NearCache, listen
from marketflow.stores.redis.reader import CLIENT_SECONDS, PING_SECONDS, RedisReader, unavailable
from marketflow.tasks import timeout

_T = TypeVar("_T")


class BucketedCache:
    """A CacheReader of one bucket or of many, which announces their changes; for one event loop.

    Args:
        parts: the near cache of each bucket, by its number.
        slot_map: of the cluster; None for a plain Redis.
        client: of the control slot of the cluster.
    """

    def __init__(
        self,
        parts: Sequence[NearCache],
        slot_map: SlotMap | None = None,
        client: "redis.asyncio.Redis | None" = None,
    ) -> None:
        self._parts = parts
        self._sole = parts[0] if len(parts) == 1 else None
        self._slot_map = slot_map
        self._client = client
        self._part_of: dict[Series, NearCache] = {}
        self._listening: set[Address] = set()
        self._limit = RateLimit(10.0)
        self._unavailable: frozenset[NearCache] = frozenset()

    @classmethod
    def connect(
        cls, keywords: dict[str, Any], clock: Clock, settle_ms: int, minute_ms: int = MINUTE_MS
    ) -> "BucketedCache":
        """Return a cache with connections of its own, which connect when first used; see RedisReader and NearCache."""
        parts = [
            NearCache(
                RedisReader.connect(keywords, clock, settle_ms, minute_ms, bucket=bucket),
                keywords,
                clock,
                minute_ms,
                bucket,
            )
            for bucket in buckets_of(keywords)
        ]
        slot_map = keywords.get("slot_map")
        return cls(parts, slot_map, async_client(keywords, 1, CLIENT_SECONDS) if slot_map else None)

    async def close(self) -> None:
        """Close all connections."""
        for part in self._parts:
            await part.close()
            await part.reader.close()
        if self._client is not None:
            await self._client.aclose()

    async def ping(self) -> None:
        """Ping the masters of all buckets.

        Raises:
            Unavailable: one did not answer, or the keys are divided into another number of buckets.
        """
        by_master: defaultdict[Address | None, list[NearCache]] = defaultdict(list)
        for part in self._parts:
            by_master[self._master_of(part)].append(part)
        pings = (of[0].reader.ping() for of in by_master.values())
        refused, *found = await asyncio.gather(self._check_number(), *pings, return_exceptions=True)
        if refused is not None:
            raise refused
        errors = [error for error in found if isinstance(error, BaseException)]
        lost = (of for of, error in zip(by_master.values(), found, strict=True) if error is not None)
        self._unavailable = frozenset(part for parts in lost for part in parts)
        if errors:
            raise errors[0]

    async def _check_number(self) -> None:
        """Check into how many buckets the keys are divided; while that is another number nothing is read."""
        if self._client is None or self._slot_map is None:
            return
        count = len(self._parts)
        with suppress(Unavailable):  # its master may be down, and the buckets are elsewhere
            with unavailable(PING_SECONDS):
                async with timeout(PING_SECONDS):
                    number = int(await self._client.get(keys.BUCKETS_KEY) or count)
            self._slot_map.refusal = refusal(count, number) if number != count else ""
        if self._slot_map.refusal:
            raise Unavailable(self._slot_map.refusal)

    def unavailable(self, symbols: Iterable[str]) -> tuple[str, ...]:
        """Return the symbols whose master did not answer the last ping, while others did."""
        if len(self._unavailable) in (0, len(self._parts)):
            return ()
        return tuple(each for each in symbols if self._of_symbol(each) in self._unavailable)

    def take_newest_in_process(self, newest_of: Callable[[Iterable[Series]], Mapping[Series, Tick]]) -> None:
        """Have queries return the newest ticks of this process where they are newer than those in Redis."""
        for part in self._parts:
            part.reader.newest_in_process = newest_of

    # Queries

    async def newest(self, series: Sequence[Series]) -> list[Tick | None]:
        """Return the newest tick of each series; None also where its bucket is unavailable, unless all buckets are."""
        divided = self._divided(series)
        found = await asyncio.gather(
            *(part.newest([series[i] for i in at]) for part, at in divided), return_exceptions=True
        )
        answers: list[list[Tick | None]] = []
        for (_, at), answer in zip(divided, found, strict=True):
            if isinstance(answer, BaseException):
                if not isinstance(answer, Unavailable) or all(isinstance(each, Unavailable) for each in found):
                    raise answer
                answers.append([None] * len(at))
            else:
                answers.append(answer)
        return _joined(len(series), divided, answers)

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        """Return one candle for each series of all that is cached from `since` on."""
        divided = self._divided(series)
        queries = [part.summary([series[i] for i in at], since, until) for part, at in divided]
        return _joined(len(series), divided, await _all(queries))

    async def by_minute(self, series: Sequence[Series], since: int, until: int) -> list[dict[int, Candle]]:
        """Return the minutes of each series from `since` on, by their start."""
        divided = self._divided(series)
        queries = [part.by_minute([series[i] for i in at], since, until) for part, at in divided]
        return _joined(len(series), divided, await _all(queries))

    def newest_in_memory(self, series: Sequence[Series]) -> list[Tick | None] | None:
        """Return the newest tick of each series if all of them are in the copies, else None."""
        if (only := self._only(series)) is not None:
            return only.newest_in_memory(series)
        divided, answers = self._divided(series), []
        for part, at in divided:
            if (answer := part.newest_in_memory([series[i] for i in at])) is None:
                return None
            answers.append(answer)
        return _joined(len(series), divided, answers)

    def summary_in_memory(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None] | None:
        """Return one candle for each series of all that is cached from `since` on, if all of it is in a copy.

        None for series of several buckets: the list would be a new one each time.
        """
        only = self._only(series)
        return None if only is None else only.summary_in_memory(series, since, until)

    # Announcements

    @property
    def live(self) -> bool:
        """Whether all changes are announced."""
        return all(part.live for part in self._parts)

    @property
    def times_live(self) -> int:
        """How often the announcements of a bucket have begun."""
        return sum(part.times_live for part in self._parts)

    @property
    def slots(self) -> Self:
        """What announces slices and minutes."""
        return self

    @contextmanager
    def announcing(self, take: TickListener) -> Iterator[None]:
        """Pass every announced newest tick to `take`, and keep the subscriptions meanwhile."""
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part.announcing(take))
            yield

    @contextmanager
    def announcing_slots(self, take: SlotListener) -> Iterator[None]:
        """Pass every changed slice and minute to `take`, and keep the subscriptions meanwhile."""
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part.announcing_slots(take))
            yield

    async def listen(self) -> None:
        """Subscribe while there are queries, and again after each failure, until cancelled."""
        if self._slot_map is None:
            await self._parts[0].listen()
            return
        async with asyncio.TaskGroup() as group:
            while True:
                needed = [self._master_of(part) for part in self._parts if part.is_needed]
                if None in needed or self._unavailable:  # a master that is cut off keeps its subscriptions
                    await asyncio.to_thread(self._slot_map.refresh)
                for master in {each for each in needed if each is not None} - self._listening:
                    self._listening.add(master)
                    group.create_task(self._listen_at(master, self._slot_map))
                await asyncio.sleep(RETRY_SECONDS)

    async def _listen_at(self, master: Address, slot_map: SlotMap) -> None:
        client = async_client(slot_map.keywords_at(master), max_connections=1)
        try:
            await listen(client, lambda: [each for each in self._parts if self._master_of(each) == master], self._limit)
        finally:
            await client.aclose()
            await asyncio.to_thread(slot_map.refresh)
            self._listening.discard(master)

    # Buckets

    def _master_of(self, part: NearCache) -> Address | None:
        if self._slot_map is None or self._slot_map.refusal:
            return None
        return self._slot_map.known_owner(part.bucket.slot)

    def _part(self, series: Series) -> NearCache:
        if (part := self._part_of.get(series)) is None:
            part = self._part_of[series] = self._of_symbol(series.symbol)
        return part

    def _of_symbol(self, symbol: str) -> NearCache:
        return self._parts[keys.bucket_of(symbol, len(self._parts))]

    def _only(self, series: Sequence[Series]) -> NearCache | None:
        """Return the only bucket of series, as all series of a symbol have one; None if they are in several."""
        if self._sole is not None:
            return self._sole
        parts = {self._part(each) for each in series}
        return parts.pop() if len(parts) == 1 else None

    def _divided(self, series: Sequence[Series]) -> list[tuple[NearCache, Sequence[int]]]:
        """Return the indexes of the series in each bucket."""
        if (only := self._only(series)) is not None:
            return [(only, range(len(series)))]
        divided: defaultdict[NearCache, list[int]] = defaultdict(list)
        for index, each in enumerate(series):
            divided[self._part(each)].append(index)
        return list(divided.items())


async def _all(queries: Iterable[Awaitable[_T]]) -> list[_T]:
    """Return the results of all; raise the first exception once all have ended."""
    found = await asyncio.gather(*queries, return_exceptions=True)
    answers: list[_T] = []
    for each in found:
        if isinstance(each, BaseException):
            raise each
        answers.append(each)
    return answers


def _joined(
    count: int, divided: Sequence[tuple[NearCache, Sequence[int]]], answers: Sequence[Sequence[_T]]
) -> list[_T]:
    """Return the answers of all buckets in the order of the series."""
    if len(divided) == 1:
        return list(answers[0])
    joined: list[Any] = [None] * count
    for (_, at), answer in zip(divided, answers, strict=True):
        for index, each in zip(at, answer, strict=True):
            joined[index] = each
    return joined
