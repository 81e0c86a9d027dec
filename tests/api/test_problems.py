"""Errors as problem details, without internal details."""

from collections.abc import Iterator

import pytest
from loguru import logger

from marketflow.api.problems import UnknownExchange, UnknownSymbol
from marketflow.api.queries.names import NameLookup
from tests.api.world import World

GET_ONLY = ["/mode", "/health", "/livez", "/readyz"] + [
    f"/prices/{name}/{form}"
    for name in ("latest", "highest", "lowest", "average")
    for form in ("BTCUSDT", "exchange1/BTCUSDT")
]


@pytest.fixture
def logged() -> Iterator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lines.append, format="{message}", diagnose=False)
    yield lines
    logger.remove(sink)


def failing_world() -> World:
    def fail() -> None:
        raise RuntimeError("the password is swordfish")

    world = World()
    world.cache.on_ask = fail
    return world


@pytest.mark.parametrize(
    ("path", "method", "status", "title", "code"),
    [
        ("/nothing", "GET", 404, "Not Found", "not_found"),
        ("/prices/latest/NOTHING", "GET", 404, "Not Found", "unknown_symbol"),
        ("/prices/highest/BTCUSDT?period=x", "GET", 400, "Bad Request", "invalid_period"),
        ("/mode", "DELETE", 405, "Method Not Allowed", "method_not_allowed"),
        ("/mode/live", "POST", 401, "Unauthorized", "unauthorized"),
        ("/readyz", "GET", 503, "Service Unavailable", "unavailable"),
    ],
)
def test_error_is_problem_details_with_code(path: str, method: str, status: int, title: str, code: str) -> None:
    response = World(token="plain", ready=False).ask(path, method)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem.pop("detail")
    assert problem == {"type": "about:blank", "title": title, "status": status, "code": code}


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/prices", "/prices/latest", "/prices/latest/", "/prices/latest/a/b/c", "/prices/middle/BTCUSDT"],
)
def test_unknown_path_is_404_without_redirect(path: str) -> None:
    response = World().ask(path)
    assert (response.status_code, response.json()["code"]) == (404, "not_found")


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "NONSENSE"])
@pytest.mark.parametrize("path", GET_ONLY)
def test_other_method_is_405_with_allow(path: str, method: str) -> None:
    response = World().ask(path, method)
    assert (response.status_code, response.json()["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
def test_mode_switch_needs_post(method: str) -> None:
    response = World().ask("/mode/live", method)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    "path", ["/prices/latest/BTCUSDT", "/prices/average/BTCUSDT", "/prices/lowest/BTCUSDT?period=1s"]
)
def test_unexpected_error_is_500_without_details(path: str, logged: list[str]) -> None:
    response = failing_world().ask(path)
    assert (response.status_code, response.json()["code"]) == (500, "internal_error")
    assert response.headers["content-type"] == "application/problem+json"
    assert "swordfish" not in response.text
    assert "RuntimeError" not in response.text


def test_unexpected_error_is_logged_once_with_cause(logged: list[str]) -> None:
    failing_world().ask("/prices/latest/BTCUSDT")
    assert len(logged) == 1
    assert "GET '/prices/latest/BTCUSDT' failed" in logged[0]
    assert "swordfish" in logged[0]


def test_client_errors_are_not_logged(logged: list[str]) -> None:
    for path in ("/nothing", "/prices/latest/NOTHING", "/prices/highest/BTCUSDT?period=x"):
        World().ask(path)
    assert logged == []


@pytest.mark.parametrize("path", [*GET_ONLY, "/nothing"])
def test_no_response_may_be_cached(path: str) -> None:
    world = World()
    assert world.ask(path).headers["cache-control"] == "no-store"
    assert world.ask(path, "DELETE").headers["cache-control"] == "no-store"
    assert failing_world().ask(path).headers["cache-control"] == "no-store"


def test_unknown_name_is_answered_with_twenty_names_at_most() -> None:
    names = [f"NAME{number}" for number in range(5000)]
    found = ", ".join(names[:20])
    with pytest.raises(UnknownSymbol, match=rf"there are {found} and 4980 more, see GET /market\.$"):
        NameLookup(names[:20], names).symbol("x")
    with pytest.raises(UnknownExchange, match=rf"there are {found}\.$"):
        NameLookup(names[:20], names).exchange("x")
