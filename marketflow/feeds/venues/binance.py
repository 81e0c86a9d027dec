"""Binance spot: one trade a frame, ids that go up by one per symbol.

Source: binance-spot-api-docs, web-socket-streams.md and rest-api.md (2026-07). Raw frames of `/ws`, and wrapped ones of
`/stream`, are both taken.
"""

from collections.abc import Sequence
from typing import Literal, cast

import msgspec

from marketflow.feeds.decoder import UNDECODABLE, TradeLine
from marketflow.feeds.venues.rest.binance_calls import BinanceCalls
from marketflow.feeds.venues.venue import (
    Acknowledged,
    Closing,
    Event,
    Instrument,
    Refused,
    Rejected,
    Trade,
    Venue,
    VenueError,
    chunks,
    compact,
    number,
)


class _Message(msgspec.Struct, gc=False):
    """Every frame; only a trade has all of s, t, p, q, T and m."""

    e: str | None = None
    s: str | None = None
    t: int | None = None
    p: str | float | None = None
    q: str | float | None = None
    at: int | None = msgspec.field(default=None, name="T")
    m: bool | None = None
    data: msgspec.Raw = msgspec.Raw()
    id: msgspec.Raw = msgspec.Raw()
    code: int | None = None
    msg: str | None = None


class _TradeMessage(TradeLine, gc=False, kw_only=True):
    """A raw frame of a trade."""

    e: Literal["trade"]
    symbol: str = msgspec.field(name="s")
    price: float = msgspec.field(name="p")
    quantity: float = msgspec.field(name="q")
    timestamp: int = msgspec.field(name="T")
    id: int = msgspec.field(name="t")
    is_buyer_maker: bool = msgspec.field(name="m")


class _Symbol(msgspec.Struct):
    symbol: str
    status: str
    base: str = msgspec.field(name="baseAsset")
    quote: str = msgspec.field(name="quoteAsset")


class _Instruments(msgspec.Struct):
    symbols: list[_Symbol] = []
    code: int | None = None
    msg: str = ""


_message = msgspec.json.Decoder(_Message).decode
_trade_message = msgspec.json.Decoder(_TradeMessage, strict=False).decode  # numbers are strings


class Binance(Venue):
    """See the module."""

    name = "binance"
    url = "wss://data-stream.binance.vision/ws"
    rest_url = "https://data-api.binance.vision"
    symbols_a_connection = 1000  # of 1,024 streams
    attempts = (100, 300.0)  # of 300 in 5 minutes
    lifetime_seconds = 23.5 * 3600  # of 24 hours
    instruments_path = "/api/v3/exchangeInfo?permissions=SPOT"
    rest = BinanceCalls()

    def subscribe(self, symbols: Sequence[str]) -> list[str]:
        """One frame for 100 streams: at most five frames a second are taken."""
        return [
            compact({"method": "SUBSCRIBE", "params": [f"{each.lower()}@trade" for each in part], "id": number})
            for number, part in enumerate(chunks(symbols, 100), 1)
        ]

    def decode(self, frame: bytes) -> list[Event]:
        """A trade; or the answer to a subscription, which names no symbols; or the notice of a shutdown."""
        try:
            message = _message(frame)
            if wrapped := bytes(message.data):
                message = _message(wrapped)
        except UNDECODABLE:
            return [Rejected("malformed", frame[:200])]
        match message.e:
            case "trade":
                return [_trade(message, frame)]
            case "serverShutdown":
                return [Closing("the server is about to stop")]
        if message.code is not None:
            return [Refused(message.msg or f"error {message.code}")]
        return [Acknowledged()] if bytes(message.id) else [Rejected("unknown_message", frame[:200])]

    def trades(self, frames: Sequence[bytes]) -> list[TradeLine] | None:
        """Decode raw frames in C alone, but for the side."""
        try:
            found = [*map(_trade_message, frames)]
        except UNDECODABLE:
            return None
        for each in found:
            each.side = "sell" if each.is_buyer_maker else "buy"
        return cast("list[TradeLine]", found)

    def instruments(self, body: bytes) -> list[Instrument]:
        """All that trade for immediate delivery."""
        answer = msgspec.json.decode(body, type=_Instruments)
        if answer.code is not None:
            raise VenueError(answer.msg)
        return [Instrument(each.symbol, each.base, each.quote, each.status == "TRADING") for each in answer.symbols]


def _trade(message: _Message, frame: bytes) -> Event:
    if message.s is None or message.t is None or message.at is None or message.m is None:
        return Rejected("malformed", frame[:200])
    try:
        price, quantity = number(message.p), number(message.q)
    except (ValueError, OverflowError):
        return Rejected("bad_price", frame[:200])
    # m: the buyer was the maker, so the taker sold.
    return Trade(message.s, price, quantity, message.at, message.t, "sell" if message.m else "buy")
