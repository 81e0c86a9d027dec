"""`marketflow export`: stored minutes, or candles made of them, as CSV, Parquet or Feather, in constant memory.

PostgreSQL writes the CSV (COPY), a series at a time: each is one range of the primary key, so nothing is sorted, in
memory or on disk, and the first row arrives at once whatever the size of the table. All rows are of one snapshot.
"""

from marketflow.cli.export.exporter import Export, export
from marketflow.cli.export.row_reader import RowFilter

__all__ = ["Export", "RowFilter", "export"]
