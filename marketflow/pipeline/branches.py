"""The branches of the flow, each behind a hand-off: what they have finished, and which of them have stalled.

A hand-off holds one item under way and one that waits, so a branch that hangs costs no memory and raises nothing; it
is seen by this alone. Time is passed in.
"""

import threading
from collections import Counter
from collections.abc import Iterable

from loguru import logger

STALLED_SECONDS = 30.0
"""How long a branch may have work without finishing any of it."""

LOOK_SECONDS = 1.0
"""How often the branches are looked at."""


class Branch:
    """One branch: written by its hand-off, under the lock of that, and read from anywhere."""

    __slots__ = ("busy", "finished", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.busy = False
        """Whether it has work."""
        self.finished = 0
        """How much of it has been done, in steps that only grow."""


class Branches:
    """Finds branches that have work and finish none, however that comes; for one thread that looks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._branches: list[Branch] = []
        self._seen: dict[Branch, int] = {}
        self._waited: dict[Branch, float] = {}
        self._looked_at: float | None = None
        self._stalled: dict[str, float] = {}  # since when
        self.stalls: dict[str, int] = {}
        """How often branches of a name have stalled."""

    @property
    def stalled(self) -> list[str]:
        """The names of those that have stalled."""
        return sorted(self._stalled)

    def add(self, name: str) -> Branch:
        """A new branch; those that do the same work side by side have the same name."""
        branch = Branch(name)
        with self._lock:
            self._branches.append(branch)
            self.stalls.setdefault(name, 0)
        return branch

    def busy(self) -> dict[str, int]:
        """How many branches of each name have work, without those that have none."""
        with self._lock:
            return dict(Counter(branch.name for branch in self._branches if branch.busy))

    def look(self, now: float) -> None:
        """Look at all branches, every LOOK_SECONDS; a time in which nobody looked counts as one of these.

        Args:
            now: seconds of a clock that is never set.
        """
        seconds = LOOK_SECONDS if self._looked_at is None else min(now - self._looked_at, LOOK_SECONDS)
        self._looked_at = now
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
        """For how long it has had work without finishing any."""
        finished = branch.finished
        idle = not branch.busy or finished != self._seen.get(branch)
        self._seen[branch] = finished
        waited = self._waited[branch] = 0.0 if idle else self._waited.get(branch, 0.0) + seconds
        return waited


class Refills:
    """Whether all that refills of the cache wrote has been confirmed; for any number of threads.

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
        """The cache was found to lack something: what it lacks will be passed to the branches."""
        with self._lock:
            self._due += 1

    def begin(self) -> list[tuple[Branch, int]]:
        """What each branch will have finished when it has written what it is passed from now on.

        That is one item, and the one before it that may be under way.
        """
        return [(branch, branch.finished + 2) for branch in self._branches]

    def passed(self, begun: list[tuple[Branch, int]]) -> None:
        """All of it has been passed to the branches, since `begin` gave this."""
        with self._lock:
            self._due -= 1
            self._awaited = begun
