"""How many connections there may be at once, and which of them is closed for a newcomer."""

import asyncio
import resource
import sys
from collections.abc import Collection
from heapq import nsmallest
from typing import Protocol

from marketflow.logs import RateLimit

FILES_PER_CONNECTION = 4
"""Of the files that may be open, a quarter are connections, another quarter those that come in one go before any of
them can be closed, and the rest is for the stores, the exchanges and the logs.
"""

_limit = RateLimit(10.0)


class Connection(Protocol):
    """A connection that can make room."""

    transport: asyncio.Transport

    @property
    def answering(self) -> bool:
        """Whether there is an answer to come, or under way."""
        ...

    @property
    def used_at(self) -> float:
        """When it was last heard of, in seconds of the monotonic clock."""
        ...


def make_room(newcomer: Connection, connections: Collection[Connection], most: int) -> None:
    """Close the connection that has been idle for longest when there are more than so many.

    Never the newcomer: whoever holds all connections would lock everybody out. Only when no connection is idle does an
    answer give way.
    """
    if len(connections) <= most:
        return
    others = [each for each in connections if each is not newcomer and not each.transport.is_closing()]
    if len(others) < most:
        return
    _limit.log("room", "WARNING", f"there are more than {most} connections; the longest idle ones are closed")
    # Some more at once, for looking through all of them takes its time; but no answer for that.
    longest, *more = nsmallest(max(1, most // 100), others, key=lambda other: (other.answering, other.used_at))
    for each in (longest, *(other for other in more if not other.answering)):
        each.transport.abort()


def raise_file_limit(connections: int) -> None:
    """Take as many open files as so many connections may need, as far as they are granted."""
    soft, hard = (_counted(limit) for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    wanted = min(hard, FILES_PER_CONNECTION * connections)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def max_open_files() -> int:
    """How many files this process may have open."""
    return _counted(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _counted(limit: int) -> int:
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit
