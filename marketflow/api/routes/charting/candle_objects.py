"""Candles as they are answered and streamed."""

from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta, structs

from marketflow.api.queries.boundaries import INTERVALS
from marketflow.api.queries.candles import CandleRows
from marketflow.api.queries.known_holes import Span, touched
from marketflow.api.rendering import Time, rfc3339
from marketflow.api.routes.charting.candle_values import UNKNOWN, Amount, Price, number_of_ticks, traded
from marketflow.model import Source

Interval = Annotated[str, Meta(description="Length of a candle.", extra_json_schema={"enum": [*INTERVALS]})]


class VenueCandle(msgspec.Struct, frozen=True, rename={"opening": "open"}):
    """A minute as the venue has it; null is what it does not say."""

    opening: Price
    high: Price
    low: Price
    close: Price
    volume: Amount | None
    turnover: Amount | None
    ticks: int | None


class CandleAnswer(msgspec.Struct, frozen=True, rename={"opening": "open"}):
    """The ticks of one interval."""

    time: Annotated[Time, Meta(description="Opening time; identifies the candle.")]
    opening: Annotated[Price, Meta(description="The first price.")]
    high: Annotated[Price, Meta(description="The highest price.")]
    low: Annotated[Price, Meta(description="The lowest price.")]
    close: Annotated[Price, Meta(description="The last price; the newest one in the running candle.")]
    average: Annotated[Price | None, Meta(description=f"The mean of all ticks; {UNKNOWN}")]
    ticks: Annotated[
        Annotated[int, Meta(ge=0)] | None, Meta(description=f"Number of ticks or trades; {UNKNOWN}", examples=[5580])
    ]
    volume: Annotated[Amount | None, Meta(description=f"What was traded, in the base currency; {UNKNOWN}")]
    turnover: Annotated[Amount | None, Meta(description=f"The same in the quote currency; {UNKNOWN}")]
    vwap: Annotated[Price | None, Meta(description="Turnover by volume: the mean price of what was traded, or null.")]
    buy_volume: Annotated[Amount | None, Meta(description=f"The part of the volume that takers bought; {UNKNOWN}")]
    buy_turnover: Annotated[Amount | None, Meta(description=f"The same of the turnover; {UNKNOWN}")]
    closed: Annotated[bool, Meta(description="True once no tick that would be accepted can change it.")]
    version: Annotated[int, Meta(ge=1, description="Raised by each correction of a closed candle.", examples=[1])]
    source: Annotated[Source, Meta(description="Made of ticks, or the venue's own candle (of several, if any is).")]
    complete: Annotated[
        bool | None,
        Meta(
            description="False where trades are known to be missing, see `/holes`; true where the venue's own candles "
            "are the same; else null."
        ),
    ]
    verified: Annotated[
        bool | None, Meta(description="Whether the venue's own candles are the same; null while that is unknown.")
    ]
    venue: Annotated[VenueCandle | None, Meta(description="The venue's own candle of a minute that differs from it.")]
    filled: Annotated[bool, Meta(description="True where there was no tick, and `fill` asked for the close before.")]


def candle_objects(rows: CandleRows, holes: Iterable[Span]) -> list[CandleAnswer]:
    """Return the candles of a query, in order; those that a hole touches are not complete."""
    incomplete = touched(holes, [*rows.candles], rows.grid.end_of)
    return [
        CandleAnswer(
            rfc3339(start),
            candle.open,
            candle.high,
            candle.low,
            candle.close,
            candle.average,
            number_of_ticks(rows, start),
            *traded(rows, start, incomplete),
            rows.closed(start),
            candle.version,
            candle.source,
            False if start in incomplete else candle.verified or None,
            candle.verified,
            None if candle.venue is None else VenueCandle(*structs.astuple(candle.venue)),
            start in rows.filled,
        )
        for start, candle in rows.candles.items()
    ]


def with_vwap_of_all(candle: CandleAnswer) -> CandleAnswer:
    """Return a candle of the reference price with the vwap of all trades."""
    # A candle keeps its vwap between its low and high, which are medians here: that of all trades may lie outside.
    if candle.turnover is None or not candle.volume:
        return candle
    return structs.replace(candle, vwap=candle.turnover / candle.volume)
