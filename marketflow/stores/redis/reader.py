"""Reads the cache in Redis for the API, on its event loop."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import redis
import redis.asyncio

from marketflow.clock import Clock, milliseconds
from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS, Candle, Series, Tick, minute_start, put_more_complete, slice_start
from marketflow.stores.call_limit import CallLimit
from marketflow.stores.candle_window import CandleWindow
from marketflow.stores.ports import RecentCandles
from marketflow.stores.redis import codec, keys
from marketflow.stores.redis.connection import TIMEOUT_SECONDS, async_client, buckets_of
from marketflow.tasks import timeout

CONNECTIONS = 32
"""Concurrent queries. A further one waits as long as Redis answers others."""

SLOTS_AT_ONCE = 300
"""Slots that are decoded before other tasks run."""

SERIES_A_CALL = 4
"""Series whose slices one call reads, up to 2 MB: the limit of a call need not grow with the number of exchanges."""

PING_SECONDS = 0.5
"""Limit of a ping."""

CLIENT_SECONDS = 30.0
"""Timeout of the clients. Those of the reader are shorter, and allow for an event loop that lags."""


class RedisReader:
    """Reads newest prices, slices and closed minutes; for one event loop.

    Args:
        client: for queries.
        ping_client: for pings, which must not wait behind queries; `client` if None.
        clock: decides which minutes have settled.
        settle_ms: how long after its end a closed minute may still be changed by late ticks.
        minute_ms: length of a minute.
        max_connections: of `client`; further queries wait for as long as Redis answers others.
        bucket: names the keys.
    """

    def __init__(
        self,
        client: "redis.asyncio.Redis",
        clock: Clock,
        settle_ms: int,
        minute_ms: int = MINUTE_MS,
        ping_client: "redis.asyncio.Redis | None" = None,
        max_connections: int = CONNECTIONS,
        bucket: keys.Bucket = keys.PLAIN,
    ) -> None:
        self._client = client
        self.bucket = bucket
        """Names the keys."""
        self._ping_client = ping_client or client
        self._clock = clock
        self._settle_ms = settle_ms
        self._minute_ms = minute_ms
        self._calls = CallLimit(max_connections, TIMEOUT_SECONDS)
        self.newest_in_process: Callable[[Iterable[Series]], Mapping[Series, Tick]] | None = None
        """Returns the newest ticks of series in this process, if it ingests: it has them before Redis."""

    @classmethod
    def connect(
        cls,
        keywords: dict[str, Any],
        clock: Clock,
        settle_ms: int,
        minute_ms: int = MINUTE_MS,
        max_connections: int = CONNECTIONS,
        bucket: keys.Bucket | None = None,
    ) -> "RedisReader":
        """Return a reader with pools of its own, which connect when first used; see RedisWriter.connect."""
        bucket = bucket or buckets_of(keywords)[0]
        client = async_client(keywords, max_connections, CLIENT_SECONDS, slot=bucket.slot)
        ping_client = async_client(keywords, 1, CLIENT_SECONDS, slot=bucket.slot)
        return cls(client, clock, settle_ms, minute_ms, ping_client, max_connections, bucket)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()
        await self._ping_client.aclose()

    async def ping(self) -> None:
        """Ping Redis; on a cluster by a read, which a master that is cut off or has lost the slot refuses.

        Raises:
            Unavailable: no answer.
        """
        client = self._ping_client
        with unavailable(PING_SECONDS):
            async with timeout(PING_SECONDS):
                await (client.ping() if self.bucket.number is None else client.exists(self.bucket.series_key))

    async def newest(self, series: Sequence[Series]) -> list[Tick | None]:
        """The newest tick of each series: its latest price, or the close of its last cached minute."""
        pipe = self._client.pipeline(transaction=False)
        for each in series:
            pipe.hmget(self.bucket.latest_key(each), keys.LATEST_FIELDS)
            pipe.zrange(self.bucket.minutes_key(each), -1, -1, withscores=True)
        answers = await self._whole(pipe)
        return self.newer(series, [_newest(answers[2 * i], answers[2 * i + 1]) for i in range(len(series))])

    def newer(self, series: Sequence[Series], cached: list[Tick | None]) -> list[Tick | None]:
        """Return the newest ticks of series: those that are cached, or newer ones of this process."""
        if self.newest_in_process is None:
            return cached
        own = self.newest_in_process(series)
        return [
            tick if (mine := own.get(each)) is None or (tick is not None and tick.order >= mine.order) else mine
            for each, tick in zip(series, cached, strict=True)
        ]

    async def recent(self, series: Sequence[Series], since: int) -> list[RecentCandles]:
        """Newest tick, slices and closed minutes of each series, as far as they end after `since`.

        The slices of settled minutes are not read: only the edges of a long period consist of slices.
        """
        now_ms = milliseconds(self._clock())
        parts = [series[begin : begin + SERIES_A_CALL] for begin in range(0, len(series), SERIES_A_CALL)]
        return [recent for part in parts for recent in await self._recent(part, since, now_ms)]

    async def _recent(self, series: Sequence[Series], since: int, now_ms: int) -> list[RecentCandles]:
        pipe = self._client.pipeline(transaction=False)
        for each in series:
            pipe.hmget(self.bucket.latest_key(each), keys.LATEST_FIELDS)
            pipe.zrangebyscore(self.bucket.minutes_key(each), minute_start(since), "+inf", withscores=True)
        answers = await self._query(pipe)
        minutes = [codec.decode_slots(answer) for answer in answers[1::2]]

        gaps = [self._between_settled(each, since, now_ms) for each in minutes]
        pipe = self._client.pipeline(transaction=False)
        for each, ranges in zip(series, gaps, strict=True):
            for begin, end in ranges:
                pipe.zrangebyscore(self.bucket.window_key(each), begin, end, withscores=True)
        slices = iter(await self._whole(pipe))
        newest = self.newer(series, [codec.decode_latest(latest) for latest in answers[::2]])
        return [
            RecentCandles(
                tick,
                codec.decode_slots(entry for _ in ranges for entry in next(slices)),
                closed,
            )
            for tick, closed, ranges in zip(newest, minutes, gaps, strict=True)
        ]

    async def everything(self, series: Series) -> RecentCandles:
        """All slices and the closed minutes of the same time of one series; not its newest tick."""
        since = minute_start(milliseconds(self._clock())) - keys.WINDOW_KEPT_MS
        pipe = self._client.pipeline(transaction=True)
        pipe.zrangebyscore(self.bucket.window_key(series), since, "+inf", withscores=True)
        pipe.zrangebyscore(self.bucket.minutes_key(series), since, "+inf", withscores=True)
        slices, minutes = await self._whole(pipe)
        return RecentCandles(None, await _decoded(slices), await _decoded(minutes))

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        """One candle for each series of all that is cached from `since` on."""
        return [
            CandleWindow(recent.slices, recent.minutes, self._minute_ms).covered(since, until, recent.newest)
            for recent in await self.recent(series, since)
        ]

    async def by_minute(self, series: Sequence[Series], since: int, until: int) -> list[dict[int, Candle]]:
        """The minutes of each series from `since` on, by their start."""
        return [
            CandleWindow(recent.slices, recent.minutes, self._minute_ms).by_minute(since, until, recent.newest)
            for recent in await self.recent(series, since)
        ]

    def newest_in_memory(self, series: Sequence[Series]) -> list[Tick | None] | None:
        """None: everything is read from Redis."""
        return None

    def summary_in_memory(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None] | None:
        """None: everything is read from Redis."""
        return None

    async def _whole(self, pipe: "redis.asyncio.client.Pipeline") -> list[Any]:
        """Return the answers of a pipeline; raise Unavailable if Redis was emptied and is not refilled yet."""
        pipe.zrange(self.bucket.series_key, 0, 0, withscores=True)
        *answers, series = await self._query(pipe)
        if not series:
            raise Unavailable("Redis was emptied a moment ago")
        return answers

    async def _query(self, pipe: "redis.asyncio.client.Pipeline") -> list[Any]:
        with unavailable(TIMEOUT_SECONDS):
            async with self._calls.call():
                return await pipe.execute()

    def _between_settled(self, minutes: Iterable[int], since: int, now_ms: int) -> list[tuple[int, str | int]]:
        """Return the ranges of scores of the slices from `since` on that are in no settled minute."""
        ranges: list[tuple[int, str | int]] = []
        begin = max(slice_start(since), minute_start(now_ms) - keys.WINDOW_KEPT_MS)
        for minute in sorted(minutes):
            end = minute + self._minute_ms
            if end + self._settle_ms <= now_ms and minute >= since and end > begin:
                if minute > begin:
                    ranges.append((begin, f"({minute}"))
                begin = end
        return [*ranges, (begin, "+inf")]


async def _decoded(entries: Sequence[tuple[bytes, float]]) -> dict[int, Candle]:
    """Decode entries by parts, between which other tasks run: 4,800 slices at once would delay them by 50 ms."""
    slots: dict[int, Candle] = {}
    for begin in range(0, len(entries), SLOTS_AT_ONCE):
        for start, candle in codec.decode_slots(entries[begin : begin + SLOTS_AT_ONCE]).items():
            put_more_complete(slots, start, candle)
        await asyncio.sleep(0)
    return slots


def _newest(latest: list[bytes | None], last_minute: list[tuple[bytes, float]]) -> Tick | None:
    if (tick := codec.decode_latest(latest)) is not None:
        return tick
    return next((candle.newest for candle in codec.decode_slots(last_minute).values()), None)


@contextmanager
def unavailable(seconds: float) -> Iterator[None]:
    """Turn errors of Redis into Unavailable."""
    try:
        yield
    except TimeoutError as error:
        raise Unavailable(f"Redis did not answer within {seconds:g} s") from error
    except (redis.RedisError, RuntimeError) as error:  # uvloop's, for writing to a connection that was reset
        raise Unavailable(f"Redis cannot be used: {error}") from error
