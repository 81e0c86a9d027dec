"""Conversion between candles and rows of `aggregates`, and connection keywords: shared by writer and reader."""

from collections.abc import Iterable
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any

import msgspec
from msgspec import structs

from marketflow.model import Amounts, Candle, Series, Slot, Source, VenueValues, rounded

CONNECT_SECONDS = 2

OLDEST_MS, END_MS = 0, 7_258_118_400_000
"""Rows before the first and from the second time on (Unix ms, 1970 and 2200) are invalid (ddl/0005)."""

FIRST_PARTITION = "aggregates_before"
"""Name of the former table where the minutes have daily partitions, and of the constraint on its times."""

VENUE_VALUES = len(VenueValues.__struct_fields__)

HOUR_MS = 60 * 60_000
DAY_MS = 24 * HOUR_MS
"""Length of a day of UTC, for which there is a daily candle."""


def connection_keywords(
    host: str,
    port: int,
    user: str,
    password: str,
    dbname: str,
    sslmode: str | None = None,
    sslrootcert: str = "",
    schema: str = "public",
    prepared_statements: bool = True,
) -> dict[str, Any]:
    """Keywords for session_keywords. Never a DSN: one that does not parse is printed with its password.

    Args:
        host: name, address or folder of a socket.
        port: TCP port.
        user: role.
        password: of the role, or "".
        dbname: database.
        sslmode: as libpq has it; none: by the host and `sslrootcert`.
        sslrootcert: file with certificates of authorities, "system" for those of this machine, or "".
        schema: of the tables.
        prepared_statements: False behind a pooler in transaction mode.
    """
    if not sslmode:
        # Over a network no password is sent unencrypted, unless sslmode is set to allow it.
        sslmode = "prefer" if is_local(host) else "verify-full" if sslrootcert else "require"
    keywords = {
        "host": host,
        "port": port,
        "user": user,
        "password": password or None,
        "dbname": dbname,
        "sslmode": sslmode,
        "sslrootcert": sslrootcert or None,
        "schema": schema,
        "client_encoding": "UTF8",
        "connect_timeout": CONNECT_SECONDS,
        "application_name": "marketflow",
    }
    found = {name: value for name, value in keywords.items() if value is not None}
    return found if prepared_statements else found | {"prepare_threshold": None}


def is_local(host: str) -> bool:
    """Whether a host is this machine: the folder of a socket, a loopback address, or the name of one."""
    if host.startswith(("/", "@")) or host.lower() in ("", "localhost"):
        return True
    try:
        return ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def parameters(series: Series) -> dict[str, Any]:
    """Query parameters that name a series."""
    return {"mode": series.mode.value, "exchange": series.exchange, "symbol": series.symbol}


class _Row(msgspec.Struct):
    """A row as a JSON object; times are Unix ms."""

    pair_name: str
    exchange: str
    mode: str
    timestamp: int
    average_price: float | None
    min_price: float
    max_price: float
    open_price: float
    close_price: float
    tick_count: int | None
    open_at: int
    close_at: int
    min_at: int
    max_at: int
    version: int
    volume: float | None
    turnover: float | None
    buy_volume: float | None
    buy_turnover: float | None
    source: Source
    verified: bool | None
    venue_values: VenueValues | None


_encode = msgspec.json.Encoder().encode


def json_rows(rows: Iterable[tuple[Slot, Candle]]) -> str:
    """Rows as a JSON array of objects, for `json_to_recordset`.

    As arrays for `unnest`, each column as psycopg adapts lists, 15,000 rows take 0.7 s of CPU instead of 0.05 s.
    """
    return _encode([_row(slot, candle) for slot, candle in rows]).decode()


def _row(slot: Slot, candle: Candle) -> _Row:
    mode, exchange, symbol = slot.series
    return _Row(
        symbol,
        exchange,
        mode.value,
        _valid_ms(slot.start),
        candle.average,
        candle.low,
        candle.high,
        candle.open,
        candle.close,
        candle.ticks or None,
        _valid_ms(candle.first_at),
        _valid_ms(candle.last_at),
        _valid_ms(candle.low_at),
        _valid_ms(candle.high_at),
        candle.version,
        *_amounts(candle),
        candle.source,
        candle.verified,
        candle.venue,
    )


def candle_of_row(row: tuple[Any, ...]) -> Candle:
    """The candle of a row.

    Args:
        row: total, ticks, high, low, open, close; the times of first, last, high and low; the version; then the
            arguments of traded_of_row.
    """
    total, ticks, high, low, opening, closing, first_at, last_at, high_at, low_at, version, *traded = row
    first, last, highest, lowest = map(to_unix_ms, (first_at, last_at, high_at, low_at))
    # Rows have no order of arrival; sequence zero sorts before every tick of the same millisecond.
    return Candle(
        opening, high, low, closing, total, ticks, first, last, highest, lowest, 0, 0, version, *traded_of_row(*traded)
    )


def traded_of_row(
    volume: float | None,
    turnover: float | None,
    buy_volume: float | None,
    buy_turnover: float | None,
    source: Source,
    verified: bool | None,
    venue_values: list[float | None] | None = None,
) -> tuple[Amounts | None, Source, bool | None, VenueValues | None]:
    """The last fields of a candle."""
    amounts = None if volume is None else Amounts(volume, turnover, buy_volume, buy_turnover)
    return amounts, source, verified, None if venue_values is None else _venue_values(venue_values)


def _venue_values(values: list[float | None]) -> VenueValues | None:
    """The values of a row; None where somebody has written something else there."""
    if len(values) != VENUE_VALUES or None in values[:4]:
        return None
    opening, high, low, closing, volume, turnover, ticks = values
    return VenueValues(
        opening or 0.0, high or 0.0, low or 0.0, closing or 0.0, volume, turnover, None if ticks is None else int(ticks)
    )


def _amounts(candle: Candle) -> tuple[float | None, float | None, float | None, float | None]:
    amounts = candle.amounts
    if amounts is None:
        return None, None, None, None
    volume, *others = structs.astuple(amounts)
    turnover, buy_volume, buy_turnover = (None if each is None else rounded(each) for each in others)
    return rounded(volume), turnover, buy_volume, buy_turnover


def to_datetime(unix_ms: int) -> datetime:
    """A time in Unix ms as a datetime, limited to the valid range of rows."""
    unix_ms = _valid_ms(unix_ms)
    return datetime.fromtimestamp(unix_ms // 1000, UTC).replace(microsecond=unix_ms % 1000 * 1000)


def _valid_ms(unix_ms: int) -> int:
    """A time limited to the valid range of rows."""
    return min(max(unix_ms, OLDEST_MS), END_MS)


def to_unix_ms(moment: datetime) -> int:
    """A datetime in Unix ms."""
    return int(moment.timestamp()) * 1000 + moment.microsecond // 1000


def reason(error: Exception) -> str:
    """The first line of an error of psycopg; the rest repeats it for every address of the host.

    Any other error is unexpected: its class is given as well.
    """
    import psycopg

    first = next(iter(str(error).splitlines()), "")
    if isinstance(error, psycopg.Error) and first:
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def is_connection_lost(error: Exception) -> bool:
    """Whether the connection is missing or lost; otherwise the server has rejected one statement."""
    import psycopg

    if not isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return False
    # Without a code it is libpq's or psycopg's own; 57P: the server shuts down, has crashed or starts.
    return error.sqlstate is None or error.sqlstate.startswith(("08", "57P"))
