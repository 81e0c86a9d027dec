"""What a check comes to."""

from collections.abc import Callable, Iterable
from enum import StrEnum

import msgspec


class State(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    HINT = "hint"  # not as it should be, but not needed as things are set
    WARNING = "warning"  # MarketFlow runs, but not well in every case
    FAILED = "failed"  # MarketFlow would not start, or would be without something that it needs


_GRAVITY = list(State)


class Finding(msgspec.Struct, frozen=True):
    """One line of the report: what was looked at and where, how it is, and what is to be done if anything is."""

    what: str
    where: str
    state: State
    found: str
    advice: str = ""


class Check(msgspec.Struct, frozen=True):
    """Something to look at. `look` may block; what it raises counts as a bug."""

    what: str
    where: str
    look: Callable[[], list[Finding]]


def worst(states: Iterable[State]) -> State:
    """The gravest of them, ok where there are none."""
    return max(states, key=_GRAVITY.index, default=State.OK)


def address_text(host: str, port: int) -> str:
    """An address for a person: `127.0.0.1:6379`, `[::1]:6379`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def seconds_text(seconds: float) -> str:
    """A length of time for a person: `under 1 ms`, `3 ms`, `2.5 s`, `4 min`, `3 h`, `2 days`."""
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
    """A number of bytes for a person: `812 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
