"""Hooks that fail a unit test that starts a process, and a test whose lost exceptions asyncio only logs."""

import logging
import sys
from collections.abc import Iterator

import pytest

_PROCESS_EVENTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system"}
_LOST = ("exception was never retrieved", "was destroyed but it is pending")


class _Guard(logging.Handler):
    """Collects what fails the test that runs; asyncio reports a lost exception when the garbage collector finds it."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.is_unit = False
        self.faults: list[str] = []

    def audit(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.is_unit and event in _PROCESS_EVENTS:
            self.faults.append(f"a unit test started a process: {event}{arguments[:2]}")

    def emit(self, record: logging.LogRecord) -> None:
        if any(text in record.getMessage() for text in _LOST):
            self.faults.append(self.format(record))


_guard = _Guard()
sys.addaudithook(_guard.audit)
logging.getLogger("asyncio").addHandler(_guard)


def _guarded(item: pytest.Item) -> Iterator[None]:
    _guard.is_unit = item.get_closest_marker("unit") is not None
    try:
        yield
    finally:
        _guard.is_unit = False
        faults, _guard.faults = _guard.faults, []
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Hold the fixtures of a test to the rules."""
    yield from _guarded(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Hold a test to the rules."""
    yield from _guarded(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Hold the end of fixtures to the rules."""
    yield from _guarded(item)
