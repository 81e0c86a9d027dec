"""Binance spot: one trade a frame, ids that go up by one per symbol.

Source: binance-spot-api-docs, web-socket-streams.md and rest-api.md (2026-07). Raw frames of `/ws`, and wrapped ones of
`/stream`, are both taken.
"""

from collections import defaultdict
from collections.abc import Sequence

import msgspec

from marketflow.feeds.decoder import UNDECODABLE, Columns
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
    are_valid,
    chunks,
    compact,
    halt_unless,
    number,
    request_number,
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


class _TradeMessage(msgspec.Struct, gc=False, tag_field="e", tag="trade"):
    """A raw frame of a trade; the fields in their order there, which is what the decoder expects next."""

    s: str
    t: int
    p: float
    q: float
    at: int = msgspec.field(name="T")
    m: bool


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
    requests_a_second = 3  # of five frames, pongs included
    attempts = (100, 300.0)  # of 300 in 5 minutes
    lifetime_seconds = 23.5 * 3600  # of 24 hours
    instruments_path = "/api/v3/exchangeInfo?permissions=SPOT"
    rest = BinanceCalls()

    def subscribe(self, symbols: Sequence[str], request: int = 1) -> list[str]:
        """One frame for 100 streams: at most five frames a second are taken."""
        return [
            compact({"method": "SUBSCRIBE", "params": [f"{each.lower()}@trade" for each in part], "id": number})
            for number, part in enumerate(chunks(symbols, self.symbols_a_request), request)
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
            return [Refused(message.msg or f"error {message.code}", None, request_number(bytes(message.id)))]
        if answered := bytes(message.id):
            return [Acknowledged((), request_number(answered))]
        return [Rejected("unknown_message", frame[:200])]

    def trades(self, frames: Sequence[bytes]) -> dict[str, Columns] | None:
        """Decode raw frames by C code alone."""
        by_symbol: defaultdict[str, list[_TradeMessage]] = defaultdict(list)
        try:
            for message in map(_trade_message, frames):
                by_symbol[message.s].append(message)
        except UNDECODABLE:
            return None
        found = {}
        for symbol, messages in by_symbol.items():
            # No tuple for each: the garbage collector would look at them all.
            quantities = [each.q for each in messages]
            if not are_valid(quantities):
                return None
            prices, times = [each.p for each in messages], [each.at for each in messages]
            bought = [not each.m for each in messages]  # m: the buyer was the maker
            ids = [each.t for each in messages]
            found[symbol] = Columns(times, prices, quantities, bought, None, ids, are_valid=True)
        return found

    def instruments(self, body: bytes) -> list[Instrument]:
        """All for immediate delivery, those that do not trade now as well."""
        answer = msgspec.json.decode(body, type=_Instruments)
        if answer.code is not None:
            raise VenueError(answer.msg)
        return [
            Instrument(each.symbol, each.base, each.quote, halt_unless(each.status, "TRADING"))
            for each in answer.symbols
        ]


def _trade(message: _Message, frame: bytes) -> Event:
    if message.s is None or message.t is None or message.at is None or message.m is None:
        return Rejected("malformed", frame[:200])
    try:
        price, quantity = number(message.p), number(message.q)
    except (ValueError, OverflowError):
        return Rejected("bad_price", frame[:200])
    # m: the buyer was the maker, so the taker sold.
    return Trade(message.s, price, quantity, message.at, message.t, "sell" if message.m else "buy")
