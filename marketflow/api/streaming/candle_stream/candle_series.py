"""Choices of candles: which intervals of which symbols, on which exchanges."""

from collections.abc import Iterable
from http import HTTPStatus
from typing import NamedTuple

from marketflow.api.problems import Problem
from marketflow.api.queries.candle_parameters import DEFAULT_INTERVAL, parse_interval
from marketflow.api.queries.names import NameLookup

MOST_CANDLE_SERIES = 500
"""Candle series of one subscription: a snapshot of them is half a megabyte."""


class TooManySeries(Problem):
    """There are more candle series than one subscription may have."""

    status = HTTPStatus.BAD_REQUEST
    code = "too_many_series"


class CandleSeries(NamedTuple):
    """The candles of one interval of a symbol, by configured names.

    Args:
        exchange: on which one; `reference` for the median over all, None for all of them merged.
        symbol: of the candles.
        interval: length of a candle.
    """

    exchange: str | None
    symbol: str
    interval: str


class CandleSlot(NamedTuple):
    """One candle of a series, by the time at which it opens (Unix ms)."""

    series: CandleSeries
    start: int


def candle_series_of(
    names: NameLookup, exchanges: Iterable[str], symbols: Iterable[str], intervals: Iterable[str]
) -> frozenset[CandleSeries]:
    """Return the candle series of these names, in any case, and intervals.

    Args:
        names: the configured names.
        exchanges: without any, all exchanges merged.
        symbols: without any, all configured ones.
        intervals: without any, the default one.

    Raises:
        UnknownExchange: an exchange is not configured.
        UnknownSymbol: a symbol is not configured.
        InvalidInterval: an interval is not one of those listed.
        TooManySeries: together they are too many.
    """
    wanted: tuple[set[str | None], set[str], set[str]] = (
        {names.exchange_or_reference(name) for name in exchanges} or {None},
        {names.symbol(name) for name in symbols} or {*names.symbols},
        {parse_interval(text) for text in intervals} or {DEFAULT_INTERVAL},
    )
    found = frozenset(
        CandleSeries(exchange, symbol, interval)
        for exchange in wanted[0]
        for symbol in wanted[1]
        for interval in wanted[2]
    )
    refuse_too_many(found)
    return found


def refuse_too_many(chosen: frozenset[CandleSeries]) -> None:
    """Check the number of candle series of a subscription.

    Raises:
        TooManySeries: they are too many.
    """
    if len(chosen) > MOST_CANDLE_SERIES:
        raise TooManySeries(
            f"Symbols by exchanges by intervals are {len(chosen)} candle series; {MOST_CANDLE_SERIES} are allowed."
        )
