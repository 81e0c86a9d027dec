"""Bybit v5 spot: up to 1,024 trades a frame, ascending.

Source: bybit-exchange/docs, v5 `publicTrade` and `instruments-info` (2026-07). Ids go up per symbol, mostly by one,
which nobody promises: good for dropping doubles, a hint of a gap at most.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from marketflow.feeds.decoder import UNDECODABLE
from marketflow.feeds.venues.rest.bybit_calls import BybitCalls
from marketflow.feeds.venues.venue import (
    Acknowledged,
    Alive,
    Event,
    Instrument,
    Refused,
    Rejected,
    Trade,
    Venue,
    VenueError,
    chunks,
    compact,
    each,
    halt_unless,
    number,
    request_number,
)


class _Trade(msgspec.Struct, gc=False):
    at: int = msgspec.field(name="T")
    symbol: str = msgspec.field(name="s")
    side: Literal["Buy", "Sell"] = msgspec.field(name="S")
    size: str | float = msgspec.field(name="v")
    price: str | float = msgspec.field(name="p")
    id: str = msgspec.field(name="i")


class _Message(msgspec.Struct, gc=False):
    topic: str | None = None
    data: msgspec.Raw = msgspec.Raw()
    op: str | None = None
    success: bool | None = None
    ret_msg: str = ""
    req_id: str = ""


class _Listing(msgspec.Struct):
    symbol: str
    base: str = msgspec.field(name="baseCoin")
    quote: str = msgspec.field(name="quoteCoin")
    status: str = "Trading"


class _Result(msgspec.Struct, frozen=True):
    listings: list[_Listing] = msgspec.field(default_factory=list, name="list")


class _Listings(msgspec.Struct):
    code: int = msgspec.field(name="retCode")
    message: str = msgspec.field(name="retMsg", default="")
    result: _Result = _Result()


_message = msgspec.json.Decoder(_Message).decode
_rows = msgspec.json.Decoder(list[msgspec.Raw]).decode
_row = msgspec.json.Decoder(_Trade).decode
_TOPIC = "publicTrade."


class Bybit(Venue):
    """See the module."""

    name = "bybit"
    url = "wss://stream.bybit.com/v5/public/spot"
    rest_url = "https://api.bybit.com"
    symbols_a_connection = 200
    symbols_a_request = 10
    refuses_whole_requests = True
    attempts = (100, 300.0)  # of 500 in 5 minutes
    ping = (20.0, '{"op":"ping"}')
    instruments_path = "/v5/market/instruments-info?category=spot"
    rest = BybitCalls()

    def subscribe(self, symbols: Sequence[str], request: int = 1) -> list[str]:
        """At most ten symbols a frame are taken."""
        return [
            compact({"req_id": str(number), "op": "subscribe", "args": [_TOPIC + symbol for symbol in part]})
            for number, part in enumerate(chunks(symbols, self.symbols_a_request), request)
        ]

    def decode(self, frame: bytes) -> list[Event]:
        """Trades; pongs, of either form; one answer a request, which names no symbols."""
        try:
            message = _message(frame)
            if message.topic is not None and message.topic.startswith(_TOPIC):
                return each(_rows(message.data), _row, _trade)
        except UNDECODABLE:
            return [Rejected("malformed", frame[:200])]
        if message.op in ("ping", "pong"):
            return [Alive()]
        if message.op == "subscribe":
            if message.success:
                return [Acknowledged((), request_number(message.req_id.encode()))]
            _, found, symbol = message.ret_msg.partition(_TOPIC)
            answered = request_number(message.req_id.encode())
            return [Refused(message.ret_msg or "refused", symbol if found else None, answered)]
        return [Rejected("unknown_message", frame[:200])]

    def instruments(self, body: bytes) -> list[Instrument]:
        """All spot instruments."""
        answer = msgspec.json.decode(body, type=_Listings)
        if answer.code:
            raise VenueError(f"{answer.code}: {answer.message}")
        return [
            Instrument(each.symbol, each.base, each.quote, halt_unless(each.status, "Trading"))
            for each in answer.result.listings
        ]


def _trade(row: _Trade) -> Trade:
    side: Literal["buy", "sell"] = "buy" if row.side == "Buy" else "sell"
    return Trade(row.symbol, number(row.price), number(row.size), row.at, int(row.id), side)
