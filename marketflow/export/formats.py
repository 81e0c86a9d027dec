"""What the rows are written as. Each format takes blocks of CSV, as PostgreSQL makes them, and keeps a bounded part."""

from abc import ABC, abstractmethod
from importlib.util import find_spec
from io import BytesIO
from typing import IO, Any

from marketflow.errors import SettingsError
from marketflow.export.rows import COLUMNS, PRICES, TEXTS, TIMES

FORMATS = ("csv", "parquet")

GROUP_ROWS = 64 * 1024
"""Rows of a row group of Parquet: some 15 MB of CSV, which is all that waits in memory."""


class Format(ABC):
    """Writes to a file that is open for bytes; `finish` at the end of a whole export and of no other."""

    @abstractmethod
    def write(self, block: bytes, rows: int) -> None:
        """Take some whole rows."""

    @abstractmethod
    def finish(self) -> None:
        """Write what is left."""


class Csv(Format):
    """A line of names, then PostgreSQL's rows as they are."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        file.write(",".join(COLUMNS).encode() + b"\n")

    def write(self, block: bytes, rows: int) -> None:
        """Take some whole rows."""
        self._file.write(block)

    def finish(self) -> None:
        """Nothing is left."""


class Parquet(Format):
    """Row groups of typed columns, compressed by zstd; times are timestamps in ms, UTC.

    Needs pyarrow, the extra `parquet`.
    """

    def __init__(self, file: IO[bytes]) -> None:
        from pyarrow import csv, parquet  # type: ignore[import-untyped]

        self._schema = _schema()
        self._csv: Any = csv
        self._writer = parquet.ParquetWriter(file, self._schema, compression="zstd")
        self._waiting: list[bytes] = []
        self._rows = 0

    def write(self, block: bytes, rows: int) -> None:
        """Take some whole rows."""
        self._waiting.append(block)
        self._rows += rows
        if self._rows >= GROUP_ROWS:
            self._write_group()

    def finish(self) -> None:
        """Write the last row group and the footer, without which nobody takes the file for a whole one."""
        if self._waiting:
            self._write_group()
        self._writer.close()

    def _write_group(self) -> None:
        table = self._csv.read_csv(
            BytesIO(b"".join(self._waiting)),
            read_options=self._csv.ReadOptions(column_names=COLUMNS),
            parse_options=self._csv.ParseOptions(newlines_in_values=True),
            # An empty field is null and a quoted one is not, as PostgreSQL has it.
            convert_options=self._csv.ConvertOptions(
                column_types=self._schema, null_values=[""], quoted_strings_can_be_null=False
            ),
        )
        self._waiting, self._rows = [], 0
        self._writer.write_table(table)


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
    kinds |= dict.fromkeys(PRICES, pyarrow.float64()) | {"tick_count": pyarrow.int64()}
    return pyarrow.schema([(name, kinds[name]) for name in COLUMNS])
