"""The cache in Redis for a process that asks for the same series again and again: read once, then kept up to date.

Its writer announces what it writes, in the same transaction. So once a series has been read, answers about it need no
Redis, nor are they older than the cache. That holds only while no announcement can have been missed: what is known is
forgotten when the connection breaks or falls silent, and Redis itself is asked until the next one stands. A server
that was emptied does no harm, for what is known was true.

Capacity: MAX_SLICES. Policy: the series that was not asked about for longest is let go of, and read again when needed.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import msgspec
import redis
import redis.asyncio
from redis.asyncio.client import PubSub

from marketflow.clock import Clock, milliseconds
from marketflow.logs import RateLimit
from marketflow.model import MINUTE_MS, Candle, Series, Tick, minute_start
from marketflow.stores.cache_limits import RECENT_MS
from marketflow.stores.candle_window import CandleWindow
from marketflow.stores.ports import TickListener
from marketflow.stores.redis import codec, keys
from marketflow.stores.redis.connection import async_client
from marketflow.stores.redis.reader import RedisReader

MAX_SLICES = 250_000
"""About 100 MB."""

PING_SECONDS = 0.1
"""How often the connection is asked for a sign of life."""

SILENT_PINGS = 4
"""After so many without any answer it is taken for dead. Not a time: a process that is short of one notices late that
the answer has come, and should not begin to read everything again.
"""

IDLE_SECONDS = 10.0
"""After so long without a question, twice at most, nobody listens any more: a flood is announced all the time."""

RETRY_SECONDS = 0.1

_CHANNELS = (keys.NEWEST_CHANNEL, keys.SLICES_CHANNEL, keys.MINUTES_CHANNEL)


class NearCache:
    """A CacheReader that has to ask Redis about each series only once.

    Args:
        reader: asks Redis.
        keywords: of the connection for announcements, see connection_keywords.
        clock: tells what has become too old to be kept.
        minute_ms: length of a minute.
    """

    def __init__(self, reader: RedisReader, keywords: dict[str, Any], clock: Clock, minute_ms: int = MINUTE_MS) -> None:
        self._reader = reader
        self._client = async_client(keywords, max_connections=1)
        self._channels = {keys.channel(name, keywords.get("db", 0)): name for name in _CHANNELS}
        self._clock = clock
        self._minute_ms = minute_ms
        self._needed = asyncio.Event()
        self._takers: list[TickListener] = []
        self._limit = RateLimit(10.0)
        self.times_live = 0
        self._forget()

    def _forget(self) -> None:
        """Know nothing. New containers, so that what is still being read ends up in what is forgotten."""
        self.live = False
        self._newest: dict[Series, Tick | None] = {}
        self._asked: set[Series] = set()
        self._windows: dict[Series, _Entry] = {}  # the one asked about last is the last one

    async def close(self) -> None:
        """Close the connection."""
        await self._client.aclose()

    async def newest(self, series: Sequence[Series]) -> list[Tick | None]:
        """The newest tick of each series."""
        self._needed.set()
        newest = self._newest
        try:
            return [newest[each] for each in series]
        except KeyError:
            pass
        if not self.live:
            return await self._reader.newest(series)
        missing = [each for each in series if each not in newest]
        self._asked.update(missing)  # before it is read: what is announced from here on is newer than that
        for each, tick in zip(missing, await self._reader.newest(missing), strict=True):
            newest.setdefault(each, tick)
        return [newest[each] for each in series]

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        """One candle for each series of what is remembered from `since` on."""
        self._needed.set()
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

    def _oldest(self) -> int:
        """Start of the oldest minute that is kept."""
        return minute_start(milliseconds(self._clock())) - RECENT_MS - self._minute_ms

    async def _known(self, series: Sequence[Series]) -> tuple[list[Tick | None], list[CandleWindow] | None]:
        """Newest ticks and windows; no windows where the connection broke meanwhile.

        All of them are of one table: in the one after it a window would lack what was written until it was subscribed.
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
            # A request that is given up takes nothing away from others that wait for the same.
            await asyncio.shield(entry.reading)
        return entry.window

    def _read(self, series: Series, table: "dict[Series, _Entry]") -> "_Entry":
        entry = _Entry(CandleWindow({}, {}, self._minute_ms))
        entry.reading = asyncio.create_task(self._fill(series, entry, table))
        entry.reading.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be waiting
        return entry

    async def _fill(self, series: Series, entry: "_Entry", windows: "dict[Series, _Entry]") -> None:
        try:
            recent = await self._reader.everything(series)
        except BaseException:
            windows.pop(series, None)
            raise
        entry.window.fill(CandleWindow(recent.slices, recent.minutes, self._minute_ms))
        entry.reading = None
        held = sum(len(other.window) for other in windows.values())
        for other in list(windows):
            if held <= MAX_SLICES or other == series:
                break
            held -= len(windows.pop(other).window)

    # Announcements

    @contextmanager
    def announcing(self, take: TickListener) -> Iterator[None]:
        """Tell of every newest tick that is announced, and listen as if somebody asked all the time."""
        self._takers.append(take)
        self._needed.set()
        try:
            yield
        finally:
            self._takers.remove(take)

    async def listen(self) -> None:
        """Take in what the writer announces while somebody asks, until cancelled."""
        while True:
            await self._needed.wait()
            try:
                await self._listen()
            except* (redis.RedisError, OSError, msgspec.MsgspecError, _NotNeeded):
                pass  # whoever needs Redis notices by itself
            except* Exception as group:  # noqa: BLE001 - of a client that is reset while it is used, say
                self._limit.log(
                    "listening", "WARNING", f"listening to the cache failed, trying again: {group.exceptions!r}"
                )
            finally:
                self._forget()
            if self._takers:
                self._needed.set()
            await asyncio.sleep(RETRY_SECONDS)

    async def _listen(self) -> None:
        self._unanswered = 0
        async with self._client.pubsub() as announcements:
            await announcements.subscribe(*self._channels)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._keep_awake(announcements))
                async for message in announcements.listen():
                    self._unanswered = 0
                    self._take(message)

    async def _keep_awake(self, announcements: PubSub) -> None:
        """Ask for signs of life; let go of minutes as they become too old.

        Raises:
            TimeoutError: there is none.
            _NotNeeded: nobody has asked for a while.
        """
        oldest = 0
        for pings in count(1):
            await asyncio.sleep(PING_SECONDS)
            if pings % round(IDLE_SECONDS / PING_SECONDS) == 0:
                if not self._needed.is_set() and not self._takers:
                    raise _NotNeeded
                self._needed.clear()
            if self._unanswered == SILENT_PINGS:
                raise TimeoutError
            self._unanswered += 1
            await announcements.ping()
            if (now_oldest := self._oldest()) != oldest:
                oldest = now_oldest
                for entry in self._windows.values():
                    entry.window.expire(oldest)

    def _take(self, message: dict[str, Any]) -> None:
        if message["type"] == "subscribe":
            if self.live:  # again: the connection was another one
                self._forget()
            self.live = message["data"] == len(_CHANNELS)
            self.times_live += self.live
        elif message["type"] == "message":
            match self._channels[message["channel"].decode()]:
                case keys.NEWEST_CHANNEL:
                    announced = codec.valid_ticks(codec.decode_newest(message["data"]))
                    for series, tick in announced:
                        if series in self._asked:
                            self._newest[series] = tick
                    for take in self._takers:
                        take(announced)
                case keys.SLICES_CHANNEL if self._windows:
                    for (series, start), candle in codec.decode_announced(message["data"]):
                        if (entry := self._windows.get(series)) is not None and (
                            found := codec.valid_slot(start, candle)
                        ):
                            entry.window.put_slice(start, found)
                case keys.MINUTES_CHANNEL if self._windows:
                    for (series, start), candle in codec.decode_announced(message["data"]):
                        if (entry := self._windows.get(series)) is not None and (
                            found := codec.valid_slot(start, candle)
                        ):
                            entry.window.put_minute(start, found)


class _NotNeeded(Exception):
    pass


class _Entry:
    """A window, and the task that still reads what was there before it was asked for."""

    def __init__(self, window: CandleWindow) -> None:
        self.window = window
        self.reading: asyncio.Task[None] | None = None
