"""Progress bar of an export."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


class RowCounter:
    """Counter of rows that updates a progress bar, if there is one."""

    def __init__(self, bar: Progress | None = None) -> None:
        self.rows = 0
        self._expected = 0
        self._bar = bar
        self._task = bar.add_task("", total=None, rows="0") if bar else None

    def expect(self, rows: int) -> None:
        """Set the number of rows still expected."""
        self._expected = self.rows + rows
        self._show()

    def count(self, rows: int) -> None:
        """Count written rows."""
        self.rows += rows
        self._show()

    def _show(self) -> None:
        if self._bar is not None and self._task is not None:
            # Below 100 % while more rows may come.
            self._bar.update(
                self._task, completed=self.rows, total=max(self._expected, self.rows + 1), rows=f"{self.rows:,}"
            )


@contextmanager
def progress_counter() -> Iterator[RowCounter]:
    """Yield a counter, with a bar on stderr if that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield RowCounter()
        return
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rows]} rows"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield RowCounter(bar)
