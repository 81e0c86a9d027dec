"""How the cache is laid out in Redis: the keys, and candles as JSON arrays. Shared by its writer and its reader.

A candle of one tick, which at human rates every slice is, says all in its price, time and sequence: it is stored as
that tick. There is but one version of it, so writing it again changes nothing.

Every key of a series carries it as hash tag, so that a cluster keeps them together. A sorted set holds a slot once: the
score is the start of the slice or minute in Unix ms, the member the candle. Should two versions of a slot meet all the
same, the more complete one counts.
"""

from collections import Counter
from collections.abc import Iterable
from math import isfinite

import msgspec
from loguru import logger

from marketflow.logs import RateLimit
from marketflow.model import MINUTE_MS, Candle, Series, Slot, Tick, candle_of, more_complete
from marketflow.stores.ports import MINUTES_KEPT_MS, RECENT_MS

# A minute longer than any reader asks for, since a recovery begins with the whole minute.
WINDOW_KEPT_MS = RECENT_MS + MINUTE_MS

# Scores are starts: the minute that ended a day ago began a minute before that.
MINUTES_TRIMMED_MS = MINUTES_KEPT_MS + 2 * MINUTE_MS

LATEST_FIELDS = ("price", "timestamp", "sequence")

ARCHIVED_KEY = "marketflow:{archive}:until"
"""Start of a minute (Unix ms) before which PostgreSQL has every row."""

SERIES_KEY = "marketflow:{archive}:series"
"""Sorted set of the series written here, by when they were last configured: what was removed since is still found.

It is there all the time; where it is not, all the rest has gone as well."""

NEWEST_CHANNEL = "marketflow:{changes}:newest"
"""Where newest ticks are announced as they are written: a JSON array of [series, tick]."""

SLICES_CHANNEL = "marketflow:{changes}:slices"
MINUTES_CHANNEL = "marketflow:{changes}:minutes"
"""Where slices and closed minutes are announced as they are written: a JSON array of [[series, start], candle]."""

LEASE_KEY = "marketflow:{control}:lease"
"""Which process takes ticks: its run; empty where one has just given it back."""

STATE_KEY = "marketflow:{control}:state"
"""How that process does, and the channel on which it says so."""

MODE_KEY = "marketflow:{control}:mode"
"""The mode that runs, or ran last."""

COMMANDS_KEY = "marketflow:{control}:commands"
"""List of the ids of commands to that process."""

EXPIRY_MS = MINUTES_TRIMMED_MS
"""How long slices and minutes outlive the last write: what a crash left is found again a day later."""

LATEST_MS = 7_258_118_400_000
"""The year 2200 (Unix ms): what is later nobody of us wrote."""

MOST_TICKS = 2**63 - 1

_encode = msgspec.json.Encoder().encode
_decode_candle = msgspec.json.Decoder(Candle).decode
_decode_tick = msgspec.json.Decoder(Tick).decode
encode_series = _encode
_decode_series = msgspec.json.Decoder(Series).decode
encode_announcement = msgspec.json.Encoder().encode
decode_newest = msgspec.json.Decoder(list[tuple[Series, Tick]]).decode
decode_announced = msgspec.json.Decoder(list[tuple[Slot, msgspec.Raw]]).decode


def channel(name: str, db: int) -> str:
    """The channel of that name for one database: Redis itself has the same channels for all of them."""
    return f"{name}:{db}" if db else name


def latest_key(series: Series) -> str:
    """Hash: price, timestamp (Unix ms), received (Unix ms), sequence (order of arrival, Unix ns)."""
    return _key(series, "latest")


def window_key(series: Series) -> str:
    """Sorted set of the slices of the last minutes."""
    return _key(series, "window")


def minutes_key(series: Series) -> str:
    """Sorted set of a day of closed minutes."""
    return _key(series, "minutes")


def run_key(run: str) -> str:
    """A key each run keeps alive: when it is gone, so is all the run had written."""
    return f"marketflow:{{run:{run}}}:alive"


def command_key(command: str) -> str:
    """What a command asks for; gone once it is too late for it."""
    return f"marketflow:{{control}}:command:{command}"


def reply_key(command: str) -> str:
    """List with the one reply to a command."""
    return f"marketflow:{{control}}:reply:{command}"


def _key(series: Series, kind: str) -> str:
    return f"marketflow:{{{series.mode}:{series.exchange}:{series.symbol}}}:{kind}"


def encode_candle(candle: Candle) -> bytes:
    """A candle as a member of a sorted set."""
    if candle.ticks == 1 and candle == candle_of(candle.newest):
        return _encode(candle.newest)
    return _encode(candle)


def decode_candle(member: bytes) -> Candle:
    """The candle of a member.

    Raises:
        msgspec.MsgspecError: this version cannot read it.
    """
    return candle_of(_decode_tick(member)) if member.count(b",") == 2 else _decode_candle(member)


def is_sound(candle: Candle) -> bool:
    """Whether a candle can be answered with and added up, whoever wrote it."""
    numbers = (candle.open, candle.high, candle.low, candle.close, candle.total)
    times = (candle.first_at, candle.last_at, candle.high_at, candle.low_at)
    return 0 < candle.ticks <= MOST_TICKS and all(map(isfinite, numbers)) and all(0 <= at < LATEST_MS for at in times)


class OddEntries:
    """Counts what another program, or another version, has put into Redis and is left out; logs it by kind.

    For any number of threads: a count may miss one of two that come at the same moment.
    """

    def __init__(self, seconds: float = 60.0) -> None:
        self._limit = RateLimit(seconds)
        self.counts: Counter[str] = Counter()

    def note(self, kind: str, entry: object) -> None:
        """Count an entry that is left out, and log it at most once a minute for each kind."""
        self.counts[kind] += 1
        if self._limit.admit(kind) is not None:
            text = "an entry of Redis is left out, it is not one of MarketFlow's kind={} so_far={} entry={!r:.200}"
            logger.warning(text, kind, self.counts[kind], entry)


odd_entries = OddEntries()
"""Those that this process has met."""


def sound_candle(kind: str, member: bytes) -> Candle | None:
    """The candle of a member; None, counted and logged, for one that cannot be read or added up."""
    try:
        if is_sound(candle := decode_candle(member)):
            return candle
    except msgspec.MsgspecError:
        pass  # left out like one that is not sound
    odd_entries.note(kind, member)
    return None


def is_sound_tick(tick: Tick) -> bool:
    """Whether a tick can be answered with, whoever wrote it."""
    return isfinite(tick.price) and 0 <= tick.at < LATEST_MS and 0 <= tick.sequence < 2**63


def decode_slots(entries: Iterable[tuple[bytes, float]]) -> dict[int, Candle]:
    """Members with their scores as candles by start. What this version cannot read is left out."""
    slots: dict[int, Candle] = {}
    for member, score in entries:
        if not 0 <= score < LATEST_MS:
            odd_entries.note("time of a slot", (member, score))
            continue
        if (candle := sound_candle("slot", member)) is None:
            continue
        start = int(score)
        slots[start] = more_complete(slots[start], candle) if start in slots else candle
    return slots


def decode_series(entries: Iterable[tuple[bytes, float]]) -> set[Series]:
    """The series of SERIES_KEY, from its members with their scores. What this version cannot read is left out."""
    series: set[Series] = set()
    for member, _ in entries:
        try:
            series.add(_decode_series(member))
        except msgspec.MsgspecError:
            odd_entries.note("series", member)
    return series


def decode_latest(fields: list[bytes | None]) -> Tick | None:
    """The values of LATEST_FIELDS as a tick, None where the key has gone or this version cannot read it."""
    price, timestamp, sequence = fields
    if price is None or timestamp is None or sequence is None:
        return None
    try:
        tick: Tick | None = Tick(float(price), int(timestamp), int(sequence))
    except ValueError:
        tick = None
    if tick is not None and is_sound_tick(tick):
        return tick
    odd_entries.note("newest price", fields)
    return None


def decode_start(value: bytes | None) -> int:
    """A time in Unix ms, 0 where there is none that this version can read."""
    if value is None:
        return 0
    if value.isdigit() and len(value) <= len(str(LATEST_MS)):  # int() refuses thousands of digits
        return int(value)
    odd_entries.note("mark of the archive", value)
    return 0
