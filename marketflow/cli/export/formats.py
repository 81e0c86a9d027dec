"""Output formats. Each takes blocks of CSV, as PostgreSQL makes them, and buffers a bounded number of rows."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from typing import IO, Any, Self

from marketflow.cli.export.columns import Column, Kind
from marketflow.errors import SettingsError
from marketflow.text import visible

FORMATS = ("csv", "parquet", "feather")

SUFFIXES = {".parquet": "parquet", ".feather": "feather", ".arrow": "feather"}
"""Formats by the end of the name of a file; csv for all others."""

_FORMULA = tuple(
    "=+-@\t\r\n\N{FULLWIDTH EQUALS SIGN}\N{FULLWIDTH PLUS SIGN}\N{FULLWIDTH HYPHEN-MINUS}\N{FULLWIDTH COMMERCIAL AT}"
)
"""First characters that make a spreadsheet take a cell for a formula."""

GROUP_ROWS = 24 * 1024
"""Rows of a row group of Parquet or a batch of Feather: some MB of CSV, the most that is buffered."""


class Format(ABC):
    """Writer to a binary file; as a context manager it completes the file at the end, unless there was an error."""

    def name(self, text: str) -> str:
        """Return a name from the database as it is written; anyone with write access may have chosen it."""
        return text

    @abstractmethod
    def write(self, block: bytes, rows: int) -> None:
        """Write some complete rows."""

    @abstractmethod
    def finish(self) -> None:
        """Write buffered rows, and complete the file."""

    @abstractmethod
    def abandon(self) -> None:
        """Write nothing more, so that an incomplete file is not taken for a complete one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            self.abandon()  # no effect on a completed file


class Csv(Format):
    """A header, then PostgreSQL's rows unchanged, except for names that a program could take for a command."""

    def __init__(self, file: IO[bytes], columns: Sequence[Column]) -> None:
        self._file = file
        file.write(",".join(column.name for column in columns).encode() + b"\n")

    def name(self, text: str) -> str:
        """Return a name with control characters escaped, and an apostrophe where a spreadsheet would see a formula.

        Source: OWASP, CSV Injection.
        """
        return f"'{visible(text)}" if text.startswith(_FORMULA) else visible(text)

    def write(self, block: bytes, rows: int) -> None:
        """Write some complete rows."""
        self._file.write(block)

    def finish(self) -> None:
        """Do nothing: no row is buffered."""

    def abandon(self) -> None:
        """Do nothing: no row is buffered."""


class Arrow(Format):
    """Typed columns, in groups of rows compressed by zstd; times are timestamps in ms, UTC. Needs pyarrow."""

    def __init__(self, file: IO[bytes], columns: Sequence[Column]) -> None:
        from pyarrow import csv  # type: ignore[import-untyped]

        self._csv: Any = csv
        self._schema = _schema(columns)
        self._read_as = _read_as(self._schema)
        self._sink = _ClosableFile(file)
        self._writer = self.open_writer(self._sink, self._schema)
        self._buffered: list[bytes] = []
        self._rows = 0

    @abstractmethod
    def open_writer(self, sink: "_ClosableFile", schema: Any) -> Any:
        """Return the writer of tables, with `write_table` and `close`."""

    def write(self, block: bytes, rows: int) -> None:
        """Write some complete rows."""
        self._buffered.append(block)
        self._rows += rows
        if self._rows >= GROUP_ROWS:
            self._write_group()

    def finish(self) -> None:
        """Write the last group and the footer."""
        if self._buffered:
            self._write_group()
        self._writer.close()

    def abandon(self) -> None:
        """Leave the file without a footer, which pyarrow would write even after an error."""
        self._sink.is_shut = True

    def _write_group(self) -> None:
        table = self._csv.read_csv(
            BytesIO(b"".join(self._buffered)),
            read_options=self._csv.ReadOptions(column_names=self._schema.names, use_threads=False),
            parse_options=self._csv.ParseOptions(newlines_in_values=True),
            # As in PostgreSQL: an empty field is null, a quoted one is not.
            convert_options=self._csv.ConvertOptions(
                column_types=self._read_as, null_values=[""], quoted_strings_can_be_null=False
            ),
        )
        self._buffered, self._rows = [], 0
        self._writer.write_table(_with_lists(table, self._schema))


class Parquet(Arrow):
    """Row groups of Parquet."""

    def open_writer(self, sink: "_ClosableFile", schema: Any) -> Any:
        """Return the writer of row groups."""
        from pyarrow import parquet

        return parquet.ParquetWriter(sink, schema, compression="zstd")


class Feather(Arrow):
    """Record batches of Feather (version 2), which is the file format of Arrow."""

    def open_writer(self, sink: "_ClosableFile", schema: Any) -> Any:
        """Return the writer of record batches."""
        from pyarrow import ipc

        return ipc.new_file(sink, schema, options=ipc.IpcWriteOptions(compression="zstd"))


class _ClosableFile:
    """A binary file that ignores writes once it is shut."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.is_shut = False

    def write(self, data: bytes) -> int:
        return len(data) if self.is_shut else self._file.write(data)

    def flush(self) -> None:
        """Do nothing: the owner of the file flushes it."""


_CLASSES: dict[str, type[Csv | Parquet | Feather]] = {"csv": Csv, "parquet": Parquet, "feather": Feather}


def open_format(name: str, file: IO[bytes], columns: Sequence[Column]) -> Format:
    """Return the format with a name of FORMATS."""
    return _CLASSES[name](file, columns)


def require(name: str) -> None:
    """Check that the packages of a format are installed.

    Raises:
        SettingsError: a package is missing; the text says how to install it.
    """
    if name != "csv" and find_spec("pyarrow") is None:
        raise SettingsError(f"argument --format: {name} needs pyarrow: pip install pyarrow")


def _schema(columns: Sequence[Column]) -> Any:
    import pyarrow

    kinds = {
        Kind.TEXT: pyarrow.string(),
        Kind.TIME: pyarrow.timestamp("ms", tz="UTC"),
        Kind.NUMBER: pyarrow.float64(),
        Kind.COUNT: pyarrow.int64(),
        Kind.VERSION: pyarrow.int32(),
        Kind.FLAG: pyarrow.bool_(),
        Kind.NUMBERS: pyarrow.list_(pyarrow.float64()),
    }
    return pyarrow.schema([(column.name, kinds[column.kind]) for column in columns])


def _is_list(field: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_list(field.type))


def _read_as(schema: Any) -> Any:
    """Return the schema in which CSV is read: pyarrow reads no lists from it."""
    import pyarrow

    return pyarrow.schema([pyarrow.field(each.name, pyarrow.string()) if _is_list(each) else each for each in schema])


def _with_lists(table: Any, schema: Any) -> Any:
    """Return the table with lists of numbers in place of their text."""
    import pyarrow

    for place, field in enumerate(schema):
        if _is_list(field):
            lists = [_numbers(text) if text else None for text in table.column(place).to_pylist()]
            table = table.set_column(place, field, pyarrow.array(lists, field.type))
    return table


def _numbers(array: str) -> list[float | None]:
    """Return the numbers of an array in JSON, in which PostgreSQL writes infinity and NaN as text."""
    return [None if each is None else float(each) for each in json.loads(array)]
