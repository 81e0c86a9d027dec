"""Progress of the branches of the pipeline, each behind a conflation, and detection of those that have stalled.

A conflation holds one item under way and one that is pending, so a branch that blocks uses no memory and raises
nothing: only its lack of progress shows. Time is passed in.
"""

import threading
from collections import Counter
from collections.abc import Iterable

from loguru import logger

STALLED_SECONDS = 30.0
"""Time for which a branch may have work without finishing any of it."""

CHECK_SECONDS = 1.0
"""Interval of the checks, while a branch has work."""

IDLE_CHECK_SECONDS = 5.0
"""The same while none has any."""


class Branch:
    """Progress of one branch: written by its conflation under a lock, read by any thread."""

    __slots__ = ("busy", "finished", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.busy = False
        """Whether it has work."""
        self.finished = 0
        """Number of steps done, which only grows."""


class Branches:
    """All branches; detects those that have work and finish none. `check` is for one thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._branches: list[Branch] = []
        self._seen: dict[Branch, int] = {}
        self._waited: dict[Branch, float] = {}
        self._checked_at: float | None = None
        self._stalled: dict[str, float] = {}  # since when
        self.stalls: dict[str, int] = {}
        """Number of stalls by branch name."""

    @property
    def stalled(self) -> list[str]:
        """Names of the branches that are stalled now."""
        return sorted(self._stalled)

    def add(self, name: str) -> Branch:
        """Add a branch; partitions of the same work have the same name."""
        branch = Branch(name)
        with self._lock:
            self._branches.append(branch)
            self.stalls.setdefault(name, 0)
        return branch

    def busy(self) -> dict[str, int]:
        """Number of branches with work by name, without zeros."""
        with self._lock:
            return dict(Counter(branch.name for branch in self._branches if branch.busy))

    def attempted(self, name: str) -> None:
        """Note that a step of a branch has failed and will be repeated. That is no stall: the call has returned."""
        with self._lock:
            for branch in self._branches:
                branch.finished += branch.name == name

    def check(self, now: float) -> None:
        """Check all branches, every CHECK_SECONDS; a longer gap counts as one interval.

        Args:
            now: seconds of a monotonic clock.
        """
        seconds = CHECK_SECONDS if self._checked_at is None else min(now - self._checked_at, CHECK_SECONDS)
        self._checked_at = now
        with self._lock:
            branches = list(self._branches)
        stalled = {branch.name for branch in branches if self._waits(branch, seconds) >= STALLED_SECONDS}
        for name in stalled - self._stalled.keys():
            self._stalled[name] = now
            self.stalls[name] += 1
            logger.error("a branch has stalled: work has waited for {:.0f} s branch={}", STALLED_SECONDS, name)
        for name in self._stalled.keys() - stalled:
            seconds = now - self._stalled.pop(name) + STALLED_SECONDS
            logger.info("a branch goes on after {:.0f} s branch={}", seconds, name)

    def _waits(self, branch: Branch, seconds: float) -> float:
        """Seconds for which a branch has had work without finishing any."""
        finished = branch.finished
        idle = not branch.busy or finished != self._seen.get(branch)
        self._seen[branch] = finished
        waited = self._waited[branch] = 0.0 if idle else self._waited.get(branch, 0.0) + seconds
        return waited


class Refills:
    """Whether the cache has confirmed all refills. Thread-safe.

    Args:
        branches: those that write to the cache.
    """

    def __init__(self, branches: Iterable[Branch]) -> None:
        self._branches = branches
        self._lock = threading.Lock()
        self._due = 0
        self._awaited: list[tuple[Branch, int]] = []

    @property
    def confirmed(self) -> bool:
        """Whether none is due and none under way."""
        with self._lock:
            self._awaited = [each for each in self._awaited if each[0].busy and each[0].finished < each[1]]
            return not self._due and not self._awaited

    def due(self) -> None:
        """Note that the cache lacks something, which will be passed to the branches."""
        with self._lock:
            self._due += 1

    def passed(self) -> None:
        """Note that all branches have been passed a refill.

        It is the item under way, the pending one, or a part of both: others may have ended while it was put together.
        """
        awaited = [(branch, branch.finished + 2) for branch in self._branches]
        with self._lock:
            self._due -= 1
            self._awaited = awaited
