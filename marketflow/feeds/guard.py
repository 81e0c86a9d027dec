"""Every tick passes here: decoded, checked and folded into candles before it is handed to anybody.

Python is slow per tick and fast per list, so the work is done on whole chunks: one `map` decodes all lines, then per
symbol there is a column of prices and one of times on which min, max, sum and sort run in C. Only a chunk that fails is
gone through line by line, to find the line to blame. A symbol that was not asked for never becomes a series.
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from operator import ne
from typing import Literal, TypeVar, cast, get_args

import msgspec

from marketflow.clock import Clock, milliseconds
from marketflow.model import SLICE_MS, Candle, Candles, Mode, Series, Slot, merge_into, slice_start

MAX_LINE_BYTES = 64 * 1024

Reason = Literal["malformed", "no_symbol", "bad_price", "unknown_symbol", "too_long"]
"""Why a line is dropped."""

REASONS: tuple[Reason, ...] = get_args(Reason)

MAX_PRICE = 1e100
"""A price beyond it is no price; up to it no sum of prices overflows."""

_T = TypeVar("_T")


class Line(msgspec.Struct, gc=False):
    """One line of a feed: `timestamp` in Unix ms by the exchange's clock. Unknown fields are ignored."""

    symbol: str
    price: float
    timestamp: int | None = None


Reject = Callable[[str, int, object], None]
"""Told of dropped lines: the reason, how many, and an example."""

_decode_line = msgspec.json.Decoder(Line).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

# What msgspec raises on hostile bytes: bad JSON or types, bad UTF-8, thousands of nested brackets.
_UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class Guard:
    """Turns what one exchange sent into candles, and counts what it had to drop or mend.

    Args:
        mode, exchange, symbols: the series that may come out.
        clock: this machine's time.
        max_skew_ms: an event time further than this from `clock` is replaced by the time of receipt.
        on_reject: told of every dropped line.
    """

    def __init__(
        self,
        mode: Mode,
        exchange: str,
        symbols: Iterable[str],
        clock: Clock,
        max_skew_ms: int,
        on_reject: Reject,
    ) -> None:
        self._series = {symbol: Series(mode, exchange, symbol) for symbol in symbols}
        self._clock = clock
        self._max_skew_ms = max_skew_ms
        self._on_reject = on_reject
        self.ticks = 0
        self.last_received: int | None = None
        """When the last good tick was received (Unix ns)."""
        self.timestamps_replaced = 0
        self.rejected: Counter[str] = Counter()

    @property
    def series(self) -> frozenset[Series]:
        """All series that may come out."""
        return frozenset(self._series.values())

    def reject(self, reason: Reason, example: object, count: int = 1) -> None:
        """Count dropped lines by reason."""
        self.rejected[reason] += count
        self._on_reject(reason, count, example)

    def decode(self, chunk: bytes) -> Candles:
        """The candles of a chunk of whole lines. Bad lines are dropped and counted, never raised."""
        return self.fold(_decode_plain(chunk) or self._decode_each(chunk))

    def fold(self, lines: Sequence[Line]) -> Candles:
        """The candles of the good ticks among `lines`, which arrived in this order just now."""
        received = self._clock()
        by_symbol: defaultdict[str, list[Line]] = defaultdict(list)
        for line in lines:
            by_symbol[line.symbol].append(line)
        candles: Candles = {}
        for symbol, group in by_symbol.items():
            if (series := self._series.get(symbol)) is None:
                self.reject("unknown_symbol", symbol, len(group))
            else:
                merge_into(candles, self._fold_series(series, group, received))
        return candles

    def _fold_series(self, series: Series, lines: list[Line], received: int) -> Candles:
        prices = [line.price for line in lines]
        timestamps = [line.timestamp for line in lines]
        times, in_order = self._event_times(timestamps, milliseconds(received))
        if times == in_order:
            candles = _candles(series, prices, times, range(received, received + len(times)))
        else:
            order = sorted(range(len(times)), key=times.__getitem__)
            candles = _candles(series, [prices[i] for i in order], in_order, [received + i for i in order])
        if not all(candle.low > 0 and candle.high <= MAX_PRICE for candle in candles.values()):
            good = [line for line in lines if 0 < line.price <= MAX_PRICE]
            bad = next(price for price in prices if not 0 < price <= MAX_PRICE)
            self.reject("bad_price", bad, len(lines) - len(good))
            return self._fold_series(series, good, received) if good else {}
        self.ticks += len(lines)
        self.last_received = received
        if times is not timestamps:
            self.timestamps_replaced += sum(map(ne, times, timestamps))
        return candles

    def _event_times(self, timestamps: list[int | None], received_at: int) -> tuple[list[int], list[int]]:
        """The timestamps where they can be believed, the time of receipt (Unix ms) elsewhere; and the same in order."""
        earliest, latest = received_at - self._max_skew_ms, received_at + self._max_skew_ms
        if None not in timestamps:
            times = cast("list[int]", timestamps)
            in_order = sorted(times)
            if earliest <= in_order[0] and in_order[-1] <= latest:
                return times, in_order
        times = [at if at is not None and earliest <= at <= latest else received_at for at in timestamps]
        return times, sorted(times)

    def _decode_each(self, chunk: bytes) -> list[Line]:
        return [line for text in chunk.split(b"\n") if (line := self._decode_one(text)) is not None]

    def _decode_one(self, text: bytes) -> Line | None:
        if len(text) > MAX_LINE_BYTES:
            self.reject("too_long", f"{len(text)} bytes")
            return None
        if not text.strip():
            return None  # a heartbeat, as some exchanges send them
        try:
            text.decode()
            return _decode_line(text)
        except UnicodeDecodeError:
            self.reject("malformed", text[:80])
            return None
        except _UNDECODABLE:
            return self._decode_by_field(text)

    def _decode_by_field(self, text: bytes) -> Line | None:
        """A line that is no plain tick: a timestamp that makes no sense is left out, all else is rejected."""
        try:
            fields = _decode_fields(text)
        except _UNDECODABLE:
            self.reject("malformed", text[:80])
        else:
            symbol, price = _field(fields, "symbol", str), _field(fields, "price", float)
            if symbol is not None and price is not None:
                return Line(symbol, price, _field(fields, "timestamp", int))
            self.reject("no_symbol" if symbol is None else "bad_price", text[:80])
        return None


def _field(fields: dict[str, msgspec.Raw], name: str, kind: type[_T]) -> _T | None:
    """The value of a field, None where it is missing or of another type."""
    try:
        return msgspec.json.decode(fields[name], type=kind)
    except (KeyError, *_UNDECODABLE):
        return None


def _decode_plain(chunk: bytes) -> list[Line] | None:
    """All lines of a chunk that has nothing but good ones, None for any other.

    Cheaper for each line than `decode_lines`, which would have to be checked for records that share a line or run over
    several.
    """
    if _has_long_line(chunk):
        return None
    try:
        chunk.decode()  # which msgspec does not check in fields that it skips
        return [*map(_decode_line, chunk.split(b"\n")[:-1])]
    except _UNDECODABLE:
        return None


def _has_long_line(chunk: bytes) -> bool:
    """Whether a line is over MAX_LINE_BYTES, by looking for one newline in every such stretch."""
    start = 0
    while len(chunk) - start > MAX_LINE_BYTES:
        newline = chunk.rfind(b"\n", start, start + MAX_LINE_BYTES + 1)
        if newline < 0:
            return True
        start = newline + 1
    return False


def _candles(series: Series, prices: list[float], times: list[int], sequences: Sequence[int]) -> Candles:
    """The candles of ticks that are sorted by time, one for each slice they fall into."""
    candles: Candles = {}
    begin = 0
    while begin < len(times):
        start = slice_start(times[begin])
        end = len(times) if times[-1] < start + SLICE_MS else bisect_left(times, start + SLICE_MS, begin)
        within = prices[begin:end]
        high, low = max(within), min(within)
        candles[Slot(series, start)] = Candle(
            within[0],
            high,
            low,
            within[-1],
            sum(within),
            end - begin,
            times[begin],
            times[end - 1],
            times[begin + within.index(high)],
            times[begin + within.index(low)],
            sequences[begin],
            sequences[end - 1],
        )
        begin = end
    return candles
