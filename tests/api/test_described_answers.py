"""Every described response occurs, and no other."""

import asyncio
import itertools
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from unittest.mock import patch

import httpx
import pytest
import uvicorn
from msgspec.structs import replace

from marketflow.alerts.alert_model import PriceRule
from marketflow.api import app as built
from marketflow.api.middleware.client_limits import ClientLimits
from marketflow.api.middleware.request_metrics import RequestMetrics
from marketflow.api.rendering import JSONAnswer
from marketflow.api.streaming.candle_stream import candle_series
from marketflow.errors import SettingsError, Unavailable
from marketflow.model import Mode
from marketflow.server.http_protocol import LimitedHttpProtocol
from marketflow.stores.postgres.request_coalescing import CoalescingReader
from tests.api.description import Documented, description, filled
from tests.api.world import MemoryMode, World, application_of, client_of
from tests.support.servers import HOST, wait_until

DESCRIBED = description()
TOKEN = {"Authorization": "Bearer plain"}


def trading(token: str = "plain") -> World:
    world = World(token=token)
    world.trade(10.0, 500)
    world.trade(11.0, 200_000)
    world.alerts.add("mine", PriceRule(symbol="BTCUSDT", level=1.0))
    return world


class NoIngestProcess(MemoryMode):
    async def switch(self, mode: Mode) -> Mode:
        raise Unavailable("postgresql://secret")


def outage() -> World:
    world = World(token="plain", mode=NoIngestProcess(), ready=False, streams=0)
    world.cache.away = world.archive.away = world.alerts.away = True
    world.reloaded = Unavailable("no ingest process is running")
    return world


class ShortDeadline(LimitedHttpProtocol):
    HEADER_SECONDS = 0.2


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Port of a server, which rejects requests that do not reach the application."""
    with socket.create_server((HOST, 0)) as listener:
        config = uvicorn.Config(
            application_of(trading().context()), http=ShortDeadline, ws="none", log_config=None, server_header=False
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        wait_until(lambda: server.started)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(10)


def raw_response(port: int, sent: bytes) -> httpx.Response:
    """Return the response of a server that then closes the connection."""
    with socket.create_connection((HOST, port), timeout=5) as client:
        client.sendall(sent)
        received = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    headers = [(name, value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
    return httpx.Response(int(first.split()[1]), headers=headers, content=body)


# Described responses


Provoke = Callable[[str, str], httpx.Response]
"""Sends a request that causes a certain response."""

BY_APPLICATION: dict[str | None, Provoke] = {
    None: lambda method, path: trading().ask(filled(path), method, TOKEN, body_of(method, path)),
    "unknown_symbol": lambda method, path: trading().ask(
        unknown(path, "symbol", "NOTHING"), method, TOKEN, body_of(method, path, symbol="NOTHING")
    ),
    "unknown_exchange": lambda method, path: trading().ask(
        unknown(path, "exchange", "nowhere"), method, TOKEN, body_of(method, path, exchange="nowhere")
    ),
    "unknown_rule": lambda method, path: trading().ask(filled(path, rule="no"), method, TOKEN, body_of(method, path)),
    "configured_rule": lambda method, path: refused("configured_rule", method, path),
    "too_many_rules": lambda method, path: refused("too_many_rules", method, path),
    "invalid_rule": lambda method, path: trading().ask(filled(path), method, TOKEN, b'{"kind":"moon"}'),
    "invalid_after": lambda method, path: trading().ask(filled(path, "after=-1"), method),
    "unknown_parameter": lambda method, path: trading().ask(filled(path, "nothing=1"), method, TOKEN),
    "no_data": lambda method, path: World().ask(filled(path), method),
    "invalid_period": lambda method, path: trading().ask(filled(path, "period=1w"), method),
    "invalid_interval": lambda method, path: trading().ask(
        filled(path, "intervals=2w" if path.startswith("/stream") else "interval=2w"), method
    ),
    "too_many_series": lambda method, path: with_few_series(method, path),
    "invalid_range": lambda method, path: trading().ask(wrong_range(path), method),
    "invalid_limit": lambda method, path: trading().ask(filled(path, "limit=0"), method),
    "invalid_state": lambda method, path: trading().ask(filled(path, "state=lost"), method),
    "invalid_offset": lambda method, path: trading().ask(filled(path, "offset=-1"), method),
    "invalid_rate": lambda method, path: trading().ask(filled(path, "max_rate=0"), method),
    "invalid_settings": lambda method, path: reloaded(SettingsError("symbols = 7")).ask(path, method, TOKEN),
    "invalid_fill": lambda method, path: trading().ask(filled(path, "fill=zero"), method),
    "invalid_format": lambda method, path: trading().ask(filled(path, "format=csv"), method),
    "too_many_requests": lambda method, path: over_limit(method, path),
    "unavailable": lambda method, path: outage().ask(filled(path), method, TOKEN, body_of(method, path)),
    "unauthorized": lambda method, path: trading().ask(filled(path), method),
    "cross_site": lambda method, path: trading().ask(filled(path), method, TOKEN | {"Origin": "https://evil.example"}),
    "invalid_host": lambda method, path: trading().ask(
        f"http://127.0.0.1{filled(path)}", method, TOKEN | {"Host": "evil.example"}
    ),
    "method_not_allowed": lambda method, path: trading().ask(filled(path), "PATCH"),
    "body_too_large": lambda method, path: trading().ask(filled(path), method, TOKEN | {"Content-Length": "99999999"}),
}


def unknown(path: str, kind: str, name: str) -> str:
    """Return a path with an unknown name, as part of it or in its query."""
    if "{" in path or path.startswith("/alerts"):
        return filled(path, **{kind: name})
    return f"{path}?{kind}{'s' if path.startswith(('/stream', '/tickers')) else ''}={name}"


def reloaded(error: Exception) -> World:
    """Return a world whose settings cannot be read again."""
    world = trading()
    world.reloaded = error
    return world


def with_few_series(method: str, path: str) -> httpx.Response:
    """Return the response where a subscription may have one candle series."""
    with patch.object(candle_series, "MOST_CANDLE_SERIES", 1):
        return trading().ask(path, method)


def body_of(method: str, path: str, **names: str) -> bytes:
    """Return the body of a request that needs one, with these names in it."""
    if method not in ("POST", "PUT") or not path.startswith("/alerts"):
        return b""
    return json.dumps({"kind": "price", "symbol": "BTCUSDT", "level": 1, **names}).encode()


def refused(code: str, method: str, path: str) -> httpx.Response:
    """Return the response to a change of a rule that is refused."""
    world = trading()
    world.alerts.refusal = code
    return world.ask(filled(path), method, TOKEN, body_of(method, path))


def wrong_range(path: str) -> str:
    """Return a path with a range that is none; /klines takes the names of Binance."""
    return "/klines?symbol=BTCUSDT&startTime=yesterday" if path == "/klines" else filled(path, "from=yesterday")


def over_limit(method: str, path: str) -> httpx.Response:
    """Return the response to a client that has used up its limits."""
    world = trading()
    context = replace(world.context(), clients=ClientLimits())
    context.broadcaster._max_streams_per_client = 0
    for bucket in (context.clients._rows, context.clients.guesses):
        bucket._monotonic = lambda: 0.0  # no refill, however slow the machine
        bucket.take("127.0.0.1", 1e9)
    charged = CoalescingReader(world.archive, charge=context.clients.charge)
    context = replace(context, prices=replace(context.prices, archive=charged))

    async def ask() -> httpx.Response:
        async with client_of(context) as client:
            return await client.request(method, filled(path), headers=TOKEN)

    return asyncio.run(ask())


def not_modified(method: str, path: str) -> httpx.Response:
    """Return the response to a client that has the current ETag."""
    world = trading()
    names = ("startTime", "endTime") if path == "/klines" else ("from", "to")
    since, until = world.now - 3_600_000, world.now - 1_800_000
    asked = filled(path, f"{names[0]}={since}&{names[1]}={until}")
    return world.ask(asked, method, {"If-None-Match": world.ask(asked).headers["etag"]})


BY_SERVER: dict[str | None, bytes] = {
    "malformed_request": b"\0\r\n\r\n",
    "headers_too_large": b"Host: localhost\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
    "request_timeout": b"Host: localhost\r\n",
}
"""Bytes after the request line."""


def test_every_described_code_has_a_test_request() -> None:
    codes = {each.code for each in DESCRIBED.documented()}
    assert codes == {*BY_APPLICATION, *BY_SERVER, "internal_error"}
    listed = DESCRIBED.document["components"]["schemas"]["ProblemDetails"]["properties"]["code"]["enum"]
    assert set(listed) == codes - {None} | {"not_found"}


@pytest.mark.parametrize("each", [each for each in DESCRIBED.documented() if each.code in BY_APPLICATION], ids=str)
def test_described_responses_of_application_occur(each: Documented) -> None:
    provoke = not_modified if each.status == HTTPStatus.NOT_MODIFIED else BY_APPLICATION[each.code]
    answer = provoke(each.method, each.path)
    assert_given(each, answer)


@pytest.mark.parametrize("each", [each for each in DESCRIBED.documented() if each.code in BY_SERVER], ids=str)
def test_described_responses_of_server_occur(each: Documented, port: int) -> None:
    answer = raw_response(port, f"{each.method} {filled(each.path)} HTTP/1.1\r\n".encode() + BY_SERVER[each.code])
    assert_given(each, answer)


@pytest.mark.parametrize("each", [each for each in DESCRIBED.documented() if each.code == "internal_error"], ids=str)
def test_internal_error_of_any_operation_is_described_500(each: Documented, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_: object) -> JSONAnswer:
        raise RuntimeError("the password is swordfish")

    broken = [replace(operation, endpoint=fail) for operation in built.operations(RequestMetrics())]
    monkeypatch.setattr(built, "operations", lambda _: broken)
    assert_given(each, trading().ask(filled(each.path), each.method))


def assert_given(each: Documented, answer: httpx.Response) -> None:
    problem = answer.headers.get("content-type", "").startswith("application/problem+json")
    code = answer.json()["code"] if problem else None
    assert (answer.status_code, code) == (each.status, each.code)
    DESCRIBED.check(each.method, filled(each.path), answer)


# Undescribed responses


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY", "CONNECT", "X-Y")
PATHS = (
    *(filled(path) for path in DESCRIBED.document["paths"]),
    *(f"{filled(path)}/" for path in DESCRIBED.document["paths"]),
    *("/", "//", "//prices/latest/BTCUSDT", "/prices//latest/BTCUSDT", "/prices/latest//BTCUSDT", "/prices/latest"),
    *("/PRICES/latest/BTCUSDT", "/prices/middle/BTCUSDT", "/prices/latest/a/b/c", "/mode/else", "/mode/TEST"),
    *("/prices/highest/btcusdt", "/prices/latest/EXCHANGE2/ethUSDT", "/prices/latest/%42TCUSDT", "/m%6Fde"),
    *("/prices/latest/%00", "/prices/latest/%FF", "/prices/latest/%E2%84%AA", "/prices/latest/exchange1%2FBTCUSDT"),
    *("/prices/latest/nowhere/BTCUSDT", "/prices/average/exchange1/NOTHING", "/prices/lowest/..", "/openapi.yaml"),
    *("/candles", "/candles/", "/candles/nowhere/BTCUSDT", "/candles/exchange2/ethusdt", "/candles/NOTHING"),
    *("/prices/latest/" + "x" * 5000, "/docs/index.html", "/static", "/prices/latest/BTCUSDT;x", "/*", "/healthz"),
)
QUERIES = (
    *("", "?", "?period", "?period=", "?period=1s", "?period=0s", "?period=367d", "?period=24h", "?period=%31m"),
    *("?period=x&period=1s", "?period=1s&period=x", "?Period=x", "?nothing=1", "?period=1s&nothing", "?%FF=%FF"),
    *("?interval=1h&limit=2", "?interval=1H", "?limit=1001", "?from=0&to=9", "?from=1e3", "?to=2026-13-01T00:00:00Z"),
    *("?format=array", "?format=", "?from=1763600000000&to=1763650000000&format=array", "?limit=", "?from=&to="),
    *("?period=1m%0A", "?period=1%00s", "?period=" + "0" * 5000 + "1s", "?period=" + "1s" * 1000),
)
HEADERS: tuple[dict[str, str], ...] = (
    {},
    TOKEN,
    {"Authorization": "Basic x"},
    {"Origin": "https://evil.example"},
    {"Host": "evil.example"},
    {"Content-Length": "70000"},
    {"Accept": "application/xml", "Range": "bytes=0-1", "If-None-Match": "*", "If-Modified-Since": "x"},
)
REQUESTS = (
    *itertools.product(METHODS, PATHS, ("",), HEADERS[:2]),
    # Answered before the route is known, or as the route answers GET: other methods would add no answer.
    *itertools.product(("GET", "POST", "PUT"), PATHS, ("",), HEADERS[2:]),
    *itertools.product(("GET",), PATHS, QUERIES, HEADERS[:1]),
    *itertools.product(("HEAD", "POST"), PATHS, ("?period=x&period=1s", "?nothing=1"), HEADERS[:1]),
)


@pytest.mark.long
@pytest.mark.parametrize("world", [trading(), World(), outage()], ids=["trading", "empty", "outage"])
def test_no_response_is_undescribed(world: World) -> None:
    seen = set()

    async def send_all() -> None:
        async with client_of(world.context()) as client:
            for method, path, query, headers in REQUESTS:
                await ask(client, method, path, query, headers)

    async def ask(client: httpx.AsyncClient, method: str, path: str, query: str, headers: dict[str, str]) -> None:
        # Without the host a client takes a path that begins with two slashes for a host.
        answer = await client.request(method, f"http://127.0.0.1{path}{query}", headers={"Host": "localhost"} | headers)
        alias = path.startswith("/candles/") and "format=array" in query
        DESCRIBED.check(method, path.replace("/candles/", "/klines/") if alias else answer.request.url.path, answer)
        seen.add(answer.status_code)

    asyncio.run(send_all())
    assert seen >= {400, 403, 404, 405, 413}


@pytest.mark.parametrize("path", [path for method, path in DESCRIBED.operations if method == "GET"])
@pytest.mark.parametrize("world", [trading(), World(), outage()], ids=["trading", "empty", "outage"])
def test_head_is_get_without_body(world: World, path: str) -> None:
    got, headed = (world.ask(filled(path), method) for method in ("GET", "HEAD"))
    if path == "/metrics":  # its length varies with the values
        assert headed.headers.pop("content-length").isdecimal()
        del got.headers["content-length"]
    assert (headed.status_code, headed.headers, headed.content) == (got.status_code, got.headers, b"")
