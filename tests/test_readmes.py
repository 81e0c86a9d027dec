"""The READMEs name what exists: files, anchors, commands, routes, settings, metrics, error codes, packages."""

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from msgspec import Meta

from marketflow.api.problems import Problem
from marketflow.cli.root_command import root
from marketflow.settings import Settings
from marketflow.settings.schema import KEYS, choices
from marketflow.stores.redis import keys
from tests.api.world import World
from tests.deploy.metrics import families

ROOT = Path(__file__).parent.parent
READMES = sorted(
    path
    for folder in (".", "collections", "ddl", "deploy", "tests", "tests/*", "marketflow", "marketflow/*")
    for path in ROOT.glob(f"{folder}/README.md")
)
IDS = [path.relative_to(ROOT).as_posix() for path in READMES]

MOST_LINES = 215
"""Of the README at the root; the others hold what their readers need."""

ELSEWHERE = {
    *("redis.conf", "redis.log", "postgres.log", "marketflow.env", "FILE.partial", "marketflow.dump"),
    *("test-output/", "week.csv", "day.parquet"),
}
"""Files named in the READMEs that are made by running or installing MarketFlow."""

_SUFFIXES = "py md toml txt json yaml yml sql conf csv js css png acl service env parquet dump partial"
_PATH = re.compile(rf"[\w.*-]+(/[\w.*-]+)*(/|\.({'|'.join(_SUFFIXES.split())}))")


def default(key: str) -> str:
    """Return the default of a setting as the table of settings shows it."""
    if key == "exchanges":
        return "three at 127.0.0.1, ports 40101 to 40103"
    if key == "data_dir":
        return "the platform's user data folder; for root `/var/lib/marketflow`"
    value: object = Settings()
    for name in key.split("."):
        value = getattr(value, name)
    match value:
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case "" | () | None:
            return "none"
        case tuple():
            return " ".join(value)
    return str(value)


def allowed(key: str) -> str:
    """Return the values of a setting as the table of settings shows them."""
    lists = {
        "symbols": "symbols: 1 to 32 of A-Z 0-9 - _ . beginning with a letter or a digit",
        "exchanges": "see right",
        "alerts": "see right",
        "data_dir": "the path of a folder",
        "http.allowed_hosts": 'host names without a port, or "*"',
        "http.allowed_origins": 'origins such as "https://prices.example.com", or "*"',
        "http.trusted_proxies": "IP addresses and networks",
        "redis.nodes": "a list of host:port",
        "flow.window_seconds": "a divisor of 60",
    }
    if key in lists:
        return lists[key]
    kind = KEYS[key]
    words = ", ".join(f"`{word}`" for word in choices(kind) if word)
    (text,) = [words] if words else [meta.description for meta in kind.__metadata__ if isinstance(meta, Meta)]
    return str(text)


def table(path: str, header: str) -> list[list[str]]:
    """Return the cells of the table with this header, a list for each row."""
    text = (ROOT / path).read_text()
    assert text.count(header) == 1, header
    lines = text.partition(header)[2].splitlines()[2:]
    rows = lines[: next((at for at, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def code_in(text: str) -> list[str]:
    """Return what stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


def prose_of(path: Path) -> str:
    """Return the text of a README without its code blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)


def commands_of(path: Path) -> Iterator[str]:
    """Yield the lines of shell blocks, and what stands in backticks."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), flags=re.M | re.S):
        if language == "sh":
            yield from re.sub(r"\\\n", " ", block).splitlines()
        elif language == "console":
            yield from (line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ "))
    yield from code_in(prose_of(path))


def anchors_of(path: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a file."""
    headings = re.findall(r"^#+ (.+)$", prose_of(path), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def exists(name: str, readme: Path) -> bool:
    """Whether a path exists, seen from the root, the package, the tests, or the README's folder and those in it."""
    folders = (ROOT, readme.parent, ROOT / "marketflow", ROOT / "tests", ROOT / "tests" / "faults")
    return any(any(folder.glob(name)) for folder in folders) or any(readme.parent.glob(f"*/{name}"))


def test_readme_at_the_root_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES


def test_every_readme_is_linked_from_another() -> None:
    linked = {
        (path.parent / target.partition("#")[0]).resolve()
        for path in READMES
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    }
    assert {path for path in READMES if path not in linked} <= {ROOT / "README.md"}


@pytest.mark.parametrize("readme", READMES, ids=IDS)
def test_links_lead_to_files_and_headings(readme: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(readme)):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (readme.parent / name) if name else readme
        assert file.exists(), target
        assert not anchor or anchor in anchors_of(file), target


@pytest.mark.parametrize("readme", READMES, ids=IDS)
def test_paths_in_readmes_exist(readme: Path) -> None:
    names = [name for name in code_in(prose_of(readme)) if _PATH.fullmatch(name) and name not in ELSEWHERE]
    assert [name for name in names if not exists(name, readme)] == []


def test_paths_are_told_from_other_code() -> None:
    assert _PATH.fullmatch("feeds/venues/registry.py")
    assert _PATH.fullmatch("logs/")
    assert _PATH.fullmatch(".ci/flaky.txt")
    assert not any(map(_PATH.fullmatch, ("http.token", "/metrics", "marketflow.app:app", "/docs/", "10s")))
    assert not exists("feeds/nothing.py", ROOT / "README.md")


def flags_of(name: str) -> set[str]:
    """Return the flags of a command of marketflow, of `marketflow` itself for an empty name."""
    context = click.Context(root)
    command = root.get_command(context, name) if name else root
    assert command is not None, name
    return {flag for parameter in command.get_params(context) for flag in parameter.opts}


def test_marketflow_commands_and_flags_exist() -> None:
    found = 0
    for line in (line for readme in READMES for line in commands_of(readme)):
        for command in re.findall(r"(?:^|bin/)marketflow((?: +[^&|;#>]+)?)(?=$| *[&|;#>])", line):
            words = command.split()
            name = words[0] if words and not words[0].startswith("-") else ""
            flags = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert flags <= flags_of(name), line
            found += 1
    assert found > 10


def test_test_tiers_and_programs_exist() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = {marker.partition(":")[0] for marker in options["markers"]}
    stages = re.findall(r"^(\w+)\(\) \{", (ROOT / ".ci/run").read_text(), flags=re.M)
    for line in (line for readme in READMES for line in commands_of(readme)):
        for module in re.findall(r"-m (tests[\w.]*)", line):
            assert importlib.util.find_spec(module), line
        if "pytest" in line:
            assert {*re.findall(r" -m (\w+)", line)} - {"venv", "pytest"} <= markers, line
        for stage in re.findall(r"\.ci/run ([a-z]+)", line):
            assert stage in stages, line


def test_api_table_equals_the_described_operations() -> None:
    described = World().ask("/openapi.json").json()["paths"]
    expected = {
        f"{method.upper()} {path}": {each["name"] for each in operation.get("parameters", []) if each["in"] == "query"}
        for path, item in described.items()
        for method, operation in item.items()
    }
    found: dict[str, set[str]] = {}
    for requests, _ in table("README.md", "| request | answer |"):
        query = {name for each in code_in(requests) if "?" in each for name in re.findall(r"(\w+)=", each)}
        for request in (each for each in code_in(requests) if " " in each):
            exchanges = "[{exchange}/]"
            forms = {request.replace(exchanges, ""), request.replace(exchanges, exchanges.strip("[]"))}
            found |= dict.fromkeys(forms, query)
    assert found == expected


def test_error_table_equals_the_problems() -> None:
    for path in (ROOT / "marketflow" / "api").rglob("*.py"):
        if "Problem)" in path.read_text():
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    importlib.import_module("marketflow.server.http_protocol")
    problems = list(Problem.__subclasses__())
    for problem in problems:
        problems.extend(problem.__subclasses__())
    expected = {(int(each.status), each.code) for each in problems if each.__module__.startswith("marketflow.")}
    rows = table("marketflow/api/README.md", "| status | `code` |")
    assert {(int(status), code) for status, codes in rows for code in code_in(codes)} == expected


def test_settings_table_equals_the_model() -> None:
    rows = table("marketflow/settings/README.md", "| key | default | allowed | |")
    assert [row[:3] for row in rows] == [[f"`{key}`", default(key), allowed(key)] for key in KEYS]
    assert all(len(meaning) > 3 for *_, meaning in rows)


def test_common_settings_are_settings() -> None:
    names = [name for row in table("README.md", "| key | |") for name in code_in(row[0])]
    assert names
    assert {*names} <= {*KEYS}


def test_metrics_table_equals_the_metrics() -> None:
    rows = table("deploy/README.md", "| metric (`marketflow_…`) | labels | |")
    assert sorted(f"marketflow_{name}" for row in rows for name in code_in(row[0])) == sorted(families())


def test_redis_table_holds_all_keys_and_channels() -> None:
    text = (ROOT / "deploy" / "README.md").read_text() + (ROOT / "marketflow" / "README.md").read_text()
    plain = keys.PLAIN
    names = [value for value in vars(keys).values() if isinstance(value, str) and value.startswith("marketflow:")]
    names += [plain.series_key, plain.archived_key("SHARD"), plain.complete_key("EXCHANGE"), plain.run_key("ID")]
    names += [plain.newest_channel, plain.slices_channel, plain.minutes_channel]
    assert names
    assert [name for name in names if f"`{name}`" not in text] == []


def test_layout_table_names_every_package_and_module() -> None:
    package = ROOT / "marketflow"
    found = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()}
    found |= {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    rows = [code_in(row[0]) for row in table("marketflow/README.md", "checks it.\n\n| | |")]
    assert sorted(name for names in rows for name in names) == sorted(found)


def test_python_client_is_valid_and_short() -> None:
    (client,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    ast.parse(client)
    assert len(client.strip().splitlines()) <= 10
