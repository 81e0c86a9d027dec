"""Limits of open connections and files, and eviction of idle connections."""

import asyncio
import resource
import sys
from collections.abc import Collection
from heapq import nsmallest
from typing import Protocol

from marketflow.logs import RateLimit

FILES_PER_CONNECTION = 4
"""Of all open files a quarter is for connections, a quarter for a burst of connections that are accepted before others
are evicted, and the rest for stores, exchanges and logs.
"""

_limit = RateLimit(10.0)


class Connection(Protocol):
    """A connection that can be evicted."""

    transport: asyncio.Transport

    @property
    def answering(self) -> bool:
        """Whether a response is pending or being sent."""
        ...

    @property
    def used_at(self) -> float:
        """Time of the last activity (seconds, monotonic clock)."""
        ...


def evict_idle(newcomer: Connection, connections: Collection[Connection], most: int) -> None:
    """Abort the connections that are idle for longest when there are more than `most`.

    Never the newcomer: a client that holds all connections would lock out all others. A connection with a pending
    response is evicted only if none is idle.
    """
    if len(connections) <= most:
        return
    others = [each for each in connections if each is not newcomer and not each.transport.is_closing()]
    if len(others) < most:
        return
    _limit.log("evict", "WARNING", f"there are more than {most} connections; the longest idle ones are closed")
    # Evict 1 % at once, since the search is linear; but no further connection with a pending response.
    longest, *more = nsmallest(max(1, most // 100), others, key=lambda other: (other.answering, other.used_at))
    for each in (longest, *(other for other in more if not other.answering)):
        each.transport.abort()


def raise_file_limit(connections: int) -> None:
    """Raise the soft limit of open files to what this many connections need, at most to the hard limit."""
    soft, hard = (_counted(limit) for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    wanted = min(hard, FILES_PER_CONNECTION * connections)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def max_open_files() -> int:
    """Return the soft limit of open files."""
    return _counted(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _counted(limit: int) -> int:
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit
