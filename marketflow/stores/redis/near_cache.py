"""Near cache: a copy of the cached series that this process reads, kept up to date by subscription.

The writer publishes what it writes, in the same transaction. Once a series has been read, queries of it need no Redis
and are as fresh as Redis itself. That holds only while no message can have been missed: the copy is dropped when the
connection breaks or falls silent, and Redis is queried until the next subscription stands. A Redis that was emptied
does no harm: the copy was right.

Capacity: MAX_SLICES. Policy: evict the least recently queried series, and read it again when needed.
"""

import asyncio
from collections.abc import Iterator, Sequence
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
from marketflow.stores.redis.connection import async_client
from marketflow.stores.redis.reader import RedisReader
from marketflow.stores.redis.subscription import Subscription, subscribed
from marketflow.tasks import raise_if_cancelled

MAX_SLICES = 250_000
"""About 100 MB."""

PING_SECONDS = 0.1
"""Interval of pings on the subscription."""

SILENT_PINGS = 4
"""Number of unanswered pings after which the connection counts as lost. Not a time: a process short of CPU reads the
answers late, and should not read everything again for it.
"""

IDLE_SECONDS = 10.0
"""Time without queries, twice at most, after which the subscription ends: a flood of ticks costs CPU to receive."""

RETRY_SECONDS = 0.1

MAX_SUMMARIES = 256
"""Summaries that are kept until the next message: some ten requests fall into a millisecond, and ask for the same."""

_CHANNELS = (keys.NEWEST_CHANNEL, keys.SLICES_CHANNEL, keys.MINUTES_CHANNEL)


class NearCache:
    """A CacheReader that reads each series from Redis once.

    Args:
        reader: queries Redis.
        keywords: of the connection of the subscription, see connection_keywords.
        clock: decides which minutes are too old to keep.
        minute_ms: length of a minute.
    """

    def __init__(self, reader: RedisReader, keywords: dict[str, Any], clock: Clock, minute_ms: int = MINUTE_MS) -> None:
        self._reader = reader
        self._client = async_client(keywords, max_connections=1)
        self._channels = {keys.channel(name, keywords.get("db", 0)): name for name in _CHANNELS}
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
            return await self._reader.newest(series)
        newest = self._newest
        missing = [each for each in series if each not in newest]
        self._read_newest.update(missing)  # before the read: messages from here on are newer than what it returns
        for each, tick in zip(missing, await self._reader.newest(missing), strict=True):
            newest.setdefault(each, tick)
        return self._reader.newer(series, [newest[each] for each in series])

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        """One candle for each series of all that is cached from `since` on."""
        if (held := self.summary_in_memory(series, since, until)) is not None:
            return held
        if not self.live or since < self._oldest() + self._minute_ms:
            return await self._reader.summary(series, since, until)
        newest, windows = await self._known(series)
        if windows is None:
            return await self._reader.summary(series, since, until)
        return [window.covered(since, until, tick) for window, tick in zip(windows, newest, strict=True)]

    async def by_minute(self, series: Sequence[Series], since: int, until: int) -> list[dict[int, Candle]]:
        """The minutes of each series from `since` on, by their start."""
        self._needed.set()
        if not self.live or since < self._oldest() + self._minute_ms:
            return await self._reader.by_minute(series, since, until)
        newest, windows = await self._known(series)
        if windows is None:
            return await self._reader.by_minute(series, since, until)
        return [window.by_minute(since, until, tick) for window, tick in zip(windows, newest, strict=True)]

    def newest_in_memory(self, series: Sequence[Series]) -> list[Tick | None] | None:
        """The newest tick of each series, if all of them are in the copy."""
        self._needed.set()
        newest = self._newest
        try:
            return self._reader.newer(series, [newest[each] for each in series])
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
        """Newest ticks and windows; no windows where the connection broke meanwhile.

        All of them come from one table: in the next one a window would lack what was written before its subscription.
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
            recent = await self._reader.everything(series)
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

    async def listen(self) -> None:
        """Subscribe while there are queries, and again after each failure, until cancelled."""
        while True:
            await self._needed.wait()
            try:
                await self._listen()
            except* (redis.RedisError, OSError, msgspec.MsgspecError, _NotNeeded):
                pass  # queries report the outage
            except* Exception as group:  # noqa: BLE001 - a client that is reset while in use, say
                self._limit.log(
                    "listening", "WARNING", f"listening to the cache failed, trying again: {group.exceptions!r}"
                )
            finally:
                self._reset()
            raise_if_cancelled()
            if self._is_followed:
                self._needed.set()
            await asyncio.sleep(RETRY_SECONDS)

    async def _listen(self) -> None:
        async with (
            subscribed(self._client, tuple(self._channels), self._take) as subscription,
            asyncio.TaskGroup() as both,
        ):
            both.create_task(self._keep_alive(subscription))
            await subscription.lost

    async def _keep_alive(self, subscription: Subscription) -> None:
        """Ping the connection, and expire minutes as they become too old.

        Raises:
            TimeoutError: no answer.
            _NotNeeded: no queries for a while.
        """
        oldest = 0
        for pings in count(1):
            await asyncio.sleep(PING_SECONDS)
            if pings % round(IDLE_SECONDS / PING_SECONDS) == 0:
                if not self._needed.is_set() and not self._is_followed:
                    raise _NotNeeded
                self._needed.clear()
            if subscription.unanswered == SILENT_PINGS:
                raise TimeoutError
            subscription.ping()
            if (now_oldest := self._oldest()) != oldest:
                oldest = now_oldest
                self._summaries.clear()
                for entry in self._windows.values():
                    entry.window.expire(oldest)

    def _take(self, kind: bytes, channel: bytes, content: Any) -> None:
        if kind == b"subscribe":
            self.live = content == len(_CHANNELS)
            self.times_live += self.live
        elif kind == b"message":
            self._summaries.clear()
            match self._channels[channel.decode()]:
                case keys.NEWEST_CHANNEL:
                    announced = codec.valid_ticks(codec.decode_newest(content))
                    for series, tick in announced:
                        if series in self._read_newest:
                            self._newest[series] = tick
                    for take in self._listeners:
                        take(announced)
                case keys.SLICES_CHANNEL if self._windows or self._slot_listeners:
                    slots = codec.decode_announced(content)
                    for (series, start), candle in slots:
                        if (entry := self._windows.get(series)) is not None and (
                            found := codec.valid_slot(start, candle)
                        ):
                            entry.window.put_slice(start, found)
                    self._announce([(slot, None) for slot, _ in slots])
                case keys.MINUTES_CHANNEL if self._windows or self._slot_listeners:
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


class _NotNeeded(Exception):
    pass


class _Entry:
    """A window, and the task that still reads what was written before the window was made."""

    def __init__(self, window: CandleWindow) -> None:
        self.window = window
        self.reading: asyncio.Task[None] | None = None
