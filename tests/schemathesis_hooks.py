"""What schemathesis has to be told beside the description of the API."""

import re
import zlib
from typing import Any

import schemathesis

from marketflow.api.period import LONGEST_MS, PATTERN, SECOND_MS, InvalidPeriod, parse_period


@schemathesis.hook
def map_query(context: Any, query: dict[str, Any] | None) -> dict[str, Any] | None:
    """Give a period that is too short or too long another length.

    No JSON Schema can say that a sum must be from 1s to 366d; to schemathesis such a period would be a good one. What
    happens to it is tested in api/test_period.py.
    """
    period = query.get("period") if query else None
    if query and isinstance(period, str) and re.fullmatch(PATTERN, period):
        try:
            parse_period(period)
        except InvalidPeriod:
            query["period"] = f"{1 + zlib.crc32(period.encode()) % (LONGEST_MS // SECOND_MS)}s"
    return query
