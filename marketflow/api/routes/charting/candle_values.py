"""What the answers with candles share: their values, problems, and headers of those that may be cached."""

from collections.abc import Container
from hashlib import blake2b
from typing import Annotated, NamedTuple

from msgspec import Meta, structs
from starlette.requests import Request
from starlette.responses import Response

from marketflow.api.openapi.operation import Tag
from marketflow.api.problems import ServiceUnavailable, TooManyRequests, UnknownSymbol
from marketflow.api.queries.candle_parameters import InvalidFill, InvalidInterval, InvalidLimit, InvalidRange
from marketflow.api.queries.candles import CandleRows
from marketflow.api.rendering import ALWAYS, JSONAnswer, has_etag
from marketflow.model import rounded

MAX_AGE_SECONDS = 60
"""Time for which a client may cache a settled answer.

Short, because the mode may be switched and a minute in the backlog may still arrive; revalidation costs a 304.
"""

_KEPT = f"max-age={MAX_AGE_SECONDS}"

Price = Annotated[float, Meta(gt=0, examples=[67432.14])]
Amount = Annotated[float, Meta(ge=0, examples=[12.5])]
UNKNOWN = "null where it is unknown, which is not zero."

CANDLES = Tag("candles", "Open, high, low and close from a minute to a month, in the mode that runs.")


CANDLE_PROBLEMS = (
    InvalidInterval,
    InvalidRange,
    InvalidLimit,
    InvalidFill,
    UnknownSymbol,
    ServiceUnavailable,
    TooManyRequests,
)


class Traded(NamedTuple):
    """What was traded, as it is answered."""

    volume: float | None = None
    turnover: float | None = None
    vwap: float | None = None
    buy_volume: float | None = None
    buy_turnover: float | None = None


def traded(rows: CandleRows, start: int, incomplete: Container[int]) -> Traded:
    """Return what was traded in a candle; unknown where one without ticks misses some."""
    candle = rows.candles[start]
    if candle.amounts is None or (start in rows.filled and start in incomplete):
        return Traded()
    volume, turnover, *bought = (each if each is None else rounded(each) for each in structs.astuple(candle.amounts))
    return Traded(volume, turnover, candle.vwap, *bought)


def number_of_ticks(rows: CandleRows, start: int) -> int | None:
    """Return the number of ticks of a candle; None where a venue does not say it."""
    return 0 if start in rows.filled else rows.candles[start].ticks or None


def cached_answer(request: Request, answer: object, rows: CandleRows) -> Response:
    """Return the response; with its ETag if the range is over, or 304 if the client has the same one."""
    response = JSONAnswer(answer)
    if not rows.settled:
        return response
    # Weak, because the compressed response has the same one.
    tag = f'W/"{blake2b(bytes(response.body), digest_size=16).hexdigest()}"'
    headers = {**ALWAYS, "cache-control": _KEPT, "etag": tag}
    if has_etag(request, tag):
        return Response(status_code=304, headers=headers)
    response.headers.update(headers)
    return response
