"""A connection to PostgreSQL with an end to every wait: a server that freezes is noticed by its silence."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import psycopg
from psycopg.abc import PQGen

_T = TypeVar("_T")

ANSWER_SECONDS = 2.0
"""How long the writer waits for any one answer."""

# The server gives up as well, and sooner. Else each further try would leave another session that waits for the same
# lock, and one whose connection broke within a transaction would keep its rows locked until the kernel notices.
_SERVER_GIVES_UP = f"""
set statement_timeout = {ANSWER_SECONDS * 900:.0f};
set idle_in_transaction_session_timeout = {ANSWER_SECONDS * 1000:.0f}
"""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that gives up on a server that does not answer."""

    _patience = ANSWER_SECONDS

    @classmethod
    def open(cls, keywords: dict[str, Any]) -> Self:
        """A connection in autocommit mode."""
        connection = cls.connect(**keywords, autocommit=True)
        connection.execute(_SERVER_GIVES_UP)
        return connection

    @contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Wait that long for each answer within, which must lie in a transaction."""
        self.execute(f"set local statement_timeout = {seconds * 900:.0f}")
        self._patience = seconds
        try:
            yield
        finally:
            self._patience = ANSWER_SECONDS

    def wait(self, gen: PQGen[_T], interval: float = 0.1, timeout: float | None = None) -> _T:
        """Wait for an answer, as all calls do.

        Raises:
            psycopg.OperationalError: there was none in time; the connection is good for nothing more.
        """
        try:
            return super().wait(gen, interval=interval, timeout=self._patience if timeout is None else timeout)
        except psycopg.errors._WaitTimeout:
            raise psycopg.OperationalError(f"no answer within {self._patience:g} s") from None
