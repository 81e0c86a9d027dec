"""What schemathesis has to be told beside the description of the API."""

import itertools
import os
import re
import zlib
from typing import Any

import schemathesis

from marketflow.api.queries.candle_parameters import TIME_PATTERN, InvalidRange, parse_time
from marketflow.api.queries.period import LONGEST_MS, PATTERN, SECOND_MS, InvalidPeriod, parse_period


@schemathesis.hook
def map_query(context: Any, query: dict[str, Any] | None) -> dict[str, Any] | None:
    """Give a period that is too short or too long another length, and a range that is none another one.

    No JSON Schema can say that a sum must be from 1s to 366d, that there is no 13th month, or that one time must lie
    before another; to schemathesis such a query would be a good one. What happens to it is tested in api/.
    """
    period = query.get("period") if query else None
    if query and isinstance(period, str) and re.fullmatch(PATTERN, period):
        try:
            parse_period(period)
        except InvalidPeriod:
            query["period"] = f"{1 + zlib.crc32(period.encode()) % (LONGEST_MS // SECOND_MS)}s"
    if query:
        _mend_range(query, "from", "to")
        _mend_range(query, "startTime", "endTime")
        _mend_names(context, query)
    return query


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    """Name what is configured: names are strings with examples, and of random ones all would be unknown."""
    if path_parameters:
        _mend_names(context, path_parameters)
    return path_parameters


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Name what is configured in the rule of an alert; what is not is a 404."""
    if isinstance(body, dict):
        _mend_names(context, body)
        if body.get("exchange") == "reference" and body.get("kind") in ("stale", "hole"):
            del body["exchange"]
        for name, value in body.items():
            if isinstance(value, str) and value.endswith("\n"):  # which `$` of Python lets pass
                body[name] = value.rstrip("\n")
    return body


_clients = itertools.count()


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Send each request for another client: one that guesses so many tokens would be refused for a while."""
    number = next(_clients)
    case.headers["X-Forwarded-For"] = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


_unused = os.environ.get("ALERT_RULES", "").split()
"""Ids of rules that none has deleted yet."""


LONGEST_NAME = 32
"""Characters of a symbol or exchange in the rule of an alert."""


def _mend_rule(context: Any, values: dict[str, Any]) -> None:
    if isinstance(values.get("rule"), str) and _unused and zlib.crc32(values["rule"].encode()) % 8:
        values["rule"] = _unused.pop() if context.operation.method.upper() == "DELETE" else _unused[0]


def _mend_names(context: Any, values: dict[str, Any]) -> None:
    _mend_rule(context, values)
    schemas = context.operation.schema.raw_schema["components"]["schemas"]
    for parameter, schema in (("symbol", "Symbol"), ("exchange", "Exchange")):
        # One that is too long is bad on purpose.
        if isinstance(values.get(parameter), str) and len(values[parameter]) <= LONGEST_NAME:
            number = zlib.crc32(values[parameter].encode())
            configured = schemas[schema]["examples"]
            if number % 8:  # some unknown ones are sent as they are
                values[parameter] = configured[number % len(configured)]


NOW_MS = 1_795_262_400_000


def _mend_range(query: dict[str, Any], first: str, last: str) -> None:
    looks_right = {name: query[name] for name in (first, last) if _looks_like_a_time(query.get(name))}
    times = {}
    for name, text in looks_right.items():
        try:
            times[name] = parse_time(name, text, NOW_MS)
        except InvalidRange:
            times[name] = NOW_MS - zlib.crc32(text.encode())
            query[name] = str(times[name])
    if len(times) == 2 and times[first] >= times[last]:
        query[first], query[last] = str(times[last]), str(times[first] + 1)


def _looks_like_a_time(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(TIME_PATTERN, value) is not None
