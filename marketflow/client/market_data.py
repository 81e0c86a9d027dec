"""Prices and candles as the clients return them. Times are aware datetimes in UTC; prices are in the quote currency."""

from datetime import datetime
from typing import TYPE_CHECKING, Any, get_type_hints

import msgspec

if TYPE_CHECKING:
    import pandas
    import polars


class Price(msgspec.Struct, frozen=True):
    """The newest tick of a series, or of a symbol."""

    symbol: str
    exchange: str
    price: float
    timestamp: datetime


class ReferencePrice(msgspec.Struct, frozen=True):
    """The median of the newest prices of a symbol; `exchanges` is how many count."""

    symbol: str
    price: float
    exchanges: int
    timestamp: datetime


class ExtremePrice(msgspec.Struct, frozen=True, rename={"since": "from", "until": "to"}):
    """The highest or lowest price of a period, and the time of its first occurrence."""

    symbol: str
    exchange: str
    price: float
    timestamp: datetime
    period: str
    since: datetime
    until: datetime


class AveragePrice(msgspec.Struct, frozen=True, rename={"since": "from", "until": "to"}):
    """The mean of all ticks of a period; `exchange` is None over all."""

    symbol: str
    exchange: str | None
    price: float
    ticks: int
    period: str
    since: datetime
    until: datetime


class Candle(msgspec.Struct, frozen=True):
    """The ticks of one interval, which begins at `time`; None is what is not known.

    `closed` is true once no tick that would be accepted can change it, `version` is raised by each later correction.
    """

    time: datetime
    open: float
    high: float
    low: float
    close: float
    average: float | None
    ticks: int | None
    volume: float | None
    turnover: float | None
    vwap: float | None
    buy_volume: float | None
    buy_turnover: float | None
    closed: bool
    version: int
    source: str
    complete: bool | None
    verified: bool | None


class LiveCandle(Candle, frozen=True):
    """A candle of the stream, and whose it is; `exchange` is None over all."""

    symbol: str
    exchange: str | None
    interval: str

    @property
    def series(self) -> tuple[str, str | None, str]:
        """What tells its series from others."""
        return self.symbol, self.exchange, self.interval


class CandleList(list[Candle]):
    """Candles, the oldest first."""

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a DataFrame of pandas, indexed by `time`, a column for each other field.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas  # no dependency of MarketFlow

        frame = pandas.DataFrame.from_records(self._records(), columns=[*_KINDS])
        return frame.astype({name: kinds[0] for name, kinds in _KINDS.items()}).set_index("time")

    def to_polars(self) -> "polars.DataFrame":
        """Return a DataFrame of polars, a column for each field.

        Raises:
            ImportError: polars is not installed.
        """
        import polars  # no dependency of MarketFlow

        types = {name: getattr(polars, kinds[1]) for name, kinds in _KINDS.items()}
        return polars.DataFrame(self._records(), schema=types | {"time": polars.Datetime("ms", "UTC")})

    def _records(self) -> list[dict[str, Any]]:
        return [msgspec.structs.asdict(candle) for candle in self]


_FLOAT, _INT, _BOOL, _TEXT = (
    ("float64", "Float64"),
    ("Int64", "Int64"),
    ("boolean", "Boolean"),
    ("object", "String"),
)
_TYPES = {float: _FLOAT, float | None: _FLOAT, int: _INT, int | None: _INT, bool: _BOOL, bool | None: _BOOL, str: _TEXT}
_KINDS = {name: _TYPES.get(kind, ("datetime64[ms, UTC]", "Datetime")) for name, kind in get_type_hints(Candle).items()}
"""Names of the types of pandas and polars, by field. Given, because a column may hold nothing but None."""
