"""Health checks, their results, and how results print numbers."""

from collections.abc import Callable, Iterable
from enum import StrEnum

import msgspec


class CheckState(StrEnum):
    """State of what was checked, from best to worst."""

    OK = "ok"
    HINT = "hint"  # wrong, but not needed with these settings
    WARNING = "warning"  # MarketFlow runs, but not well in all cases
    FAILED = "failed"  # MarketFlow would not start, or would lack something it needs


_BEST_TO_WORST = list(CheckState)


class CheckResult(msgspec.Struct, frozen=True):
    """One line of the report: what was checked and where, its state, what was found, and what to do about it.

    `command` is a command line that opens what was checked, ready to be pasted into a shell.
    """

    what: str
    where: str
    state: CheckState
    found: str
    advice: str = ""
    command: str | msgspec.UnsetType = msgspec.UNSET


class Check(msgspec.Struct, frozen=True):
    """One health check. `run` may block; an exception from it is reported as a bug."""

    what: str
    where: str
    run: Callable[[], list[CheckResult]]


def worst_state(states: Iterable[CheckState]) -> CheckState:
    """Return the worst of some states; OK without any."""
    return max(states, key=_BEST_TO_WORST.index, default=CheckState.OK)


def seconds_text(seconds: float) -> str:
    """Return a duration for a person: `under 1 ms`, `3 ms`, `2.5 s`, `4 min`, `3 h`, `2 days`."""
    if seconds < 0.001:
        return "under 1 ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    for unit, length in (("min", 60), ("h", 3600)):
        if seconds < 120 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def bytes_text(number: float) -> str:
    """Return a number of bytes for a person: `812 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
