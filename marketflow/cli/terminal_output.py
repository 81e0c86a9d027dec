"""Tables and text for a person: as wide as the terminal, plain text elsewhere. Long cells wrap."""

import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from marketflow.text import visible

PLAIN_WIDTH = 120
"""Width in columns where there is no terminal, unless COLUMNS is set."""


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str | Text]], lines: bool = False) -> None:
    """Print a table to stdout, with `lines` between rows. Control characters are escaped, markup is shown."""
    table = Table(*headings, box=box.ROUNDED if lines else box.SIMPLE_HEAD, show_lines=lines, header_style="bold")
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(visible(cell)) for cell in row))
    _console().print(table)


def print_text(text: str | Text) -> None:
    """Print a line to stdout."""
    _console().print(text if isinstance(text, Text) else Text(visible(text)))


def _console() -> Console:
    unknown = "COLUMNS" not in os.environ and not any(
        _is_terminal(each) for each in (sys.stdin, sys.stdout, sys.stderr)
    )
    return Console(width=PLAIN_WIDTH if unknown else None, highlight=False, emoji=False, markup=False)


def _is_terminal(stream: TextIO | None) -> bool:
    with suppress(ValueError):  # closed
        return stream is not None and stream.isatty()
    return False
