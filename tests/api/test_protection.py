"""Middleware that rejects requests before routing: host names, cross-site requests, bodies."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marketflow.api.middleware.allowed_hosts import AllowedHosts
from marketflow.api.middleware.body_limit import BodyLimit
from marketflow.api.middleware.same_site import SameSiteOnly
from marketflow.text import is_loopback
from tests.api.world import World

Headers = Sequence[tuple[str, str]]
NO_BODY: Message = {"type": "http.request", "body": b"", "more_body": False}


class Inner:
    """An application behind the middleware that reads the body."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def ask(
    app: ASGIApp,
    headers: Headers = (),
    method: str = "GET",
    server: tuple[str, int | None] | None = ("127.0.0.1", 8080),
    body: Sequence[Message] = (NO_BODY,),
) -> tuple[int | None, str | None, dict[str, str]]:
    """Return status, problem code and headers; None and no headers without a response."""
    sent: list[Message] = []
    incoming = list(body)

    async def receive() -> Message:
        return incoming.pop(0) if incoming else await asyncio.Future()

    async def send(message: Message) -> None:
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "http",
        "method": method,
        "path": "/",
        "server": server,
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
    }
    asyncio.run(asyncio.wait_for(_called(app, scope, receive, send), 5))
    if not sent:
        return None, None, {}
    sent_headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], json.loads(sent[1]["body"]).get("code"), sent_headers


async def _called(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


def host(*values: str) -> Headers:
    return [("host", value) for value in values]


# Host names


@pytest.mark.parametrize(
    "value",
    [
        "localhost",
        "LOCALHOST:8080",
        "localhost.:1",
        "127.0.0.1",
        "127.0.0.1:8080",
        "127.8.8.8:1",
        "[::1]",
        "[::1]:8080",
    ],
)
@pytest.mark.parametrize("local", ["127.0.0.1", "127.0.0.2", "::1", "::ffff:127.0.0.1"])
def test_loopback_connection_allows_loopback_names(value: str, local: str) -> None:
    assert ask(AllowedHosts(Inner(), "127.0.0.1", ()), host(value), server=(local, 8080))[0] == 200


@pytest.mark.parametrize(
    "value",
    [
        *("evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "[::2]"),
        *("", "localhost:80:80", "[::1]x", "::1", "localhost, evil.example", "\xff"),
    ],
)
@pytest.mark.parametrize("local", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_loopback_connection_rejects_other_names(value: str, local: str) -> None:
    inner = Inner()
    status, code, _ = ask(AllowedHosts(inner, "127.0.0.1", ()), host(value), server=(local, 8080))
    assert (status, code, inner.bodies) == (400, "invalid_host", [])


@pytest.mark.parametrize("values", [(), ("localhost", "localhost")])
def test_loopback_connection_needs_exactly_one_host(values: tuple[str, ...]) -> None:
    assert ask(AllowedHosts(Inner(), "localhost", ()), host(*values))[:2] == (400, "invalid_host")


@pytest.mark.parametrize(
    ("listens_on", "local"),
    [
        *(("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("10.0.0.1", "10.0.0.1"), ("127.0.0.1", "172.17.0.2")),
        *(("127.0.0.1", "/run/marketflow.sock"), ("127.0.0.1", "testserver")),
    ],
)
def test_connection_beyond_loopback_allows_any_name(listens_on: str, local: str) -> None:
    assert ask(AllowedHosts(Inner(), listens_on, ()), host("any.example"), server=(local, 8080))[0] == 200


def test_server_without_address_allows_any_name() -> None:
    assert ask(AllowedHosts(Inner(), "127.0.0.1", ()), host("any.example"), server=None)[0] == 200


@pytest.mark.parametrize("listens_on", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize(
    ("value", "status"),
    [("prices.example", 200), ("PRICES.example.:80", 200), ("[2001:DB8::1]:80", 200), ("localhost", 400), ("", 400)],
)
def test_only_configured_host_names_are_allowed(listens_on: str, value: str, status: int) -> None:
    allowed = ("Prices.example", "[2001:db8::1]")
    assert ask(AllowedHosts(Inner(), listens_on, allowed), host(value))[0] == status


def test_star_allows_any_host_name() -> None:
    assert ask(AllowedHosts(Inner(), "127.0.0.1", ("*",)), host("evil.example"))[0] == 200


@pytest.mark.parametrize("host", ["Localhost", "127.1.2.3", "::1", "::ffff:127.0.0.1"])
def test_loopback_is_recognized_by_name_and_address(host: str) -> None:
    assert is_loopback(host)
    assert not is_loopback(f"{host}.example")
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "", "example")))


# Cross-site requests


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ({}, True),
        ({"sec-fetch-site": "same-origin"}, True),
        ({"sec-fetch-site": "none"}, True),
        ({"sec-fetch-site": "same-origin", "origin": "https://evil.example"}, True),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "same-site"}, False),
        ({"sec-fetch-site": ""}, True),
        ({"origin": "http://localhost:8080"}, True),
        ({"origin": "https://localhost:8080"}, True),
        ({"origin": "http://localhost"}, False),
        ({"origin": "http://localhost:8081"}, False),
        ({"origin": "https://evil.example"}, False),
        ({"origin": "null"}, False),
        ({"origin": ""}, True),
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "TRACE"])
def test_unsafe_cross_site_request_is_rejected(method: str, headers: dict[str, str], passes: bool) -> None:
    inner = Inner()
    answer = ask(SameSiteOnly(inner), [*host("localhost:8080"), *headers.items()], method)
    assert answer[:2] == ((200, None) if passes else (403, "cross_site"))
    assert len(inner.bodies) == passes


def test_null_origin_does_not_match_missing_host() -> None:
    assert ask(SameSiteOnly(Inner()), [("origin", "null")], "POST")[0] == 403


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_safe_cross_site_request_is_allowed(method: str) -> None:
    assert ask(SameSiteOnly(Inner()), [("sec-fetch-site", "cross-site")], method)[0] == 200


def test_cross_site_page_cannot_switch_mode_with_token() -> None:
    world = World(token="plain")
    headers = {"Origin": "https://evil.example", "Authorization": "Bearer plain"}
    response = world.ask("/mode/live", "POST", headers)
    assert (response.status_code, response.json()["code"]) == (403, "cross_site")
    assert world.mode.current == "test"


# Bodies


def pieces(*bodies: bytes, ends: bool = True) -> list[Message]:
    more = [True] * (len(bodies) - 1) + [not ends]
    return [{"type": "http.request", "body": body, "more_body": yet} for body, yet in zip(bodies, more, strict=True)]


CHUNKED: Headers = [("transfer-encoding", "chunked")]


def test_too_long_content_length_is_rejected_unread() -> None:
    status, code, headers = ask(BodyLimit(Inner(), max_bytes=10), [("content-length", "11")], "POST", body=())
    assert (status, code, headers["connection"]) == (413, "body_too_large", "close")


def test_chunked_body_over_limit_is_rejected() -> None:
    inner = Inner()
    answer = ask(BodyLimit(inner, max_bytes=10), CHUNKED, "POST", body=pieces(b"x" * 6, b"x" * 5, ends=False))
    assert (answer[:2], answer[2]["connection"], inner.bodies) == ((413, "body_too_large"), "close", [])


@pytest.mark.parametrize("headers", [CHUNKED, [("content-length", "10")]])
def test_body_within_limit_is_passed_on_complete(headers: Headers) -> None:
    inner = Inner()
    assert ask(BodyLimit(inner, max_bytes=10), headers, "POST", body=pieces(b"12345", b"", b"67890"))[0] == 200
    assert inner.bodies == [b"1234567890"]


def test_slow_body_is_rejected_at_deadline() -> None:
    inner = Inner()
    answer = ask(BodyLimit(inner, seconds=0.01), CHUNKED, "POST", body=pieces(b"x", ends=False))
    assert (answer[:2], answer[2]["connection"], inner.bodies) == ((408, "request_timeout"), "close", [])


def test_disconnect_within_body_ends_request() -> None:
    inner = Inner()
    body = [*pieces(b"x", ends=False), {"type": "http.disconnect"}]
    assert ask(BodyLimit(inner), CHUNKED, "POST", body=body)[0] is None
    assert inner.bodies == []


def test_request_without_body_is_passed_on_at_once() -> None:
    class NotReceiving(Inner):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def nothing() -> Message:
                return NO_BODY

            await super().__call__(scope, nothing, send)

    assert ask(BodyLimit(NotReceiving()), body=())[0] == 200


# All responses


@pytest.mark.parametrize(
    ("path", "method", "headers"),
    [
        ("/health", "GET", {}),
        ("/nothing", "GET", {}),
        ("/health", "DELETE", {}),
        ("/mode/live", "POST", {"Origin": "https://evil.example"}),
        ("/mode/live", "POST", {"Content-Length": "99999999"}),
    ],
)
def test_every_response_has_nosniff_and_no_store(path: str, method: str, headers: dict[str, str]) -> None:
    response = World().ask(path, method, headers)
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-store"
