"""Pools of connections that read, for one event loop."""

from typing import Any, Self

import psycopg
from psycopg import sql
from psycopg_pool import AsyncConnectionPool

from marketflow.stores.host_lookup import LOOKUP_SECONDS, look_up_aside
from marketflow.stores.postgres.connections.session import looking_up, pin_async, session_keywords, with_addresses

POOL_SECONDS = 30.0
"""Limit of the pool, by the clock; that of the reader, which spares an event loop that is behind, comes first."""

# A statement is planned at its first use, and never compiled by JIT: a summary takes 10 ms to plan and 2 ms to run.
_PLANNED_ONCE = {"plan_cache_mode": "force_generic_plan", "jit": "off"}


class ReadConnection(psycopg.AsyncConnection[Any]):
    """A connection that is pinned at its first use: by a request, which has a timeout, and not by the pool."""

    _is_new = True
    _pinning: sql.Composed | None = None

    @classmethod
    async def connect(cls, conninfo: str = "", **keywords: Any) -> Self:
        """Connect, once the host was looked up.

        Raises:
            psycopg.OperationalError: there is no connection.
        """
        host = keywords.get("host", "")
        with looking_up(host):
            addresses = await look_up_aside(host, LOOKUP_SECONDS)
        return await super().connect(conninfo, **with_addresses(keywords, addresses))

    async def pinned(self, keywords: dict[str, Any]) -> sql.Composed | None:
        """Statements to begin each transaction with; None where the session is pinned."""
        if self._is_new:
            self._pinning = await pin_async(self, keywords, jit="off")
            self._is_new = False
        return self._pinning


ReadPool = AsyncConnectionPool[ReadConnection]


def read_pool(keywords: dict[str, Any], max_size: int, name: str) -> ReadPool:
    """Return a pool that has yet to be opened.

    Args:
        keywords: of the connections, see connection_keywords.
        max_size: limit of connections.
        name: of the pool.
    """
    return AsyncConnectionPool(
        connection_class=ReadConnection,
        kwargs={"prepare_threshold": 0, **session_keywords(keywords, **_PLANNED_ONCE), "autocommit": True},
        min_size=1,
        max_size=max_size,
        open=False,
        timeout=POOL_SECONDS,
        # The pool doubles its pauses without a limit; after reconnect_timeout it starts anew with the shortest.
        reconnect_timeout=2.0,
        reconnect_failed=lambda pool: None,
        name=name,
    )
