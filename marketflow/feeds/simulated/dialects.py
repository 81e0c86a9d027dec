"""What each venue's server says, for `marketflow exchange --venue` and the tests: the venue modules' other side."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar

import msgspec

from marketflow.feeds.venues.venue import Trade, compact

QUOTES = ("FDUSD", "USDT", "USDC", "TUSD", "USD", "EUR", "GBP", "TRY", "BTC", "ETH", "BNB")


def split(symbol: str) -> tuple[str, str]:
    """Base and quote of a symbol such as BTCUSDT; the longest quote that fits, USDT where none does."""
    for quote in QUOTES:
        if symbol.endswith(quote) and len(symbol) > len(quote):
            return symbol.removesuffix(quote), quote
    return symbol, "USDT"


def rfc3339(at: int) -> str:
    """A time in Unix ms as RFC 3339 with microseconds."""
    return datetime.fromtimestamp(at / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Dialect(ABC):
    """One venue's side of the protocol. Symbols are the venue's names."""

    separator: ClassVar[str] = ""
    heartbeat: ClassVar[bool] = False
    """Whether a heartbeat is sent each second."""

    def native(self, symbol: str) -> str:
        """The venue's name of one of our symbols."""
        return self.separator.join(split(symbol))

    def greeting(self) -> str | None:
        """What is sent on connecting."""
        return None

    def beat(self, symbol: str, newest_id: int) -> str:
        """A heartbeat."""
        raise NotImplementedError

    @abstractmethod
    def requested(self, message: Any) -> list[str]:
        """The symbols that a client's message subscribes to; none for any other message."""

    @abstractmethod
    def acknowledgements(self, symbols: Sequence[str], message: Any) -> list[str]:
        """The answers to a subscription."""

    def pong(self, text: str) -> str | None:
        """The answer to a client's ping; None where it is none."""
        return None

    @abstractmethod
    def trade(self, trade: Trade) -> str:
        """The frame of a trade."""

    @abstractmethod
    def instruments(self, symbols: Sequence[str]) -> Any:
        """The list of instruments: of our symbols."""


class BinanceDialect(Dialect):
    """Binance spot."""

    def requested(self, message: Any) -> list[str]:
        """The streams of a SUBSCRIBE."""
        streams = message.get("params", []) if message.get("method") == "SUBSCRIBE" else []
        return [stream.removesuffix("@trade").upper() for stream in streams]

    def acknowledgements(self, symbols: Sequence[str], message: Any) -> list[str]:
        """One, which names none of them."""
        return [compact({"result": None, "id": message.get("id")})]

    def trade(self, trade: Trade) -> str:
        """One a frame; m says that the buyer was the maker."""
        at, price, quantity = trade.at, f"{trade.price:.8f}", f"{trade.quantity:.8f}"
        maker = trade.side == "sell"
        return compact(
            {"e": "trade", "E": at, "s": trade.symbol, "t": trade.id, "p": price, "q": quantity, "T": at}
            | {"m": maker, "M": True}
        )

    def instruments(self, symbols: Sequence[str]) -> Any:
        """As of exchangeInfo."""
        parts = [(symbol, *split(symbol)) for symbol in symbols]
        rows = [{"symbol": s, "status": "TRADING", "baseAsset": base, "quoteAsset": quote} for s, base, quote in parts]
        return {"timezone": "UTC", "symbols": rows}


class CoinbaseDialect(Dialect):
    """Coinbase Exchange."""

    separator = "-"
    heartbeat = True

    def beat(self, symbol: str, newest_id: int) -> str:
        """The newest id of a product."""
        return compact({"type": "heartbeat", "sequence": newest_id, "last_trade_id": newest_id, "product_id": symbol})

    def requested(self, message: Any) -> list[str]:
        """The products of a subscribe."""
        return list(message.get("product_ids", [])) if message.get("type") == "subscribe" else []

    def acknowledgements(self, symbols: Sequence[str], message: Any) -> list[str]:
        """One, of all channels."""
        channels = [
            {"name": each, "product_ids": [*symbols], "account_ids": None} for each in message.get("channels", [])
        ]
        return [compact({"type": "subscriptions", "channels": channels})]

    def trade(self, trade: Trade) -> str:
        """A match, whose side is the maker's."""
        maker = "sell" if trade.side == "buy" else "buy"
        return compact(
            {"type": "match", "trade_id": trade.id, "side": maker, "size": f"{trade.quantity:.8f}"}
            | {"price": f"{trade.price:.8f}", "product_id": trade.symbol, "sequence": trade.id}
            | {"time": rfc3339(trade.at)}
        )

    def instruments(self, symbols: Sequence[str]) -> Any:
        """As of /products."""
        return [
            {"id": self.native(symbol), "base_currency": base, "quote_currency": quote, "status": "online"}
            | {"trading_disabled": False}
            for symbol in symbols
            for base, quote in [split(symbol)]
        ]


class KrakenDialect(Dialect):
    """Kraken v2."""

    separator = "/"
    heartbeat = True
    _LEGACY: ClassVar[dict[str, str]] = {"BTC": "XBT", "DOGE": "XDG"}

    def greeting(self) -> str:
        """The status; its connection_id is above 2^63."""
        data = [{"system": "online", "api_version": "v2", "connection_id": 12955725412101258142, "version": "2.0.10"}]
        return compact({"channel": "status", "type": "update", "data": data})

    def beat(self, symbol: str, newest_id: int) -> str:
        """The same for all symbols."""
        return '{"channel":"heartbeat"}'

    def requested(self, message: Any) -> list[str]:
        """The symbols of a subscribe."""
        return list(message["params"].get("symbol", [])) if message.get("method") == "subscribe" else []

    def acknowledgements(self, symbols: Sequence[str], message: Any) -> list[str]:
        """One a symbol."""
        return [
            compact({"method": "subscribe", "result": {"channel": "trade", "symbol": each}, "success": True})
            for each in symbols
        ]

    def pong(self, text: str) -> str | None:
        """To {"method":"ping"}."""
        return '{"method":"pong"}' if '"ping"' in text else None

    def trade(self, trade: Trade) -> str:
        """An array of one; price and quantity are numbers."""
        row = {"symbol": trade.symbol, "side": trade.side, "price": trade.price, "qty": trade.quantity}
        row |= {"ord_type": "limit", "trade_id": trade.id, "timestamp": rfc3339(trade.at)}
        return compact({"channel": "trade", "type": "update", "data": [row]})

    def instruments(self, symbols: Sequence[str]) -> Any:
        """As of AssetPairs, with the legacy names."""
        pairs = [tuple(self._LEGACY.get(part, part) for part in split(symbol)) for symbol in symbols]
        return {
            "error": [],
            "result": {f"{b}{q}": {"altname": f"{b}{q}", "wsname": f"{b}/{q}", "status": "online"} for b, q in pairs},
        }


class OkxDialect(Dialect):
    """OKX v5."""

    separator = "-"

    def requested(self, message: Any) -> list[str]:
        """The instruments of a subscribe."""
        return [each["instId"] for each in message.get("args", [])] if message.get("op") == "subscribe" else []

    def acknowledgements(self, symbols: Sequence[str], message: Any) -> list[str]:
        """One an argument."""
        return [
            compact({"event": "subscribe", "arg": {"channel": "trades", "instId": each}, "connId": "c7f0ba8e"})
            for each in symbols
        ]

    def pong(self, text: str) -> str | None:
        """Plain text."""
        return "pong" if text == "ping" else None

    def trade(self, trade: Trade) -> str:
        """An array of one, which stands for `count` trades."""
        row = {"instId": trade.symbol, "tradeId": str(trade.id), "px": f"{trade.price:.8f}"}
        row |= {"sz": f"{trade.quantity:.8f}", "side": trade.side, "ts": str(trade.at), "count": str(trade.count)}
        return compact({"arg": {"channel": "trades", "instId": trade.symbol}, "data": [row]})

    def instruments(self, symbols: Sequence[str]) -> Any:
        """As of public/instruments."""
        rows = [
            {"instId": self.native(symbol), "instType": "SPOT", "baseCcy": base, "quoteCcy": quote, "state": "live"}
            for symbol in symbols
            for base, quote in [split(symbol)]
        ]
        return {"code": "0", "msg": "", "data": rows}


class BybitDialect(Dialect):
    """Bybit v5 spot."""

    def requested(self, message: Any) -> list[str]:
        """The topics of a subscribe."""
        topics = message.get("args", []) if message.get("op") == "subscribe" else []
        return [topic.removeprefix("publicTrade.") for topic in topics]

    def acknowledgements(self, symbols: Sequence[str], message: Any) -> list[str]:
        """One a request, which names none of them."""
        return [compact({"success": True, "ret_msg": "subscribe", "conn_id": "d9avsh3f", "op": "subscribe"})]

    def pong(self, text: str) -> str | None:
        """To {"op":"ping"}."""
        return '{"success":true,"ret_msg":"pong","conn_id":"d9avsh3f","op":"ping"}' if '"ping"' in text else None

    def trade(self, trade: Trade) -> str:
        """An array of one; type is always snapshot."""
        row = {"T": trade.at, "s": trade.symbol, "S": trade.side.capitalize(), "v": f"{trade.quantity:.8f}"}
        row |= {"p": f"{trade.price:.8f}", "i": str(2290000000000000000 + (trade.id or 0)), "BT": False, "RPI": False}
        return compact(
            {"topic": f"publicTrade.{trade.symbol}", "type": "snapshot", "ts": trade.at, "data": [row]},
        )

    def instruments(self, symbols: Sequence[str]) -> Any:
        """As of instruments-info."""
        parts = [(symbol, *split(symbol)) for symbol in symbols]
        rows = [{"symbol": s, "baseCoin": base, "quoteCoin": quote, "status": "Trading"} for s, base, quote in parts]
        return {"retCode": 0, "retMsg": "OK", "result": {"category": "spot", "list": rows}, "time": 0}


DIALECTS: dict[str, Dialect] = {
    "binance": BinanceDialect(),
    "coinbase": CoinbaseDialect(),
    "kraken": KrakenDialect(),
    "okx": OkxDialect(),
    "bybit": BybitDialect(),
}


def parsed(text: str | bytes) -> dict[str, Any]:
    """A client's message; empty where it is no object."""
    try:
        message = msgspec.json.decode(text)
    except msgspec.MsgspecError:
        return {}
    return message if isinstance(message, dict) else {}
