"""Candles, ticks and series as the members and messages of the cache, and the validation of what is read back.

A candle is a JSON array. A candle of one tick, as every slice is at human rates, is stored as that tick: price, time
and sequence, and where they are known its quantity and whether its taker bought. It has only one version, so writing it
again changes nothing. Entries of versions without quantities are read as such.

Other programs and other versions may write to the same Redis. An entry that cannot be decoded, or is no valid candle,
is skipped, counted and logged.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from math import inf, isfinite

import msgspec
from loguru import logger

from marketflow.logs import RateLimit
from marketflow.model import Amounts, Candle, Series, Slot, Tick, candle_of, put_more_complete

LATEST_MS = 7_258_118_400_000
"""The year 2200 (Unix ms): MarketFlow writes no later time."""

MOST_TICKS = 2**63 - 1

_TICK_COMMAS, _TRADE_COMMAS = 2, 4


class _Trade(msgspec.Struct, array_like=True):
    """A tick with its quantity, as a member; `bought` is None where the side is unknown."""

    price: float
    at: int
    sequence: int
    quantity: float
    bought: bool | None


encode_series = encode_times = _encode = msgspec.json.Encoder().encode
_decode_candle = msgspec.json.Decoder(Candle).decode
_decode_tick = msgspec.json.Decoder(Tick).decode
_decode_trade = msgspec.json.Decoder(_Trade).decode
_decode_times = msgspec.json.Decoder(dict[str, int]).decode
_decode_series = msgspec.json.Decoder(Series).decode
decode_newest = msgspec.json.Decoder(list[tuple[Series, Tick]]).decode
decode_announced = msgspec.json.Decoder(list[tuple[Slot, msgspec.Raw]]).decode


class WrittenKey(msgspec.Struct, gc=False):
    """What a writer knows of the key of a series.

    Args:
        key: its name.
        series: the series as JSON.
        renewed_at: when its expiry was renewed (Unix ms), or by which time it was trimmed.
    """

    key: bytes
    series: bytes
    renewed_at: int = 0


class WrittenKeys(dict[Series, WrittenKey]):
    """The keys of one kind by series; the names are formatted once, which takes half as long as a write.

    Args:
        key_of: returns the key of a series.
    """

    def __init__(self, key_of: Callable[[Series], str]) -> None:
        super().__init__()
        self._key_of = key_of

    def __missing__(self, series: Series) -> WrittenKey:
        found = self[series] = WrittenKey(self._key_of(series).encode(), encode_series(series))
        return found


def encode_ticks(ticks: Sequence[Tick]) -> tuple[list[bytes], list[bytes]]:
    """Return the JSON of each tick without its brackets, and price, time and sequence of each in turn.

    All ticks are encoded at once, which takes a third of the time of one by one.
    """
    joined = _encode(ticks)[2:-2]
    return joined.split(b"],["), joined.replace(b"],[", b",").split(b",")


def announcement(published: Iterable[bytes]) -> bytes:
    """Return the message that publishes several items, each given as JSON."""
    return b"[%b]" % b",".join(published)


class InvalidEntries:
    """Counts the entries of Redis that are skipped, and logs them by kind.

    For any number of threads: of two that count at the same moment one may be lost.
    """

    def __init__(self, seconds: float = 60.0) -> None:
        self._limit = RateLimit(seconds)
        self.counts: Counter[str] = Counter()

    def note(self, kind: str, entry: object) -> None:
        """Count a skipped entry, and log it at most once a minute for each kind."""
        self.counts[kind] += 1
        if self._limit.admit(kind) is not None:
            text = "an entry of Redis is left out, it is not one of MarketFlow's kind={} so_far={} entry={!r:.200}"
            logger.warning(text, kind, self.counts[kind], entry)


invalid_entries = InvalidEntries()
"""The entries that this process has skipped."""


def encode_candle(candle: Candle) -> bytes:
    """A candle as a member of a sorted set."""
    if candle.ticks == 1:
        if candle.amounts is None:
            price, at, sequence = candle.close, candle.last_at, candle.last_sequence
            if candle == Candle(price, price, price, price, price, 1, at, at, at, at, sequence, sequence):
                return _encode((price, at, sequence))  # without a Tick, which would take half of the time
        elif candle == _candle_of_trade(trade := _trade_of(candle, candle.amounts)):
            return _encode(trade)
    return _encode(candle)


def decode_candle(member: bytes) -> Candle:
    """The candle of a member.

    Raises:
        msgspec.MsgspecError: this version cannot decode it.
    """
    commas = member.count(b",")
    if commas == _TICK_COMMAS:
        return candle_of(_decode_tick(member))
    return _candle_of_trade(_decode_trade(member)) if commas == _TRADE_COMMAS else _decode_candle(member)


def _trade_of(candle: Candle, amounts: Amounts) -> _Trade:
    """The trade that a candle of one tick may stand for."""
    bought = None if amounts.buy_volume is None else amounts.buy_volume > 0
    return _Trade(candle.close, candle.last_at, candle.last_sequence, amounts.volume, bought)


def _candle_of_trade(trade: _Trade) -> Candle:
    price, at, sequence, volume = trade.price, trade.at, trade.sequence, trade.quantity
    turnover = price * volume
    bought = (None, None) if trade.bought is None else (volume, turnover) if trade.bought else (0.0, 0.0)
    amounts = Amounts(volume, turnover, *bought)
    return Candle(price, price, price, price, price, 1, at, at, at, at, sequence, sequence, 1, amounts)


def is_valid_candle(candle: Candle) -> bool:
    """Whether all numbers are finite and all times and counts are within their limits."""
    numbers = (candle.open, candle.high, candle.low, candle.close, candle.total)
    times = (candle.first_at, candle.last_at, candle.high_at, candle.low_at)
    fewest = 0 if candle.source == "venue" else 1
    return (
        fewest <= candle.ticks <= MOST_TICKS
        and all(map(isfinite, numbers))
        and all(0 <= at < LATEST_MS for at in times)
        and (candle.amounts is None or _are_valid(candle.amounts))
    )


def _are_valid(amounts: Amounts) -> bool:
    known = (amounts.volume, amounts.turnover, amounts.buy_volume, amounts.buy_turnover)
    return all(amount is None or 0 <= amount < inf for amount in known)


def is_valid_tick(tick: Tick) -> bool:
    """Whether the price is finite, and time and sequence are within their limits."""
    return isfinite(tick.price) and 0 <= tick.at < LATEST_MS and 0 <= tick.sequence < 2**63


def valid_candle(kind: str, member: bytes) -> Candle | None:
    """The candle of a member; None, counted and logged, for an invalid one."""
    try:
        if is_valid_candle(candle := decode_candle(member)):
            return candle
    except msgspec.MsgspecError:
        pass  # invalid as well
    invalid_entries.note(kind, member)
    return None


def valid_slot(start: int, member: msgspec.Raw) -> Candle | None:
    """The candle of a published slot; None, counted and logged, for an invalid one."""
    if 0 <= start < LATEST_MS:
        return valid_candle("announced slot", bytes(member))
    invalid_entries.note("announced slot", (start, bytes(member)))
    return None


def valid_ticks(published: list[tuple[Series, Tick]]) -> list[tuple[Series, Tick]]:
    """Published newest ticks without the invalid ones, which are counted and logged."""
    if all(is_valid_tick(tick) for _, tick in published):
        return published
    for each in published:
        if not is_valid_tick(each[1]):
            invalid_entries.note("announced price", each)
    return [each for each in published if is_valid_tick(each[1])]


def decode_slots(entries: Iterable[tuple[bytes, float]]) -> dict[int, Candle]:
    """Members with their scores as candles by start; of two versions of a slot the more complete one."""
    slots: dict[int, Candle] = {}
    for member, score in entries:
        if not 0 <= score < LATEST_MS:
            invalid_entries.note("time of a slot", (member, score))
            continue
        if (candle := valid_candle("slot", member)) is None:
            continue
        put_more_complete(slots, int(score), candle)
    return slots


def decode_series(entries: Iterable[tuple[bytes, float]]) -> set[Series]:
    """The series of SERIES_KEY, from its members with their scores."""
    series: set[Series] = set()
    for member, _ in entries:
        try:
            series.add(_decode_series(member))
        except msgspec.MsgspecError:
            invalid_entries.note("series", member)
    return series


def decode_latest(fields: list[bytes | None]) -> Tick | None:
    """The values of LATEST_FIELDS as a tick; None where the key is missing or its value is invalid."""
    price, timestamp, sequence = fields
    if price is None or timestamp is None or sequence is None:
        return None
    try:
        tick: Tick | None = Tick(float(price), int(timestamp), int(sequence))
    except ValueError:
        tick = None
    if tick is not None and is_valid_tick(tick):
        return tick
    invalid_entries.note("newest price", fields)
    return None


def decode_times(value: bytes | None) -> dict[str, int]:
    """Times (Unix ms) by name; none where they are missing or invalid."""
    try:
        return {} if value is None else _decode_times(value)
    except msgspec.MsgspecError:
        invalid_entries.note("times", value)
        return {}


def decode_start(value: bytes | None) -> int:
    """A time in Unix ms; 0 where it is missing or invalid."""
    if value is None:
        return 0
    if value.isdigit() and len(value) <= len(str(LATEST_MS)):  # int() refuses thousands of digits
        return int(value)
    invalid_entries.note("mark of the archive", value)
    return 0
