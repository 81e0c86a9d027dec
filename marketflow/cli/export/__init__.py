"""`marketflow export`: the minutes of the table `aggregates` as CSV or Parquet, in constant memory.

PostgreSQL writes the CSV (COPY), a series at a time: each is one range of the primary key, so nothing is ever sorted,
in memory or on disk, and the first row comes at once however large the table is. All of it is read in one snapshot.
"""

from marketflow.cli.export.export_rows import Selection
from marketflow.cli.export.exporter import Export, export

__all__ = ["Export", "Selection", "export"]
