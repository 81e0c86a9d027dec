"""OKX v5: one message a taker order and price, which stands for `count` trades; `tradeId` is the last of them.

Source: www.okx.com/docs-v5, channel `trades` and public REST (2026-06). On subscribing the last trade is pushed again,
however old.
"""

from collections.abc import Sequence

import msgspec

from marketflow.feeds.decoder import UNDECODABLE
from marketflow.feeds.venues.rest.okx_calls import OkxCalls
from marketflow.feeds.venues.venue import (
    Acknowledged,
    Alive,
    Closing,
    Event,
    Instrument,
    Refused,
    Rejected,
    Side,
    Trade,
    Venue,
    VenueError,
    chunks,
    compact,
    each,
    halt_unless,
    number,
)


class _Argument(msgspec.Struct):
    channel: str = ""
    symbol: str | None = msgspec.field(default=None, name="instId")


class _Trade(msgspec.Struct, gc=False):
    symbol: str = msgspec.field(name="instId")
    id: str = msgspec.field(name="tradeId")
    price: str | float = msgspec.field(name="px")
    size: str | float = msgspec.field(name="sz")
    side: Side
    ts: str
    count: str = "1"


class _Message(msgspec.Struct, gc=False):
    event: str | None = None
    arg: _Argument | None = None
    code: str | None = None
    msg: str = ""
    data: list[msgspec.Raw] | None = None


class _Listing(msgspec.Struct):
    symbol: str = msgspec.field(name="instId")
    base: str = msgspec.field(name="baseCcy")
    quote: str = msgspec.field(name="quoteCcy")
    state: str = "live"


class _Listings(msgspec.Struct):
    code: str
    msg: str = ""
    data: list[_Listing] = []


_message = msgspec.json.Decoder(_Message).decode
_row = msgspec.json.Decoder(_Trade).decode


class Okx(Venue):
    """See the module."""

    name = "okx"
    url = "wss://ws.okx.com:8443/ws/v5/public"
    rest_url = "https://openapi.okx.com"
    symbols_a_connection = 400
    attempts = (2, 1.0)  # of 3 a second
    ping = (20.0, "ping")  # cut after 30 s without a frame
    instruments_path = "/api/v5/public/instruments?instType=SPOT"
    rest = OkxCalls()

    def subscribe(self, symbols: Sequence[str], request: int = 1) -> list[str]:
        """At most 100 a frame, well below 64 kB."""
        return [
            compact({"op": "subscribe", "args": [{"channel": "trades", "instId": symbol} for symbol in part]})
            for part in chunks(symbols, self.symbols_a_request)
        ]

    def decode(self, frame: bytes) -> list[Event]:
        """Trades; the text pong; the answer to each argument; the notice of an upgrade."""
        if frame == b"pong":
            return [Alive()]
        try:
            message = _message(frame)
        except UNDECODABLE:
            return [Rejected("malformed", frame[:200])]
        match message.event:
            case "subscribe":
                symbol = message.arg.symbol if message.arg else None
                return [Acknowledged((symbol,) if symbol else ())]
            case "error":
                _, found, rest = message.msg.partition("instId:")
                return [Refused(f"{message.code}: {message.msg}", rest.partition(" doesn't")[0] if found else None)]
            case "notice":
                return [Closing(message.msg)] if message.code == "64008" else [Alive()]
        if message.data is not None and message.arg is not None and message.arg.channel in ("trades", "trades-all"):
            return each(message.data, _row, _trade)
        return [Rejected("unknown_message", frame[:200])]

    def instruments(self, body: bytes) -> list[Instrument]:
        """All spot instruments."""
        answer = msgspec.json.decode(body, type=_Listings)
        if answer.code != "0":
            raise VenueError(f"{answer.code}: {answer.msg}")
        return [Instrument(each.symbol, each.base, each.quote, halt_unless(each.state, "live")) for each in answer.data]


def _trade(row: _Trade) -> Trade:
    price, size = number(row.price), number(row.size)
    return Trade(row.symbol, price, size, int(row.ts), int(row.id), row.side, max(1, int(row.count)))
