"""Daily partitions of the minutes, where `marketflow migrate --partition` has made them: adds and drops them.

ddl/0012_partitions.sql explains them, and its functions do the work with the rights of the tables' owner. Rows wait for
none of it: until the partition of a day is there its rows are in the default one, from which they are moved.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from loguru import logger

from marketflow.logs import RateLimit
from marketflow.stores.postgres.rows import DAY_MS, reason, to_datetime

if TYPE_CHECKING:
    from marketflow.stores.postgres.connections.bounded_connection import BoundedConnection

DAYS_AHEAD = 7
"""For how many days from today on there are partitions: how long adding them may fail before it matters."""

ADDED_SECONDS = 3600.0
"""Time between two looks for missing partitions."""

RETRY_SECONDS = 60.0
"""The same after a failure."""

# Others wait behind a wait for a lock.
_PATIENCE = "set local lock_timeout = 200"

_ADD = "select * from aggregates_add_partitions(%s::timestamptz, %s::timestamptz)"

_DROP = "select aggregates_drop_partition()"


class PartitionInUse(Exception):
    """A transaction that lasts long, such as an export or a dump, reads the table."""


class DailyPartitions:
    """Adds missing partitions from yesterday on; for one thread at a time.

    Args:
        monotonic: in seconds.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._due_at = float("-inf")
        self._limit = RateLimit(600.0)

    def add(self, connection: "BoundedConnection", now_ms: int) -> None:
        """Add partitions that are missing, from time to time; failures are logged, and tried again.

        Raises:
            psycopg.Error: the connection is lost.
        """
        import psycopg

        if self._monotonic() < self._due_at:
            return
        self._due_at = self._monotonic() + RETRY_SECONDS
        today = to_datetime(now_ms // DAY_MS * DAY_MS)
        try:
            with connection.pinned():
                connection.execute(_PATIENCE)
                bounds = [today - timedelta(days=1), today + timedelta(days=1 + DAYS_AHEAD)]
                added = [name for (name,) in connection.execute(_ADD, bounds)]
        except psycopg.Error as error:
            if connection.broken:
                raise
            text = f"partitions cannot be added yet, rows of days without one go to the default one: {reason(error)}"
            self._limit.log("add", "WARNING", text)
            return
        self._due_at = self._monotonic() + ADDED_SECONDS
        if added:
            logger.info("added partitions {}", ", ".join(added))


def drop_partition(connection: "BoundedConnection") -> bool:
    """Drop the oldest partition whose minutes have all expired; return whether there was one.

    Raises:
        PartitionInUse: to be tried again.
        psycopg.Error: nothing was dropped.
    """
    import psycopg

    try:
        with connection.pinned():
            connection.execute(_PATIENCE)
            ((name,),) = connection.execute(_DROP).fetchall()
    except psycopg.errors.LockNotAvailable as error:
        raise PartitionInUse(reason(error)) from error
    if name is not None:
        logger.info("dropped the expired partition {}", name)
    return name is not None
