"""Near cache: a copy of the cached series that this process reads, kept up to date by subscription.

The writer publishes what it writes, in the same transaction. Once a series has been read, queries of it need no Redis
and are as fresh as Redis itself. That holds only while no message can have been missed: the copy is dropped when the
connection breaks or falls silent, and Redis is queried until it is subscribed to again. When Redis was emptied the copy
stays: it is right.

Capacity: MAX_SLICES. Policy: evict the least recently queried series, and read it again when needed.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Self

import msgspec
import redis
import redis.asyncio

from marketflow.clock import Clock, milliseconds
from marketflow.logs import RateLimit
from marketflow.model import MINUTE_MS, Candle, Series, Slot, Tick, minute_start
from marketflow.stores.cache_limits import RECENT_MS
from marketflow.stores.candle_window import CandleWindow
from marketflow.stores.ports import SlotListener, TickListener
from marketflow.stores.redis import codec, keys
from marketflow.stores.redis.buckets.channel_messages import Subscription, subscribed
from marketflow.stores.redis.connection import async_client, buckets_of
from marketflow.stores.redis.reader import RedisReader
from marketflow.tasks import raise_if_cancelled

MAX_SLICES = 250_000
"""About 100 MB."""

PING_SECONDS = 0.1
"""Interval of pings on the subscription."""

SILENT_PINGS = 4
"""Number of unanswered pings after which the connection counts as lost. Not a time: a process short of CPU reads the
answers late, and should not read everything again for that."""

IDLE_SECONDS = 10.0
"""The subscription ends after one to two times this without queries: receiving a flood of ticks costs CPU."""

RETRY_SECONDS = 0.1

MOVED_SECONDS = 0.3
"""How long a bucket is not subscribed to again at a node that has just refused it, while the map is read."""

MAX_SUMMARIES = 256
"""Summaries that are kept until the next message: some ten requests a millisecond are for the same one."""


class NearCache:
    """A CacheReader that reads each series from Redis once.

    Args:
        reader: queries Redis.
        keywords: of the connection of the subscription, see connection_keywords.
        clock: decides which minutes are too old to keep.
        minute_ms: length of a minute.
        bucket: names the channels; None where there is but one.
    """

    def __init__(
        self,
        reader: RedisReader,
        keywords: dict[str, Any],
        clock: Clock,
        minute_ms: int = MINUTE_MS,
        bucket: keys.Bucket | None = None,
    ) -> None:
        self.reader = reader
        self.bucket = bucket = bucket or buckets_of(keywords)[0]
        """Names the channels."""
        self._client = async_client(keywords, max_connections=1, slot=bucket.slot)
        self.channels = {
            bucket.newest_channel: "newest",
            bucket.slices_channel: "slices",
            bucket.minutes_channel: "minutes",
        }
        """What is announced on each channel."""
        self._clock = clock
        self._minute_ms = minute_ms
        self._needed = asyncio.Event()
        self._listeners: list[TickListener] = []
        self._slot_listeners: list[SlotListener] = []
        self._limit = RateLimit(10.0)
        self.times_live = 0
        self._reset()

    def _reset(self) -> None:
        """Drop the copy. In new containers: reads under way then fill the dropped ones."""
        self.live = False
        self._subscribed: set[bytes] = set()  # channels
        self._newest: dict[Series, Tick | None] = {}
        self._read_newest: set[Series] = set()
        self._windows: dict[Series, _Entry] = {}  # the most recently queried last
        self._summaries: dict[tuple[object, ...], list[Candle | None]] = {}  # of the copy as it is now

    async def close(self) -> None:
        """Close the connection."""
        await self._client.aclose()

    async def newest(self, series: Sequence[Series]) -> list[Tick | None]:
        """The newest tick of each series."""
        if (held := self.newest_in_memory(series)) is not None:
            return held
        if not self.live:
            return await self.reader.newest(series)
        newest = self._newest
        missing = [each for each in series if each not in newest]
        self._read_newest.update(missing)  # before the read: messages from here on are newer than what it returns
        for each, tick in zip(missing, await self.reader.newest(missing), strict=True):
            newest.setdefault(each, tick)
        return self.reader.newer(series, [newest[each] for each in series])

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        """One candle for each series of all that is cached from `since` on."""
        if (held := self.summary_in_memory(series, since, until)) is not None:
            return held
        if not self.live or since < self._oldest() + self._minute_ms:
            return await self.reader.summary(series, since, until)
        newest, windows = await self._known(series)
        if windows is None:
            return await self.reader.summary(series, since, until)
        return [window.covered(since, until, tick) for window, tick in zip(windows, newest, strict=True)]

    async def by_minute(self, series: Sequence[Series], since: int, until: int) -> list[dict[int, Candle]]:
        """The minutes of each series from `since` on, by their start."""
        self._needed.set()
        if not self.live or since < self._oldest() + self._minute_ms:
            return await self.reader.by_minute(series, since, until)
        newest, windows = await self._known(series)
        if windows is None:
            return await self.reader.by_minute(series, since, until)
        return [window.by_minute(since, until, tick) for window, tick in zip(windows, newest, strict=True)]

    def newest_in_memory(self, series: Sequence[Series]) -> list[Tick | None] | None:
        """The newest tick of each series, if all of them are in the copy."""
        self._needed.set()
        newest = self._newest
        try:
            return self.reader.newer(series, [newest[each] for each in series])
        except KeyError:
            return None

    def summary_in_memory(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None] | None:
        """One candle for each series of all that is cached from `since` on, if all of it is in the copy.

        The same list until the copy changes; not to be changed.
        """
        query = (*series, since, until)
        if (known := self._summaries.get(query)) is not None:
            self._needed.set()
            return known
        newest = self.newest_in_memory(series)
        if newest is None or not self.live or since < self._oldest() + self._minute_ms:
            return None
        entries = [self._windows.get(each) for each in series]
        windows = [entry.window for entry in entries if entry is not None and entry.reading is None]
        if len(windows) < len(series):
            return None
        for each in series:  # the most recently queried last
            self._windows[each] = self._windows.pop(each)
        found = [window.covered(since, until, tick) for window, tick in zip(windows, newest, strict=True)]
        if len(self._summaries) >= MAX_SUMMARIES:
            self._summaries.clear()
        self._summaries[query] = found
        return found

    def _oldest(self) -> int:
        """Start of the oldest minute that is kept."""
        return minute_start(milliseconds(self._clock())) - RECENT_MS - self._minute_ms

    async def _known(self, series: Sequence[Series]) -> tuple[list[Tick | None], list[CandleWindow] | None]:
        """Return newest ticks and windows; no windows if the connection broke meanwhile.

        All windows are of one table: in a later one they would lack what was written before its subscription.
        """
        table = self._windows
        newest = await self.newest(series)
        windows: list[CandleWindow] = []
        for each in series:
            if self._windows is not table:
                return newest, None
            windows.append(await self._window(each, table))
        return newest, windows if self._windows is table else None

    async def _window(self, series: Series, table: "dict[Series, _Entry]") -> CandleWindow:
        entry = table.pop(series, None) or self._read(series, table)
        table[series] = entry
        if entry.reading is not None:
            # The cancellation of one request must not cancel the read for the others.
            await asyncio.shield(entry.reading)
        return entry.window

    def _read(self, series: Series, table: "dict[Series, _Entry]") -> "_Entry":
        entry = _Entry(CandleWindow({}, {}, self._minute_ms))
        entry.reading = asyncio.create_task(self._fill(series, entry, table))
        entry.reading.add_done_callback(lambda task: task.cancelled() or task.exception())  # retrieves the exception
        return entry

    async def _fill(self, series: Series, entry: "_Entry", windows: "dict[Series, _Entry]") -> None:
        try:
            recent = await self.reader.everything(series)
        except BaseException:
            windows.pop(series, None)
            raise
        entry.window.fill(CandleWindow(recent.slices, recent.minutes, self._minute_ms))
        entry.reading = None
        self._summaries.clear()
        held = sum(len(other.window) for other in windows.values())
        for other in list(windows):
            if held <= MAX_SLICES or other == series:
                break
            held -= len(windows.pop(other).window)

    # Announcements

    @contextmanager
    def announcing(self, take: TickListener) -> Iterator[None]:
        """Pass every announced newest tick to `take`, and keep the subscription meanwhile."""
        self._listeners.append(take)
        self._needed.set()
        try:
            yield
        finally:
            self._listeners.remove(take)

    @contextmanager
    def announcing_slots(self, take: SlotListener) -> Iterator[None]:
        """Pass every changed slice and minute to `take`, and keep the subscription meanwhile."""
        self._slot_listeners.append(take)
        self._needed.set()
        try:
            yield
        finally:
            self._slot_listeners.remove(take)

    @property
    def slots(self) -> Self:
        """What announces slices and minutes."""
        return self

    @property
    def _is_followed(self) -> bool:
        return bool(self._listeners or self._slot_listeners)

    @property
    def is_needed(self) -> bool:
        """Whether there were queries recently, or there are listeners of the announcements."""
        return self._needed.is_set() or self._is_followed

    async def listen(self) -> None:
        """Subscribe while there are queries, and again after each failure, until cancelled."""
        while True:
            await self._needed.wait()
            try:
                await listen(self._client, lambda: [self], self._limit)
            finally:
                self._reset()
            raise_if_cancelled()
            if self._is_followed:
                self._needed.set()
            await asyncio.sleep(RETRY_SECONDS)

    def _still_needed(self) -> bool:
        """Whether it was needed since the last call."""
        needed = self.is_needed
        self._needed.clear()
        return needed

    def _expire(self, oldest: int) -> None:
        self._summaries.clear()
        for entry in self._windows.values():
            entry.window.expire(oldest)

    def _take(self, kind: bytes, channel: bytes, content: Any) -> None:
        if kind in (b"subscribe", b"ssubscribe"):
            self._subscribed.add(channel)
            self.live = len(self._subscribed) == len(self.channels)
            self.times_live += self.live
        elif kind in (b"message", b"smessage"):
            self._summaries.clear()
            match self.channels[channel.decode()]:
                case "newest":
                    announced = codec.valid_ticks(codec.decode_newest(content))
                    for series, tick in announced:
                        if series in self._read_newest:
                            self._newest[series] = tick
                    for take in self._listeners:
                        take(announced)
                case "slices" if self._windows or self._slot_listeners:
                    slots = codec.decode_announced(content)
                    for (series, start), candle in slots:
                        if (entry := self._windows.get(series)) is not None and (
                            found := codec.valid_slot(start, candle)
                        ):
                            entry.window.put_slice(start, found)
                    self._announce([(slot, None) for slot, _ in slots])
                case "minutes" if self._windows or self._slot_listeners:
                    minutes: list[tuple[Slot, Candle | None]] = []
                    for slot, candle in codec.decode_announced(content):
                        entry = self._windows.get(slot.series)
                        if entry is None and not self._slot_listeners:
                            continue
                        if (found := codec.valid_slot(slot.start, candle)) is not None:
                            minutes.append((slot, found))
                            if entry is not None:
                                entry.window.put_minute(slot.start, found)
                    self._announce(minutes)

    def _announce(self, slots: Sequence[tuple[Slot, Candle | None]]) -> None:
        for take in self._slot_listeners:
            take(slots)


async def listen(client: "redis.asyncio.Redis", here: Callable[[], Sequence[NearCache]], limit: RateLimit) -> None:
    """Keep near caches up to date by one connection, until that fails or none of them is needed any more.

    Args:
        client: of a node.
        here: returns the near caches whose bucket is on the node; those that are needed are subscribed to.
        limit: of log lines.
    """
    listener = _Listener(here)
    try:
        await listener.run(client)
    except* (redis.RedisError, OSError, msgspec.MsgspecError, _NotNeeded):
        pass  # queries report the outage
    except* Exception as group:  # noqa: BLE001 - a client that is reset while in use, say
        limit.log("listening", "WARNING", f"listening to the cache failed, trying again: {group.exceptions!r}")
    finally:
        listener.end()


class _Listener:
    """One connection to a node, and the near caches of its buckets.

    Args:
        here: see `listen`.
    """

    def __init__(self, here: Callable[[], Sequence[NearCache]]) -> None:
        self._here = here
        self._caches = [each for each in here() if each.is_needed]
        self._by_channel: dict[bytes, NearCache] = {}
        self._refused: dict[NearCache, float] = {}  # until when they are not subscribed to again
        self._is_sharded = any(each.bucket.number is not None for each in self._caches)
        self._subscribe = "SSUBSCRIBE" if self._is_sharded else "SUBSCRIBE"

    async def run(self, client: "redis.asyncio.Redis") -> None:
        """Subscribe and take messages.

        Raises:
            TimeoutError: no answer.
            _NotNeeded: no queries for a while.
            redis.RedisError: the connection failed.
        """
        if not self._caches:
            return
        first, *others = self._caches
        async with (
            subscribed(client, self._channels(first), self._take, self._subscribe) as subscription,
            asyncio.TaskGroup() as both,
        ):
            for cache in others:
                subscription.send(self._subscribe, *self._channels(cache))
            both.create_task(self._keep_alive(subscription))
            await subscription.lost

    def end(self) -> None:
        """Have all near caches drop their copies."""
        for cache in list(self._caches):
            self._end(cache)

    def _channels(self, cache: NearCache) -> list[str]:
        """The channels of a cache, for a command of their own: they are in one slot, as those of a command must be."""
        self._by_channel |= dict.fromkeys((name.encode() for name in cache.channels), cache)
        return list(cache.channels)

    def _take(self, kind: bytes, channel: bytes, content: Any) -> None:
        cache = self._by_channel[channel]
        if kind == b"sunsubscribe":  # the slot has moved to another node; the map is read again soon
            self._end(cache)
        elif cache in self._caches:
            cache._take(kind, channel, content)

    async def _keep_alive(self, subscription: Subscription) -> None:
        """Ping the connection, subscribe to what is needed, and expire old minutes."""
        oldest = 0
        for pings in count(1):
            await asyncio.sleep(PING_SECONDS)
            if pings % round(IDLE_SECONDS / PING_SECONDS) == 0:
                self._drop(subscription, [each for each in self._caches if not each._still_needed()])
            if self._is_sharded:
                self._follow(subscription)
            if not self._caches:
                raise _NotNeeded
            if subscription.unanswered == SILENT_PINGS:
                raise TimeoutError
            subscription.ping()
            if (now_oldest := self._caches[0]._oldest()) != oldest:
                oldest = now_oldest
                for cache in self._caches:
                    cache._expire(oldest)

    def _follow(self, subscription: Subscription) -> None:
        """Subscribe to further buckets of the node that are needed, and no longer to those of another one."""
        here, now = self._here(), time.monotonic()
        self._drop(subscription, [each for each in self._caches if each not in here])
        new = [each for each in here if each.is_needed and each not in self._caches]
        for cache in [each for each in new if self._refused.get(each, 0.0) <= now]:
            self._caches.append(cache)
            subscription.send(self._subscribe, *self._channels(cache))

    def _drop(self, subscription: Subscription, caches: Iterable[NearCache]) -> None:
        for cache in caches:
            self._end(cache)
            if self._is_sharded:
                subscription.send("SUNSUBSCRIBE", *cache.channels)

    def _end(self, cache: NearCache) -> None:
        if cache in self._caches:
            self._caches.remove(cache)
            self._refused[cache] = time.monotonic() + MOVED_SECONDS
            cache._reset()


class _NotNeeded(Exception):
    pass


class _Entry:
    """A window, and the task that still reads what was written before the window was made."""

    def __init__(self, window: CandleWindow) -> None:
        self.window = window
        self.reading: asyncio.Task[None] | None = None
