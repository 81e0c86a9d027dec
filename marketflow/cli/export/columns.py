"""Columns of an export: those of the table, or chosen ones of candles."""

from collections.abc import Sequence
from enum import Enum, auto
from typing import NamedTuple

from marketflow.errors import SettingsError


class Kind(Enum):
    """Type of the values of a column; all but `NUMBERS` are plain in CSV."""

    TEXT = auto()
    TIME = auto()
    NUMBER = auto()
    COUNT = auto()
    VERSION = auto()
    FLAG = auto()
    NUMBERS = auto()


class Column(NamedTuple):
    """Name and type of a column."""

    name: str
    kind: Kind


def _columns(kind: Kind, *names: str) -> list[Column]:
    return [Column(name, kind) for name in names]


TABLE = (
    *_columns(Kind.TEXT, "pair_name", "exchange", "mode"),
    *_columns(Kind.TIME, "timestamp"),
    *_columns(Kind.NUMBER, "average_price", "min_price", "max_price", "open_price", "close_price"),
    *_columns(Kind.COUNT, "tick_count"),
    *_columns(Kind.TIME, "open_at", "close_at", "min_at", "max_at"),
    *_columns(Kind.VERSION, "version"),
    *_columns(Kind.NUMBER, "volume", "turnover", "buy_volume", "buy_turnover"),
    *_columns(Kind.TEXT, "source"),
    *_columns(Kind.FLAG, "verified"),
    *_columns(Kind.NUMBERS, "venue_values"),
)
"""Columns of the table `aggregates`, in its order; new ones are added at the end, for readers by position."""

_CANDLE = (
    *_columns(Kind.TEXT, "exchange", "symbol"),
    *_columns(Kind.TIME, "time"),
    *_columns(Kind.NUMBER, "open", "high", "low", "close", "volume", "turnover", "vwap", "average"),
    *_columns(Kind.COUNT, "ticks"),
    *_columns(Kind.NUMBER, "buy_volume", "buy_turnover"),
    *_columns(Kind.VERSION, "version"),
    *_columns(Kind.TEXT, "source"),
    *_columns(Kind.FLAG, "verified"),
)

CANDLE = {column.name: column for column in _CANDLE}
"""Columns of candles by name, in the order in which they are written if none are chosen."""

OHLCV = ("time", "open", "high", "low", "close", "volume")
"""What `ohlcv` stands for, in the order that tools for back tests expect."""


def chosen_columns(names: Sequence[str]) -> tuple[Column, ...]:
    """Return the columns of candles with these names, in their order; all without names.

    Raises:
        SettingsError: a name is unknown or named twice.
    """
    wanted = [part for name in names for part in (OHLCV if name == "ohlcv" else (name,))]
    for place, name in enumerate(wanted):
        if name not in CANDLE:
            raise SettingsError(f"argument --columns: no such column {name}; there are ohlcv, {', '.join(CANDLE)}")
        if name in wanted[:place]:
            raise SettingsError(f"argument --columns: {name} is named twice")
    return tuple(CANDLE[name] for name in wanted or CANDLE)
