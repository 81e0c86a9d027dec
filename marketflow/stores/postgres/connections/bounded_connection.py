"""Connections to PostgreSQL with a limit to every wait, so that a frozen server is noticed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import psycopg
from psycopg import pq, sql, waiting
from psycopg.abc import PQGen

from marketflow.stores.host_lookup import LOOKUP_SECONDS, look_up
from marketflow.stores.postgres.connections.session import (
    connecting,
    looking_up,
    pin,
    session_keywords,
    with_addresses,
)

_T = TypeVar("_T")

ANSWER_SECONDS = 2.0
"""How long the writer waits for any one answer."""

# Timeouts of the server, shorter than those of the client. Without them each retry would leave another session waiting
# for the same lock, and a session whose connection broke within a transaction would keep its rows locked until the
# kernel notices.
_SERVER_TIMEOUTS = {
    "statement_timeout": f"{ANSWER_SECONDS * 900:.0f}",
    "idle_in_transaction_session_timeout": f"{ANSWER_SECONDS * 1000:.0f}",
}


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that raises when the server does not answer in time."""

    answer_seconds = ANSWER_SECONDS
    """Limit of the wait for any one answer."""

    cancels_on_interrupt = True
    """Whether Ctrl+C asks the server to cancel, and waits up to 5 s for its answer, as psycopg does."""

    _pinning: sql.Composed | None = None

    @classmethod
    def connect(cls, conninfo: str = "", **keywords: Any) -> Self:
        """Connect, once the host was looked up.

        Raises:
            psycopg.OperationalError: there is no connection.
        """
        host = keywords.get("host", "")
        with looking_up(host):
            addresses = look_up(host, LOOKUP_SECONDS)
        return super().connect(conninfo, **with_addresses(keywords, addresses))

    @classmethod
    def open(cls, keywords: dict[str, Any]) -> Self:
        """Connect in autocommit mode and at isolation level read committed.

        Raises:
            psycopg.Error: no connection, or the server is too old.
        """
        with connecting():
            connection = cls.connect(**session_keywords(keywords, **_SERVER_TIMEOUTS), autocommit=True)
        try:
            connection._pinning = pin(connection, keywords, **_SERVER_TIMEOUTS)
        except BaseException:
            connection.close()
            raise
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        if connection._pinning is not None:
            connection.read_only = False
        return connection

    @property
    def has_session(self) -> bool:
        """Whether the session belongs to this connection; a pooler lends one for each transaction instead."""
        return self._pinning is None

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Begin a transaction with pinned settings; every statement must stand in one."""
        with self.transaction():
            if self._pinning is not None:
                self.execute(self._pinning)
            yield

    @contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Wait up to `seconds` for each answer within; must be used in a transaction."""
        self.execute(f"set local statement_timeout = {seconds * 900:.0f}")
        self.answer_seconds = seconds
        try:
            yield
        finally:
            self.answer_seconds = ANSWER_SECONDS

    def wait(self, gen: PQGen[_T], interval: float = 0.1, timeout: float | None = None) -> _T:
        """Wait for an answer, as every call of psycopg does.

        Raises:
            psycopg.OperationalError: there was none in time; the connection can't be used any more.
        """
        limit = self.answer_seconds if timeout is None else timeout
        try:
            if self.cancels_on_interrupt:
                return super().wait(gen, interval=interval, timeout=limit)
            return waiting.wait(gen, self.pgconn.socket, interval=interval, timeout=limit)
        except psycopg.OperationalError as error:
            if error.sqlstate is not None or not self._is_awaiting_answer():
                raise
            raise psycopg.OperationalError(f"no answer within {limit:g} s") from None

    def _is_awaiting_answer(self) -> bool:
        """Whether the connection is intact and a command runs: then only the wait for it has ended."""
        state = self.pgconn.status, self.pgconn.transaction_status
        return state == (pq.ConnStatus.OK, pq.TransactionStatus.ACTIVE)
