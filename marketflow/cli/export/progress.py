"""The bar that shows how far an export is."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


class Counter:
    """Counts rows, and shows them beside how many are expected; nothing is shown without a bar."""

    def __init__(self, bar: Progress | None = None) -> None:
        self.rows = 0
        self._expected = 0
        self._bar = bar
        self._task = bar.add_task("", total=None, rows="0") if bar else None

    def expect(self, rows: int) -> None:
        """Expect so many rows from now on."""
        self._expected = self.rows + rows
        self._show()

    def count(self, rows: int) -> None:
        """Count rows that were written."""
        self.rows += rows
        self._show()

    def _show(self) -> None:
        if self._bar is not None and self._task is not None:
            # Never quite done while there may be more.
            self._bar.update(
                self._task, completed=self.rows, total=max(self._expected, self.rows + 1), rows=f"{self.rows:,}"
            )


@contextmanager
def counter() -> Iterator[Counter]:
    """A counter with a bar on stderr while that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Counter()
        return
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rows]} rows"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield Counter(bar)
