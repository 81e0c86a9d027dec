"""Makes candles of the messages of one connection."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from loguru import logger

from marketflow.feeds.decoder import Columns, Decoder, TradeLine
from marketflow.feeds.tcp import decoding
from marketflow.feeds.venues.trade_ids import TradeIds
from marketflow.feeds.venues.venue import (
    MAX_FRAME_BYTES,
    Acknowledged,
    Alive,
    Closing,
    Event,
    Refused,
    Rejected,
    Status,
    Trade,
    Venue,
)
from marketflow.feeds.venues.websocket.data_silence import DataSilence
from marketflow.feeds.venues.websocket.subscriptions import Subscriptions
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
        native: the symbols that are expected, the venue's name of each of ours.
        subscriptions: take notice of answers and trades.
    """

    def __init__(
        self,
        exchange: str,
        venue: Venue,
        decoder: Decoder,
        ids: TradeIds,
        silence: DataSilence,
        emit: Callable[[Candles], None],
        native: Mapping[str, str],
        subscriptions: Subscriptions,
    ) -> None:
        self._log = logger.bind(exchange=exchange)
        self._venue, self._decoder, self._ids = venue, decoder, ids
        self._silence, self._emit = silence, emit
        self._ours = {theirs: ours for ours, theirs in native.items()}
        self._subscriptions = subscriptions
        self.is_closing = False
        """Whether the venue has announced that it closes the connection."""
        self.halt = ""
        """The venue's word for it where it has said that it does not trade."""

    def read(self, messages: Sequence[bytes]) -> None:
        """Emit the candles of messages, if there are any."""
        with decoding:
            if (new := self._new_columns(messages)) is None:
                new = self._new_trades(self._decode_each(messages))
            if new and (candles := self._decoder.fold_trades(new)):
                self._silence.on_trade()
                self._emit(candles)

    def _new_columns(self, messages: Sequence[bytes]) -> dict[str, Columns] | None:
        """The trades that count, of messages that all are valid trades of our symbols; None for any others."""
        if not messages or max(map(len, messages)) > MAX_FRAME_BYTES:
            return None
        trades = self._venue.trades(messages)
        if trades is None or not self._ours.keys() >= trades.keys():
            return None
        self._subscriptions.on_trades(trades)
        new: dict[str, Columns] = {}
        for symbol, columns in trades.items():
            ours = self._ours[symbol]
            if self._ids.take_next(ours, cast("Sequence[int | None]", columns.ids), columns.times[-1]):
                new[ours] = columns
            elif lines := self._ids.new_of(ours, columns.lines(ours)):
                new[ours] = Columns.of(lines)
        return new

    def _decode_each(self, messages: Sequence[bytes]) -> list[Trade]:
        trades: list[Trade] = []
        for message in messages:
            if len(message) > MAX_FRAME_BYTES:
                self._decoder.reject("too_long", f"{len(message)} bytes")
                continue
            for event in self._venue.decode(message):
                if not isinstance(event, Trade):
                    self._on(event)
                elif event.quantity > 0:
                    trades.append(event)
                else:
                    self._decoder.reject("bad_price", event)
        return trades

    def _new_trades(self, trades: Sequence[Trade]) -> dict[str, Columns]:
        """Those that count."""
        by_symbol: defaultdict[str, list[TradeLine]] = defaultdict(list)
        for trade in trades:
            if (ours := self._ours.get(trade.symbol)) is None:
                self._decoder.reject("unknown_symbol", trade.symbol)
            else:
                self._subscriptions.on_trades((trade.symbol,))
                by_symbol[ours].append(_line(ours, trade))
        counting = ((ours, self._ids.new_of(ours, lines)) for ours, lines in by_symbol.items())
        return {ours: Columns.of(lines) for ours, lines in counting if lines}

    def _on(self, event: Event) -> None:
        match event:
            case Rejected():
                self._decoder.reject(event.reason, event.example)
            case Acknowledged():
                self._subscriptions.on_answer(event)
            case Refused():
                self._log.warning("the venue refuses a subscription: {}", event.text)
                self._subscriptions.on_answer(event)
            case Closing():
                self.is_closing = True
                self._log.info("the venue is about to close the connection: {}", event.text)
            case Status():
                self._on_status(event)
            case Alive() if event.newest_id is not None and (ours := self._ours.get(event.symbol or "")) is not None:
                before = self._ids.newest(ours)
                if self._ids.has(ours, event.newest_id):
                    self._silence.on_proof()
                self._ids.note_newest(ours, event.newest_id)
                if self._ids.newest(ours) != before:  # trades are missing, and not only late
                    self._subscriptions.ask_again(event.symbol or "")

    def _on_status(self, status: Status) -> None:
        if status.halt != self.halt:
            text = f"the venue has halted all trading: {status.halt}" if status.halt else "the venue trades again"
            self._log.warning(text)
        self.halt = status.halt
        self._silence.on_status(bool(status.halt))


def _line(symbol: str, trade: Trade) -> TradeLine:
    return TradeLine(symbol, trade.price, trade.at, trade.quantity, trade.side, trade.id, trade.count)
