"""Kraken v2: arrays of trades with numbers, ids that go up by one per book.

Source: docs.kraken.com, WebSocket v2 `trade` and REST `AssetPairs` (2026-06). The v2 names are BTC and DOGE where REST
says XBT and XDG.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from marketflow.feeds.decoder import UNDECODABLE
from marketflow.feeds.venues.rest.kraken_calls import KrakenCalls
from marketflow.feeds.venues.venue import (
    Acknowledged,
    Alive,
    Event,
    Instrument,
    Refused,
    Rejected,
    Side,
    Status,
    Trade,
    Venue,
    VenueError,
    chunks,
    compact,
    each,
    halt_unless,
    number,
    unix_ms,
)


class _Trade(msgspec.Struct, gc=False):
    symbol: str
    side: Side
    price: float | str
    qty: float | str
    trade_id: int
    timestamp: str


class _Message(msgspec.Struct, gc=False):
    channel: str | None = None
    type: str | None = None
    data: list[msgspec.Raw] = []
    method: str | None = None
    success: bool | None = None
    error: str | None = None
    result: dict[str, Any] | None = None


class _Pair(msgspec.Struct):
    wsname: str = ""
    altname: str = ""
    status: str = "online"


class _System(msgspec.Struct):
    system: str


class _Pairs(msgspec.Struct):
    error: list[str] = []
    result: dict[str, _Pair] = {}


_message = msgspec.json.Decoder(_Message).decode
_row = msgspec.json.Decoder(_Trade).decode
_system = msgspec.json.Decoder(_System).decode
_COMMON = {"XBT": "BTC", "XDG": "DOGE"}
_LEGACY = {common: legacy for legacy, common in _COMMON.items()}
_TRADING = ("online", "limit_only", "reduce_only")
_UNSUPPORTED = "Currency pair not supported "


class Kraken(Venue):
    """See the module."""

    name = "kraken"
    url = "wss://ws.kraken.com/v2"
    rest_url = "https://api.kraken.com"
    symbols_a_connection = 500
    attempts = (60, 600.0)  # of 150 in 10 minutes, which end in a ban of 10 minutes
    ping = (25.0, '{"method":"ping"}')
    instruments_path = "/0/public/AssetPairs"
    rest = KrakenCalls()

    def subscribe(self, symbols: Sequence[str], request: int = 1) -> list[str]:
        """Without the last 50 trades, which would be counted again after each connection."""
        return [
            compact({"method": "subscribe", "params": {"channel": "trade", "symbol": part, "snapshot": False}})
            for part in chunks(symbols, self.symbols_a_request)
        ]

    def decode(self, frame: bytes) -> list[Event]:
        """Trades, of an update or a snapshot; heartbeats; the state of the venue; the answer to each symbol."""
        try:
            message = _message(frame)
        except UNDECODABLE:
            return [Rejected("malformed", frame[:200])]
        match message.channel, message.method:
            case "trade", _:
                return each(message.data, _row, _trade)
            case "status", _:
                return _statuses(message.data, frame)
            case ("heartbeat", _) | (_, "pong"):
                return [Alive()]
            case _, "subscribe":
                return [_answer(message)]
        return [Rejected("unknown_message", frame[:200])]

    def instruments(self, body: bytes) -> list[Instrument]:
        """All pairs, by the names of v2."""
        answer = msgspec.json.decode(body, type=_Pairs)
        if answer.error:
            raise VenueError(", ".join(answer.error))
        found = []
        for pair in answer.result.values():
            base, slash, quote = pair.wsname.partition("/")
            if slash:
                base, quote = _COMMON.get(base, base), _COMMON.get(quote, quote)
                halt = halt_unless(pair.status, *_TRADING)
                found.append(Instrument(f"{base}/{quote}", base, quote, halt, pair.altname))
        return found

    def rest_symbol(self, symbol: str) -> str:
        """XBTUSD for BTC/USD."""
        return "".join(_LEGACY.get(part, part) for part in symbol.split("/"))


def _trade(row: _Trade) -> Trade:
    return Trade(row.symbol, number(row.price), number(row.qty), unix_ms(row.timestamp), row.trade_id, row.side)


def _statuses(data: Sequence[bytes], frame: bytes) -> list[Event]:
    try:
        return [Status(halt_unless(_system(each).system, *_TRADING)) for each in data]
    except UNDECODABLE:
        return [Rejected("malformed", frame[:200])]


def _answer(message: _Message) -> Event:
    if message.success:
        symbol = (message.result or {}).get("symbol")
        return Acknowledged((symbol,) if isinstance(symbol, str) else ())
    text = message.error or "refused"
    # The symbol stands only in the text.
    return Refused(text, text.removeprefix(_UNSUPPORTED) if text.startswith(_UNSUPPORTED) else None)
