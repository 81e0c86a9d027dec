"""One connection to PostgreSQL that is opened when needed and again after any error.

psycopg is loaded with the first connection and not with this module: that takes a fifth of the time to the first price,
which needs no PostgreSQL.
"""

import select
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from marketflow.errors import Unavailable
from marketflow.stores.postgres.rows import is_connection_lost, reason

if TYPE_CHECKING:
    from marketflow.stores.postgres.connections.bounded_connection import BoundedConnection


class ReconnectingConnection:
    """One bounded connection, opened when first used and again after any error; for one thread at a time.

    Args:
        keywords: of the connection, see connection_keywords.
    """

    def __init__(self, keywords: dict[str, Any]) -> None:
        self._keywords = keywords
        self._connection: BoundedConnection | None = None

    @contextmanager
    def opened(self) -> "Iterator[BoundedConnection]":
        """The connection.

        Raises:
            Unavailable: in place of any error; the connection is closed, and the next call opens a new one.
        """
        from marketflow.stores.postgres.connections.bounded_connection import BoundedConnection

        try:
            if self._connection is not None and _ended(self._connection):
                self.close()
            if self._connection is None:
                self._connection = BoundedConnection.open(self._keywords)
            yield self._connection
        except Unavailable:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise Unavailable(reason(error), is_unreachable=is_connection_lost(error)) from error

    def close(self) -> None:
        """Close the connection; from any thread."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):  # its state does not matter any more
                connection.close()


def _ended(connection: "BoundedConnection") -> bool:
    """Whether the server has closed an idle connection.

    Otherwise a failing write would find out; the last write before a stop has no retry, and comes up to a minute after
    the one before.
    """
    if connection.closed:
        return True
    # Not `select`, which rejects file descriptors from 1024 on.
    ready = select.poll()
    ready.register(connection.fileno(), select.POLLIN)
    return bool(ready.poll(0))
