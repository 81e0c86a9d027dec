"""Parses the query parameters of candles: interval, range, limit and format."""

from functools import lru_cache
from http import HTTPStatus
from typing import NamedTuple

from starlette.datastructures import QueryParams

from marketflow.api.openapi.operation import Parameter
from marketflow.api.problems import Problem
from marketflow.api.queries.candles import CandleRequest
from marketflow.time_parsing import PATTERN, is_relative, parse_time_ms

INTERVALS_MS = {
    "1m": 60_000,
    "5m": 5 * 60_000,
    "15m": 15 * 60_000,
    "1h": 60 * 60_000,
    "4h": 4 * 60 * 60_000,
    "1d": 24 * 60 * 60_000,
}
"""Lengths of candles in ms by interval. All divide a day, which begins at midnight UTC."""

DEFAULT_INTERVAL = "1m"
DEFAULT_LIMIT = 500
MOST = 1000

TIME_PATTERN = PATTERN
"""Pattern of a time; whether the day exists is checked apart."""

_TIME = f"^{PATTERN}$"

INTERVAL = Parameter(
    "interval",
    f"Length of a candle; `{DEFAULT_INTERVAL}` without it. Hours and days are those of UTC.",
    {"type": "string", "enum": [*INTERVALS_MS], "default": DEFAULT_INTERVAL},
    (*INTERVALS_MS,),
)
FROM = Parameter(
    "from",
    "Where the range begins, as RFC 3339, as a date (its midnight, UTC), as Unix milliseconds, as `now` or as `-24h` "
    "(a sum of `s`, `m`, `h` and `d` back from now): a candle belongs to it that opens at this time or later. "
    "With it the first `limit` candles from there on are answered, without it the last ones. (A `+` in a query "
    "is written `%2B`.)",
    {"type": "string", "pattern": _TIME},
    ("2026-11-21T00:00:00Z", "2026-11-21", "1795219200000", "-24h"),
)
TO = Parameter(
    "to",
    "Where the range ends, in the same forms: a candle belongs to it that opens before this time. Without it, now.",
    {"type": "string", "pattern": _TIME},
    ("now", "-1h"),
)
LIMIT = Parameter(
    "limit",
    f"How many candles at most; {DEFAULT_LIMIT} without it.",
    {"type": "integer", "minimum": 1, "maximum": MOST, "default": DEFAULT_LIMIT},
    (DEFAULT_LIMIT, 1, MOST),
)
FORMAT = Parameter(
    "format",
    "`array`: each candle as an array in the order of Binance's klines, with null for a volume that is unknown. "
    "Without it, as an object.",
    {"type": "string", "enum": ["array"]},
    ("array",),
)

CANDLE_QUERY = (INTERVAL, FROM, TO, LIMIT, FORMAT)


class InvalidInterval(Problem):
    """The interval is not one of those listed."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_interval"


class InvalidRange(Problem):
    """`from` or `to` is not a time, or `from` is not before `to`."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_range"


class InvalidLimit(Problem):
    """The limit is not a whole number from 1 to 1000."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_limit"


class InvalidFormat(Problem):
    """The format is not one of those listed."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_format"


class CandleQuery(NamedTuple):
    """A parsed query: the name of the interval, the request, and whether candles are answered as arrays."""

    interval: str
    wanted: CandleRequest
    as_arrays: bool


def parse_query(query: bytes, now_ms: int) -> CandleQuery:
    """Parse a query string at a time (Unix ms); of a repeated parameter the last one counts.

    Raises:
        InvalidInterval, InvalidRange, InvalidLimit, InvalidFormat: a parameter is wrong.
    """
    try:
        return _parse_absolute(query)
    except _Relative:
        return _parse(query, now_ms)


class _Relative(Exception):
    """A time of the query is relative to now."""


@lru_cache(maxsize=256)  # requests repeat a few of them
def _parse_absolute(query: bytes) -> CandleQuery:
    given = QueryParams(query)
    if any(is_relative(given.get(name, "")) for name in ("from", "to")):
        raise _Relative  # not cached
    return _parse(query, 0)


def _parse(query: bytes, now_ms: int) -> CandleQuery:
    given = QueryParams(query)
    interval = given.get("interval", DEFAULT_INTERVAL)
    if interval not in INTERVALS_MS:
        raise InvalidInterval(f"The interval is one of {', '.join(INTERVALS_MS)}.")
    since, until = (parse_time(name, given[name], now_ms) if name in given else None for name in ("from", "to"))
    if since is not None and until is not None and since >= until:
        raise InvalidRange("The range ends before it begins: `from` must lie before `to`.")
    limit = parse_limit(given.get("limit"), DEFAULT_LIMIT)
    as_arrays = given.get("format")
    if as_arrays not in (None, "array"):
        raise InvalidFormat("The format is array, or is left out for objects.")
    return CandleQuery(interval, CandleRequest(INTERVALS_MS[interval], since, until, limit), as_arrays is not None)


def parse_time(name: str, text: str, now_ms: int) -> int:
    """Parse a time to Unix ms, rounded up.

    Raises:
        InvalidRange: the text is not a time, or has another unit.
    """
    try:
        return max(0, parse_time_ms(text, now_ms))
    except ValueError as error:
        raise InvalidRange(f"`{name}` {error}. (A + in a query is written %2B.)") from None


def parse_limit(text: str | None, default: int) -> int:
    """Parse a limit.

    Raises:
        InvalidLimit: it is not a whole number from 1 to MOST.
    """
    if text is None:
        return default
    digits = text.lstrip("0") if text.isascii() else ""  # int() refuses thousands of zeros
    if digits.isdecimal() and len(digits) <= len(str(MOST)) and 1 <= int(digits) <= MOST:
        return int(digits)
    raise InvalidLimit(f"The limit is a whole number from 1 to {MOST}.")
