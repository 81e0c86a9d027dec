"""Daily partitions for tests, whose days are long past."""

from datetime import datetime
from typing import Any

from marketflow.stores.postgres.connections.bounded_connection import BoundedConnection
from marketflow.stores.postgres.partitioning import conversion
from marketflow.stores.postgres.rows import connection_keywords


def partition(place: dict[str, Any], today: datetime) -> None:
    """Convert the minutes: the first partition ends with `today`, and eight days after it have one each."""
    with BoundedConnection.open(connection_keywords(**place)) as connection:
        conversion.partition(connection, today)
