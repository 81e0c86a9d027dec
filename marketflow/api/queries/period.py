"""Parses the parameter `period`: a sum of whole seconds, minutes, hours and days, such as 1m30s or 24h."""

import re
from http import HTTPStatus

from marketflow.api.openapi.operation import Parameter
from marketflow.api.problems import Problem
from marketflow.time_parsing import duration_ms

SECOND_MS = 1_000

SHORTEST_MS = SECOND_MS
LONGEST_MS = 366 * 86_400 * SECOND_MS

# 366 days are eight digits of seconds; the bound limits the work of int() on long digits.
PATTERN = "(0*([0-9]{1,8})([smhd]))+"
"""Pattern of a period; the limits of its length are checked apart."""

_PERIOD = re.compile(PATTERN)

PERIOD = Parameter(
    "period",
    "How far to look back from now: a sum of whole `s`, `m`, `h` and `d` from `1s` to `366d`. Without it the answer is "
    "about everything on record. An empty one is refused; of several the last one counts.",
    {"type": "string", "pattern": f"^{PATTERN}$"},
    ("10s", "1s", "3s", "5s", "30s", "1m", "3m", "5m", "1m30s", "24h", "366d"),
)


class InvalidPeriod(Problem):
    """The period is not a sum of whole s, m, h and d from 1s to 366d."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_period"


def parse_period(text: str) -> int:
    """Return the length of a period in ms.

    Raises:
        InvalidPeriod: the text is not a sum of whole s, m, h and d from 1s to 366d.
    """
    if _PERIOD.fullmatch(text):
        length = duration_ms(text)
        if SHORTEST_MS <= length <= LONGEST_MS:
            return length
    raise InvalidPeriod("A period is a sum of whole s, m, h and d from 1s to 366d, such as 30s, 1m30s or 24h.")
