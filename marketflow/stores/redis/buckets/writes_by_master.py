"""Writes to the masters of a Redis Cluster at the same time, so that a late one delays none of the others.

A frozen master costs a whole timeout at each attempt, and the pipeline would write nothing else meanwhile. So a call
returns without it: items for that master are merged until it has answered or failed, and are written then.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any

from marketflow.stores.redis.writer import RedisWriter

CALLS_AT_ONCE = 16
"""Masters that are written to at the same time, by all callers together."""

MASTER_WAIT_SECONDS = 0.03
"""How long a call waits for a master: a third of the delay that others may have, which each attempt causes once."""

ITEM_SECONDS = 1e-4
"""Added for each item: four times what one takes with 15,000 series on two cores. Without it every write of these
items is late, and merged with the next ones."""

LATE_SECONDS = 1.0
"""How long `wait_for_late` waits for pending writes: three timeouts."""

Write = Callable[[RedisWriter, dict[Any, Any]], bool | None]
"""Writes the items of a bucket; returns False if they are not confirmed, and raises Unavailable."""

_Key = tuple[RedisWriter, Write]
_Items = dict[_Key, dict[Any, Any]]


class WritesByMaster:
    """Divides writes by master; for any number of threads.

    Args:
        threads: run the writes.
        master_of: returns the master of a bucket, at once.
        wait_seconds: how long a call waits for a master, beside the time for its items.
    """

    def __init__(
        self,
        threads: Executor,
        master_of: Callable[[RedisWriter], object],
        wait_seconds: float = MASTER_WAIT_SECONDS,
    ) -> None:
        self._threads = threads
        self._master_of = master_of
        self._wait_seconds = wait_seconds
        self._lock = threading.Lock()
        self._running: set[_Call] = set()
        self._late: _Items = {}
        """Items to be written once a write of the same kind to the same bucket has ended."""
        self._late_error: Exception | None = None

    def write(self, write: Write, contents: Mapping[RedisWriter, dict[Any, Any]]) -> bool:
        """Write the items of each bucket; return whether all are confirmed. Late ones are not.

        Raises:
            Unavailable: a write to some bucket, or an earlier late one, failed; all others are done, or are late.
        """
        until = time.monotonic() + self._wait_seconds + ITEM_SECONDS * sum(map(len, contents.values()))
        by_master: defaultdict[object, _Items] = defaultdict(dict)
        is_late = False
        with self._lock:
            for part, content in contents.items():
                if (key := (part, write)) in self._late:
                    self._late[key] = {**self._late[key], **content}
                    is_late = True
                else:
                    by_master[self._master_of(part)][key] = content
            calls = [_Call(items) for items in by_master.values()]
            self._running.update(calls)
        for call in calls:
            self._threads.submit(self._run, call)
        for call in calls:
            if not call.ended.wait(until - time.monotonic()):
                is_late |= self._leave(call)
        error = self._late_error or next((call.error for call in calls if call.error is not None), None)
        if error is not None:
            self._late_error = None
            raise error
        return not is_late and all(call.confirmed for call in calls)

    def wait_for_late(self) -> None:
        """Wait until late items are written, LATE_SECONDS at most."""
        until = time.monotonic() + LATE_SECONDS
        for call in list(self._running):
            call.ended.wait(until - time.monotonic())

    def _leave(self, call: "_Call") -> bool:
        """Have later items for the same buckets wait for a call; return whether it still runs."""
        with self._lock:
            call.is_late = call in self._running
            if call.is_late:
                for key in call.items:  # items may already wait for another call
                    self._late.setdefault(key, {})
            return call.is_late

    def _run(self, call: "_Call") -> None:
        """Write items, and then those that have become late meanwhile."""
        while call.items:
            call.write()
            self._next(call)
        call.ended.set()

    def _next(self, call: "_Call") -> None:
        """Continue with late items of the same kinds and buckets; the call has ended if there are none."""
        with self._lock:
            late = {key: self._late.pop(key, {}) for key in call.items} if call.is_late else {}
            if call.is_late and call.error is not None:
                self._late_error, call.error = call.error, None
            call.items = {key: content for key, content in late.items() if content}
            self._late |= {key: {} for key in call.items}
            if not call.items:
                self._running.discard(call)


class _Call:
    """The writes of one call to the buckets of one master, one after the other."""

    def __init__(self, items: _Items) -> None:
        self.items = items
        self.ended = threading.Event()
        self.is_late = False
        self.confirmed = True
        self.error: Exception | None = None

    def write(self) -> None:
        """Write all items, also after an error."""
        for (part, write), content in self.items.items():
            try:
                self.confirmed = write(part, content) is not False and self.confirmed
            except Exception as error:  # noqa: BLE001 - raised where the write is awaited
                self.error = error
