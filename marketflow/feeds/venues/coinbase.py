"""Coinbase Exchange: one match a frame, ids that go up by one per product; heartbeats name the newest id.

Source: docs.cdp.coinbase.com/exchange, WebSocket feed and REST (2026-09). Data may come before the answer to the
subscription. Tickers beside matches are not counted: they leave trades out.
"""

from collections.abc import Sequence

import msgspec

from marketflow.feeds.decoder import UNDECODABLE
from marketflow.feeds.venues.rest.coinbase_calls import CoinbaseCalls
from marketflow.feeds.venues.venue import (
    Acknowledged,
    Alive,
    Event,
    Instrument,
    Refused,
    Rejected,
    Side,
    Trade,
    Venue,
    chunks,
    compact,
    number,
    unix_ms,
)


class _Channel(msgspec.Struct):
    name: str
    product_ids: list[str] = []


class _Message(msgspec.Struct, gc=False):
    """Every frame; only a match has all of product_id, trade_id, price, size, time and side."""

    type: str
    product_id: str | None = None
    trade_id: int | None = None
    price: str | float | None = None
    size: str | float | None = None
    time: str | None = None
    side: str | None = None
    last_trade_id: int | None = None
    message: str = ""
    reason: str = ""
    channels: list[_Channel] = []


class _Product(msgspec.Struct):
    id: str
    base_currency: str
    quote_currency: str
    status: str = "online"
    trading_disabled: bool = False
    cancel_only: bool = False
    post_only: bool = False

    @property
    def halt(self) -> str:
        """Why it does not trade, empty if it does."""
        if self.status != "online":
            return self.status
        modes = ("trading_disabled", "cancel_only", "post_only")
        return next((mode for mode in modes if getattr(self, mode)), "")


_message = msgspec.json.Decoder(_Message).decode


class Coinbase(Venue):
    """See the module."""

    name = "coinbase"
    url = "wss://ws-feed.exchange.coinbase.com"
    rest_url = "https://api.exchange.coinbase.com"
    symbols_a_connection = 500
    refuses_whole_requests = True
    attempts = (4, 1.0)  # of 8 a second
    instruments_path = "/products"
    rest = CoinbaseCalls()

    def subscribe(self, symbols: Sequence[str], request: int = 1) -> list[str]:
        """Matches, and the heartbeats that prove that none is missing."""
        return [
            compact({"type": "subscribe", "product_ids": part, "channels": ["matches", "heartbeat"]})
            for part in chunks(symbols, self.symbols_a_request)
        ]

    def decode(self, frame: bytes) -> list[Event]:
        """A trade; a heartbeat; what is subscribed; or an error."""
        try:
            message = _message(frame)
        except UNDECODABLE:
            return [Rejected("malformed", frame[:200])]
        match message.type:
            case "match" | "last_match":
                return [_trade(message, frame)]
            case "heartbeat":
                # 0 says nothing: it stood there for months in 2019, and does in sandboxes.
                return [Alive(message.product_id, message.last_trade_id or None)]
            case "subscriptions":
                named = [each.product_ids for each in message.channels if each.name == "matches"]
                return [Acknowledged(tuple(product for part in named for product in part))]
            case "error":
                symbol, found, _ = message.reason.partition(" is not a valid product")
                return [Refused(message.reason or message.message, symbol if found else None)]
            case "ticker":
                return [Alive()]
        return [Rejected("unknown_message", frame[:200])]

    def instruments(self, body: bytes) -> list[Instrument]:
        """All products."""
        return [
            Instrument(each.id, each.base_currency, each.quote_currency, each.halt)
            for each in msgspec.json.decode(body, type=list[_Product])
        ]


def _trade(message: _Message, frame: bytes) -> Event:
    if message.product_id is None or message.trade_id is None or message.time is None:
        return Rejected("malformed", frame[:200])
    if message.side not in ("buy", "sell"):
        return Rejected("malformed", frame[:200])
    try:
        price, quantity, at = number(message.price), number(message.size), unix_ms(message.time)
    except (ValueError, OverflowError):
        return Rejected("bad_price", frame[:200])
    # `side` is the maker's.
    taker: Side = "sell" if message.side == "buy" else "buy"
    return Trade(message.product_id, price, quantity, at, message.trade_id, taker)
