"""The tables of promises name tests that exist."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
TESTS = REPOSITORY / "tests"
HEADER = "| when | then | shown by |"
PLACES = ("README.md", "tests/README.md")


def promises() -> list[str]:
    """Return the last column of the tables, a text for each row."""
    found = []
    for place in PLACES:
        lines = (REPOSITORY / place).read_text().partition(HEADER)[2].splitlines()[2:]
        rows = lines[: next((at for at, line in enumerate(lines) if not line.startswith("|")), len(lines))]
        found += [row.rstrip("| ").rpartition(" | ")[2] for row in rows]
    return found


def named(promise: str) -> Iterator[tuple[Path, str]]:
    """Return the files of a promise, each with an empty name, and the tests it names, each with the file before it."""
    path = TESTS
    for text in re.findall(r"`([\w./…]+)`", promise):
        if text.endswith(".py"):
            path = TESTS / text if "/" in text or (TESTS / text).exists() else TESTS / "faults" / text
        yield path, "" if text.endswith(".py") else text


@functools.cache
def functions_of(path: Path) -> frozenset[str]:
    """Return the names of the functions and methods in a file."""
    return frozenset(node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))


def is_there(path: Path, name: str) -> bool:
    """Whether a file has a test of this name; one that ends with an ellipsis is the beginning of a name."""
    if not path.exists():
        return False
    functions = functions_of(path)
    if name.endswith("…") or not name:
        return any(function.startswith(f"test_{name.removesuffix('…')}") for function in functions)
    return f"test_{name}" in functions


def test_each_promise_names_existing_tests() -> None:
    found = [each for promise in promises() for each in named(promise)]
    assert len(found) > 50
    assert [f"{path.relative_to(REPOSITORY)}: {name}" for path, name in found if not is_there(path, name)] == []


def test_each_fault_seen_elsewhere_names_existing_tests() -> None:
    rows = re.findall(r"^\| (\d+) \|(.*)", (TESTS / "feeds" / "README.md").read_text(), flags=re.M)
    assert [int(number) for number, _ in rows] == [*range(1, 47)]
    found = {number: re.findall(r"`([\w./]+)::test_(\w+)`", row) for number, row in rows}
    assert [number for number, tests in found.items() if not tests] == []
    named_tests = [(TESTS / path, name) for tests in found.values() for path, name in tests]
    assert [f"{path.name}::{name}" for path, name in named_tests if not is_there(path, name)] == []


def test_missing_files_and_names_are_found() -> None:
    here = Path(__file__)
    assert is_there(here, "each_promise…")
    assert is_there(here, "")
    assert not is_there(here, "each_promise")
    assert not is_there(here, "no_promise…")
    assert not is_there(here.with_name("test_nothing.py"), "")
