"""Makes candles of the messages of one connection."""

from collections.abc import Callable, Mapping, Sequence

from loguru import logger

from marketflow.feeds.decoder import Decoder, TradeLine
from marketflow.feeds.tcp import decoding
from marketflow.feeds.venues.trade_ids import TradeIds
from marketflow.feeds.venues.venue import MAX_FRAME_BYTES, Alive, Closing, Event, Refused, Rejected, Trade, Venue
from marketflow.feeds.venues.websocket.data_silence import DataSilence
from marketflow.model import Candles


class TradeReader:
    """Decodes messages, drops doubles, and folds the rest.

    Args:
        exchange: its name.
        venue: decodes.
        decoder: checks and folds the trades; shared by the connections of a feed.
        ids: which trades have been counted; shared likewise.
        silence: notices trades.
        emit: called with the candles of each read that has trades.
    """

    def __init__(
        self,
        exchange: str,
        venue: Venue,
        decoder: Decoder,
        ids: TradeIds,
        silence: DataSilence,
        emit: Callable[[Candles], None],
    ) -> None:
        self._log = logger.bind(exchange=exchange)
        self._venue, self._decoder, self._ids = venue, decoder, ids
        self._silence, self._emit = silence, emit
        self._ours: Mapping[str, str] = {}
        self.is_closing = False
        """Whether the venue has announced that it closes the connection."""

    def expect(self, native: Mapping[str, str]) -> None:
        """Take the trades of these symbols: the venue's name of each of ours."""
        self._ours = {theirs: ours for ours, theirs in native.items()}

    def read(self, messages: Sequence[bytes]) -> None:
        """Emit the candles of messages, if there are any."""
        lines: list[TradeLine] = []
        with decoding:
            for message in messages:
                if len(message) > MAX_FRAME_BYTES:
                    self._decoder.reject("too_long", f"{len(message)} bytes")
                    continue
                for event in self._venue.decode(message):
                    self._on(event, lines)
            if lines and (candles := self._decoder.fold(lines)):
                self._silence.on_trade()
                self._emit(candles)

    def _on(self, event: Event, lines: list[TradeLine]) -> None:
        match event:
            case Trade():
                self._on_trade(event, lines)
            case Rejected():
                self._decoder.reject(event.reason, event.example)
            case Refused():
                self._log.warning("the venue refuses a subscription: {}", event.text)
            case Closing():
                self.is_closing = True
                self._log.info("the venue is about to close the connection: {}", event.text)
            case Alive() if event.symbol is not None and event.newest_id is not None:
                if self._ids.has(event.symbol, event.newest_id):
                    self._silence.on_proof()

    def _on_trade(self, trade: Trade, lines: list[TradeLine]) -> None:
        if (symbol := self._ours.get(trade.symbol)) is None:
            self._decoder.reject("unknown_symbol", trade.symbol)
        elif trade.quantity <= 0:
            self._decoder.reject("bad_price", trade)
        elif self._ids.is_new(trade):
            lines.append(TradeLine(symbol, trade.price, trade.at, trade.quantity, trade.side, trade.id, trade.count))
