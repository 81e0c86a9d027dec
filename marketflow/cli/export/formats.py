"""What the rows are written as. Each format takes blocks of CSV, as PostgreSQL makes them, and keeps a bounded part."""

from abc import ABC, abstractmethod
from importlib.util import find_spec
from io import BytesIO
from typing import IO, Any, Self

from marketflow.cli.export.export_rows import COLUMNS, PRICES, TEXTS, TIMES
from marketflow.errors import SettingsError
from marketflow.text import visible

FORMATS = ("csv", "parquet")

_FORMULA = tuple(
    "=+-@\t\r\n\N{FULLWIDTH EQUALS SIGN}\N{FULLWIDTH PLUS SIGN}\N{FULLWIDTH HYPHEN-MINUS}\N{FULLWIDTH COMMERCIAL AT}"
)
"""With these a cell of a spreadsheet begins a formula."""

GROUP_ROWS = 64 * 1024
"""Rows of a row group of Parquet: some 15 MB of CSV, which is all that waits in memory."""


class Format(ABC):
    """Writes to a file that is open for bytes; a context manager, whose end completes the file unless by an error."""

    def name(self, text: str) -> str:
        """What stands for a name of the database, which somebody else may have chosen."""
        return text

    @abstractmethod
    def write(self, block: bytes, rows: int) -> None:
        """Take some whole rows."""

    @abstractmethod
    def finish(self) -> None:
        """Write what is left."""

    @abstractmethod
    def abandon(self) -> None:
        """Write nothing more, so that nobody takes the file for a whole one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            self.abandon()  # changes nothing about a file that is complete


class Csv(Format):
    """A line of names, then PostgreSQL's rows as they are, but for names that a program could take for a command."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        file.write(",".join(COLUMNS).encode() + b"\n")

    def name(self, text: str) -> str:
        """A name without what drives a terminal, and with an apostrophe where a spreadsheet would see a formula.

        Source: OWASP, CSV Injection.
        """
        return f"'{visible(text)}" if text.startswith(_FORMULA) else visible(text)

    def write(self, block: bytes, rows: int) -> None:
        """Take some whole rows."""
        self._file.write(block)

    def finish(self) -> None:
        """Nothing is left."""

    def abandon(self) -> None:
        """Nothing was kept."""


class Parquet(Format):
    """Row groups of typed columns, compressed by zstd; times are timestamps in ms, UTC.

    Needs pyarrow, the extra `parquet`.
    """

    def __init__(self, file: IO[bytes]) -> None:
        from pyarrow import csv, parquet  # type: ignore[import-untyped]

        self._schema = _schema()
        self._csv: Any = csv
        self._valve = _Valve(file)
        self._writer = parquet.ParquetWriter(self._valve, self._schema, compression="zstd")
        self._waiting: list[bytes] = []
        self._rows = 0

    def write(self, block: bytes, rows: int) -> None:
        """Take some whole rows."""
        self._waiting.append(block)
        self._rows += rows
        if self._rows >= GROUP_ROWS:
            self._write_group()

    def finish(self) -> None:
        """Write the last row group and the footer."""
        if self._waiting:
            self._write_group()
        self._writer.close()

    def abandon(self) -> None:
        """Leave the file without a footer, which pyarrow would write whatever has happened."""
        self._valve.shut = True

    def _write_group(self) -> None:
        table = self._csv.read_csv(
            BytesIO(b"".join(self._waiting)),
            read_options=self._csv.ReadOptions(column_names=COLUMNS, use_threads=False),
            parse_options=self._csv.ParseOptions(newlines_in_values=True),
            # An empty field is null and a quoted one is not, as PostgreSQL has it.
            convert_options=self._csv.ConvertOptions(
                column_types=self._schema, null_values=[""], quoted_strings_can_be_null=False
            ),
        )
        self._waiting, self._rows = [], 0
        self._writer.write_table(table)


class _Valve:
    """A file for bytes that takes nothing more once it is shut."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.shut = False

    def write(self, data: bytes) -> int:
        return len(data) if self.shut else self._file.write(data)

    def flush(self) -> None:
        """Whoever opened the file sees to that."""


def open_format(name: str, file: IO[bytes]) -> Format:
    """The format of a name, one of FORMATS."""
    return Parquet(file) if name == "parquet" else Csv(file)


def require(name: str) -> None:
    """Make sure that a format can be written here.

    Raises:
        SettingsError: a package is missing; says how to install it.
    """
    if name == "parquet" and find_spec("pyarrow") is None:
        raise SettingsError("argument --format: parquet needs pyarrow: pip install 'marketflow[parquet]'")


def _schema() -> Any:
    import pyarrow

    kinds = dict.fromkeys(TEXTS, pyarrow.string()) | dict.fromkeys(TIMES, pyarrow.timestamp("ms", tz="UTC"))
    kinds |= dict.fromkeys(PRICES, pyarrow.float64()) | {"tick_count": pyarrow.int64(), "version": pyarrow.int32()}
    return pyarrow.schema([(name, kinds[name]) for name in COLUMNS])
