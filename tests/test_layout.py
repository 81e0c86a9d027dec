"""Layout rules of the package: imports point one way, folders stay small, one module name stands for one thing.

Imports are read from the source, those within functions and under TYPE_CHECKING as well.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "marketflow"

LAYERS: list[tuple[str, ...]] = [
    (
        "model",
        "clock",
        "errors",
        "text",
        "counters",
        "time_parsing",
        "health",
        "resources",
        "tasks",
        "reference_price",
    ),
    ("logs", "client"),
    ("alerts",),
    ("settings",),
    ("stores", "feeds"),
    ("pipeline",),
    ("embedded",),
    ("cluster",),
    ("api",),
    ("server",),
    ("runtime",),
    ("cli",),
    ("app",),
]
"""What `marketflow/` holds, low to high: packages and modules. A module imports from its own package and from lower
layers; those of one layer do not import each other, but in the first, where a module may import those before it."""

STORES = ("redis", "postgres")
"""The folders of stores/: they import from its modules, not the other way round and not from each other."""

MOST_MODULES = 12
"""Python files in a folder, besides `__init__.py`."""

UPWARD_IMPORTS: dict[tuple[str, str], str] = {}
"""Imports that break the order, with the reason; the aim is none."""

SAME_NAMES = {
    "reader": "reads one store: Redis, PostgreSQL",
    "writer": "writes to one store: Redis, PostgreSQL; logs.writer writes lines",
    "candles": "the query and its route",
    "prices": "the query and its route",
    "app": "`marketflow.app:app` is the application that api.app makes, with stores and feeds",
    "health": "the route serves what health.py describes",
    "recovery": "reads what earlier runs left in Redis; the streams that take it over",
}
"""Module names that stand more than once, with the reason; the aim is stores and queries with their routes."""


def modules(package: Path) -> dict[str, Path]:
    """Return the modules of a package by dotted name, without the package's own; a folder's is its `__init__`."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if name := ".".join(parts[:-1] if parts[-1] == "__init__" else parts):
            found[name] = path
    return found


def imports(package: Path) -> dict[str, set[str]]:
    """Return each module's imports from its own package, as far as they are modules."""
    known = modules(package)
    return {
        name: {imported for imported in _imported(path, package, known) if imported != name}
        for name, path in known.items()
    }


def _imported(path: Path, package: Path, known: dict[str, Path]) -> Iterator[str]:
    folder = (package.name, *path.relative_to(package).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom():
                above = folder[: len(folder) - node.level + 1] if node.level else ()
                module = ".".join((*above, *([node.module] if node.module else [])))
                names = [f"{module}.{alias.name}" for alias in node.names]
            case _:
                continue
        for full in names:
            root, _, name = full.partition(".")
            imported = name if name in known else name.rpartition(".")[0]
            if root == package.name and imported:
                yield imported


def is_allowed(importer: str, imported: str) -> bool:
    """Whether the order of the layers lets one module import another."""
    own, other = importer.split("."), imported.split(".")
    if own[0] == "stores" == other[0]:
        mine, theirs = (name[1] if len(name) > 1 and name[1] in STORES else None for name in (own, other))
        return theirs is None or theirs == mine
    if own[0] == other[0]:
        return True
    places = {name: (layer, names.index(name)) for layer, names in enumerate(LAYERS) for name in names}
    (layer, position), (other_layer, other_position) = places[own[0]], places[other[0]]
    return other_layer < layer or (layer == other_layer == 0 and other_position < position)


def upward_imports(package: Path) -> set[tuple[str, str]]:
    """Return the imports that the order of the layers forbids, as pairs of importer and imported module."""
    return {
        (importer, imported)
        for importer, all_imported in imports(package).items()
        if importer != "__main__"
        for imported in all_imported
        if not is_allowed(importer, imported)
    }


def import_cycle(package: Path) -> list[str]:
    """Return the modules of one import cycle in the order they import each other, empty if there is none."""
    try:
        TopologicalSorter(imports(package)).prepare()
    except CycleError as error:
        cycle: list[str] = error.args[1][::-1]
        return cycle
    return []


def same_names(package: Path) -> set[str]:
    """Return the module and folder names that stand more than once."""
    counts = Counter(name.rpartition(".")[2] for name in modules(package))
    return {name for name, count in counts.items() if count > 1}


def large_folders(package: Path) -> dict[str, int]:
    """Return the folders with too many modules and how many these are."""
    files = [path for path in package.rglob("*.py") if path.name != "__init__.py"]
    counts = Counter(path.parent.relative_to(package).as_posix() for path in files)
    return {folder: count for folder, count in counts.items() if count > MOST_MODULES}


def test_imports_follow_the_order_of_layers() -> None:
    assert upward_imports(PACKAGE) == {*UPWARD_IMPORTS}


def test_layers_name_all_packages_and_modules() -> None:
    found = {name.split(".")[0] for name in modules(PACKAGE)} - {"__main__"}
    assert found == {name for names in LAYERS for name in names}


def test_modules_import_each_other_without_cycles() -> None:
    assert import_cycle(PACKAGE) == []


def test_folders_hold_few_modules() -> None:
    assert large_folders(PACKAGE) == {}


def test_module_names_are_unique() -> None:
    assert same_names(PACKAGE) == {*SAME_NAMES}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """An empty package of the same name."""
    folder = tmp_path / "marketflow"
    folder.mkdir()
    (folder / "__init__.py").touch()
    return folder


def write(package: Path, name: str, source: str = "") -> None:
    path = package / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)


@pytest.mark.parametrize(
    "source",
    [
        "from marketflow.api.app import create_app",
        "import marketflow.api.app",
        "from ..api import app",
        "from ..api.app import create_app",
        "def later():\n    from marketflow.api import app",
        "if TYPE_CHECKING:\n    from marketflow.api.app import create_app",
    ],
)
def test_upward_imports_are_found_in_every_form(package: Path, source: str) -> None:
    write(package, "api/app")
    write(package, "pipeline/graph", source)
    assert upward_imports(package) == {("pipeline.graph", "api.app")}


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("runtime.engine", "pipeline.graph", True),
        ("pipeline.graph", "runtime.engine", False),
        ("pipeline.graph", "pipeline.state", True),
        ("feeds.tcp", "stores.ports", False),
        ("health", "model", True),
        ("model", "health", False),
        ("stores.redis.reader", "stores.ports", True),
        ("stores.redis.reader", "stores.redis.keys", True),
        ("stores.ports", "stores.redis.keys", False),
        ("stores.redis.reader", "stores.postgres.rows", False),
    ],
)
def test_order_of_layers_decides_on_an_import(importer: str, imported: str, allowed: bool) -> None:
    assert is_allowed(importer, imported) is allowed


def test_import_cycles_and_duplicate_names_are_found(package: Path) -> None:
    for importer, imported in pairwise(["a.one", "b.two", "a.three", "a.one"]):
        write(package, importer.replace(".", "/"), f"import marketflow.{imported}")
    write(package, "c/one")
    cycle = import_cycle(package)
    assert {*cycle} == {"a.one", "b.two", "a.three"}
    assert all(imported in imports(package)[importer] for importer, imported in pairwise(cycle))
    assert same_names(package) == {"one"}


def test_folders_with_too_many_modules_are_found(package: Path) -> None:
    for number in range(MOST_MODULES + 1):
        write(package, f"api/module{number}")
    assert large_folders(package) == {"api": MOST_MODULES + 1}
