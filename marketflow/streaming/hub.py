"""What all clients of a process look at: the newest price of each series, the mode and the health, and who looks.

A client is no more than a selection of series and the position up to which it has seen what changed. When it can take
more it is given all that changed since, of each series the newest price alone, so it costs the same however slow it is
and nothing waits for it. Clients at the same position are given the same bytes.

Prices come from what the writer announces in Redis. While that may be incomplete the cache is asked, or what stands in
for it, and differences are told.
"""

import asyncio
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from uuid import uuid4
from weakref import WeakValueDictionary

import msgspec
from loguru import logger

from marketflow.api.answers import Prices
from marketflow.api.context import Health, ModeSwitch
from marketflow.api.prices import LatestPrice
from marketflow.api.problems import TryAgain
from marketflow.api.rendering import rfc3339
from marketflow.clock import milliseconds
from marketflow.errors import Unavailable
from marketflow.model import Mode, Series, Tick
from marketflow.stores.ports import Announcements
from marketflow.streaming.events import (
    Batch,
    ChangedMode,
    ChangedPrices,
    End,
    Heartbeat,
    Message,
    Snapshot,
    message,
)
from marketflow.streaming.selection import Pair, Selection

HEARTBEAT_SECONDS = 5.0

LOOK_SECONDS = 0.1
"""How often mode, health and the state of the cache are looked at."""

POLL_SECONDS = 0.5
"""How often the cache is asked while announcements cannot be relied on."""

ARCHIVE_SECONDS = 5.0
"""How often, at most, the archive is asked for what the cache does not tell."""

AT_ONCE = 25
"""How many clients are told in one go, before other work of the process gets its turn."""

RESTART_SECONDS = 1.0


class Position(NamedTuple):
    """What a client has seen.

    Args:
        epoch: of which mode, counted from the start; -1 of none.
        mode: the mode it was last told.
        whole: whether it has had a snapshot of that epoch.
        version: the last change that it has seen.
        beat: the last heartbeat.
    """

    epoch: int
    mode: Mode | None
    whole: bool
    version: int
    beat: int


_NOTHING = Position(-1, None, False, 0, -1)


class _Newest(NamedTuple):
    tick: Tick
    version: int


class Client:
    """Somebody who is told what changes."""

    def __init__(self, hub: "Hub", selection: Selection, position: Position) -> None:
        self._hub = hub
        self.selection = selection
        self.position = position
        self.stamp = -1  # of the hub when it last looked for something new to this client
        self._turn: asyncio.Future[Batch] | None = None

    async def next(self) -> Batch:
        """What has changed, as soon as there is anything and it is this client's turn."""
        self._turn = asyncio.get_running_loop().create_future()
        self._hub.ask()
        return await self._turn

    @property
    def waits(self) -> bool:
        """Whether it can be told something."""
        return self._turn is not None and not self._turn.done()

    def give(self, batch: Batch) -> None:
        """Tell it, while it waits."""
        assert self._turn is not None, "it waits"
        self._turn.set_result(batch)


class Hub:
    """Knows what runs and tells clients; does nothing while there are none.

    Args:
        exchanges: the configured ones.
        symbols: the configured ones.
        mode: which mode runs.
        prices: asked for newest prices while announcements cannot be relied on.
        health: how the application does; must not block.
        announcements: newest ticks as they are written.
    """

    def __init__(
        self,
        exchanges: Sequence[str],
        symbols: Sequence[str],
        mode: ModeSwitch,
        prices: Prices,
        health: Callable[[], Health],
        announcements: Announcements,
    ) -> None:
        self._exchanges = exchanges
        self._symbols = symbols
        self._pairs = frozenset((exchange, symbol) for exchange in exchanges for symbol in symbols)
        self._modes = mode
        self._prices = prices
        self._health_now = health
        self._announcements = announcements
        self._selections: WeakValueDictionary[frozenset[Pair], Selection] = WeakValueDictionary()
        self._clients: dict[Client, None] = {}
        self._running: asyncio.Task[None] | None = None

        self._run_id = uuid4().hex[:12]
        self._mode = mode.current
        self._epoch = 0
        self._ready = False  # whether what the cache has of this mode is known
        self._newest: dict[Pair, _Newest] = {}  # the one that changed last is the last one
        self._version = 0
        self._health: Health | None = None
        self._health_version = 0
        self._beat = 0
        self._beat_at = 0.0
        self._ended = False

        self._stamp = 0  # changes with any of these
        self._steps: dict[tuple[Selection, Position], tuple[Batch | None, Position]] = {}
        self._due = asyncio.Event()
        self._unread = asyncio.Event()
        self._relied_on: object = None
        self._poll_at = 0.0
        self._archive_at = 0.0

    # Clients

    def selection(self, chosen: frozenset[Pair]) -> Selection:
        """Some of the series."""
        if (found := self._selections.get(chosen)) is None:
            found = self._selections[chosen] = Selection(self._exchanges, self._symbols, chosen)
        return found

    @contextmanager
    def client(self, selection: Selection, last_id: str = "") -> Iterator[Client]:
        """One more client, which goes on after the event with that id if it is known.

        Raises:
            TryAgain: the process ends.
        """
        if self._ended:
            raise TryAgain("The server ends.")
        client = Client(self, selection, self._position(selection, last_id))
        self._clients[client] = None
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        try:
            yield client
        finally:
            del self._clients[client]
            if not self._clients:
                self._running.cancel()
                self._running = None

    def end(self) -> None:
        """Tell everybody that it is over; nobody is told anything afterwards."""
        if not self._ended:
            self._ended = True
            self._changed()

    def ask(self) -> None:
        """Somebody waits."""
        self._due.set()

    def _position(self, selection: Selection, last_id: str) -> Position:
        """Where the client goes on that has seen this id last."""
        found = _ID.fullmatch(last_id)
        if found is None or found["run"] != self._run_id or found["selection"] != selection.digest:
            return _NOTHING
        epoch, version = int(found["epoch"]), int(found["version"])
        if epoch > self._epoch or version > self._version:
            return _NOTHING
        return Position(epoch, Mode(found["mode"]), True, version, -1)  # a heartbeat tells it that it is connected

    def _id(self, selection: Selection, position: Position) -> str:
        if not position.whole:
            return self._run_id
        return f"{self._run_id}-{position.mode}-{position.epoch}-{position.version}-{selection.digest}"

    # What a client is told

    def _step(self, selection: Selection, position: Position) -> tuple[Batch | None, Position]:
        """What a client at this position is to be told, and where it is then."""
        if (step := self._steps.get((selection, position))) is None:
            step = self._steps[selection, position] = self._made(selection, position)
        return step

    def _made(self, selection: Selection, seen: Position) -> tuple[Batch | None, Position]:
        news: list[msgspec.Struct] = []
        whole = seen.whole and seen.epoch == self._epoch
        if seen.mode not in (None, self._mode):
            assert seen.mode is not None
            news.append(ChangedMode(self._mode, seen.mode))
        if whole:
            news += self._changes(selection, seen.version)
        elif self._ready and self._health is not None:
            whole = True
            news.append(
                Snapshot(
                    self._mode,
                    list(selection.symbols),
                    list(selection.exchanges),
                    [self._price(pair) for pair in selection.pairs if pair in self._newest],
                    self._health,
                )
            )
        if whole and seen.beat != self._beat and (seen.whole or seen.beat >= 0):
            news.append(Heartbeat(rfc3339(milliseconds(self._prices.clock()))))
        if self._ended:
            news.append(End("shutdown"))
        now = Position(self._epoch, self._mode, whole, self._version, self._beat)
        position = self._id(selection, now)
        messages: list[Message] = [message(each, position) for each in news]
        return (Batch(messages) if messages else None), now

    def _changes(self, selection: Selection, version: int) -> Iterator[msgspec.Struct]:
        if self._health is not None and self._health_version > version:
            yield self._health
        changed = []
        for pair in reversed(self._newest):
            if self._newest[pair].version <= version:
                break
            if pair in selection.chosen:
                changed.append(self._price(pair))
        if changed:
            yield ChangedPrices(changed[::-1])

    def _price(self, pair: Pair) -> LatestPrice:
        exchange, symbol = pair
        tick = self._newest[pair].tick
        return LatestPrice(symbol, exchange, tick.price, rfc3339(tick.at))

    # Work, while there are clients

    async def _run(self) -> None:
        self._ready = False
        self._relied_on = None
        while True:
            try:
                with self._announcements.announcing(self._take):
                    async with asyncio.TaskGroup() as group:
                        for work in (self._look, self._read, self._tell):
                            group.create_task(work())
            except Exception as error:  # noqa: BLE001 - clients would wait for ever
                logger.opt(exception=error).error("the stream failed, which is a bug")
            await asyncio.sleep(RESTART_SECONDS)

    async def _tell(self) -> None:
        """Tell clients what is new to them, a few at a time, and leave as much time for all other work as it takes."""
        while True:
            await self._due.wait()
            self._due.clear()
            told, began = 0, time.perf_counter()
            for client in [each for each in self._clients if each.stamp != self._stamp and each.waits]:
                if not client.waits:  # it has gone meanwhile
                    continue
                self._look_at_mode()
                batch, client.position = self._step(client.selection, client.position)
                client.stamp = self._stamp
                if batch is not None:
                    client.give(batch)
                    told += 1
                if told == AT_ONCE:
                    await self._pause(began)
                    told, began = 0, time.perf_counter()
            await self._pause(began)

    async def _pause(self, began: float) -> None:
        await asyncio.sleep(0)  # they send
        await asyncio.sleep(time.perf_counter() - began)

    async def _look(self) -> None:
        while True:
            now = time.monotonic()
            self._look_at_mode()
            health = self._health_now()
            if self._health is None or _state(health) != _state(self._health):
                self._health = health
                self._version += 1
                self._health_version = self._version
                self._changed()
            if now >= self._beat_at:
                self._beat_at = now + HEARTBEAT_SECONDS
                self._beat += 1
                self._changed()
            relied_on = self._relies_on(health)
            if (relied_on is None and now >= self._poll_at) or relied_on != self._relied_on:
                self._unread.set()
            await asyncio.sleep(LOOK_SECONDS)

    def _look_at_mode(self) -> None:
        if (mode := self._modes.current) is not self._mode:
            self._mode = mode
            self._epoch += 1
            self._version += 1
            self._newest.clear()
            self._ready = False
            self._changed()

    def _relies_on(self, health: Health) -> object:
        """The time during which no announcement can be missed, None if it is not such a time."""
        if not self._announcements.live or health.redis != "ok":
            return None
        return self._epoch, self._announcements.times_live

    async def _read(self) -> None:
        """Read what may have been missed."""
        while True:
            await self._unread.wait()
            self._unread.clear()
            epoch, mode = self._epoch, self._mode
            relied_on = self._relies_on(self._health_now())
            series = [Series(mode, exchange, symbol) for exchange in self._exchanges for symbol in self._symbols]
            cached = await self._cached(series)
            if epoch != self._epoch:
                continue
            self._put([(one, tick) for one, tick in zip(series, cached, strict=True) if tick is not None])
            if not self._ready:
                self._ready = True
                self._changed()
            self._relied_on = relied_on
            self._poll_at = time.monotonic() + POLL_SECONDS
            await self._read_archive([one for one, tick in zip(series, cached, strict=True) if tick is None])

    async def _cached(self, series: Sequence[Series]) -> Sequence[Tick | None]:
        try:
            return await self._prices.cache.newest(series)
        except Unavailable:
            return [None] * len(series)

    async def _read_archive(self, missing: Sequence[Series]) -> None:
        if not missing or time.monotonic() < self._archive_at:
            return
        self._archive_at = time.monotonic() + ARCHIVE_SECONDS
        try:
            last = await self._prices.archive.last(missing)
        except Unavailable:
            return
        self._put([(one, tick) for one, tick in zip(missing, last, strict=True) if tick is not None])

    def _take(self, announced: Sequence[tuple[Series, Tick]]) -> None:
        self._look_at_mode()
        self._put(announced)

    def _put(self, ticks: Sequence[tuple[Series, Tick]]) -> None:
        version = self._version + 1
        for (mode, *pair), tick in ticks:
            if mode is not self._mode or (place := (pair[0], pair[1])) not in self._pairs:
                continue
            known = self._newest.get(place)
            if known is None or known.tick.order < tick.order:
                self._newest.pop(place, None)
                self._newest[place] = _Newest(tick, version)
                self._version = version
        if self._version == version:
            self._changed()

    def _changed(self) -> None:
        self._stamp += 1
        self._steps.clear()
        self._due.set()


_ID = re.compile(
    r"(?P<run>[0-9a-f]{12})-(?P<mode>test|live)-(?P<epoch>[0-9]{1,9})-(?P<version>[0-9]{1,18})-(?P<selection>[0-9a-f]+)"
)


def _state(health: Health) -> Health:
    return msgspec.structs.replace(health, uptime_seconds=0.0)
