"""A venue over WebSocket: connects, subscribes, keeps the connection alive, and folds trades into candles.

One thread a connection, which blocks on the next frame; what has come meanwhile is taken with it, so that a burst is a
few batches. Subscriptions follow from the settings at each connection. Silence of trades has a limit of its own, apart
from that of frames: pings are answered by servers that have stopped sending data. A connection that was given up for
such silence is given twice the time before it is given up again, for its symbols may trade that rarely.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from math import inf

import reactivex as rx
from loguru import logger
from reactivex import Observable, abc
from reactivex.disposable import Disposable
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from marketflow.feeds.backfill.rest_client import RestClient
from marketflow.feeds.decoder import Decoder, TradeLine
from marketflow.feeds.tcp import ConnectionLost, ConnectionSilent
from marketflow.feeds.venues.instruments import Names, look_up
from marketflow.feeds.venues.limits import AttemptBudget, VenueRefusal, refusal_of
from marketflow.feeds.venues.trade_ids import TradeIds
from marketflow.feeds.venues.venue import (
    MAX_FRAME_BYTES,
    Alive,
    Closing,
    Event,
    Refused,
    Rejected,
    Trade,
    Venue,
)
from marketflow.model import Candles, FeedState

CONNECT_TIMEOUT_SECONDS = 10.0

FRAME_SILENCE_SECONDS = 45.0
"""Without any frame for so long, pings and their answers included, a connection is dead."""

LONGEST_DATA_SILENCE_SECONDS = 600.0

LOOK_AGAIN_SECONDS = 600.0
"""How often symbols are looked for that the venue did not have."""

FRAMES_A_BATCH = 512

OVERLAP_SECONDS = 2.0
"""How long a connection is still read after another has taken over from it."""

HAND_OVER_RETRY_SECONDS = 5.0


class VenueFeed:
    """The trades of one venue.

    Args:
        exchange: the name its prices go by.
        venue: its protocol.
        symbols: ours.
        native: the venue's names of those whose name is configured.
        decoder: checks and folds the trades.
        stale_after_seconds: silence of trades after which the connection is made anew.
        budget: of connections, shared by all feeds of the venue.
        url: where it is, the venue's own by default.
        rest: asks it by REST; the venue's own address by default.
        monotonic: measures silence, in seconds.
    """

    def __init__(
        self,
        exchange: str,
        venue: Venue,
        symbols: Collection[str],
        native: Mapping[str, str],
        decoder: Decoder,
        stale_after_seconds: float,
        budget: AttemptBudget,
        url: str = "",
        rest: RestClient | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.exchange = exchange
        self.decoder = decoder
        self.place = url or venue.url
        self._venue = venue
        self._symbols = tuple(symbols)
        self._native = native
        self.rest = rest or RestClient(venue)
        self._stale_after_seconds = stale_after_seconds
        self._budget = budget
        self._monotonic = monotonic
        self._ids = TradeIds()
        self._session: _Session | None = None
        self._stopped = False
        self._silent = False
        self._data_silence_seconds = stale_after_seconds
        self._not_before = 0.0
        self._hand_over_at = 0.0
        self._last_trade = monotonic()
        self.absent: frozenset[str] = frozenset()
        """Our symbols that the venue does not trade."""

    @property
    def doubles(self) -> int:
        """How many trades came more than once and were counted once."""
        return self._ids.doubles

    @property
    def state(self) -> FeedState:
        """Connected means that trades come; a silent connection stays stale until a trade proves otherwise."""
        if self._silent:
            return FeedState.STALE
        if self._session is None or not self._session.connected:
            return FeedState.CONNECTING
        fresh = self._monotonic() - self._last_trade <= self._stale_after_seconds
        return FeedState.CONNECTED if fresh else FeedState.STALE

    def batches(self) -> Observable[Candles]:
        """One connection: candles of its trades, then ConnectionLost, ConnectionSilent or another OSError."""
        return rx.create(self._subscribe)

    def stop(self) -> None:
        """Receive no more and complete; what was received is handed off first."""
        self._stopped = True
        self.rest.close()
        if self._session is not None:
            self._session.close()

    def _subscribe(
        self, observer: abc.ObserverBase[Candles], scheduler: abc.SchedulerBase | None = None
    ) -> abc.DisposableBase:
        session = self._session = _Session()
        name = f"feed-{self.exchange}"
        threading.Thread(target=self._run, args=(session, observer), name=name, daemon=True).start()
        return Disposable(session.abort)

    def _run(self, session: "_Session", observer: abc.ObserverBase[Candles]) -> None:
        try:
            self._receive(session, observer)
        except Exception as error:  # noqa: BLE001 - handed off
            if self._stopped:
                observer.on_completed()
                return
            if session is self._session:
                self._silent = isinstance(error, ConnectionSilent) or (self._silent and not _is_refusal(error))
            observer.on_error(error)
        else:
            observer.on_completed()

    def _receive(self, session: "_Session", observer: abc.ObserverBase[Candles]) -> None:
        with ExitStack() as connections:
            reading = self._open(session, connections)
            if reading is None:
                return
            session.connected = True
            connections.callback(session.disconnected)
            while not session.closed.is_set():
                if candles := reading.next_batch():
                    observer.on_next(candles)
                if reading.ends_soon and (successor := self._hand_over(session, connections)) is not None:
                    self._drain(reading, observer)
                    reading = successor
        if not (self._stopped or session.aborted):
            raise ConnectionLost("the connection was closed")

    def _open(self, session: "_Session", connections: ExitStack) -> "_Reading | None":
        """A connection that is subscribed; None where the session was closed meanwhile."""
        try:
            self._wait_for_turn(session)
            names = self._look_up()
            if session.closed.is_set():
                return None
            socket = connections.enter_context(self._connect())
        except VenueRefusal as refusal:
            self._not_before = self._monotonic() + refusal.pause_seconds
            raise
        session.use(socket)
        for frame in self._venue.subscribe([*names.native.values()]):
            socket.send(frame)
        return _Reading(self, session, socket, names)

    def _hand_over(self, session: "_Session", connections: ExitStack) -> "_Reading | None":
        """The connection that takes over from one about to be closed; None where there is none as yet."""
        if self._monotonic() < self._hand_over_at:
            return None
        self._hand_over_at = self._monotonic() + HAND_OVER_RETRY_SECONDS
        try:
            return self._open(session, connections)
        except OSError as error:
            logger.bind(exchange=self.exchange).warning("no connection to take over yet: {}", error)
            return None

    def _drain(self, reading: "_Reading", observer: abc.ObserverBase[Candles]) -> None:
        """Take what still comes on the old connection. The new one's frames wait meanwhile; doubles are found by id."""
        reading.last_until = self._monotonic() + OVERLAP_SECONDS
        with suppress(ConnectionLost, ConnectionSilent):
            while self._monotonic() < reading.last_until:
                if candles := reading.next_batch():
                    observer.on_next(candles)
        reading.close()

    def _wait_for_turn(self, session: "_Session") -> None:
        """Wait until the venue lets this address ask again."""
        pause = max(self._not_before - self._monotonic(), 0.0)
        session.closed.wait(max(pause, self._budget.take()))

    def _look_up(self) -> Names:
        names = look_up(self.rest, self._symbols, self._native)
        if names.absent != self.absent:
            self.absent = names.absent
            if names.absent:
                text = "symbols that {} does not trade, looked for again every ten minutes: {}"
                logger.bind(exchange=self.exchange).warning(text, self._venue.name, " ".join(sorted(names.absent)))
        if not names.native:
            raise OSError(f"{self._venue.name} trades none of the symbols")
        return names

    @contextmanager
    def _connect(self) -> Iterator[ClientConnection]:
        timeout, most = CONNECT_TIMEOUT_SECONDS, 4 * MAX_FRAME_BYTES
        try:
            connection = connect(self.place, open_timeout=timeout, close_timeout=1.0, max_size=most)
        except InvalidStatus as error:
            raise refusal_of(error.response.status_code, error.response.headers) from None
        except (WebSocketException, EOFError) as error:
            raise OSError(f"no WebSocket at {self.place}: {error}") from None
        with connection as socket:
            try:
                yield socket
            finally:
                socket.close()  # as a normal end, whatever the reason: the library would report an internal error

    def note_trade(self) -> None:
        """Take notice that trades come: the connection is no longer silent."""
        self._last_trade = self._monotonic()
        self._silent = False
        self._data_silence_seconds = self._stale_after_seconds


class _Session:
    """One attempt as its owner sees it: it can be closed from another thread at any time, before it is open too."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self.connected = False
        self.aborted = False
        self._socket: ClientConnection | None = None

    def use(self, socket: ClientConnection) -> None:
        """Close this connection when the session is closed."""
        self._socket = socket
        if self.closed.is_set():
            self.close()

    def disconnected(self) -> None:
        """Take notice of the end."""
        self.connected = False

    def close(self) -> None:
        """End the wait for frames."""
        self.closed.set()
        if (socket := self._socket) is not None:
            # Off this thread: closing waits for the venue's answer.
            threading.Thread(target=socket.close, name="feed-close", daemon=True).start()

    def abort(self) -> None:
        """Close without handing anything off."""
        self.aborted = True
        self.close()


class _Reading:
    """Takes frames from one connection, and makes candles of them."""

    def __init__(self, feed: VenueFeed, session: _Session, socket: ClientConnection, names: Names) -> None:
        self._feed, self._session, self._socket = feed, session, socket
        self._ours = {native: ours for ours, native in names.native.items()}
        self._began = self._frame_at = self._pinged_at = feed._monotonic()
        self._data_at = self._began
        self._look_again_at = self._began + LOOK_AGAIN_SECONDS
        lifetime = feed._venue.lifetime_seconds
        self._ends_at = inf if lifetime is None else self._began + lifetime
        self._closing = False
        self.last_until: float | None = None
        """Until when it is read once another has taken over."""

    @property
    def ends_soon(self) -> bool:
        """Whether the venue is about to close the connection, by its notice or its rule."""
        return self._closing or self._feed._monotonic() >= self._ends_at

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def next_batch(self) -> Candles:
        """The candles of the next frames; empty where none came for a moment, or without trades.

        Raises:
            ConnectionLost: the venue closed the connection.
            ConnectionSilent: no trades, or no frames at all, for too long.
        """
        lines: list[TradeLine] = []
        try:
            self._take(self._socket.recv(timeout=self._until_next_duty(), decode=False), lines)
            for _ in range(FRAMES_A_BATCH):
                self._take(self._socket.recv(timeout=0, decode=False), lines)
        except TimeoutError:
            pass
        except ConnectionClosed as closed:
            if not lines:
                if self._session.closed.is_set():
                    return {}
                raise ConnectionLost(f"the venue closed the connection: {closed}") from None
        self._do_duties()
        if not lines or not (candles := self._feed.decoder.fold(lines)):
            return {}
        self._data_at = self._feed._monotonic()
        self._feed.note_trade()
        return candles

    def _take(self, frame: bytes, lines: list[TradeLine]) -> None:
        self._frame_at = self._feed._monotonic()
        if len(frame) > MAX_FRAME_BYTES:
            self._feed.decoder.reject("too_long", f"{len(frame)} bytes")
            return
        for event in self._feed._venue.decode(frame):
            self._on(event, lines)

    def _on(self, event: Event, lines: list[TradeLine]) -> None:
        feed = self._feed
        match event:
            case Trade():
                if (symbol := self._ours.get(event.symbol)) is None:
                    feed.decoder.reject("unknown_symbol", event.symbol)
                elif event.quantity <= 0:
                    feed.decoder.reject("bad_price", event)
                elif feed._ids.is_new(event):
                    traded = event.quantity, event.side, event.id, event.count
                    lines.append(TradeLine(symbol, event.price, event.at, *traded))
            case Rejected():
                feed.decoder.reject(event.reason, event.example)
            case Refused():
                text = "the venue refuses a subscription: {}"
                logger.bind(exchange=feed.exchange).warning(text, event.text)
            case Closing():
                self._closing = True
                logger.bind(exchange=feed.exchange).info("the venue is about to close the connection: {}", event.text)
            case Alive() if event.symbol is not None and event.newest_id is not None:
                if feed._ids.has(event.symbol, event.newest_id):
                    self._data_at = feed._monotonic()  # proof that nothing was traded

    def _until_next_duty(self) -> float:
        """Seconds until something is due without a frame; at most one, in which a stop is noticed."""
        now = self._feed._monotonic()
        due = [self._frame_at + FRAME_SILENCE_SECONDS, self._data_at + self._feed._data_silence_seconds, now + 1.0]
        if self.last_until is not None:
            due.append(self.last_until)
        if self._feed._venue.ping is not None:
            due.append(max(self._frame_at, self._pinged_at) + self._feed._venue.ping[0])
        return max(0.001, min(due) - now)

    def _do_duties(self) -> None:
        feed, now = self._feed, self._feed._monotonic()
        if now - self._frame_at >= FRAME_SILENCE_SECONDS:
            raise ConnectionSilent(f"no frame for {FRAME_SILENCE_SECONDS:g} s")
        if now - self._data_at >= feed._data_silence_seconds:
            silence = feed._data_silence_seconds
            feed._data_silence_seconds = min(2 * silence, max(LONGEST_DATA_SILENCE_SECONDS, silence))
            raise ConnectionSilent(f"no trade for {silence:g} s")
        ping = feed._venue.ping
        if ping is not None and now - max(self._frame_at, self._pinged_at) >= ping[0]:
            self._pinged_at = now
            self._socket.send(ping[1])
        if feed.absent and now >= self._look_again_at:
            self._look_again_at = now + LOOK_AGAIN_SECONDS
            raise ConnectionLost("connecting again, to look for the symbols that were absent")


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, OSError) and not isinstance(error, ConnectionSilent)
