"""The Postman collection as a file: complete, explained, and in the form in which Postman writes it.

What the answers are is checked by newman, see `__main__`.
"""

import json
import re
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from starlette.applications import Starlette
from starlette.routing import Match, Route

from marketflow.api.app import create_app

FOLDER = Path(__file__).parent.parent.parent / "collections"
COLLECTION = FOLDER / "marketflow.postman_collection.json"
ENVIRONMENTS = sorted(FOLDER.glob("*.postman_environment.json"))

CODES = (
    "unknown_symbol",
    "unknown_exchange",
    "no_data",
    "not_found",
    "invalid_period",
    "invalid_interval",
    "invalid_range",
    "invalid_limit",
    "invalid_format",
    "invalid_fill",
    "invalid_state",
    "invalid_offset",
    "invalid_rule",
    "invalid_after",
    "unknown_rule",
    "unknown_parameter",
    "unauthorized",
    "method_not_allowed",
    "invalid_host",
    "cross_site",
    "body_too_large",
    "headers_too_large",
)


class Item(NamedTuple):
    """A folder or a request, and all that its folders run after each of their requests."""

    place: str
    content: dict[str, Any]
    inherited: str


def items(parent: dict[str, Any], place: str = "", inherited: str = "") -> Iterator[Item]:
    for content in parent["item"]:
        item = Item(f"{place}/{content['name']}", content, inherited)
        yield item
        if "item" in content:
            yield from items(content, item.place, inherited + script(content, "test"))


def script(content: dict[str, Any], listen: str) -> str:
    events = (event for event in content.get("event", ()) if event["listen"] == listen)
    return "\n".join(line for event in events for line in event["script"]["exec"])


@pytest.fixture(scope="module")
def collection() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(COLLECTION.read_text())
    return loaded


@pytest.fixture(scope="module")
def requests(collection: dict[str, Any]) -> list[Item]:
    return [item for item in items(collection) if "request" in item.content]


def routes() -> list[tuple[Route, str]]:
    @asynccontextmanager
    async def nothing(_: Starlette) -> Any:
        yield {}

    found = [route for route in create_app(nothing).routes if isinstance(route, Route) and route.include_in_schema]
    return [(route, method) for route in found for method in sorted(route.methods or ()) if method != "HEAD"]


@pytest.mark.parametrize(("route", "method"), routes(), ids=lambda of: of if isinstance(of, str) else of.path)
def test_collection_requests_every_route(route: Route, method: str, requests: list[Item]) -> None:
    def asks(item: Item) -> bool:
        raw = item.content["request"]["url"]["raw"].removeprefix("{{baseUrl}}")
        scope = {"type": "http", "method": item.content["request"]["method"], "path": re.sub(r"{{|}}|\?.*", "", raw)}
        return scope["method"] == method and route.matches(scope)[0] is Match.FULL

    assert any(asks(item) for item in requests)


@pytest.mark.parametrize("question", ["highest", "lowest", "average"])
@pytest.mark.parametrize("form", ["{{symbol}}", "{{exchange}}/{{symbol}}"])
def test_each_price_query_is_sent_with_and_without_a_period(question: str, form: str, requests: list[Item]) -> None:
    asked = {item.content["request"]["url"]["raw"] for item in requests}
    path = f"{{{{baseUrl}}}}/prices/{question}/{form}"
    assert path in asked
    assert any(url.startswith(f"{path}?period=") for url in asked)


@pytest.mark.parametrize("code", CODES)
def test_collection_causes_every_client_error(code: str, requests: list[Item]) -> None:
    assert any(f'.to.equal("{code}")' in script(item.content, "test") for item in requests)


def folder_of(item: Item) -> str:
    return item.place.split("/")[1]


def test_start_here_has_ten_requests_that_only_read(requests: list[Item]) -> None:
    first = [item for item in requests if folder_of(item) == "Start here"]
    assert requests[:10] == first
    assert {item.content["request"]["method"] for item in first} == {"GET"}
    assert all(item.content["response"] for item in first[1:]), "an answer is saved with each"


def test_only_a_folder_that_asks_first_switches_the_mode(collection: dict[str, Any], requests: list[Item]) -> None:
    def switches(item: Item) -> bool:
        request = item.content["request"]
        # Those of Errors are for the mode that runs: they change nothing, even where they are not refused.
        path = re.search(r"/mode/(test|live|{{mode_before}})$", request["url"]["raw"])
        return request["method"] == "POST" and path is not None

    assert {folder_of(item) for item in requests if switches(item)} == {"Switch the mode"}
    (folder,) = (folder for folder in collection["item"] if folder["name"] == "Switch the mode")
    before = script(folder, "prerequest")
    assert 'pm.variables.get("switch_mode") !== "yes"' in before
    assert "pm.execution.skipRequest()" in before
    assert [each["value"] for each in collection["variable"] if each["key"] == "switch_mode"] == [""]
    assert all('"switch_mode"' not in path.read_text() for path in ENVIRONMENTS)
    assert "`switch_mode`" in folder["description"]
    assert "`switch_mode`" in (FOLDER / "README.md").read_text()


def test_folders_and_requests_have_descriptions_and_unique_names(collection: dict[str, Any]) -> None:
    places = []
    for item in items(collection):
        described = item.content.get("description") or item.content["request"]["description"]
        assert described.strip(), item.place
        places.append(item.place)
    assert len(places) == len(set(places))


def test_every_request_has_tests(requests: list[Item]) -> None:
    for item in requests:
        assert "pm.test(" in script(item.content, "test") + item.inherited, item.place


def test_scripts_use_functions_of_the_postman_app(collection: dict[str, Any], requests: list[Item]) -> None:
    whole = COLLECTION.read_text()
    assert "require(" not in whole
    assert not re.search(r"\bpostman\.\w+\(", whole)
    for item in requests:  # a promise that a test returns is not waited for by every version
        assert not re.search(r"pm\.test\([^,]+, async", script(item.content, "test") + item.inherited), item.place


def test_every_variable_has_a_default_or_a_script_sets_it(collection: dict[str, Any]) -> None:
    defaults = {variable["key"] for variable in collection["variable"]}
    text = COLLECTION.read_text()
    used = set(re.findall(r"{{(\w+)}}", text)) | set(re.findall(r'pm\.variables\.get\(\\"(\w+)\\"\)', text))
    set_by_scripts = set(re.findall(r'(?:v|V)ariables\.set\(\\"(\w+)\\"', text))
    assert used <= defaults | set_by_scripts
    assert defaults <= used


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.name)
def test_environments_set_existing_variables(path: Path, collection: dict[str, Any]) -> None:
    environment = json.loads(path.read_text())
    defaults = {variable["key"] for variable in collection["variable"]}
    assert {value["key"] for value in environment["values"]} <= defaults
    assert [value["type"] for value in environment["values"] if value["key"] == "token"] == ["secret"]


@pytest.mark.parametrize("path", [COLLECTION, *ENVIRONMENTS], ids=lambda path: path.name)
def test_files_have_the_format_of_postman_exports(path: Path) -> None:
    """So that an export after a change made in the app shows that change and nothing else."""
    text = path.read_text()
    assert json.dumps(json.loads(text), indent="\t", ensure_ascii=False) == text.rstrip("\n")
