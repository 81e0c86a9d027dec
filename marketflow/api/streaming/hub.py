"""What all clients of a process look at: it keeps up with prices, mode and health, and tells those who look.

A client is no more than a selection of series and the position up to which it has seen what changed. When it can take
more it is given all that changed since, of each series the newest price alone, so it costs the same however slow it is
and nothing waits for it. Clients at the same position are given the same bytes.

Prices come from what the writer announces in Redis. While that may be incomplete the cache is asked, or what stands in
for it, and differences are told.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakValueDictionary

from loguru import logger

from marketflow.api.problems import ServiceUnavailable
from marketflow.api.queries.prices import PriceQueries
from marketflow.api.streaming.known_state import Known
from marketflow.api.streaming.selection import Pair, Selection
from marketflow.api.streaming.subscriber import Client
from marketflow.clock import milliseconds
from marketflow.errors import QuotaExceeded, Unavailable
from marketflow.health import Health, ModeSwitch
from marketflow.logs import RateLimit
from marketflow.model import Series, Tick
from marketflow.stores.ports import Announcements
from marketflow.tasks import cancel

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

STREAM_AGAIN_SECONDS = 10.0
"""After which a client that has as many streams as it may is to try again."""

_limit = RateLimit(60.0)


class Hub:
    """Tells clients what changes; does nothing while there are none.

    Args:
        exchanges: the configured ones.
        symbols: the configured ones.
        mode: which mode runs.
        prices: asked for newest prices while announcements cannot be relied on.
        health: how the application does; must not block.
        announcements: newest ticks as they are written.
        most: how many clients there may be.
        most_of_one: how many streams one client may have.
    """

    def __init__(
        self,
        exchanges: Sequence[str],
        symbols: Sequence[str],
        mode: ModeSwitch,
        prices: PriceQueries,
        health: Callable[[], Health],
        announcements: Announcements,
        most: int = 1000,
        most_of_one: int = 1000,
    ) -> None:
        self._exchanges = exchanges
        self._symbols = symbols
        self._mode = mode
        self._prices = prices
        self._health = health
        self._announcements = announcements
        self._most = most
        self._most_of_one = most_of_one
        self._of_one: Counter[str] = Counter()
        self._selections: WeakValueDictionary[frozenset[Pair], Selection] = WeakValueDictionary()
        self._clients: dict[Client, None] = {}
        self._running: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()  # cancelled, and perhaps not yet done
        self._due = asyncio.Event()
        pairs = frozenset((exchange, symbol) for exchange in exchanges for symbol in symbols)
        self._known = Known(pairs, mode.current, self._due.set, self._horizon)
        self._unread = asyncio.Event()
        self._relied_on: object = None
        self._unarchived = False  # whether the archive could not be asked for something
        self._beat_at = self._poll_at = self._archive_at = 0.0

    # Clients

    def selection(self, chosen: frozenset[Pair]) -> Selection:
        """Some of the series."""
        if (found := self._selections.get(chosen)) is None:
            found = self._selections[chosen] = Selection(self._exchanges, self._symbols, chosen)
        return found

    def reserve(self, address: str = "") -> Callable[[], None]:
        """Count one more stream of an address; gives what ends that, which may be called again.

        To be called before the first await: of streams asked for at once, each would find the others not begun.

        Raises:
            QuotaExceeded: there are as many from there as there may be.
            ServiceUnavailable: there are too many.
        """
        if self._of_one[address] >= self._most_of_one:
            _limit.log(
                "streams",
                "WARNING",
                f"refused a stream: {address or 'a client'} has {self._most_of_one} already (http.streams_per_client);"
                " if that is a proxy, name it in http.trusted_proxies",
            )
            raise QuotaExceeded(STREAM_AGAIN_SECONDS)
        if self._of_one.total() >= self._most:
            raise ServiceUnavailable(f"There are {self._most} streams already.")
        self._of_one[address] += 1
        released = False

        def release() -> None:
            nonlocal released
            if released:
                return
            released = True
            self._of_one[address] -= 1
            if not self._of_one[address]:
                del self._of_one[address]

        return release

    @contextmanager
    def client(self, selection: Selection, last_id: str = "") -> Iterator[Client]:
        """One more client, which goes on after the event with that id if it is known."""
        client = Client(selection, self._known.position(selection, last_id), self.ask)
        self._clients[client] = None
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        try:
            yield client
        finally:
            del self._clients[client]
            if not self._clients:
                self._running.cancel()
                self._ending.add(self._running)
                self._running.add_done_callback(self._ending.discard)
                self._running = None

    def ask(self) -> None:
        """Somebody waits."""
        self._due.set()

    @property
    def is_ready(self) -> bool:
        """Whether what there is of the mode that runs is known."""
        return self._known.is_ready

    def end(self) -> None:
        """Tell everybody that it is over; nobody is told anything afterwards."""
        self._known.end()

    async def close(self) -> None:
        """Wait for the end of all work, which uses the stores."""
        await cancel(*self._ending, *([self._running] if self._running else []))

    # Work, while there are clients

    async def _run(self) -> None:
        self._known.complete = False  # nobody has listened meanwhile
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
        known = self._known
        while True:
            await self._due.wait()
            self._due.clear()
            told, began = 0, time.thread_time()
            for client in [each for each in self._clients if each.is_due(known.stamp)]:
                self._look_at_mode()
                if not client.is_due(known.stamp):  # it has gone meanwhile
                    continue
                batch, client.position = known.step(client.selection, client.position)
                client.stamp = known.stamp
                told += client.give(batch)
                if told == AT_ONCE:
                    await _pause(began)
                    told, began = 0, time.thread_time()
            await _pause(began)

    async def _look(self) -> None:
        """Look at all that nobody announces."""
        while True:
            now = time.monotonic()
            self._look_at_mode()
            health = self._health()
            self._known.put_health(health)
            if now >= self._beat_at:
                self._beat_at = now + HEARTBEAT_SECONDS
                self._known.beat(milliseconds(self._prices.clock()))
            relied_on = self._relies_on(health)
            poll = now >= self._poll_at if relied_on is None else self._unarchived and now >= self._archive_at
            if poll or relied_on != self._relied_on:
                self._unread.set()
            await asyncio.sleep(LOOK_SECONDS)

    def _horizon(self) -> int:
        return milliseconds(self._prices.clock()) + self._prices.ahead_ms

    def _look_at_mode(self) -> None:
        if (mode := self._mode.current) is not self._known.mode:
            self._known.switch(mode, self._health())
            self._archive_at = 0.0

    def _take(self, announced: Sequence[tuple[Series, Tick]]) -> None:
        self._look_at_mode()
        self._known.put(announced)

    def _relies_on(self, health: Health) -> object:
        """The time during which no announcement can be missed, None if it is not such a time."""
        if not self._announcements.live or health.redis != "ok":
            return None
        return self._known.epoch, self._announcements.times_live

    async def _read(self) -> None:
        """Read what may have been missed, whenever there may be anything."""
        known = self._known
        while True:
            await self._unread.wait()
            self._unread.clear()
            epoch, relied_on = known.epoch, self._relies_on(self._health())
            series = [Series(known.mode, exchange, symbol) for exchange in self._exchanges for symbol in self._symbols]
            try:
                cached = await self._prices.cache.newest(series)
            except Unavailable:
                cached = [None] * len(series)
            if epoch != known.epoch:
                continue
            known.put([(one, tick) for one, tick in zip(series, cached, strict=True) if tick is not None])
            known.finish()
            self._relied_on = relied_on
            self._poll_at = time.monotonic() + POLL_SECONDS
            await self._read_archive([one for one, tick in zip(series, cached, strict=True) if tick is None])

    async def _read_archive(self, missing: Sequence[Series]) -> None:
        if not missing or time.monotonic() < self._archive_at:
            return
        self._archive_at = time.monotonic() + ARCHIVE_SECONDS
        try:
            last = await self._prices.archive.last(missing)
        except Unavailable:
            self._unarchived = True
            return
        self._unarchived = False
        self._known.put([(one, tick) for one, tick in zip(missing, last, strict=True) if tick is not None])


async def _pause(began: float) -> None:
    await asyncio.sleep(0)  # they send
    await asyncio.sleep(time.thread_time() - began)
