"""Makes candles of the messages of one connection."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import inf

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
        on_refusal: called with our symbol and the venue's words where it refuses a subscription.
    """

    def __init__(
        self,
        exchange: str,
        venue: Venue,
        decoder: Decoder,
        ids: TradeIds,
        silence: DataSilence,
        emit: Callable[[Candles], None],
        on_refusal: Callable[[str, str], None],
    ) -> None:
        self._on_refusal = on_refusal
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
        with decoding:
            if (trades := self._decode_trades(messages)) is None:
                trades = self._decode_each(messages)
            if trades and (candles := self._fold(trades)):
                self._silence.on_trade()
                self._emit(candles)

    def _decode_trades(self, messages: Sequence[bytes]) -> list[TradeLine] | None:
        """The trades of messages that all are valid trades, None for any others."""
        if not messages or max(map(len, messages)) > MAX_FRAME_BYTES:
            return None
        if not (trades := self._venue.trades(messages)):
            return None
        quantities = [trade.quantity or 0.0 for trade in trades]
        return trades if min(quantities) > 0 and sum(quantities) < inf else None  # NaN is not less

    def _decode_each(self, messages: Sequence[bytes]) -> list[TradeLine]:
        trades: list[TradeLine] = []
        for message in messages:
            if len(message) > MAX_FRAME_BYTES:
                self._decoder.reject("too_long", f"{len(message)} bytes")
                continue
            for event in self._venue.decode(message):
                if not isinstance(event, Trade):
                    self._on(event)
                elif event.quantity > 0:
                    trades.append(_line(event))
                else:
                    self._decoder.reject("bad_price", event)
        return trades

    def _fold(self, trades: Sequence[TradeLine]) -> Candles:
        by_symbol: defaultdict[str, list[TradeLine]] = defaultdict(list)
        for trade in trades:
            by_symbol[trade.symbol].append(trade)
        new: dict[str, list[TradeLine]] = {}
        for symbol, of_symbol in by_symbol.items():
            if (ours := self._ours.get(symbol)) is None:
                self._decoder.reject("unknown_symbol", symbol, len(of_symbol))
            elif counting := self._ids.new_of(ours, of_symbol):
                new[ours] = counting
        return self._decoder.fold_trades(new) if new else {}

    def _on(self, event: Event) -> None:
        match event:
            case Rejected():
                self._decoder.reject(event.reason, event.example)
            case Refused():
                self._log.warning("the venue refuses a subscription: {}", event.text)
                if (refused := self._ours.get(event.symbol or "")) is not None:
                    self._on_refusal(refused, event.text)
            case Closing():
                self.is_closing = True
                self._log.info("the venue is about to close the connection: {}", event.text)
            case Alive() if event.newest_id is not None and (ours := self._ours.get(event.symbol or "")) is not None:
                self._ids.note_newest(ours, event.newest_id)
                if self._ids.has(ours, event.newest_id):
                    self._silence.on_proof()


def _line(trade: Trade) -> TradeLine:
    return TradeLine(trade.symbol, trade.price, trade.at, trade.quantity, trade.side, trade.id, trade.count)
