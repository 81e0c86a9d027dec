"""Writes to the masters of a Redis Cluster at the same time, of which a late one delays none of the others.

A frozen master costs a whole timeout at each attempt, and the pipeline would write nothing else meanwhile. So a call
returns without it: what is for that master is merged until it has answered or failed, and is written then.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, wait
from typing import Any

from marketflow.stores.redis.writer import RedisWriter

CALLS_AT_ONCE = 16
"""Masters that are written to at the same time, by all callers together."""

PATIENCE_SECONDS = 0.03
"""How long a call waits for a master: a third of the gap that others may have, which each attempt costs once."""

ITEM_SECONDS = 1e-4
"""Added for each item: four times what one takes with 15,000 series on two cores. Without it every write of so many is
late, and merged with the next ones.
"""

LATE_SECONDS = 1.0
"""How long the end waits for what is still to be written: three timeouts."""

Write = Callable[[RedisWriter, dict[Any, Any]], bool | None]
"""Writes what a bucket gets; returns False if that is not confirmed, and raises Unavailable."""

_Key = tuple[RedisWriter, Write]
_Items = dict[_Key, dict[Any, Any]]


class WritesByMaster:
    """Divides writes by master; for any number of threads.

    Args:
        threads: run the writes.
        master_of: returns the master of a bucket, at once.
        patience_seconds: how long a call waits for a master, but for its items.
    """

    def __init__(
        self,
        threads: Executor,
        master_of: Callable[[RedisWriter], object],
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._threads = threads
        self._master_of = master_of
        self._patience_seconds = patience_seconds
        self._lock = threading.Lock()
        self._running: dict[Future[bool], _Items] = {}
        self._late: _Items = {}
        """What is to be written once a write of the same kind and bucket has ended."""
        self._late_error: Exception | None = None

    def write(self, write: Write, contents: Mapping[RedisWriter, dict[Any, Any]]) -> bool:
        """Write what each bucket gets; return whether all is confirmed, which what is late is not.

        Raises:
            Unavailable: that of some bucket failed, or a late one before; all others have been done, or are late.
        """
        by_master: defaultdict[object, _Items] = defaultdict(dict)
        is_late = False
        with self._lock:
            for part, content in contents.items():
                if (key := (part, write)) in self._late:
                    self._late[key] = {**self._late[key], **content}
                    is_late = True
                else:
                    by_master[self._master_of(part)][key] = content
            futures = [self._begin(items) for items in by_master.values()]
        wait(futures, self._patience_seconds + ITEM_SECONDS * sum(map(len, contents.values())))
        with self._lock:
            running = [future for future in futures if future in self._running]
            for future in running:
                self._late |= {key: {} for key in self._running[future]}
            error, self._late_error = self._late_error, None
        if error is not None:
            raise error
        confirmed = [future.result() for future in futures if future not in running]
        return all(confirmed) and not (running or is_late)

    def wait_for_late(self) -> None:
        """Wait until what is late is written, but not for long."""
        with self._lock:
            running = list(self._running)
        wait(running, LATE_SECONDS)

    def _begin(self, items: _Items) -> "Future[bool]":
        future: Future[bool] = Future()
        self._running[future] = items
        self._threads.submit(self._run, future, items)
        return future

    def _run(self, future: "Future[bool]", items: _Items) -> None:
        """Write items, and then what has become late meanwhile."""
        confirmed, error = _write(items)
        while items := self._next(future, items, error):
            confirmed, error = _write(items)
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(confirmed)

    def _next(self, future: "Future[bool]", items: _Items, error: Exception | None) -> _Items:
        """What is late of the same kinds and buckets; the write has ended if there is nothing."""
        with self._lock:
            late = {key: content for key in items if (content := self._late.pop(key, None)) is not None}
            if late and error is not None:
                self._late_error = error
            further = {key: content for key, content in late.items() if content}
            self._late |= {key: {} for key in further}
            if not further:
                del self._running[future]
            return further


def _write(items: _Items) -> tuple[bool, Exception | None]:
    confirmed, error = True, None
    for (part, write), content in items.items():
        try:
            confirmed = write(part, content) is not False and confirmed
        except Exception as failed:  # noqa: BLE001 - raised where the write is awaited, once all others are done
            error = failed
    return confirmed, error
