"""Parses the query parameters of candles: interval, range, limit, fill and format."""

from functools import lru_cache
from http import HTTPStatus
from typing import NamedTuple

from starlette.datastructures import QueryParams

from marketflow.api.openapi.operation import Parameter
from marketflow.api.problems import Problem
from marketflow.api.queries.boundaries import INTERVALS
from marketflow.api.queries.candles import CandleRequest
from marketflow.time_parsing import PATTERN, is_relative, parse_time_ms

DEFAULT_INTERVAL = "1m"
DEFAULT_LIMIT = 500
MOST = 1000

TIME_PATTERN = PATTERN
"""Pattern of a time; whether the day exists is checked apart."""

_TIME = f"^{PATTERN}$"

INTERVAL = Parameter(
    "interval",
    f"Length of a candle; `{DEFAULT_INTERVAL}` without it. In UTC; weeks begin on Monday, months on the 1st.",
    {"type": "string", "enum": [*INTERVALS], "default": DEFAULT_INTERVAL},
    (*INTERVALS,),
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
FILL = Parameter(
    "fill",
    "`previous`: intervals without ticks, between others, are flat candles at the close of the one before, with 0 "
    "ticks and `filled`. Without it they are absent.",
    {"type": "string", "enum": ["previous"]},
    ("previous",),
)
FORMAT = "format"
"""`array` answers what /klines does; the parameter is older than that path."""

CANDLE_QUERY = (INTERVAL, FROM, TO, LIMIT, FILL)

_BINANCE_TIME = "as RFC 3339, as a date (its midnight, UTC), as Unix milliseconds, as `now` or as `-24h`."

BINANCE_QUERY = (
    INTERVAL,
    Parameter("startTime", f"Open time of the first candle, or before, {_BINANCE_TIME}", FROM.schema, FROM.examples),
    Parameter("endTime", f"Open time of the last candle, or after, {_BINANCE_TIME}", TO.schema, TO.examples),
    LIMIT,
)


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


class InvalidFill(Problem):
    """The value of `fill` is not one of those listed."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_fill"


class InvalidFormat(Problem):
    """The value of `format`, which older clients send, is not `array`."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_format"


class CandleQuery(NamedTuple):
    """A parsed query: the name of the interval, and the request."""

    interval: str
    wanted: CandleRequest


def parse_query(query: bytes, now_ms: int) -> CandleQuery:
    """Parse a query string at a time (Unix ms); of a repeated parameter the last one counts.

    Raises:
        InvalidInterval, InvalidRange, InvalidLimit, InvalidFill: a parameter is wrong.
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
    interval = parse_interval(given.get("interval", DEFAULT_INTERVAL))
    since, until = (_time_in(given, name, now_ms) for name in ("from", "to"))
    if since is not None and until is not None and since >= until:
        raise InvalidRange("The range ends before it begins: `from` must lie before `to`.")
    limit = parse_limit(given.get("limit"), DEFAULT_LIMIT)
    fill = given.get("fill")
    if fill not in (None, "previous"):
        raise InvalidFill("What is filled in is previous, the close before, or the parameter is left out.")
    wanted = CandleRequest(INTERVALS[interval], since, until, limit, fill is not None)
    return CandleQuery(interval, wanted)


@lru_cache(maxsize=256)
def wants_arrays(query: bytes) -> bool:
    """Return whether a query string asks for arrays instead of objects.

    Raises:
        InvalidFormat: it asks for something else.
    """
    if (text := QueryParams(query).get(FORMAT)) not in (None, "array"):
        raise InvalidFormat("The format is array, or is left out for objects.")
    return text is not None


def parse_interval(text: str) -> str:
    """Return the interval.

    Raises:
        InvalidInterval: it is not one of those listed.
    """
    if text not in INTERVALS:
        raise InvalidInterval(f"The interval is one of {', '.join(INTERVALS)}.")
    return text


def parse_binance_query(given: QueryParams, now_ms: int) -> CandleRequest:
    """Parse the names of Binance's klines at a time (Unix ms): a candle that opens at `endTime` belongs to the range.

    Raises:
        InvalidInterval, InvalidRange, InvalidLimit: a parameter is wrong.
    """
    interval = parse_interval(given.get("interval", DEFAULT_INTERVAL))
    since, last = (
        parse_time(name, given[name], now_ms) if name in given else None for name in ("startTime", "endTime")
    )
    if since is not None and last is not None and since > last:
        raise InvalidRange("The range ends before it begins: `startTime` must not lie after `endTime`.")
    until = None if last is None else last + 1
    return CandleRequest(INTERVALS[interval], since, until, parse_limit(given.get("limit"), DEFAULT_LIMIT))


def _time_in(given: QueryParams, name: str, now_ms: int) -> int | None:
    return parse_time(name, given[name], now_ms) if name in given else None


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
