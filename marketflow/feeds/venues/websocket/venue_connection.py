"""One connection to a venue after another, for a part of the symbols of a feed.

An attempt is a thread with an event loop of its own. It looks up the symbols, connects, subscribes, and then only
reacts: to what one read of the socket has given, and to what is due without a message. Subscriptions follow from the
settings at each connection.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any, TypeVar

import reactivex as rx
from loguru import logger
from reactivex import Observable, abc
from reactivex.disposable import Disposable

from marketflow.feeds.decoder import Decoder
from marketflow.feeds.feed import Record
from marketflow.feeds.tcp import ConnectionLost, ConnectionSilent
from marketflow.feeds.venues.instruments import Names
from marketflow.feeds.venues.limits import AttemptBudget, VenueRefusal
from marketflow.feeds.venues.trade_ids import TradeIds
from marketflow.feeds.venues.venue import Venue
from marketflow.feeds.venues.websocket.data_silence import DataSilence
from marketflow.feeds.venues.websocket.frame_stream import FrameStream, open_stream
from marketflow.feeds.venues.websocket.subscriptions import Subscriptions
from marketflow.feeds.venues.websocket.trade_reader import TradeReader
from marketflow.model import Candles, FeedState
from marketflow.tasks import on_daemon_thread
from marketflow.text import without_secrets

FRAME_SILENCE_SECONDS = 45.0
"""Without any frame for so long, pings and their answers included, a connection is dead."""

LOOK_AGAIN_SECONDS = 600.0
"""How often the venue is asked which symbols it has and trades now."""

OVERLAP_SECONDS = 2.0
"""How long a connection is still read after another has taken over from it."""

HAND_OVER_RETRY_SECONDS = 5.0

_T = TypeVar("_T")


class VenueConnection:
    """Connects on each subscription to `batches`; the earlier attempt has ended by then.

    Args:
        exchange: the name its prices go by.
        url: where the venue is.
        venue: its protocol.
        look_up: finds the venue's names of the symbols, and is passed this connection, and whether it is about to be
            made; blocking.
        decoder: checks and folds the trades; shared by the connections of a feed.
        ids: which trades have been counted; shared likewise.
        stale_after_seconds: silence of trades after which the connection is made anew.
        budget: of connections, shared by all feeds of the venue.
        monotonic: measures silence, in seconds.
        on_refusal: called with our symbol and the venue's words where it refuses a subscription.
        on_acceptance: called with a symbol of ours that was refused and is subscribed now.
    """

    def __init__(
        self,
        exchange: str,
        url: str,
        venue: Venue,
        look_up: Callable[["VenueConnection", bool], Names],
        decoder: Decoder,
        ids: TradeIds,
        stale_after_seconds: float,
        budget: AttemptBudget,
        monotonic: Callable[[], float] = time.monotonic,
        on_refusal: Callable[[str, str], None] = lambda symbol, text: None,
        on_acceptance: Callable[[str], None] = lambda symbol: None,
    ) -> None:
        self._on_refusal, self._on_acceptance = on_refusal, on_acceptance
        self.exchange = exchange
        self.place = without_secrets(url)
        self._url = url
        self._venue = venue
        self._look_up = partial(look_up, self)
        self._decoder = decoder
        self._ids = ids
        self._budget = budget
        self._monotonic = monotonic
        self._silence = DataSilence(stale_after_seconds, monotonic)
        self.record: Record | None = None
        """Takes the messages that are received."""
        self._attempt: _Attempt | None = None
        self.link: _Link | None = None
        """The WebSocket in use, the newest one."""
        self._stopped = False
        self._not_before = 0.0
        self._waits_for_trading = False
        self._renewals = 0
        """How often the symbols were replaced."""
        self._native: Mapping[str, str] = {}  # of the symbols that are subscribed to

    @property
    def state(self) -> FeedState:
        """Connected means that trades come; a silent connection stays stale until a trade proves otherwise."""
        if self._waits_for_trading or self.halt:
            return FeedState.HALTED
        if self._silence.is_unbroken:
            return FeedState.STALE
        if not self.is_connected:
            return FeedState.CONNECTING
        return FeedState.CONNECTED if self._silence.is_fresh else FeedState.STALE

    @property
    def halt(self) -> str:
        """The venue's word for it where it says, on the connection, that it does not trade at all."""
        return self.link.halt if self.link is not None and self.is_connected else ""

    @property
    def is_connected(self) -> bool:
        """Whether the connection is made and subscribed."""
        return self._attempt is not None and self._attempt.connected

    @property
    def pause_seconds(self) -> float:
        """How long until the venue lets this address connect again; 0 for now."""
        return max(0.0, self._not_before - self._monotonic())

    def batches(self) -> Observable[Candles]:
        """One connection: candles of its trades, then ConnectionLost, ConnectionSilent or another OSError."""
        return rx.create(self._subscribe)

    def ask_again(self, symbol: str) -> None:
        """Subscribe again to a symbol of ours whose trades do not come though there are some; from any thread."""
        if (attempt := self._attempt) is not None:
            attempt.call(partial(self._ask_again, symbol))

    def renew(self) -> None:
        """Have a connection for the symbols of now take over, as they were replaced; from any thread."""
        self._renewals += 1
        if (attempt := self._attempt) is not None:
            attempt.call(self._wake)

    def _wake(self) -> None:
        self._renewed.set()
        if self.link is not None:
            self.link.wake()

    def _ask_again(self, symbol: str) -> None:
        if self.link is not None and symbol in self._native:
            self.link.ask_again(self._native[symbol])

    def stop(self) -> None:
        """Receive no more and complete."""
        self._stopped = True
        if self._attempt is not None:
            self._attempt.cancel()

    def _subscribe(
        self, observer: abc.ObserverBase[Candles], scheduler: abc.SchedulerBase | None = None
    ) -> abc.DisposableBase:
        attempt = self._attempt = _Attempt()
        self._renewed = asyncio.Event()
        arguments = (attempt, observer)
        threading.Thread(target=self._run, args=arguments, name=f"feed-{self.exchange}", daemon=True).start()
        return Disposable(attempt.cancel)

    def _run(self, attempt: "_Attempt", observer: abc.ObserverBase[Candles]) -> None:
        try:
            attempt.run(self._receive(attempt, observer.on_next))
        except Exception as error:  # noqa: BLE001 - handed off
            if self._stopped:
                observer.on_completed()
                return
            if attempt is self._attempt and isinstance(error, OSError):
                self._silence.is_unbroken = False  # refused or unreachable: it is connecting
            observer.on_error(error)
        else:
            observer.on_completed()

    async def _receive(self, attempt: "_Attempt", emit: Callable[[Candles], None]) -> None:
        """Receive until the attempt is cancelled.

        Raises:
            ConnectionLost: the venue closed the connection.
            ConnectionSilent: no trades, or no frames at all, for too long.
            OSError: it cannot be connected.
        """
        link = await self._open(emit)
        others = asyncio.ensure_future(self._until_others_trade())
        try:
            attempt.connected = True
            while True:
                await link.until_it_ends_soon(others, partial(self._is_outdated, link))
                successor = await self._successor(link, emit)
                leaving, link = link, successor
                await self._leave(leaving)
        finally:
            others.cancel()
            attempt.connected = False
            await link.close()

    def _is_outdated(self, link: "_Link") -> bool:
        return link.renewals < self._renewals

    async def _until_others_trade(self) -> Collection[str]:
        """Symbols that are traded now, and were not when the connection was made."""
        while True:
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
            try:
                names = await on_daemon_thread(partial(self._look_up, False))
            except OSError as error:
                logger.bind(exchange=self.exchange).debug("symbols cannot be looked up: {}", error)
                continue
            if others := names.native.keys() - self._native.keys():
                return others

    async def _names(self) -> Names:
        """The names of the symbols, of which one at least is traded: waits while all are halted."""
        try:
            while not (names := await on_daemon_thread(partial(self._look_up, True))).native:
                self._waits_for_trading = True
                self._renewed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_AGAIN_SECONDS):
                        await self._renewed.wait()
        finally:
            self._waits_for_trading = False
        self._native = names.native
        return names

    async def _open(self, emit: Callable[[Candles], None]) -> "_Link":
        """A connection that is subscribed."""
        await asyncio.sleep(max(self.pause_seconds, self._budget.take()))
        renewals = self._renewals
        try:
            names = await self._names()
            ours = {theirs: each for each, theirs in names.native.items()}
            subscriptions = Subscriptions(
                self._venue,
                ours,
                self._monotonic,
                lambda symbol, text: self._on_refusal(ours[symbol], text),
                lambda symbol: self._on_acceptance(ours[symbol]),
            )
            reader = TradeReader(
                self.exchange, self._venue, self._decoder, self._ids, self._silence, emit, names.native, subscriptions
            )
            link = _Link(self._venue, reader, subscriptions, self._silence, self._monotonic, self.record, renewals)
            await link.open(self._url)
            self.link = link
        except VenueRefusal as refusal:
            self._not_before = self._monotonic() + refusal.pause_seconds
            raise
        return link

    async def _successor(self, link: "_Link", emit: Callable[[Candles], None]) -> "_Link":
        """A connection that takes over from one about to be closed, which is read meanwhile."""
        while True:
            try:
                return await link.unless_it_ends(self._open(emit))
            except OSError as error:
                logger.bind(exchange=self.exchange).warning("no connection to take over yet: {}", error)
            await link.unless_it_ends(asyncio.sleep(HAND_OVER_RETRY_SECONDS))

    async def _leave(self, link: "_Link") -> None:
        """Read what still comes on a connection after another has taken over; doubles are found by id."""
        try:
            with suppress(ConnectionLost):
                await link.unless_it_ends(asyncio.sleep(OVERLAP_SECONDS))
        finally:
            await link.close()


class _Attempt:
    """One attempt as its owner sees it: any thread can cancel it at any time, before it has begun too."""

    def __init__(self) -> None:
        self.connected = False
        self._lock = threading.Lock()
        self._cancelled = False
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run to the end, or until cancelled; raises what the work raises."""
        try:
            with self._lock:
                self._task = self._loop.create_task(work)
                if self._cancelled:
                    self._task.cancel()
            with suppress(asyncio.CancelledError):
                self._loop.run_until_complete(self._task)
        finally:
            self._cancel_others()
            self._loop.run_until_complete(_rounds(5))
            self._loop.close()

    def call(self, work: Callable[[], None]) -> None:
        """Have its event loop do something; nothing where it has ended."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(work)

    def cancel(self) -> None:
        """End it; what it has received is emitted by then."""
        with self._lock, suppress(RuntimeError):  # it may have ended
            self._cancelled = True
            if self._task is not None:
                self._loop.call_soon_threadsafe(self._task.cancel)

    def _cancel_others(self) -> None:
        if others := asyncio.all_tasks(self._loop):
            for task in others:
                task.cancel()
            self._loop.run_until_complete(asyncio.wait(others))


async def _rounds(count: int) -> None:
    """Let the event loop close the sockets of failed and ended connections, which it does in its next rounds."""
    for _ in range(count):
        await asyncio.sleep(0)


class _Link:
    """One WebSocket, and what is due on it."""

    def __init__(
        self,
        venue: Venue,
        reader: TradeReader,
        subscriptions: Subscriptions,
        silence: DataSilence,
        monotonic: Callable[[], float],
        record: Record | None,
        renewals: int,
    ) -> None:
        self.renewals = renewals
        """How often the symbols had been replaced when it was subscribed."""
        self.subscriptions = subscriptions
        self._venue, self._reader, self._silence, self._monotonic = venue, reader, silence, monotonic
        self._record = record
        self._frame_at = self._pinged_at = monotonic()
        self._ends_at = inf
        self._woken = asyncio.Event()
        self._stream: FrameStream

    @property
    def halt(self) -> str:
        """The venue's word for it where it says that it does not trade."""
        return self._reader.halt

    async def open(self, url: str) -> None:
        """Connect and subscribe.

        Raises:
            OSError: as of `open_stream`.
        """
        self._stream = await open_stream(url, self._on_messages)
        self._stream.closed.add_done_callback(lambda _: self._woken.set())
        now = self._frame_at = self._pinged_at = self._monotonic()
        self._silence.begin()
        if self._venue.lifetime_seconds is not None:
            self._ends_at = now + self._venue.lifetime_seconds
        self._subscribe()

    def ask_again(self, symbol: str) -> None:
        """Subscribe to a symbol again, by the venue's name."""
        self.subscriptions.ask_again(symbol)
        self._woken.set()

    def wake(self) -> None:
        """Have it look at what has changed."""
        self._woken.set()

    async def close(self) -> None:
        """Close the connection."""
        await self._stream.close()

    async def until_it_ends_soon(
        self, others: "asyncio.Future[Collection[str]]", is_outdated: Callable[[], bool]
    ) -> None:
        """Do what is due until the connection is outdated, or the venue about to close it, by its notice or its rule.

        Args:
            others: symbols to be subscribed to by another connection, once there are any.
            is_outdated: whether it is for other symbols than those of now.

        Raises:
            ConnectionLost: the venue has closed it, or others trade now.
            ConnectionSilent: no trades, or no frames at all, for too long.
        """
        others.add_done_callback(lambda _: self._woken.set())
        while not (self._reader.is_closing or self._monotonic() >= self._ends_at or is_outdated()):
            self._woken.clear()
            if others.done():
                names = " ".join(sorted(others.result()))
                raise ConnectionLost(f"connecting again, for symbols that trade now: {names}")
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.001, self._next_duty() - self._monotonic())):
                    await self._woken.wait()
            self._check_closed()
            self._do_duties()

    async def unless_it_ends(self, work: Awaitable[_T]) -> _T:
        """Await something else while the connection is read.

        Raises:
            ConnectionLost: the venue has closed it.
        """
        task = asyncio.ensure_future(work)
        both: tuple[asyncio.Future[Any], ...] = (task, self._stream.closed)
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self._check_closed()
            return task.result()
        finally:
            task.cancel()

    def _on_messages(self, messages: list[bytes]) -> None:
        self._frame_at = self._monotonic()
        if self._record is not None:
            self._record(messages)
        halt = self._reader.halt
        self._reader.read(messages)
        if self._reader.is_closing or self.subscriptions.has_urgent or self._reader.halt != halt:
            self._woken.set()

    def _subscribe(self) -> None:
        for frame in self.subscriptions.due():
            self._stream.send(frame)

    def _check_closed(self) -> None:
        if self._stream.closed.done():
            raise ConnectionLost(f"the venue closed the connection: {self._stream.closed.result()}")

    def _next_duty(self) -> float:
        """When something is due without a message."""
        due = [self._frame_at + FRAME_SILENCE_SECONDS, self._silence.ends_at, self._ends_at]
        due.append(self.subscriptions.next_at)
        if self._venue.ping is not None:
            due.append(max(self._frame_at, self._pinged_at) + self._venue.ping[0])
        return min(due)

    def _do_duties(self) -> None:
        now = self._monotonic()
        if now >= self._frame_at + FRAME_SILENCE_SECONDS:
            self._silence.is_unbroken = True
            raise ConnectionSilent(f"no frame for {FRAME_SILENCE_SECONDS:g} s")
        if now >= self._silence.ends_at:
            raise ConnectionSilent(f"no trade for {self._silence.on_end():g} s")
        if self._venue.ping is not None and now >= max(self._frame_at, self._pinged_at) + self._venue.ping[0]:
            self._pinged_at = now
            self._stream.send(self._venue.ping[1])
        self._subscribe()
