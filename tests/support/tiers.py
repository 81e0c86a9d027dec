"""The unit tier: tests that start no process, found by what they and their fixtures refer to."""

import functools
import inspect
import multiprocessing
import subprocess
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType

import pytest

_OTHER_TIERS = ("long", "slow", "faults", "browser", "image")
_USUAL_TIMEOUT_SECONDS = 120  # as in pyproject.toml
_STARTING_MODULES = (subprocess, multiprocessing)
_STARTING_PACKAGE = "marketflow.embedded"
_STARTING_NAMES = {"fork", "forkpty", "posix_spawn", "create_subprocess_exec", "create_subprocess_shell"}


def is_unit(item: pytest.Function) -> bool:
    """Whether a test is of no other tier, and neither it nor a fixture of it refers to what starts a process."""
    if any(item.get_closest_marker(tier) for tier in _OTHER_TIERS):
        return False
    fixtures = [definitions[-1].func for definitions in item._fixtureinfo.name2fixturedefs.values()]
    return not any(starts_process(function) for function in (item.obj, *fixtures))


def takes_minutes(item: pytest.Item) -> bool:
    """Whether a test has a longer timeout than all others."""
    timeout = item.get_closest_marker("timeout")
    return timeout is not None and timeout.args[0] > _USUAL_TIMEOUT_SECONDS


_harmless: dict[int, object] = {}
"""Objects that refer to nothing that starts a process, by id; referenced here, so that no other object gets the id."""


@functools.cache  # the same fixtures again and again
def starts_process(function: object) -> bool:
    """Whether a function refers to what starts a process, directly or by way of other code of the tests."""
    seen: dict[int, object] = {}
    waiting = [function]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or id(one) in _harmless:
            continue
        seen[id(one)] = one
        if _is_starter(one):
            return True
        waiting.extend(_references(one))
    _harmless.update(seen)
    return False


def _is_starter(value: object) -> bool:
    if isinstance(value, ModuleType):
        return value in _STARTING_MODULES or value.__name__.startswith(_STARTING_PACKAGE)
    if isinstance(value, CodeType):
        return not _STARTING_NAMES.isdisjoint(value.co_names)
    return str(getattr(value, "__module__", "")).startswith(_STARTING_PACKAGE)


def _references(value: object) -> Iterator[object]:
    """What a function, method or class of the tests refers to: the globals it names, its code, its bases."""
    value = inspect.unwrap(value) if isinstance(value, FunctionType) else getattr(value, "__func__", value)
    if not str(getattr(value, "__module__", "")).startswith("tests."):
        return
    if isinstance(value, FunctionType):
        for code in _codes(value.__code__):
            yield code
            for one in [value.__globals__[name] for name in code.co_names if name in value.__globals__]:
                yield one
                if isinstance(one, ModuleType) and one.__name__.startswith("tests."):
                    yield from (vars(one)[name] for name in code.co_names if name in vars(one))
        yield from (cell.cell_contents for cell in value.__closure__ or ())
    elif isinstance(value, type):
        yield from value.__mro__[1:]
        yield from (getattr(member, "fget", member) for member in vars(value).values())


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
