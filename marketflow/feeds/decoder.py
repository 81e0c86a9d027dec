"""Decodes and validates ticks, and folds them into candles; rejects and counts bad lines.

Whole pieces of a chunk are processed: one call decodes all lines, and those of a symbol are folded in one loop. Trades
are folded column by column: min, max, sum and sort run in C on a list of prices, one of times, and so on. Only a piece
that fails is decoded line by line, to find the bad lines. A symbol that is not configured never becomes a series.
"""

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import compress
from math import fsum, inf
from operator import attrgetter, mul
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, cast, get_args

import msgspec

from marketflow.clock import Clock, milliseconds
from marketflow.feeds.line_framing import MAX_LINE_BYTES, pieces, records_in
from marketflow.feeds.timestamps import OffTime, TimestampCheck
from marketflow.feeds.venues.trade_ids import TradeIds
from marketflow.model import SLICE_MS, Amounts, Candle, Candles, Mode, Series, Slot, merge_into, slice_start

BadLine = Literal["malformed", "no_symbol", "bad_price", "unknown_symbol", "too_long", "unknown_message"]
Reason = BadLine | OffTime
"""Why a line is rejected."""

REASONS: tuple[Reason, ...] = (*get_args(BadLine), *get_args(OffTime))

MAX_PRICE = 1e100
"""Greatest valid price and quantity: no sum of them, or of their products, overflows."""

Side = Literal["buy", "sell"]

_SIDES: dict[bool | None, Side] = {True: "buy", False: "sell"}
_IS_BUY: dict[Side | None, bool] = {"buy": True, "sell": False}

SPELLINGS_A_SYMBOL = 4
"""Spellings of a symbol in upper and lower case that are cached; others are looked up each time."""

MOST_SHARED_SYMBOLS = 1000
"""Number of symbols up to which decoded lines share the text of each; preparing that for 10,000 takes 80 ms."""

_T = TypeVar("_T")


class Line(msgspec.Struct, gc=False):
    """One line of a feed: `timestamp` in Unix ms by the exchange's clock. Unknown fields are ignored."""

    has_trade: ClassVar[bool] = False
    symbol: str
    price: float
    timestamp: int | None = None


class TradeLine(Line, gc=False, omit_defaults=True):
    """A line with the quantity of a trade.

    Args:
        quantity: in base units; None where it is unknown.
        side: of the taker.
        id: of the trade, ascending per symbol.
        count: the number of trades that it aggregates; set by adapters of venues, never by a line.
    """

    has_trade: ClassVar[bool] = True
    quantity: float | None = None
    side: Side | None = None
    id: int | str | None = None
    count: int = msgspec.field(default=1, name="trades_in_one")


class Columns(NamedTuple):
    """Ticks of one symbol, column by column in the order of their arrival: what C code works on.

    Args:
        times: event times in Unix ms; None for those that the exchange does not date.
        prices: one a tick.
        quantities: in base units; None for unknown ones.
        bought: whether the taker bought; None where that is unknown.
        counts: how many trades each aggregates; None for one each.
        ids: of the trades.
        are_valid: whether times, quantities and sides all are known, and the quantities are valid; others are checked.
    """

    times: Sequence[int | None]
    prices: Sequence[float]
    quantities: Sequence[float | None] | None = None
    bought: Sequence[bool | None] | None = None
    counts: Sequence[int] | None = None
    ids: Sequence[int | str | None] | None = None
    are_valid: bool = False

    @classmethod
    def of(cls, lines: "Sequence[Line | _Numbers]") -> "Columns":
        """Return the columns of lines of one type; a Line has no more than time and price."""
        times = cast("list[int | None]", [line.timestamp for line in lines])
        prices = [line.price for line in lines]
        if not lines[0].has_trade:
            return cls(times, prices)
        trades = cast("Sequence[TradeLine]", lines)
        return cls(
            times,
            prices,
            [trade.quantity for trade in trades],
            [*map(_IS_BUY.get, [trade.side for trade in trades])],
            [trade.count for trade in trades],
            [trade.id for trade in trades],
        )

    def lines(self, symbol: str) -> list[TradeLine]:
        """Return the ticks as lines."""
        none: list[None] = [None] * len(self.times)
        sides = map(_SIDES.get, self.bought or none)
        quantities, ids, counts = self.quantities or none, self.ids or none, self.counts or [1] * len(none)
        columns = zip(self.prices, self.times, quantities, sides, ids, counts, strict=True)
        return [TradeLine(symbol, *each) for each in columns]

    def in_order(self, order: Sequence[int]) -> "Columns":
        """Return the ticks at these indexes, in this order."""
        return self._each(lambda column: [column[place] for place in order])

    def between(self, begin: int, end: int) -> "Columns":
        """Return the ticks of a range of indexes."""
        return self if not begin and end == len(self.times) else self._each(lambda column: column[begin:end])

    def _each(self, of_column: Callable[[Any], Any]) -> "Columns":
        columns: tuple[Any, ...] = self[:-1]
        found: list[Any] = [None if column is None else of_column(column) for column in columns]
        return Columns(*found)._replace(are_valid=self.are_valid)

    def has_unknown(self, column: Sequence[object] | None) -> bool:
        """Whether a value of a column is unknown. Skipped for valid ones: it takes as long as adding them up."""
        return column is None or (not self.are_valid and None in column)


class _LooseLine(msgspec.Struct, gc=False):
    """A line whose numbers may be strings, and whose timestamp may have a fraction."""

    symbol: str
    price: float | str
    timestamp: int | float | str | None = None
    quantity: float | str | None = None
    side: msgspec.Raw = msgspec.Raw()
    id: msgspec.Raw = msgspec.Raw()


class _Numbers(msgspec.Struct, gc=False):
    """A loose line after conversion of its numbers."""

    has_trade: ClassVar[bool] = True
    symbol: str
    price: float
    timestamp: float | None
    quantity: float | None = None
    side: Side | None = None
    id: int | str | None = None
    count: int = 1


_AnyLine = TypeVar("_AnyLine", bound=Line)
_AnyTrade = TypeVar("_AnyTrade", TradeLine, _Numbers)


class _DatedLine(Protocol):
    """A line with a timestamp."""

    price: float
    timestamp: int


class _Dated(NamedTuple):
    """A valid tick; sorts by event time, then by arrival."""

    at: int
    sequence: int
    price: float
    line: "Line | _Numbers"


Reject = Callable[[str, int, object], None]
"""Called for rejected lines with the reason, their number and an example."""

_line_decoder = msgspec.json.Decoder(Line)
_trade_decoder = msgspec.json.Decoder(TradeLine)
_decode_loose_line = msgspec.json.Decoder(_LooseLine).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

# What msgspec raises on hostile bytes: bad JSON or types, bad UTF-8, thousands of nested brackets.
UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

_symbol_of, _timestamp_of = attrgetter("symbol"), attrgetter("timestamp")

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_EXACT_DIGITS = 19  # a time in nanoseconds
_FAR_OFF = 2**63  # timestamps are clamped to it


class Decoder:
    """Decoder of one feed: bytes in, candles out, with counts of what was rejected or dated by receipt.

    Args:
        mode, exchange, symbols: the configured series.
        clock: this machine's time.
        max_skew_ms: a tick further off than this from `clock` is rejected, unless the clock of the whole feed is off.
        on_reject: called for rejected lines.
        on_clock: called with a sentence when the clock of the exchange, or the unit of its timestamps, changes.
        milliseconds_only: whether timestamps in another unit are an error of the feed.
        ids: drops trades of decoded lines that came before, by their ids; None where others do that.
    """

    def __init__(
        self,
        mode: Mode,
        exchange: str,
        symbols: Iterable[str],
        clock: Clock,
        max_skew_ms: int,
        on_reject: Reject,
        on_clock: Callable[[str], None] = lambda text: None,
        milliseconds_only: bool = False,
        ids: TradeIds | None = None,
    ) -> None:
        self._mode, self._exchange = mode, exchange
        self.take_symbols(symbols)
        self._clock = clock
        self._max_skew_ms = max_skew_ms
        self._timestamps = TimestampCheck(max_skew_ms, on_clock, milliseconds_only)
        self._on_reject = on_reject
        self.ids = ids
        self.expected_unknown: frozenset[str] = frozenset()
        """Symbols that are neither configured nor counted as unknown: their subscription is about to end."""
        self.on_off_time: Callable[[Series, Line | _Numbers], None] = lambda series, line: None
        """Called with lines that are rejected for their time."""
        self.ticks = 0
        self.last_received: int | None = None
        """When the last valid tick was received (Unix ns)."""
        self.timestamps_replaced = 0
        self.rejected: Counter[str] = Counter()

    def take_symbols(self, symbols: Iterable[str]) -> None:
        """Replace the symbols; for any thread. A call of `decode` that is under way may still use the previous ones."""
        found = {symbol: Series(self._mode, self._exchange, symbol) for symbol in symbols}
        self.series = frozenset(found.values())
        """The configured series."""
        # In this order: a thread that decodes reads `_series` first, and the other one after that.
        self._by_lower_case = {symbol.lower(): series for symbol, series in found.items()}
        self._most_spellings = SPELLINGS_A_SYMBOL * len(found)
        self._symbols = frozenset(found)
        self._series = found  # by all spellings cached

    @property
    def clock_offset_ms(self) -> int:
        """How far the clock of the exchange is ahead of this machine's, 0 while it is within the allowed skew."""
        return self._timestamps.offset_ms

    def reject(self, reason: Reason, example: object, count: int = 1) -> None:
        """Count rejected lines by reason."""
        self.rejected[reason] += count
        self._on_reject(reason, count, example)

    def decode(self, chunk: bytes, waited_ms: int = 0) -> Candles:
        """Return the candles of a chunk of whole lines. Bad lines are rejected and counted, never raised.

        Args:
            chunk: the lines.
            waited_ms: how long they have waited in this machine, which does not count as skew.
        """
        if len(chunk) <= MAX_LINE_BYTES:
            return self._decode_piece(chunk, waited_ms)
        candles: Candles = {}
        for piece in pieces(chunk):  # of a size whose ticks fit into the cache of a core: 6 % less CPU
            merge_into(candles, self._decode_piece(piece, waited_ms))
        return candles

    def _decode_piece(self, lines: bytes, waited_ms: int) -> Candles:
        if len(lines) > MAX_LINE_BYTES + 1:  # a single line with its newline, see `pieces`
            self.reject("too_long", f"{len(lines) - 1} bytes")
            return {}
        # Lines without a quantity are decoded apart, as one with it costs a quarter more to decode and fold.
        # One letter is found ten times as fast as the word.
        if b"q" in lines and b'"quantity"' in lines:
            if trades := _decode_lines(lines, _trade_decoder):
                return self.fold(self._without_doubles(trades), waited_ms)
            return self._fold_each(self._without_doubles(self._decode_loosely(lines)), self._clock(), waited_ms)
        if ticks := _decode_lines(lines, _decoder_of(self._symbols)) or _decode_lines(lines, _line_decoder):
            return self.fold(ticks, waited_ms)
        return self._fold_each(self._decode_loosely(lines), self._clock(), waited_ms)

    def fold(self, lines: Sequence[Line], waited_ms: int = 0) -> Candles:
        """Return the candles of the valid ticks among `lines`, which have arrived in this order.

        Args:
            lines: all of one type, Line or TradeLine.
            waited_ms: how long they have waited in this machine, which does not count as skew.
        """
        received = self._clock()
        candles = None
        if self._timestamps.usual:
            usual_ms = waited_ms if self._timestamps.settled else 0  # ticks that waited prove nothing about the clock
            if 0 < len(lines) <= len(self._series) and len({*map(_symbol_of, lines)}) == len(lines):
                candles = self._fold_one_each(lines, received, usual_ms)
            if candles is None:
                candles = self._fold_usual(_by_symbol(lines), received, usual_ms)
        return self._fold_each(lines, received, waited_ms) if candles is None else candles

    def fold_trades(self, by_symbol: Mapping[str, Columns]) -> Candles:
        """Return the candles of the valid trades among those that have just arrived, by configured symbol."""
        received = self._clock()
        candles = self._fold_usual(by_symbol, received) if self._timestamps.usual else None
        if candles is not None:
            return candles
        lines = [line for symbol, columns in by_symbol.items() for line in columns.lines(symbol)]
        return self._fold_each(lines, received)

    def _without_doubles(self, lines: "list[_AnyTrade]") -> "list[_AnyTrade]":
        """Remove trades that came before; those that overtook each other are sorted by their ids."""
        if self.ids is None or [line.id for line in lines].count(None) == len(lines):
            return lines
        by_symbol: defaultdict[str, list[_AnyTrade]] = defaultdict(list)
        found: list[_AnyTrade] = []  # with those that are rejected later
        for line in lines:
            if 0 < line.price <= MAX_PRICE and (series := self._series_of(line.symbol)) is not None:
                by_symbol[series.symbol].append(line)
            else:
                found.append(line)
        for symbol, of_symbol in by_symbol.items():
            found += self.ids.new_of(symbol, of_symbol)
        return found

    # One line a series, as from a feed with thousands of series, or one tick at a time: a third of the cost of columns

    def _fold_one_each(self, lines: Sequence[Line], received: int, waited_ms: int) -> Candles | None:
        """Return the candles of lines that are valid and each of another configured series; else None."""
        received_at = milliseconds(received)
        oldest, newest = received_at - waited_ms - self._max_skew_ms, received_at + self._max_skew_ms
        has_trades = lines[0].has_trade
        candles: Candles = {}
        for line in lines:
            series, price, at = self._series.get(line.symbol), line.price, line.timestamp
            if series is None or at is None or not (oldest <= at <= newest and 0 < price <= MAX_PRICE):
                return None
            amounts = None
            if has_trades:
                trade = cast("TradeLine", line)
                if trade.count != 1 or not 0 <= (trade.quantity or 0) <= MAX_PRICE:
                    return None
                amounts = _amounts_of(trade)
            candles[Slot(series, at - at % SLICE_MS)] = Candle(
                price, price, price, price, price, 1, at, at, at, at, received, received, 1, amounts
            )
        if len(candles) < len(lines):
            return None  # two spellings of the same symbol
        if not self._timestamps.settled:
            self._timestamps.confirm()
        self._count(len(lines), received)
        return candles

    # Series by series

    def _fold_usual(
        self, by_symbol: "Mapping[str, Columns | list[Line]]", received: int, waited_ms: int = 0
    ) -> Candles | None:
        """Return the candles of ticks whose prices and timestamps are all valid; else None."""
        candles: Candles = {}
        unknown: dict[str, int] = {}
        folded: set[Series] = set()
        count = 0
        for symbol, group in by_symbol.items():
            ticks = len(group.times if isinstance(group, Columns) else group)
            if (series := self._series_of(symbol)) is None:
                if symbol not in self.expected_unknown:
                    unknown[symbol] = ticks
            elif series in folded or (of_series := self._fold_series(series, group, received, waited_ms)) is None:
                return None
            else:
                folded.add(series)
                candles |= of_series
                count += ticks
        for symbol, lines in unknown.items():
            self.reject("unknown_symbol", symbol, lines)
        if candles:
            if not self._timestamps.settled:
                self._timestamps.confirm()
            self._count(count, received)
        return candles

    def _fold_series(
        self, series: Series, ticks: "Columns | list[Line]", received: int, waited_ms: int
    ) -> Candles | None:
        received_at = milliseconds(received)
        allowed = received_at - waited_ms - self._max_skew_ms, received_at + self._max_skew_ms
        if isinstance(ticks, Columns):
            candles = _fold_columns(series, ticks, received, *allowed)
        else:
            candles = _fold_lines(series, ticks, received, *allowed)
        for candle in (candles or {}).values():
            if not (candle.low > 0 and candle.high <= MAX_PRICE):
                return None
        return candles

    # Line by line

    def _fold_each(self, lines: Sequence[Line | _Numbers], received: int, waited_ms: int = 0) -> Candles:
        """Return the candles of the valid ticks; the others are rejected and counted."""
        received_at = milliseconds(received)
        ticks: defaultdict[Series, list[_Dated]] = defaultdict(list)
        rejected: dict[Reason, list[object]] = defaultdict(list)
        replaced = 0
        for number, line in enumerate(lines):
            if (series := self._series_of(line.symbol)) is None:
                if line.symbol not in self.expected_unknown:
                    rejected["unknown_symbol"].append(line.symbol)
                continue
            if not 0 < line.price <= MAX_PRICE:
                rejected["bad_price"].append(line.price)
                continue
            if not _has_valid_quantity(line):
                cast("TradeLine | _Numbers", line).quantity = None  # the price counts all the same
            at: int | OffTime = received_at
            if line.timestamp is not None:
                at = self._timestamps.date(line.timestamp, received_at, waited_ms)
            if isinstance(at, str):
                rejected[at].append(line.timestamp)
                self.on_off_time(series, line)
                continue
            replaced += line.timestamp is None or self._timestamps.by_receipt
            ticks[series].append(_Dated(at, received + number, line.price, line))
        for reason, examples in rejected.items():
            self.reject(reason, examples[0], len(examples))
        candles: Candles = {}
        for series, dated in ticks.items():
            times, sequences, _, of_series = zip(*sorted(dated), strict=True)
            candles |= _candles(series, Columns.of(of_series), times, sequences)
        if candles:
            self.timestamps_replaced += replaced
            self._count(sum(map(len, ticks.values())), received)
        return candles

    def _series_of(self, symbol: str) -> Series | None:
        """Return the series of a symbol, in upper or lower case."""
        known = self._series
        if (series := known.get(symbol)) is None and symbol.isascii():
            series = self._by_lower_case.get(symbol.lower())
            if series is not None and len(known) < self._most_spellings:
                known[symbol] = series
        return series

    def _count(self, ticks: int, received: int) -> None:
        self.ticks += ticks
        self.last_received = received

    def _decode_loosely(self, lines: bytes) -> list[_Numbers]:
        """Decode lines whose numbers may be strings, and reject bad ones."""
        numbers = _decode_each_of(lines, _decode_numbers)
        return self._decode_each(lines) if numbers is None else numbers

    def _decode_each(self, chunk: bytes) -> list[_Numbers]:
        return [numbers for text in chunk.split(b"\n") if (numbers := self._decode_one(text)) is not None]

    def _decode_one(self, text: bytes) -> _Numbers | None:
        if not text.strip():
            return None  # a heartbeat
        try:
            text.decode()
            return _decode_numbers(text)
        except UnicodeDecodeError:
            self.reject("malformed", text[:80])
            return None
        except UNDECODABLE:
            return self._decode_by_field(text)

    def _decode_by_field(self, text: bytes) -> _Numbers | None:
        """Decode a line with a field of an unexpected type; reject it unless that is only the timestamp."""
        try:
            fields = _decode_fields(text)
        except UNDECODABLE:
            self.reject("malformed", text[:80])
            return None
        symbol, price = _field(fields, "symbol", str), _field(fields, "price", float | str)
        number = number_of(price) if isinstance(price, str) else price
        if symbol is None or number is None:
            self.reject("no_symbol" if symbol is None else "bad_price", text[:80])
            return None
        quantity = _field(fields, "quantity", float | str)
        quantity = number_of(quantity) if isinstance(quantity, str) else quantity
        side, trade_id = _field(fields, "side", Side), _field(fields, "id", int | str)
        return _Numbers(symbol, number, _timestamp_in(fields), quantity, side, trade_id)


def _decode_numbers(text: bytes) -> _Numbers:
    """Decode a line whose numbers may be strings; an optional field that is none of its kind is ignored.

    Raises:
        msgspec.MsgspecError: the price is no number, or a field is of another type.
    """
    line = _decode_loose_line(text)
    timestamp, quantity = line.timestamp, line.quantity
    price = number_of(line.price) if isinstance(line.price, str) else line.price
    if price is None:
        raise msgspec.ValidationError("the price is no number")
    return _Numbers(
        line.symbol,
        price,
        _timestamp(timestamp) if isinstance(timestamp, str) else timestamp,
        number_of(quantity) if isinstance(quantity, str) else quantity,
        _decoded(line.side, Side),
        _decoded(line.id, int | str),
    )


def _timestamp_in(fields: dict[str, msgspec.Raw]) -> float | None:
    text = _field(fields, "timestamp", str)
    # As text: the number may be greater than any float.
    return _timestamp(bytes(fields.get("timestamp", b"")).decode() if text is None else text)


def _timestamp(text: str) -> float | None:
    number = number_of(text)
    return None if number is None else max(-_FAR_OFF, min(number, _FAR_OFF))


def number_of(text: str) -> float | None:
    """Parse a decimal number, as an int where that is exact; None if the text is none."""
    if not _NUMBER.fullmatch(text):
        return None
    if text.isdigit() and len(text) <= _EXACT_DIGITS:
        return int(text)
    return float(text)


def _field(fields: dict[str, msgspec.Raw], name: str, kind: Any) -> Any:
    """Return the value of a field, None if it is missing or of another type."""
    return _decoded(fields.get(name, msgspec.Raw()), kind)


def _decoded(value: msgspec.Raw, kind: Any) -> Any:
    """Return a value, None if there is none or it is of another type."""
    try:
        return msgspec.json.decode(value, type=kind)
    except UNDECODABLE:
        return None


def _has_valid_quantity(line: "Line | _Numbers") -> bool:
    return not line.has_trade or 0 <= (cast("TradeLine | _Numbers", line).quantity or 0) <= MAX_PRICE


def _are_valid(quantities: Sequence[float | None]) -> bool:
    """Whether all known quantities are numbers, not negative and not too great."""
    known = [each for each in quantities if each is not None] if None in quantities else cast("list[float]", quantities)
    return not known or (min(known) >= 0 and sum(known) <= MAX_PRICE)


@lru_cache(maxsize=16)
def _decoder_of(symbols: frozenset[str]) -> "msgspec.json.Decoder[Line]":
    """Decoder of lines of these symbols alone, which share the text of each: its hash is computed once."""
    if not 0 < len(symbols) <= MOST_SHARED_SYMBOLS:
        return _line_decoder
    fields = [("symbol", Literal[tuple(sorted(symbols))])]
    return msgspec.json.Decoder(msgspec.defstruct("KnownLine", fields, bases=(Line,), gc=False))


def _decode_lines(lines: bytes, decoder: "msgspec.json.Decoder[_AnyLine]") -> "list[_AnyLine] | None":
    """Decode all lines of a piece at once, None if any of them fails."""
    if (count := records_in(lines)) is None:
        return _decode_each_of(lines, decoder.decode)
    try:
        lines.decode()  # msgspec does not check it in fields that it skips
        found = decoder.decode_lines(lines)
    except UNDECODABLE:
        return None
    return found if len(found) == count else None


def _decode_each_of(lines: bytes, decode: Callable[[bytes], _T]) -> list[_T] | None:
    """Decode the lines of a piece one by one, None if any of them fails."""
    try:
        lines.decode()
        each = lines.split(b"\n")
        del each[-1]
        return [*map(decode, each)]
    except UNDECODABLE:
        return None


def _by_symbol(lines: Sequence[Line]) -> "Mapping[str, Columns | list[Line]]":
    """Lines of one type for each symbol, those of trades column by column."""
    by_symbol: dict[str, list[Line]] = {}
    for line in lines:
        try:
            by_symbol[line.symbol].append(line)
        except KeyError:
            by_symbol[line.symbol] = [line]
    if lines and lines[0].has_trade:
        return {symbol: Columns.of(group) for symbol, group in by_symbol.items()}
    return by_symbol


# Candles of ticks of one series in the order of arrival; None if not all are dated within the allowed skew


def _fold_lines(series: Series, lines: Sequence[Line], received: int, oldest: int, newest: int) -> Candles | None:
    dated = cast("Sequence[_DatedLine]", lines)
    try:
        candles = _candles_in_order(series, dated, range(received, received + len(dated)))
        if candles is None:
            order = sorted(range(len(dated)), key=lambda place: dated[place].timestamp)
            dated = [dated[place] for place in order]
            candles = _candles_in_order(series, dated, [received + place for place in order])
    except TypeError:  # not all are dated
        return None
    return candles if oldest <= dated[0].timestamp and dated[-1].timestamp <= newest else None


def _fold_columns(series: Series, ticks: Columns, received: int, oldest: int, newest: int) -> Candles | None:
    if ticks.times[0] is None:
        return None
    times = cast("Sequence[int]", ticks.times)
    try:
        in_order = sorted(times)
    except TypeError:  # others are not dated; to look for them first takes as long as sorting
        return None
    if in_order[0] < oldest or in_order[-1] > newest:
        return None
    if ticks.quantities is not None and not (ticks.are_valid or _are_valid(ticks.quantities)):
        return None
    if ticks.quantities is not None and not sum(ticks.prices) < inf:  # NaN is not; it is in no line
        return None
    sequences: Sequence[int] = range(received, received + len(times))
    if times != in_order:
        order = sorted(range(len(times)), key=times.__getitem__)
        ticks, sequences = ticks.in_order(order), [received + place for place in order]
    return _candles(series, ticks, in_order, sequences)


def _candles_in_order(series: Series, lines: "Sequence[_DatedLine]", sequences: Sequence[int]) -> Candles | None:
    """Fold lines into one candle for each slice; None if they are not sorted by time.

    In one loop: columns take several passes over objects that are spread over the memory, and half as long again.

    Raises:
        TypeError: not all are dated.
    """
    candles: Candles = {}
    begin, count = 0, len(lines)
    while begin < count:
        first = lines[begin]
        first_at = last_at = high_at = low_at = first.timestamp
        start = slice_start(first_at)
        end, within = count, lines
        if begin or lines[-1].timestamp >= start + SLICE_MS:
            end = bisect_left(lines, start + SLICE_MS, begin, key=_timestamp_of)
            within = lines[begin:end]
        price = high = low = first.price
        total = 0.0
        for line in within:
            price, at = line.price, line.timestamp
            if at < last_at:
                return None
            last_at = at
            total += price
            if price > high:
                high, high_at = price, at
            elif price < low:
                low, low_at = price, at
        if not within:
            return None
        candles[Slot(series, start)] = Candle(
            first.price,
            high,
            low,
            price,
            total,
            end - begin,
            first_at,
            last_at,
            high_at,
            low_at,
            sequences[begin],
            sequences[end - 1],
        )
        begin = end
    return candles


def _candles(series: Series, ticks: Columns, times: Sequence[int], sequences: Sequence[int]) -> Candles:
    """Fold ticks that are sorted by time into one candle for each slice; `times` are their event times."""
    candles: Candles = {}
    begin = 0
    while begin < len(times):
        start = slice_start(times[begin])
        end = len(times) if times[-1] < start + SLICE_MS else bisect_left(times, start + SLICE_MS, begin)
        within = ticks.between(begin, end)
        prices = within.prices
        high, low = max(prices), min(prices)
        total, count, amounts = 0.0, end - begin, None
        if high <= MAX_PRICE:  # or the sum would overflow; such a candle is rejected by its high
            total, count, amounts = _traded(within)
        candles[Slot(series, start)] = Candle(
            prices[0],
            high,
            low,
            prices[-1],
            total,
            count,
            times[begin],
            times[end - 1],
            times[begin + prices.index(high)],
            times[begin + prices.index(low)],
            sequences[begin],
            sequences[end - 1],
            1,
            amounts,
        )
        begin = end
    return candles


def _amounts_of(trade: TradeLine) -> Amounts | None:
    """Return what was traded by one line, as `_traded` of it alone."""
    volume, side = trade.quantity, trade.side
    if volume is None:
        return None
    turnover = trade.price * volume
    if side is None:
        return Amounts(volume, turnover, None, None)
    return Amounts(volume, turnover, volume, turnover) if side == "buy" else Amounts(volume, turnover, 0.0, 0.0)


def _traded(ticks: Columns) -> tuple[float, int, Amounts | None]:
    """Return the total of all prices, the number of trades, and what was traded."""
    prices, quantities, bought, counts = ticks.prices, ticks.quantities, ticks.bought, ticks.counts
    count = len(prices) if counts is None else sum(counts)
    total = sum(prices if counts is None or count == len(prices) else map(mul, prices, counts))
    if ticks.has_unknown(quantities):
        return total, count, None
    volumes = cast("Sequence[float]", quantities)
    turnovers = [*map(mul, prices, volumes)]
    volume, turnover = fsum(volumes), fsum(turnovers)
    if ticks.has_unknown(bought):
        return total, count, Amounts(volume, turnover, None, None)
    takers = cast("Sequence[bool]", bought)
    return total, count, Amounts(volume, turnover, fsum(compress(volumes, takers)), fsum(compress(turnovers, takers)))
