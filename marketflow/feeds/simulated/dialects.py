"""What each venue's server says on a WebSocket, for `marketflow exchange --venue` and the tests.

It is the venue modules' other side; REST is in the `*_rest` modules. Where the documents leave open what a server does,
the harsher way is taken: one bad symbol fails a whole request at Coinbase and Bybit, and data come before the answer.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import Any, ClassVar, NamedTuple

import msgspec

from marketflow.feeds.simulated.listings import Listed, listed, split
from marketflow.feeds.simulated.trade_book import SymbolBook, digits
from marketflow.feeds.venues.venue import Trade, compact

NEWEST_KRAKEN_TRADES = 50
"""How many a snapshot has."""

FRAME_TRADES = 1024
"""The most trades in one frame of Bybit."""


def rfc3339(at: int, microseconds: int = 0) -> str:
    """A time in Unix ms, and microseconds beyond it, as RFC 3339 with microseconds."""
    whole = datetime.fromtimestamp(at // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{whole}.{at % 1000 * 1000 + microseconds:06}Z"


def kraken_ns(at: int) -> int:
    """The nanoseconds of Kraken's clock in a millisecond; all trades of one millisecond have the same."""
    return at * 1_000_000 + 1_000 + at * 7_919 % 998_000


class Response(NamedTuple):
    """What a subscription comes to: the symbols that are subscribed by it, and the frames that say so."""

    symbols: list[str]
    frames: list[str]


class Dialect(ABC):
    """One venue's side of the protocol. Symbols are the venue's names."""

    separator: ClassVar[str] = ""
    heartbeat: ClassVar[bool] = False
    """Whether a heartbeat is sent each second."""
    ids_above: ClassVar[int] = 0
    """Added to the ids of a simulated market."""

    def native(self, symbol: str) -> str:
        """The venue's name of one of our symbols."""
        return self.separator.join(split(symbol))

    def listed(self, symbol: str) -> Listed:
        """The instrument of one of our symbols."""
        return listed(self.native(symbol), self.separator)

    def greeting(self) -> str | None:
        """What is sent on connecting."""
        return None

    def beat(self, symbol: str, newest_id: int) -> str:
        """A heartbeat."""
        raise NotImplementedError

    @abstractmethod
    def requested(self, message: Any) -> list[str]:
        """The symbols that a client's message subscribes to; none for any other message."""

    def respond(self, message: Any, known: Collection[str]) -> Response:
        """Subscribe to the symbols of a message that are `known`, and refuse the others."""
        symbols = self.requested(message)
        good = [symbol for symbol in symbols if symbol in known]
        refusals = [self.refusal(symbol, message) for symbol in symbols if symbol not in known]
        return Response(good, refusals + (self.acknowledgements(good, message) if good else []))

    @abstractmethod
    def acknowledgements(self, symbols: Sequence[str], message: Any) -> list[str]:
        """The answers to a subscription."""

    @abstractmethod
    def refusal(self, symbol: str, message: Any) -> str:
        """The answer to a symbol that there is not."""

    def before_answer(self, book: SymbolBook, message: Any) -> list[str]:
        """What is sent of a symbol before the answer to its subscription."""
        return []

    def after_answer(self, book: SymbolBook, message: Any) -> list[str]:
        """What is sent of a symbol after it."""
        return []

    def pong(self, text: str) -> str | None:
        """The answer to a client's ping; None where it is none."""
        return None

    @abstractmethod
    def trade(self, trade: Trade) -> str:
        """The frame of one trade."""

    def trades(self, trades: Sequence[Trade]) -> list[str]:
        """The frames of several of one symbol, ascending by id."""
        return [self.trade(trade) for trade in trades]


class BinanceDialect(Dialect):
    """Binance spot."""

    def requested(self, message: Any) -> list[str]:
        """The streams of a SUBSCRIBE."""
        streams = message.get("params", []) if message.get("method") == "SUBSCRIBE" else []
        return [stream.removesuffix("@trade").upper() for stream in streams]

    def respond(self, message: Any, known: Collection[str]) -> Response:
        """A symbol that there is not is acknowledged like any other, and silent."""
        symbols = self.requested(message)
        return Response([each for each in symbols if each in known], self.acknowledgements(symbols, message))

    def acknowledgements(self, symbols: Sequence[str], message: Any) -> list[str]:
        """One, which names none of them."""
        return [compact({"result": None, "id": message.get("id")})]

    def refusal(self, symbol: str, message: Any) -> str:
        """Of what is no request."""
        return compact({"code": 2, "msg": f"Invalid request: {symbol}", "id": message.get("id")})

    def trade(self, trade: Trade) -> str:
        """One a frame; m says that the buyer was the maker."""
        at, price, quantity = trade.at, digits(trade.price), digits(trade.quantity)
        maker = trade.side == "sell"
        return compact(
            {"e": "trade", "E": at, "s": trade.symbol, "t": trade.id, "p": price, "q": quantity, "T": at}
            | {"m": maker, "M": True}
        )


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

    def respond(self, message: Any, known: Collection[str]) -> Response:
        """One bad product fails them all."""
        symbols = self.requested(message)
        bad = next((symbol for symbol in symbols if symbol not in known), None)
        if bad is not None:
            return Response([], [self.refusal(bad, message)])
        return Response(symbols, self.acknowledgements(symbols, message) if symbols else [])

    def acknowledgements(self, symbols: Sequence[str], message: Any) -> list[str]:
        """One, of all channels."""
        channels = [
            {"name": each, "product_ids": [*symbols], "account_ids": None} for each in message.get("channels", [])
        ]
        return [compact({"type": "subscriptions", "channels": channels})]

    def refusal(self, symbol: str, message: Any) -> str:
        """The product stands only in the text."""
        reason = f"{symbol} is not a valid product"
        return compact({"type": "error", "message": "Failed to subscribe", "reason": reason})

    def before_answer(self, book: SymbolBook, message: Any) -> list[str]:
        """The newest trade, as last_match."""
        newest = book.newest
        return [self.trade(newest).replace('"match"', '"last_match"', 1)] if newest else []

    def trade(self, trade: Trade) -> str:
        """A match, whose side is the maker's."""
        maker = "sell" if trade.side == "buy" else "buy"
        return compact(
            {"type": "match", "trade_id": trade.id, "side": maker, "size": digits(trade.quantity)}
            | {"price": digits(trade.price), "product_id": trade.symbol, "sequence": trade.id}
            | {"time": rfc3339(trade.at)}
        )


class KrakenDialect(Dialect):
    """Kraken v2."""

    separator = "/"
    heartbeat = True

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
        snapshot = bool(message["params"].get("snapshot"))
        results = [{"channel": "trade", "snapshot": snapshot, "symbol": symbol} for symbol in symbols]
        return [compact({"method": "subscribe", "result": each, "success": True}) for each in results]

    def refusal(self, symbol: str, message: Any) -> str:
        """The pair stands only in the text."""
        text = f"Currency pair not supported {symbol}"
        return compact({"method": "subscribe", "error": text, "success": False})

    def after_answer(self, book: SymbolBook, message: Any) -> list[str]:
        """The newest trades as a snapshot, where it is asked for."""
        trades = book.last(NEWEST_KRAKEN_TRADES) if message["params"].get("snapshot") else []
        return [self._frame("snapshot", trades)] if trades else []

    def pong(self, text: str) -> str | None:
        """To {"method":"ping"}."""
        return '{"method":"pong"}' if '"ping"' in text else None

    def trade(self, trade: Trade) -> str:
        """An array of one; price and quantity are numbers."""
        return self._frame("update", [trade])

    def trades(self, trades: Sequence[Trade]) -> list[str]:
        """One frame of all."""
        return [self._frame("update", trades)] if trades else []

    def _frame(self, kind: str, trades: Sequence[Trade]) -> str:
        rows = [
            {"symbol": trade.symbol, "side": trade.side, "price": trade.price, "qty": trade.quantity}
            | {"ord_type": "limit", "trade_id": trade.id}
            | {"timestamp": rfc3339(trade.at, kraken_ns(trade.at) // 1000 % 1000)}
            for trade in trades
        ]
        return compact({"channel": "trade", "type": kind, "data": rows})


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

    def refusal(self, symbol: str, message: Any) -> str:
        """The argument stands only in the text."""
        text = f"Wrong URL or channel:trades,instId:{symbol} doesn't exist. Please use the correct URL, channel and"
        text += " parameters referring to API document."
        return compact({"event": "error", "code": "60018", "msg": text, "connId": "c7f0ba8e"})

    def after_answer(self, book: SymbolBook, message: Any) -> list[str]:
        """The newest trade again, however old."""
        return [self.trade(book.newest)] if book.newest else []

    def pong(self, text: str) -> str | None:
        """Plain text."""
        return "pong" if text == "ping" else None

    def trade(self, trade: Trade) -> str:
        """An array of one, which stands for `count` trades."""
        row = {"instId": trade.symbol, "tradeId": str(trade.id), "px": digits(trade.price)}
        row |= {"sz": digits(trade.quantity), "side": trade.side, "ts": str(trade.at), "count": str(trade.count)}
        return compact({"arg": {"channel": "trades", "instId": trade.symbol}, "data": [row]})

    def trades(self, trades: Sequence[Trade]) -> list[str]:
        """One frame for those of one time, price and side, with the id of the last."""
        orders = groupby(trades, lambda trade: (trade.at, trade.price, trade.side))
        return [self.trade(_as_one([*parts])) for _, parts in orders]


class BybitDialect(Dialect):
    """Bybit v5 spot."""

    ids_above = 2_290_000_000_000_000_000

    def requested(self, message: Any) -> list[str]:
        """The topics of a subscribe."""
        topics = message.get("args", []) if message.get("op") == "subscribe" else []
        return [topic.removeprefix("publicTrade.") for topic in topics]

    def respond(self, message: Any, known: Collection[str]) -> Response:
        """One bad topic fails them all."""
        symbols = self.requested(message)
        bad = next((symbol for symbol in symbols if symbol not in known), None)
        if bad is not None:
            return Response([], [self.refusal(bad, message)])
        return Response(symbols, self.acknowledgements(symbols, message) if symbols else [])

    def acknowledgements(self, symbols: Sequence[str], message: Any) -> list[str]:
        """One a request, which names none of them."""
        return [compact({"success": True, "ret_msg": "subscribe", "conn_id": "d9avsh3f", "op": "subscribe"})]

    def refusal(self, symbol: str, message: Any) -> str:
        """The topic stands only in the text."""
        text = f"Invalid topic: publicTrade.{symbol}"
        return compact({"success": False, "ret_msg": text, "conn_id": "d9avsh3f", "op": "subscribe"})

    def pong(self, text: str) -> str | None:
        """To {"op":"ping"}."""
        return '{"success":true,"ret_msg":"pong","conn_id":"d9avsh3f","op":"ping"}' if '"ping"' in text else None

    def trade(self, trade: Trade) -> str:
        """An array of one; type is always snapshot."""
        return self._frame([trade])

    def trades(self, trades: Sequence[Trade]) -> list[str]:
        """As few frames as hold them."""
        return [self._frame(trades[at : at + FRAME_TRADES]) for at in range(0, len(trades), FRAME_TRADES)]

    def _frame(self, trades: Sequence[Trade]) -> str:
        rows = [
            {"T": trade.at, "s": trade.symbol, "S": trade.side.capitalize(), "v": digits(trade.quantity)}
            | {"p": digits(trade.price), "i": str(trade.id), "BT": False, "RPI": False}
            for trade in trades
        ]
        symbol, at = trades[-1].symbol, trades[-1].at
        return compact({"topic": f"publicTrade.{symbol}", "type": "snapshot", "ts": at, "data": rows})


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


def _as_one(parts: Sequence[Trade]) -> Trade:
    """The report of several trades of one order."""
    last = parts[-1]
    quantity = round(sum(part.quantity for part in parts), 8)
    return Trade(last.symbol, last.price, quantity, last.at, last.id, last.side, len(parts))
