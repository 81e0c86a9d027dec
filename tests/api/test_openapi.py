"""The OpenAPI document describes all routes and nothing else; test_described_answers checks the responses."""

from typing import Any

import jsonschema_rs
import pytest
from jsonschema import Draft202012Validator
from schemathesis.specs.openapi.definitions import OPENAPI_31
from starlette import requests
from starlette.datastructures import QueryParams
from starlette.routing import Route

from marketflow import __version__
from marketflow.alerts.alert_model import KINDS, PriceRule
from marketflow.api.app import operations
from marketflow.api.middleware.request_metrics import RequestMetrics
from marketflow.api.openapi.operation import PATH_PARAMETERS
from marketflow.api.queries import candle_parameters
from marketflow.api.queries.period import PERIOD
from marketflow.api.routes import prices
from tests.api.description import Description, description, filled
from tests.api.world import EXCHANGES, SYMBOLS, World, application_of

RULES = {rule.__name__ for rule in KINDS}

OPERATIONS = {(each.method, each.path): each for each in operations(RequestMetrics())}


@pytest.fixture(scope="module")
def described() -> Description:
    return description()


def references(thing: Any) -> set[str]:
    if isinstance(thing, dict):
        own = {thing["$ref"]} if isinstance(thing.get("$ref"), str) else set()
        return own.union(*map(references, thing.values()))
    return set().union(*map(references, thing)) if isinstance(thing, list) else set()


# The document


@pytest.mark.parametrize("token", ["plain", ""])
def test_document_is_valid_openapi(token: str) -> None:
    document = description(token).document
    validator = jsonschema_rs.validator_for(OPENAPI_31)
    assert [str(error) for error in validator.iter_errors(document)] == []
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_openapi_refs_resolve_and_no_component_is_unused(described: Description) -> None:
    referenced = references(described.document)
    for reference in referenced:
        described.resolved({"$ref": reference})
    components = described.document["components"]
    defined = {
        f"#/components/{kind}/{name}" for kind in ("schemas", "responses", "headers") for name in components[kind]
    }
    # The 404 of unknown paths is documented for people; no operation has it.
    assert defined - referenced <= {"#/components/responses/not_found"} | {
        f"#/components/headers/{name}" for name in ("Connection", "WWW-Authenticate")
    }


def test_openapi_examples_match_their_schemas(described: Description) -> None:
    for operation in described.operations.values():
        for parameter in operation["parameters"]:
            for example in parameter.get("examples", {}).values():
                assert not described.errors(parameter["schema"], example["value"])
    for response in described.document["components"]["responses"].values():
        for content in response["content"].values():
            for example in content["examples"].values():
                assert not described.errors(content["schema"], example["value"])
    for schema in described.document["components"]["schemas"].values():
        for field in schema.get("properties", {}).values():
            assert not [error for example in field.get("examples", ()) for error in described.errors(field, example)]


def test_every_operation_and_schema_is_described(described: Description) -> None:
    names = [operation["operationId"] for operation in described.operations.values()]
    assert len(set(names)) == len(names)
    assert all(operation["summary"] and operation["tags"] for operation in described.operations.values())
    assert all(tag["description"] for tag in described.document["tags"])
    assert described.document["info"]["version"] == __version__
    for name, schema in described.document["components"]["schemas"].items():
        assert schema["description"], name
        # Left out while there is nothing to report.
        optional = {
            "Health": {"clock_offsets_ms", "feeds", "shards", "stalled", "unavailable_symbols"},
            "FeedProblem": {"halted"},
        }.get(name, set())
        if name in RULES:  # what requests may leave out
            optional = {field for field, each in schema["properties"].items() if "default" in each}
        assert set(schema.get("required", ())) | optional == set(schema.get("properties", ())), name


def test_names_are_strings_with_configured_ones_as_examples(described: Description) -> None:
    schemas = described.document["components"]["schemas"]
    for name, configured in (("Exchange", EXCHANGES), ("Symbol", SYMBOLS)):
        assert (schemas[name]["type"], schemas[name]["examples"]) == ("string", list(configured))
        assert "enum" not in schemas[name]


@pytest.mark.parametrize(("token", "security"), [("plain", [{"bearerToken": []}]), ("", [{}, {"bearerToken": []}])])
def test_only_changes_require_the_configured_token(token: str, security: list[object]) -> None:
    required = {key: operation["security"] for key, operation in description(token).operations.items()}
    changes = {("POST", "/mode/test"), ("POST", "/mode/live"), ("POST", "/reload"), ("POST", "/alerts")}
    changes |= {(method, "/alerts/{rule}") for method in ("PUT", "DELETE")}
    assert {key for key, value in required.items() if value} == changes
    assert [value for value in required.values() if value] == [security] * len(changes)
    assert all(value == [] for key, value in required.items() if key[0] == "GET")


def test_openapi_document_is_deterministic() -> None:
    assert World().ask("/openapi.json").content == World().ask("/openapi.json").content


# Routes


def test_routes_and_described_operations_are_the_same(described: Description) -> None:
    routes = [route for route in application_of(World().context()).routes if isinstance(route, Route)]
    existing = {(method, route.path) for route in routes if route.include_in_schema for method in route.methods or ()}
    heads = {("HEAD", path) for method, path in described.operations if method == "GET"}
    assert existing == set(described.operations) | heads
    assert [route.path for route in routes if not route.include_in_schema] == ["/ws", "/static/{name:path}"]
    assert len(application_of(World().context()).routes) == len(routes) + 1  # the WebSocket


# Parameters


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_described_parameters_are_those_read(
    described: Description, method: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[str] = set()

    class Watched(QueryParams):
        def get(self, key: Any, default: Any = None) -> Any:
            used.add(key)
            return super().get(key, default)

        def __contains__(self, key: Any) -> bool:
            used.add(key)
            return super().__contains__(key)

        def getlist(self, key: Any) -> list[str]:
            used.add(key)
            return super().getlist(key)

        def multi_items(self) -> list[tuple[str, str]]:
            used.add("any")
            return super().multi_items()

    for module in (prices, candle_parameters, requests):
        monkeypatch.setattr(module, "QueryParams", Watched)
    world = World()
    world.trade(1.0, 500)
    world.alerts.add("mine", PriceRule(symbol="BTCUSDT", level=1.0))
    body = b'{"kind":"stale"}' if OPERATIONS[method, path].body else b""
    # A query string that no other test uses, because parsed queries are cached.
    asked = filled(path, "&" * (1 + [*OPERATIONS].index((method, path))))
    assert world.ask(asked, method, content=body).status_code == OPERATIONS[method, path].status
    parameters = described.operations[method, path]["parameters"]
    in_query = {parameter["name"] for parameter in parameters if parameter["in"] == "query"}
    assert used == in_query.union(OPERATIONS[method, path].aliases)
    in_path = {parameter["name"] for parameter in parameters if parameter["in"] == "path"}
    assert in_path == {name for name in PATH_PARAMETERS if f"{{{name}}}" in path}
    for name in in_path:
        answer = world.ask(filled(path, **{name: "NOTHING"}), method, content=body)
        assert answer.json()["code"] == f"unknown_{name}"


@pytest.mark.parametrize("example", PERIOD.examples)
def test_period_examples_are_valid(example: str) -> None:
    world = World()
    world.trade(1.0, 0)
    assert world.ask(f"/prices/average/BTCUSDT?period={example}").json()["period"] == example
