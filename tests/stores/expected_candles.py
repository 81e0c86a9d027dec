"""What a walk through the archive must find, by the minutes alone."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from marketflow.model import Candle
from marketflow.stores.ports import CandleRange
from marketflow.stores.postgres.rows import to_unix_ms

HOUR_MS = 60 * 60_000

Row = Mapping[str, Any]
"""A row of aggregates by its column names."""


def expected(rows: Iterable[Row], walk: CandleRange) -> dict[int, Candle]:
    """The candles of one series, exactly up to the limit."""
    by_start: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["timestamp"]):
        at = to_unix_ms(row["timestamp"])
        if walk.since <= at < walk.until:
            by_start.setdefault(at - at % walk.length_ms, []).append(row)
    starts = sorted(by_start)
    chosen = starts[-walk.limit :] if walk.newest else starts[: walk.limit]
    return {start: _candle(start, by_start[start]) for start in chosen}


def assert_found(found: Mapping[int, Candle], rows: Iterable[Row], walk: CandleRange) -> None:
    """A walk found what it must, and nothing between that is not there."""
    wanted = expected(rows, walk)
    starts = sorted(found)
    assert starts[-walk.limit :] == [*wanted] if walk.newest else starts[: walk.limit] == [*wanted], walk
    for start, candle in wanted.items():
        for name in Candle.__struct_fields__:
            value, right = getattr(found[start], name), getattr(candle, name)
            assert value == (pytest.approx(right, rel=1e-9) if name == "total" else right), (walk, start, name)


def _candle(start: int, rows: list[Row]) -> Candle:
    first, last = rows[0], rows[-1]
    return Candle(
        first["open_price"],
        max(row["max_price"] for row in rows),
        min(row["min_price"] for row in rows),
        last["close_price"],
        sum(row["average_price"] * row["tick_count"] for row in rows),
        sum(row["tick_count"] for row in rows),
        to_unix_ms(first["open_at"] or first["timestamp"]),
        to_unix_ms(last["close_at"] or last["timestamp"]),
        start,
        start,
        0,
        0,
        1 + sum(row.get("version", 1) - 1 for row in rows),
    )
