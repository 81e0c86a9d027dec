"""What a benchmark says: a table for people, then one JSON line for programs."""

import json
import os
from collections.abc import Mapping, Sequence


def report(benchmark: str, measured: Sequence[Mapping[str, object]]) -> None:
    """Print measurements, each with the same columns: a table, and below it one line of JSON."""
    columns = list(measured[0])
    table = [columns, *([_text(row[column]) for column in columns] for row in measured)]
    if len(measured) == 1:  # one figure a line reads better than one long line
        table = [list(pair) for pair in zip(*table, strict=True)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))
    print(json.dumps({"benchmark": benchmark, "cpus": os.cpu_count(), "measured": list(measured)}), flush=True)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(one)}" for name, one in value.items())
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def percentile(values: Sequence[float], at: float) -> float:
    """The value below which `at` per cent of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * at / 100))]
