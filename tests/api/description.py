"""The OpenAPI document as a client reads it, and the check of responses against it."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import httpx
from jsonschema import Draft202012Validator, FormatChecker

from tests.api.world import World

EVERYWHERE = {"content-type", "content-length", "content-encoding", "vary", "date", "connection"}
"""Headers of HTTP itself. `Connection: close` is described where it is part of the response."""


class Documented(NamedTuple):
    """A described response of an operation; `code` is None unless it is a problem."""

    method: str
    path: str
    status: int
    code: str | None


class Description:
    """The document at /openapi.json."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.operations: dict[tuple[str, str], dict[str, Any]] = {
            (method.upper(), path): operation
            for path, item in document["paths"].items()
            for method, operation in item.items()
        }
        self._found: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
        self._validators: dict[int, tuple[Mapping[str, Any], Draft202012Validator]] = {}
        """By the id of their schema, which is kept, so that no other schema has this id."""

    def resolved(self, thing: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the object, with a `$ref` resolved."""
        if "$ref" not in thing:
            return thing
        found: Any = self.document
        for name in thing["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        return self.resolved(found)

    def responses(self, method: str, path: str) -> dict[int, Mapping[str, Any]]:
        """Return the responses of an operation by status."""
        found = self.operations[method, path]["responses"]
        return {int(status): self.resolved(response) for status, response in found.items()}

    def documented(self) -> Iterator[Documented]:
        """Return all described responses."""
        for method, path in self.operations:
            for status, response in self.responses(method, path).items():
                for code in codes_of(response):
                    yield Documented(method, path, status, code)

    def errors(self, schema: Mapping[str, Any], value: object) -> list[str]:
        """Return the errors of a value by a schema of this document."""
        if id(schema) not in self._validators:
            whole = {**schema, "components": self.document["components"]}
            self._validators[id(schema)] = schema, Draft202012Validator(whole, format_checker=FormatChecker())
        return [error.message for error in self._validators[id(schema)][1].iter_errors(value)]

    def check(self, method: str, path: str, answer: httpx.Response) -> None:
        """Check a response against the description of its path, which is matched without the query."""
        path = path.partition("?")[0]
        responses = self._expected(method, path)
        assert answer.status_code in responses, (method, path, answer.status_code, answer.text)
        response = responses[answer.status_code]
        self._check_headers(response, answer)
        if "content" not in response:
            assert not answer.content
            return
        media_type = answer.headers["content-type"].partition(";")[0]
        assert media_type in response["content"], (method, path, media_type)
        if method == "HEAD":
            assert not answer.content
            return
        schema = response["content"][media_type]["schema"]
        value = answer.json() if media_type.endswith("json") else answer.text
        assert not self.errors(schema, value), (method, path, value, self.errors(schema, value))
        self._check_names(schema, value)

    def _expected(self, method: str, path: str) -> dict[int, Mapping[str, Any]]:
        """Return the responses to a request, also to one for an unknown path or method."""
        if (method, path) not in self._found:
            self._found[method, path] = self._find_expected(method, path)
        return self._found[method, path]

    def _find_expected(self, method: str, path: str) -> dict[int, Mapping[str, Any]]:
        templates = [template for _, template in self.operations if _matches(template, path)]
        for template in templates:
            for each in {method, "GET" if method == "HEAD" else method}:
                if (each, template) in self.operations:
                    return self.responses(each, template)
        errors = {"method_not_allowed"} if templates else {"not_found"}
        return {
            _status_of(response): response
            for response in self.document["components"]["responses"].values()
            if set(codes_of(response)) <= errors | {"cross_site", "malformed_request", "invalid_host", "body_too_large"}
        }

    def _check_headers(self, response: Mapping[str, Any], answer: httpx.Response) -> None:
        documented = {name.lower(): self.resolved(header) for name, header in response["headers"].items()}
        assert set(answer.headers) - EVERYWHERE <= set(documented), answer.headers
        for name, header in documented.items():
            assert name in answer.headers or not header["required"], (name, answer.headers)
            if name in answer.headers:
                integer = header["schema"]["type"] == "integer"
                value = int(answer.headers[name]) if integer else answer.headers[name]
                assert not self.errors(header["schema"], value), (name, value)

    def _check_names(self, schema: Mapping[str, Any], value: object) -> None:
        """Check that each member is described; JSON Schema allows others."""
        if "anyOf" in schema:
            schema = next(each for each in schema["anyOf"] if not self.errors(each, value))
        schema = self.resolved(schema["allOf"][0] if "allOf" in schema else schema)
        if schema.get("properties"):
            assert isinstance(value, dict)
            assert set(schema["required"]) <= set(value) <= set(schema["properties"])
            for name, each in schema["properties"].items():
                for item in value.get(name, ()) if "items" in each else ():
                    self._check_names(each["items"], item)


def description(token: str = "plain") -> Description:
    """Return the document of an application with this token; "" for none."""
    return Description(World(token=token).ask("/openapi.json").json())


def codes_of(response: Mapping[str, Any]) -> list[str | None]:
    """Return the problem codes of a response; None for one that is no problem."""
    problem = response.get("content", {}).get("application/problem+json")
    return problem["schema"]["properties"]["code"]["enum"] if problem else [None]


REQUIRED = {
    "/klines": "symbol={symbol}",
    "/udf/symbols": "symbol={symbol}",
    "/udf/history": "symbol={symbol}&resolution=1&from=0&to=1763690460",
}
"""Queries with the required parameters of paths."""


def filled(
    template: str, query: str = "", exchange: str = "exchange1", symbol: str = "BTCUSDT", rule: str = "mine"
) -> str:
    """Return the path of a template, with a query and what is required in it beside that."""
    path = template.replace("{exchange}", exchange).replace("{symbol}", symbol).replace("{rule}", rule)
    given = {each.partition("=")[0] for each in query.split("&")}
    required = REQUIRED.get(template, "").replace("{symbol}", symbol)
    missing = [each for each in required.split("&") if each and each.partition("=")[0] not in given]
    whole = "&".join([*missing, *([query] if query else [])])
    return f"{path}?{whole}" if whole else path


def _matches(template: str, path: str) -> bool:
    return re.fullmatch(re.sub(r"\\{[a-z]+\\}", "[^/]+", re.escape(template)), path) is not None


def _status_of(response: Mapping[str, Any]) -> int:
    status: int = response["content"]["application/problem+json"]["schema"]["properties"]["status"]["const"]
    return status
