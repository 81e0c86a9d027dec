"""A venue over WebSocket: the trades of all its symbols, on as many connections as they need.

Each connection reconnects on its own; the rest is shared: the decoder, the ids of the trades, and the budget of
connections of the process.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial

import reactivex as rx
from loguru import logger
from reactivex import Observable

from marketflow.feeds.backfill.rest_client import RestClient
from marketflow.feeds.decoder import Decoder, TradeLine
from marketflow.feeds.feed import FeedReport, Record
from marketflow.feeds.venues.instruments import Names, look_up
from marketflow.feeds.venues.limits import AttemptBudget
from marketflow.feeds.venues.trade_ids import TradeIds
from marketflow.feeds.venues.venue import Venue, chunks
from marketflow.feeds.venues.websocket.venue_connection import VenueConnection
from marketflow.model import Candles, FeedState, Series
from marketflow.text import without_secrets

_WORST_FIRST = (FeedState.CONNECTING, FeedState.STALE, FeedState.CONNECTED, FeedState.HALTED)
"""Where some connections are halted, the others tell."""


LONGEST_DELAY_MS = 3_600_000
"""How late a trade may come to be fetched, or how far ahead it may be dated."""


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
        self.place = without_secrets(url or venue.url)
        self.rest = rest or RestClient(venue)
        self.symbols: Sequence[str] = ()
        """Ours, all that are configured."""
        self.ids = TradeIds()
        """Which trades have come, by our symbols."""
        decoder.on_off_time = self._on_off_time
        self._venue = venue
        self._native = native
        self._record: Record | None = None
        self._clock_offset_ms: int | None = None
        self._monotonic = monotonic
        self.refusals: dict[str, str] = {}
        """By our symbol, the venue's words where it refuses a subscription."""
        self._absent: dict[VenueConnection, frozenset[str]] = {}
        self._halted: dict[str, tuple[str, tuple[int, int] | None]] = {}
        self._new_connection = partial(
            VenueConnection,
            exchange,
            url or venue.url,
            venue,
            self._look_up,
            decoder,
            self.ids,
            stale_after_seconds,
            budget,
            monotonic,
            self._on_refusal,
            self._on_acceptance,
        )
        self.connections: Sequence[VenueConnection] = ()
        """Each for a part of the symbols."""
        self._connection_of: dict[str, VenueConnection] = {}
        self._spread(symbols)
        self.rest_names: Mapping[str, str] = {}
        """The venue's name in REST calls of each of our symbols that it trades, as far as it is known yet."""

    @property
    def record(self) -> Record | None:
        """Takes the messages that are received, of all connections; None for nothing."""
        return self._record

    @record.setter
    def record(self, record: Record | None) -> None:
        self._record = record
        for connection in self.connections:
            connection.record = record

    @property
    def absent(self) -> frozenset[str]:
        """Our symbols that the venue does not trade."""
        return frozenset().union(*self._absent.values())

    @property
    def halted(self) -> dict[str, str]:
        """Our symbols that the venue lists and does not trade now, and its word for that; a trade ends it."""
        halted = self._halted.items()
        found = {symbol: halt for symbol, (halt, newest) in halted if self.ids.newest(symbol) == newest}
        for connection in self.connections:
            if halt := connection.halt:
                found |= {symbol: halt for symbol, each in self._connection_of.items() if each is connection}
        return found

    @property
    def doubles(self) -> int:
        """How many trades came more than once and were counted once."""
        return self.ids.doubles

    @property
    def state(self) -> FeedState:
        """The worst state of its connections."""
        return min((connection.state for connection in self.connections), key=_WORST_FIRST.index)

    def is_connected(self, symbol: str) -> bool:
        """Whether the connection for a symbol is made, and the venue trades it."""
        connection = self._connection_of.get(symbol)
        return connection is not None and connection.is_connected and symbol not in self.halted

    def ask_again(self, symbol: str) -> None:
        """Subscribe again to a symbol whose trades do not come though there are some; from any thread."""
        if (connection := self._connection_of.get(symbol)) is not None:
            connection.ask_again(symbol)

    def take_symbols(self, symbols: Mapping[str, str]) -> None:
        """Replace the symbols. A connection whose part changes is taken over by one for the new part, without a gap."""
        self._native = {ours: theirs for ours, theirs in symbols.items() if theirs}
        # The connections of before still send them for a moment.
        self.decoder.expected_unknown = frozenset(self.symbols).difference(symbols)
        self.decoder.take_symbols(symbols)
        before = self._parts()
        self._spread(symbols)
        gone = [each for each in before if each not in self.connections]
        for connection in gone:
            connection.stop()
        self._absent = {each: absent for each, absent in self._absent.items() if each not in gone}
        self.refusals = {symbol: text for symbol, text in self.refusals.items() if symbol in symbols}
        self._halted = {symbol: halt for symbol, halt in self._halted.items() if symbol in symbols}
        self.rest_names = {symbol: name for symbol, name in self.rest_names.items() if symbol in symbols}
        for connection, part in self._parts().items():
            if connection in before and before[connection] != part:
                connection.renew()

    def _parts(self) -> dict[VenueConnection, list[str]]:
        """The symbols of each connection."""
        parts: dict[VenueConnection, list[str]] = {connection: [] for connection in self.connections}
        for symbol, connection in self._connection_of.items():
            parts[connection].append(symbol)
        return parts

    def _spread(self, symbols: Collection[str]) -> None:
        """Spread the symbols over connections: each stays on its own, and new ones go where there is room."""
        of = {symbol: each for symbol, each in self._connection_of.items() if symbol in symbols}
        added = [symbol for symbol in symbols if symbol not in of]
        room = dict.fromkeys(of.values(), self._venue.symbols_a_connection)
        for connection in of.values():
            room[connection] -= 1
        for connection, free in room.items():
            of |= dict.fromkeys(added[:free], connection)
            added = added[free:]
        for part in chunks(added, self._venue.symbols_a_connection):
            connection = self._new_connection()
            connection.record = self._record
            of |= dict.fromkeys(part, connection)
        self._connection_of = {symbol: of[symbol] for symbol in symbols}
        self.connections = tuple(dict.fromkeys(self._connection_of.values()))
        self.symbols = tuple(symbols)

    @property
    def pause_seconds(self) -> float:
        """How long until the venue lets all its connections be made; 0 for now."""
        return max(connection.pause_seconds for connection in self.connections)

    def report(self) -> FeedReport:
        """The venue's clock, and what REST has used."""
        return FeedReport(
            clock_offset_ms=self._clock_offset_ms,
            rest_weight=(self.rest.used, self.rest.limit),
            rest_error=self.rest.error,
            halted=self.halted,
        )

    def measure_clock(self) -> None:
        """Measure the venue's clock by REST: its time against the middle of the call."""
        began_ms, began = self.rest.now_ms, self._monotonic()
        with suppress(OSError):  # its cause is reported where trades or instruments fail for it
            server_ms = self.rest.server_time_ms()
            self._clock_offset_ms = round(server_ms - began_ms - 500 * (self._monotonic() - began))

    def doubles_by_symbol(self) -> dict[str, int]:
        """How many trades came more than once, and counted once."""
        return self.ids.doubles_by_symbol()

    def batches(self) -> Observable[Candles]:
        """Each connection once; ends with the first one's ConnectionLost, ConnectionSilent or another OSError."""
        return rx.merge(*(connection.batches() for connection in self.connections))

    def stop(self) -> None:
        """Receive no more and complete; what was received is handed off first."""
        self.rest.close()
        for connection in self.connections:
            connection.stop()

    def _on_refusal(self, symbol: str, text: str) -> None:
        self.refusals = {**self.refusals, symbol: text}

    def _on_acceptance(self, symbol: str) -> None:
        self.refusals = {each: text for each, text in self.refusals.items() if each != symbol}

    def _on_off_time(self, series: Series, line: object) -> None:
        """Have a trade fetched that was held up somewhere; one that is dated in another unit is no trade of then."""
        if not isinstance(line, TradeLine) or not isinstance(line.id, int) or line.timestamp is None:
            return
        if abs(self.rest.now_ms - line.timestamp) <= LONGEST_DELAY_MS:
            self.ids.lose(series.symbol, line.id, line.timestamp, line.count)

    def _look_up(self, connection: VenueConnection, is_connecting: bool) -> Names:
        symbols = [symbol for symbol, each in self._connection_of.items() if each is connection]
        if is_connecting:  # subscribes to all of them again
            self.refusals = {symbol: text for symbol, text in self.refusals.items() if symbol not in symbols}
        names = look_up(self.rest, symbols, self._native)
        known = {ours: name for ours, name in self.rest_names.items() if ours not in names.absent}
        self.rest_names = {**known, **names.rest}
        if names.absent != self._absent.get(connection, frozenset()):
            self._absent = self._absent | {connection: names.absent}
            if names.absent:
                text = "symbols that {} does not trade, looked for again every ten minutes: {}"
                logger.bind(exchange=self.exchange).warning(text, self._venue.name, " ".join(sorted(names.absent)))
        self._note_halted(symbols, names.halted)
        if not (names.native or names.halted):
            raise OSError(f"{self._venue.name} trades none of the symbols")
        return names

    def _note_halted(self, symbols: Sequence[str], halted: Mapping[str, str]) -> None:
        before = {symbol: halt for symbol, (halt, _) in self._halted.items() if symbol in symbols}
        if halted == before:
            return
        others = {symbol: known for symbol, known in self._halted.items() if symbol not in symbols}
        self._halted = others | {symbol: (halt, self.ids.newest(symbol)) for symbol, halt in halted.items()}
        log = logger.bind(exchange=self.exchange)
        if new := [f"{symbol} ({halt})" for symbol, halt in sorted(halted.items()) if before.get(symbol) != halt]:
            text = "symbols that {} has halted, looked at again every ten minutes: {}"
            log.warning(text, self._venue.name, " ".join(new))
        if again := sorted(before.keys() - halted.keys()):
            log.info("symbols that {} does not halt any more: {}", self._venue.name, " ".join(again))
