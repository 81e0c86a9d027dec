"""Fan-out of prices, candles, mode and health to all subscribers of this process.

A subscriber is a subscription and a position. When it can send, it receives one delta since its position with only the
newest price of each series (conflation), so a slow subscriber costs no memory and delays nobody. Subscribers at the
same position share the encoded bytes.

Prices come from the writer's announcements in Redis. While announcements may be incomplete, the cache (or its fallback)
is polled instead and differences are sent.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from weakref import WeakValueDictionary

from msgspec import structs

from marketflow.api.problems import ServiceUnavailable
from marketflow.api.queries.known_holes import KnownHoles
from marketflow.api.queries.names import NameLookup
from marketflow.api.queries.prices import PriceQueries
from marketflow.api.streaming.candle_stream.candle_series import CandleSeries
from marketflow.api.streaming.candle_stream.live_candles import LiveCandles
from marketflow.api.streaming.cpu_share import CpuShare
from marketflow.api.streaming.subscriber import CountSent, Subscriber, Writes
from marketflow.api.streaming.subscription import Pair, Subscription
from marketflow.api.streaming.versioned_state import Position, VersionedState
from marketflow.clock import milliseconds
from marketflow.errors import QuotaExceeded, Unavailable
from marketflow.health import Health, ModeSwitch
from marketflow.logs import RateLimit
from marketflow.model import Series, Tick
from marketflow.stores.ports import Announcements, ArchiveReader
from marketflow.tasks import cancel, raise_if_cancelled

HEARTBEAT_SECONDS = 5.0

CHECK_SECONDS = 0.1
"""Interval at which mode, health and the state of the announcements are checked."""

POLL_SECONDS = 0.5
"""Interval at which the cache is polled while announcements are unreliable."""

ARCHIVE_SECONDS = 5.0
"""Shortest interval between queries of the archive for series that are not in the cache."""

DELIVERIES_AT_ONCE = 250
"""Batches delivered before the event loop runs other tasks, after one to two milliseconds. With fewer each costs more:
a reader on the same machine that has read them all goes to sleep, and is woken by the next write."""

RESTART_SECONDS = 1.0

STREAM_AGAIN_SECONDS = 10.0
"""Retry-After of a client that has reached its limit of streams."""

_limit = RateLimit(60.0)


class Broadcaster:
    """Sends changes to subscribers; idle while there are none.

    Args:
        exchanges: all configured exchanges.
        symbols: all configured symbols.
        mode: the current mode.
        prices: queried for newest prices while announcements are unreliable.
        health: returns the health of the application; must not block.
        announcements: newest ticks as they are written.
        max_streams: streams of all clients together.
        max_streams_per_client: streams of one client.
        archive: has the rows of which candles are made, uncached; by default that of `prices`.
        holes: says which candles are incomplete.
    """

    def __init__(
        self,
        exchanges: Sequence[str],
        symbols: Sequence[str],
        mode: ModeSwitch,
        prices: PriceQueries,
        health: Callable[[], Health],
        announcements: Announcements,
        max_streams: int = 1000,
        max_streams_per_client: int = 1000,
        archive: ArchiveReader | None = None,
        holes: KnownHoles | None = None,
    ) -> None:
        self._exchanges = exchanges
        self._symbols = symbols
        self._mode = mode
        self._prices = prices
        self._health_of_process = health
        self._announcements = announcements
        self._max_streams = max_streams
        self._max_streams_per_client = max_streams_per_client
        self._streams: Counter[str] = Counter()
        self._subscriptions: WeakValueDictionary[tuple[frozenset[Pair], frozenset[CandleSeries]], Subscription] = (
            WeakValueDictionary()
        )
        self._subscribers: dict[Subscriber, None] = {}
        self._task: asyncio.Task[None] | None = None
        self._cancelled: set[asyncio.Task[None]] = set()  # and not yet done
        self._due = asyncio.Event()
        pairs = frozenset(product(exchanges, symbols))
        self._state = VersionedState(pairs, mode.current, self._due.set, self._horizon, self._now)
        self._candles = LiveCandles(
            exchanges, prices, archive or prices.archive, self._state, announcements.slots, holes
        )
        self._read_due = asyncio.Event()
        self._caught_up_with: object = None
        self._archive_failed = False  # the last query of the archive
        self._heartbeat_at = self._poll_at = self._archive_at = 0.0

    # Subscribers

    def subscription(self, chosen: frozenset[Pair], candles: frozenset[CandleSeries] = frozenset()) -> Subscription:
        """Return the subscription to the prices of these series, and to these candle series."""
        if (found := self._subscriptions.get((chosen, candles))) is None:
            found = Subscription(self._exchanges, self._symbols, chosen, candles)
            self._subscriptions[chosen, candles] = found
        return found

    @property
    def names(self) -> NameLookup:
        """The configured names at present."""
        return NameLookup(self._exchanges, self._symbols)

    def take_names(self, exchanges: Sequence[str], symbols: Sequence[str]) -> None:
        """Replace the configured names. Whose series have changed by it receives a snapshot.

        Subscribers to all symbols of an exchange, or to all exchanges of a symbol, have added ones, too.
        """
        before, after = NameLookup(self._exchanges, self._symbols), NameLookup(exchanges, symbols)
        self._exchanges, self._symbols = exchanges, symbols
        self._subscriptions.clear()
        self._state.take_pairs(frozenset(product(exchanges, symbols)))
        for subscriber in self._subscribers:
            had = subscriber.subscription
            chosen, candles = had.chosen_of(before, after), had.candles_of(before, after)
            if (chosen, candles) != (had.chosen, had.candles):
                self.resubscribe(subscriber, self.subscription(chosen, candles))
        self._candles.take_exchanges(exchanges)
        self._read_due.set()
        self.wake()

    def reserve(self, address: str = "") -> Callable[[], None]:
        """Count one more stream of an address; return an idempotent function that releases it.

        Call it before the first await, so that concurrent requests count each other.

        Raises:
            QuotaExceeded: the address has reached its limit.
            ServiceUnavailable: all clients together have reached the limit.
        """
        if self._streams[address] >= self._max_streams_per_client:
            _limit.log(
                "streams",
                "WARNING",
                f"refused a stream: {address or 'a client'} has {self._max_streams_per_client} already"
                " (http.streams_per_client); if that is a proxy, name it in http.trusted_proxies",
            )
            raise QuotaExceeded(STREAM_AGAIN_SECONDS)
        if self._streams.total() >= self._max_streams:
            raise ServiceUnavailable(f"There are {self._max_streams} streams already.")
        self._streams[address] += 1
        released = False

        def release() -> None:
            nonlocal released
            if released:
                return
            released = True
            self._streams[address] -= 1
            if not self._streams[address]:
                del self._streams[address]

        return release

    @contextmanager
    def subscribe(
        self, subscription: Subscription, last_id: str = "", pause_seconds: float = 0.0
    ) -> Iterator[Subscriber]:
        """Yield a subscriber that resumes after the event with that id if it is known.

        With a pause, what changes within it comes at its end.
        """
        subscriber = Subscriber(subscription, self._state.position(subscription, last_id), self.wake, pause_seconds)
        self._subscribers[subscriber] = None
        self._follow(subscription, 1)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        try:
            yield subscriber
        finally:
            del self._subscribers[subscriber]
            self._follow(subscriber.subscription, -1)
            if not self._subscribers:
                self._task.cancel()
                self._cancelled.add(self._task)
                self._task.add_done_callback(self._cancelled.discard)
                self._task = None

    def resubscribe(self, subscriber: Subscriber, subscription: Subscription) -> None:
        """Replace the subscription of a subscriber; its snapshot comes next."""
        self._follow(subscription, 1)
        self._follow(subscriber.subscription, -1)
        subscriber.subscribe(subscription)

    def _follow(self, subscription: Subscription, subscribers: int) -> None:
        self._state.follow_references(subscription.references, subscribers)
        self._candles.follow(subscription.candle_series, subscribers)

    def wake(self) -> None:
        """Deliver to subscribers that wait for a batch."""
        self._due.set()

    @property
    def is_ready(self) -> bool:
        """Whether snapshots of the current mode can be made."""
        return self._state.is_ready

    def end(self) -> None:
        """Send the last event to all subscribers."""
        self._state.end()

    async def close(self) -> None:
        """Cancel all tasks and wait for their end, so that the stores can be closed."""
        await cancel(*self._cancelled, *([self._task] if self._task else []))

    # Tasks that run while there are subscribers

    async def _run(self) -> None:
        self._state.complete = False  # announcements were missed since the last subscriber left
        self._caught_up_with = None
        while True:
            try:
                with self._announcements.announcing(self._take):
                    async with asyncio.TaskGroup() as group:
                        tasks = (self._check, self._read, self._deliver, self._candles.make, self._candles.read_archive)
                        for work in tasks:
                            group.create_task(work())
            except Exception as error:  # noqa: BLE001 - otherwise subscribers would wait for ever
                _limit.log_bug("the stream failed", error)
            await asyncio.sleep(RESTART_SECONDS)

    async def _deliver(self) -> None:
        """Deliver deltas to all waiting subscribers in one pass; rest after it if passes take too much of the core."""
        share = CpuShare()
        while True:
            await self._due.wait()
            self._due.clear()
            busy = 0.0
            subscribers, more = iter(list(self._subscribers)), True
            while more:
                began = time.thread_time()
                more = self._deliver_to_some(subscribers)
                await asyncio.sleep(0)  # others run, and subscribers that pull send
                busy += time.thread_time() - began
            await asyncio.sleep(share.rest_after(busy))

    def _deliver_to_some(self, subscribers: Iterator[Subscriber]) -> bool:
        """Deliver to DELIVERIES_AT_ONCE of those that are due; return whether more may be."""
        self._check_mode()
        state, sent = self._state, Counter[CountSent | None]()
        writes: Writes = []
        subscription: Subscription | None = None
        position: Position | None = None
        stamp, deliveries = 0, 0
        for subscriber in subscribers:
            if subscriber.subscription is not subscription:
                subscription, position = subscriber.subscription, None
                stamp = state.stamp_for(subscription)
            if not subscriber.is_due(stamp):
                continue
            # Most are at one position, and share the object: to look up its delta takes as long as to write it.
            if subscriber.position is not position:
                position = subscriber.position
                batch, after = state.delta(subscription, position)
            subscriber.position, subscriber.stamp = after, stamp
            sent[subscriber.sent] += subscriber.deliver(batch, writes)
            deliveries += 1
            if deliveries == DELIVERIES_AT_ONCE:
                break
        for sink, data in writes:
            sink.write(data)
        for count, events in sent.items():
            if count is not None and events:
                count(events)
        return deliveries == DELIVERIES_AT_ONCE

    async def _check(self) -> None:
        """Poll what is not announced: mode, health, heartbeats, and whether announcements are reliable."""
        while True:
            now = time.monotonic()
            self._check_mode()
            health = self._health()
            self._state.put_health(health)
            self._state.refresh_references()
            if now >= self._heartbeat_at:
                self._heartbeat_at = now + HEARTBEAT_SECONDS
                self._state.beat(self._now())
            reliable = self._reliable_period(health)
            self._candles.check(reliable)
            poll = now >= self._poll_at if reliable is None else self._archive_failed and now >= self._archive_at
            if poll or reliable != self._caught_up_with:
                self._read_due.set()
            await asyncio.sleep(CHECK_SECONDS)

    def _now(self) -> int:
        return milliseconds(self._prices.clock())

    def _horizon(self) -> int:
        return self._now() + self._prices.ahead_ms

    def _check_mode(self) -> None:
        if (mode := self._mode.current) is not self._state.mode:
            self._state.switch(mode, self._health())
            self._candles.reset()
            self._archive_at = 0.0

    def _take(self, announced: Sequence[tuple[Series, Tick]]) -> None:
        self._check_mode()
        self._state.put(announced)
        self._candles.take(announced)

    def _health(self) -> Health:
        """The health without the shards, whose lag always changes."""
        return structs.replace(self._health_of_process(), shards=())

    def _reliable_period(self, health: Health) -> object:
        """Return an id of the period in which no announcement can be missed; None outside of such a period."""
        if not self._announcements.live or health.redis != "ok":
            return None
        return self._state.epoch, self._announcements.times_live

    async def _read(self) -> None:
        """Read the newest ticks from the cache whenever announcements may have been missed."""
        state = self._state
        while True:
            await self._read_due.wait()
            self._read_due.clear()
            epoch, reliable = state.epoch, self._reliable_period(self._health())
            series = [Series(state.mode, exchange, symbol) for exchange in self._exchanges for symbol in self._symbols]
            try:
                cached = await self._prices.cache.newest(series)
            except Unavailable:
                raise_if_cancelled()
                cached = [None] * len(series)
            if epoch != state.epoch:
                continue
            state.put([(one, tick) for one, tick in zip(series, cached, strict=True) if tick is not None])
            state.mark_complete()
            self._caught_up_with = reliable
            self._poll_at = time.monotonic() + POLL_SECONDS
            await self._read_archive([one for one, tick in zip(series, cached, strict=True) if tick is None])

    async def _read_archive(self, missing: Sequence[Series]) -> None:
        if not missing or time.monotonic() < self._archive_at:
            return
        self._archive_at = time.monotonic() + ARCHIVE_SECONDS
        try:
            last = await self._prices.archive.last(missing)
        except Unavailable:
            self._archive_failed = True
            return
        self._archive_failed = False
        self._state.put([(one, tick) for one, tick in zip(missing, last, strict=True) if tick is not None])
