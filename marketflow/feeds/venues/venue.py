"""What a venue is to the WebSocket feed, and what its frames come to.

Every frame is decoded to a list of events. A frame, or a trade in it, that cannot be decoded becomes a `Rejected`: it
is counted, and costs nothing but itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from math import isfinite
from typing import ClassVar, Literal, NamedTuple, TypeVar

import msgspec

from marketflow.feeds.decoder import MAX_PRICE, UNDECODABLE, Columns, number_of
from marketflow.model import VenueValues

Side = Literal["buy", "sell"]

MAX_FRAME_BYTES = 2**20
"""A longer frame is rejected; the largest that a venue sends is some hundred kB (1,024 trades of Bybit)."""

_T = TypeVar("_T")


class Trade(msgspec.Struct, frozen=True, gc=False):
    """One trade, or several of one taker order that the venue reports as one.

    Args:
        symbol: the venue's name of the instrument.
        price, quantity: as the venue says them; quantity in base units.
        at: event time in Unix ms.
        id: ascending per symbol; of several trades the last one's. None where the venue has none that ascend.
        side: of the taker.
        count: how many trades it stands for.
    """

    symbol: str
    price: float
    quantity: float
    at: int
    id: int | None
    side: Side
    count: int = 1


class Acknowledged(NamedTuple):
    """Subscriptions that the venue has confirmed; without symbols where it does not name them.

    `request` is the number of the request, where it repeats that.
    """

    symbols: tuple[str, ...] = ()
    request: int | None = None


class Refused(NamedTuple):
    """A subscription that the venue refuses, in its words; the symbol and the number of the request where known."""

    text: str
    symbol: str | None = None
    request: int | None = None


class Alive(NamedTuple):
    """A sign of life without a trade; `newest_id` is the symbol's newest trade by the venue, where it says so."""

    symbol: str | None = None
    newest_id: int | None = None


class Closing(NamedTuple):
    """The venue is about to close the connection."""

    text: str


class Rejected(NamedTuple):
    """What could not be decoded: the reason and an example."""

    reason: Literal["malformed", "bad_price", "unknown_message"]
    example: bytes


class Status(NamedTuple):
    """What the venue says of its trading as a whole: its word for it where there is none, empty where there is."""

    halt: str


Event = Trade | Acknowledged | Refused | Alive | Closing | Rejected | Status


class Instrument(NamedTuple):
    """What a venue lists: its name of it, and base and quote in common letters.

    `halt` is the venue's word for its state where it does not trade now, and empty where it does; `rest_symbol` its
    name in REST calls, where that is another one.
    """

    symbol: str
    base: str
    quote: str
    halt: str = ""
    rest_symbol: str = ""


class RestCall(NamedTuple):
    """A GET below `rest_url`, and what it counts of the venue's limit."""

    path: str
    query: Mapping[str, str | int] = {}
    weight: int = 1


class RestReply(NamedTuple):
    """An answer with status 200."""

    body: bytes
    headers: Mapping[str, str]


class TradesPage(NamedTuple):
    """Trades in any order, and where the next page begins; None where there is none, or where this one is empty."""

    trades: list[Trade]
    cursor: str | None


class VenueCandle(NamedTuple):
    """A row of the venue's own candles; None is what the venue does not say.

    Args:
        start: Unix ms.
        values: what our candles are compared with.
        is_closed: whether the minute is over.
        vwap: the mean price of what was traded.
        buy_volume, buy_turnover: the part in which the taker bought.
    """

    start: int
    values: VenueValues
    is_closed: bool | None = None
    vwap: float | None = None
    buy_volume: float | None = None
    buy_turnover: float | None = None


class RestCalls(ABC):
    """What a venue gives by REST: requests, and parsers of their answers.

    Parsers raise msgspec.MsgspecError, ValueError or VenueError for an answer that is none, and VenueRefusal for one
    that says the venue is asked too often.
    """

    weight_limit: ClassVar[tuple[int, float]]
    """How much weight is used in how many seconds: a share of what the venue allows to an address."""
    newest_first: ClassVar[bool]
    """Whether pages of trades begin at the newest one and go back, or begin at a time and go forward."""
    trades_span_ms: ClassVar[int | None] = None
    """How much time the first page of those that go forward spans; None for all that follows."""
    trades_kept_ms: ClassVar[int | None] = None
    """How far back trades are given; None for all."""
    newest_trades: ClassVar[int | None] = None
    """How many trades are given, the newest, where the others are not; ids are only a hint of what is missing then."""
    candles_a_call: ClassVar[int]
    candles_kept_ms: ClassVar[int | None] = None
    """How far back candles of a minute are given; None for all."""
    gives_older_candles: ClassVar[bool] = False
    """Whether candles from before the range come, too, or alone where nothing was traded in it."""
    gives_newer_candles: ClassVar[bool] = False
    """The same of candles from after the range."""
    opens_at_last_close: ClassVar[bool] = False
    """Whether a candle opens at the close of the one before, and its high and low may be that price."""
    instruments_weight: ClassVar[int] = 1
    used_weight: ClassVar[tuple[str, int] | None] = None
    """The header in which the venue counts what this address has used in `weight_limit`'s time, and what it allows."""
    time_call: ClassVar[RestCall]

    @abstractmethod
    def trades_call(self, symbol: str, since_ms: int, newest_id: int | None, cursor: str | None) -> RestCall:
        """A page of trades.

        Args:
            symbol: by its REST name.
            since_ms: where pages that go forward begin.
            newest_id: where pages that go back begin, itself included; None for the newest trade.
            cursor: of the page before; None for the first one.
        """

    @abstractmethod
    def trades(self, symbol: str, reply: RestReply) -> TradesPage:
        """The trades of a page, under the given symbol."""

    @abstractmethod
    def candles_call(self, symbol: str, since_ms: int, until_ms: int, now_ms: int) -> RestCall:
        """The candles of the minutes that start from `since_ms` to before `until_ms`; at most `candles_a_call`."""

    @abstractmethod
    def candles(self, reply: RestReply) -> list[VenueCandle]:
        """The rows of an answer, in any order."""

    @abstractmethod
    def time(self, reply: RestReply) -> int:
        """The venue's clock in Unix ms."""


class Venue(ABC):
    """The protocol of one venue. `decode` never raises; `instruments` does for an answer that is none."""

    name: ClassVar[str]
    url: ClassVar[str]
    rest_url: ClassVar[str]
    symbols_a_connection: ClassVar[int]
    symbols_a_request: ClassVar[int] = 100
    """In one frame that subscribes."""
    requests_a_second: ClassVar[int] = 20
    """That subscribe, on one connection."""
    refuses_whole_requests: ClassVar[bool] = False
    """Whether one bad symbol fails the others of its request."""
    attempts: ClassVar[tuple[int, float]]
    """How many connections may be begun in how many seconds, below what the venue allows to an address."""
    ping: ClassVar[tuple[float, str] | None] = None
    """After how many seconds without a frame which text is sent; None where the protocol's own pings do."""
    lifetime_seconds: ClassVar[float | None] = None
    """After how long another connection takes over, before the venue cuts this one."""
    instruments_path: ClassVar[str]
    """Path and query of the list of instruments, below `rest_url`."""
    rest: ClassVar[RestCalls]
    """What it gives by REST."""

    @abstractmethod
    def subscribe(self, symbols: Sequence[str], request: int = 1) -> list[str]:
        """The frames that subscribe to the trades of these symbols, within the venue's limits.

        Args:
            symbols: the venue's names.
            request: the number of the first of these requests, for venues whose answers repeat it.
        """

    @abstractmethod
    def decode(self, frame: bytes) -> list[Event]:
        """What a frame says."""

    def trades(self, frames: Sequence[bytes]) -> dict[str, Columns] | None:
        """The trades of frames that hold nothing but valid ones, by the venue's names of the symbols; None for others.

        Faster than `decode`, whose trades are the same; worth it for a venue that sends many frames.
        """
        return None

    @abstractmethod
    def instruments(self, body: bytes) -> list[Instrument]:
        """The instruments of an answer.

        Raises:
            msgspec.MsgspecError: it is no such answer.
            VenueError: it says what is wrong.
        """

    def rest_symbol(self, symbol: str) -> str:
        """The name in REST calls of a symbol that is not in the list of instruments."""
        return symbol


class VenueError(Exception):
    """An answer of a venue that says what is wrong."""


def number(text: object) -> float:
    """A decimal number, from a JSON number or a string such as 0.1, 1e-8 or 1E+3.

    Raises:
        ValueError: it is none; NaN, Infinity and what is too great for a float are none.
    """
    found: float | None = None
    if isinstance(text, int | float) and not isinstance(text, bool):
        found = float(text)
    elif isinstance(text, str):
        found = number_of(text)
    if found is not None and isfinite(found):
        return float(found)
    raise ValueError(f"{text!r} is no number")


def halt_unless(status: str, *trading: str) -> str:
    """The status of an instrument, empty where it is one of those in which it trades."""
    return "" if status in trading else status


def are_valid(quantities: Sequence[float]) -> bool:
    """Whether all of at least one quantity can be traded: above zero, and finite."""
    return min(quantities) > 0 and sum(quantities) <= MAX_PRICE  # NaN is not less


def request_number(raw: bytes) -> int | None:
    """The number of a request that an answer repeats; None where there is none."""
    digits = raw.strip(b'"')
    return int(digits) if digits.isdigit() and len(digits) < 10 else None


def unix_ms(text: str) -> int:
    """A time in RFC 3339 as Unix ms; what is below a millisecond is cut.

    Raises:
        ValueError: it is none, or has no offset.
    """
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no offset")
    return int(moment.timestamp() * 1_000_000) // 1000


def each(rows: Iterable[msgspec.Raw], decode: Callable[[bytes], _T], to_trade: Callable[[_T], Trade]) -> list[Event]:
    """A trade for each row; one that is none is rejected, and the others are kept."""
    events: list[Event] = []
    for row in rows:
        raw = bytes(row)
        try:
            events.append(to_trade(decode(raw)))
        except UNDECODABLE:
            events.append(Rejected("malformed", raw[:200]))
        except (ValueError, OverflowError):
            events.append(Rejected("bad_price", raw[:200]))
    return events


def compact(message: object) -> str:
    """A message as JSON text."""
    return msgspec.json.encode(message).decode()


def chunks(symbols: Sequence[str], size: int) -> list[Sequence[str]]:
    """The symbols in groups of at most `size`."""
    return [symbols[start : start + size] for start in range(0, len(symbols), size)]
