"""Parses the query parameters of /feeds and /holes: exchange, symbol, state, from, limit and offset."""

from http import HTTPStatus
from typing import NamedTuple

from starlette.datastructures import QueryParams

from marketflow.api.openapi.operation import EXCHANGE_SCHEMA, SYMBOL_SCHEMA, Parameter
from marketflow.api.problems import Problem
from marketflow.api.queries.candle_parameters import MOST, TIME_PATTERN, parse_limit, parse_time
from marketflow.api.queries.names import NameLookup
from marketflow.cluster.messages import FeedsQuery
from marketflow.model import HoleState, Mode
from marketflow.stores.ports import HoleQuery

FEEDS_LIMIT = 500
HOLES_LIMIT = 100

MOST_OFFSET_DIGITS = 9

EXCHANGE = Parameter("exchange", "One exchange only; upper and lower case are the same.", EXCHANGE_SCHEMA)
SYMBOL = Parameter("symbol", "One symbol only; upper and lower case are the same.", SYMBOL_SCHEMA)
STATE = Parameter(
    "state", "Holes in this state only.", {"type": "string", "enum": [state.value for state in HoleState]}, ("open",)
)
FROM = Parameter(
    "from",
    "Holes that end at this time or later only: as RFC 3339, as a date (its midnight, UTC), as Unix milliseconds, as "
    "`now` or as `-24h`. (A `+` in a query is written `%2B`.)",
    {"type": "string", "pattern": f"^{TIME_PATTERN}$"},
    ("2026-11-21T00:00:00Z", "-24h"),
)
OFFSET = Parameter(
    "offset",
    "How many series to skip; `next_offset` of the page before.",
    {"type": "integer", "minimum": 0, "maximum": 10**MOST_OFFSET_DIGITS - 1, "default": 0},
    (0, 500),
)


def _limit(what: str, default: int) -> Parameter:
    schema = {"type": "integer", "minimum": 1, "maximum": MOST, "default": default}
    return Parameter("limit", f"How many {what} at most; {default} without it.", schema, (default, 1, MOST))


FEEDS_QUERY = (EXCHANGE, SYMBOL, _limit("series", FEEDS_LIMIT), OFFSET)
HOLES_QUERY = (EXCHANGE, SYMBOL, STATE, FROM, _limit("holes", HOLES_LIMIT))


class InvalidState(Problem):
    """The state is not one of those of a hole."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_state"


class InvalidOffset(Problem):
    """The offset is not a whole number."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_offset"


class _Names(NamedTuple):
    exchange: str | None
    symbol: str | None


def feeds_query(given: QueryParams, names: NameLookup) -> FeedsQuery:
    """Parse the query of /feeds.

    Raises:
        UnknownExchange, UnknownSymbol, InvalidLimit, InvalidOffset: a parameter is wrong.
    """
    exchange, symbol = _names(given, names)
    return FeedsQuery(parse_limit(given.get("limit"), FEEDS_LIMIT), _offset(given.get("offset")), exchange, symbol)


def holes_query(given: QueryParams, names: NameLookup, mode: Mode, now_ms: int) -> HoleQuery:
    """Parse the query of /holes at a time (Unix ms).

    Raises:
        UnknownExchange, UnknownSymbol, InvalidState, InvalidRange, InvalidLimit: a parameter is wrong.
    """
    exchange, symbol = _names(given, names)
    limit = parse_limit(given.get("limit"), HOLES_LIMIT)
    since = parse_time("from", given["from"], now_ms) if "from" in given else None
    return HoleQuery(mode, limit, exchange, symbol, _state(given.get("state")), since)


def _names(given: QueryParams, names: NameLookup) -> _Names:
    exchange, symbol = given.get("exchange"), given.get("symbol")
    return _Names(
        None if exchange is None else names.exchange(exchange), None if symbol is None else names.symbol(symbol)
    )


def _state(text: str | None) -> HoleState | None:
    if text is None:
        return None
    try:
        return HoleState(text)
    except ValueError:
        raise InvalidState(f"The state is one of {', '.join(HoleState)}.") from None


def _offset(text: str | None) -> int:
    if text is None:
        return 0
    digits = text.lstrip("0") if text.isascii() else ""
    if text.isdecimal() and text.isascii() and len(digits) <= MOST_OFFSET_DIGITS:
        return int(digits or "0")
    raise InvalidOffset(f"The offset is a whole number from 0 to {10**MOST_OFFSET_DIGITS - 1}.")
