"""Prepared answers are those of the routes: the same bytes, on real sockets, from two servers of one market."""

import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager

import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marketflow.api.middleware.client_limits import ClientLimits
from marketflow.api.prepared_answers import MAX_PREPARED, PREPARED_ANSWERS
from marketflow.api.queries.prices import PriceQueries
from marketflow.clock import NANOSECONDS_PER_MS
from marketflow.model import MINUTE_MS, Mode
from marketflow.server.http_protocol import LimitedHttpProtocol
from marketflow.settings import HttpSettings
from marketflow.stores.postgres.request_coalescing import CoalescingReader
from tests.api.world import EXCHANGES, World, application_of, series
from tests.support.exposition import samples_of
from tests.support.servers import HOST, wait_until

HOT = [
    f"/prices/{name}/{names}{query}"
    for name, query in (("latest", ""), ("highest", "?period=5m"), ("lowest", "?period=1s"), ("average", "?period=1m"))
    for names in ("BTCUSDT", "exchange1/BTCUSDT")
]
KEEP_ALIVE_SECONDS = 1
HEADER_SECONDS = 1.0


class Protocol(LimitedHttpProtocol):
    HEADER_SECONDS = HEADER_SECONDS


class Server:
    """uvicorn in a thread; `prepared` is whether it answers itself what it can. Counts what reaches the application."""

    def __init__(
        self,
        world: World,
        http: HttpSettings = HttpSettings(),  # noqa: B008 - frozen
        *,
        prepared: bool = True,
        limited: bool = False,
        access_log: bool = False,
        keep_alive: int = 60,
    ) -> None:
        self.asked = 0
        self._prepared = prepared
        clients = ClientLimits()
        context = world.context()
        if limited:
            archive = CoalescingReader(world.archive, charge=clients.charge)
            prices = PriceQueries(world.cache, archive, lambda: world.now * NANOSECONDS_PER_MS)
            context = replace(context, prices=prices, clients=clients)
        self._app: ASGIApp = application_of(context, http)
        self._listener = socket.create_server((HOST, 0))
        self.port = self._listener.getsockname()[1]
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._count,
                interface="asgi3",
                http=Protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=access_log,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=keep_alive,
            )
        )
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]})
        self._thread.start()

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def started(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete" and not self._prepared:
                del scope["state"][PREPARED_ANSWERS]
            await send(message)

        self.asked += scope["type"] == "http"
        await self._app(scope, receive, started)

    def stop(self) -> None:
        """Stop, and wait for the end."""
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self.stop()
        self._listener.close()


class Client:
    """A connection that is opened again once the server has closed it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._socket: socket.socket | None = None

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def send(self, data: bytes) -> None:
        if self._socket is None:
            self._socket = socket.create_connection((HOST, self.server.port), timeout=5)
        self._socket.sendall(data)

    def receive(self, head_only: bool = False) -> bytes:
        """Return one whole response, without its date; b"" if the server closes instead."""
        assert self._socket is not None
        received = b""
        while (length := _length_of(received, head_only)) is None or len(received) < length:
            if not (data := self._socket.recv(65536)):
                self.close()
                assert not received
                return b""
            received = (received + data).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        if b"\r\nconnection: close\r\n" in received:
            received += _rest(self._socket)
            self.close()
        else:
            assert len(received) == length, received
        dateless, count = re.subn(rb"\r\ndate: \w{3}, [^\r]* GMT\r\n", b"\r\n", received)
        assert count == 1, received
        return dateless

    def ask(self, request: bytes) -> bytes:
        """Send a request and return the response."""
        self.send(request)
        return self.receive(request.startswith(b"HEAD "))

    def get(self, path: str) -> bytes:
        """Return the response to a usual GET."""
        return self.ask(get(path))


def _length_of(received: bytes, head_only: bool) -> int | None:
    head, end, _ = received.partition(b"\r\n\r\n")
    if not end:
        return None
    found = re.search(rb"\r\ncontent-length: (\d+)", head)
    assert found, received
    return len(head) + 4 + (0 if head_only else int(found[1]))


def get(path: str, *headers: str, method: str = "GET", version: str = "1.1") -> bytes:
    lines = [f"{method} {path} HTTP/{version}", *(headers or ("Host: 127.0.0.1",)), "", ""]
    return "\r\n".join(lines).encode("latin-1")


def trade(world: World) -> None:
    """Add ticks of every exchange in test mode, and other ones of one exchange in live mode."""
    for i, exchange in enumerate(EXCHANGES):
        for age in (100, 1_100, 45_000, 4 * MINUTE_MS):
            world.trade(100.25 + i * 10 + age % 7, age, series(exchange))
    world.trade(7.5, 300, series(mode=Mode.LIVE))


@contextmanager
def both(
    world: World,
    http: HttpSettings = HttpSettings(),  # noqa: B008 - frozen
    limited: bool = False,
) -> Iterator[tuple[Client, Client]]:
    """Yield clients of a server with prepared answers, and of one without."""
    with ExitStack() as stack:
        servers = [
            stack.enter_context(closing(Server(world, http, prepared=prepared, limited=limited)))
            for prepared in (True, False)
        ]
        prepared, reference = (stack.enter_context(Client(server)) for server in servers)
        yield prepared, reference


class Market:
    """A market, and a client of either server."""

    def __init__(self, world: World, prepared: Client, reference: Client) -> None:
        self.world = world
        self.prepared = prepared
        self.reference = reference

    def compare(self, request: bytes) -> bytes:
        """Send a request three times to one server and once to the other; return the response that all give."""
        expected = self.reference.ask(request)
        for _ in range(3):
            assert self.prepared.ask(request) == expected, request
        return expected

    def asked(self, ask: Callable[[], object]) -> int:
        """Return how many requests reach the application of the server with prepared answers."""
        before = self.prepared.server.asked
        ask()
        return self.prepared.server.asked - before


@pytest.fixture(scope="module")
def market() -> Iterator[Market]:
    """A market with ticks; not to be changed."""
    world = World(token="0123456789abcdef")
    trade(world)
    with both(world) as (prepared, reference):
        yield Market(world, prepared, reference)


@pytest.fixture
def changing() -> Iterator[Market]:
    """A market of its own."""
    world = World()
    trade(world)
    with both(world) as (prepared, reference):
        yield Market(world, prepared, reference)


# The prepared path is taken


@pytest.mark.parametrize("path", HOT)
def test_equal_requests_do_not_reach_the_application(market: Market, path: str) -> None:
    request = get(path, "Host: localhost", "User-Agent: x", "Accept: */*")
    assert market.prepared.ask(request).startswith(b"HTTP/1.1 200 OK\r\n")
    assert market.asked(lambda: [market.prepared.ask(request) for _ in range(5)]) == 0
    with Client(market.prepared.server) as another:
        assert market.asked(lambda: another.ask(request)) == 0


def test_prepared_requests_are_bounded_and_the_oldest_evicted(market: Market) -> None:
    first = get(HOT[0], "Host: localhost", "User-Agent: first")
    market.prepared.ask(first)
    for i in range(MAX_PREPARED):
        market.prepared.ask(get(HOT[0], "Host: localhost", f"User-Agent: {i}"))
    assert market.asked(lambda: market.prepared.ask(first)) == 1
    assert market.asked(lambda: market.prepared.ask(first)) == 0


def test_access_log_has_every_request(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    trade(world)
    logging.getLogger("uvicorn.access").addHandler(handler := logging.NullHandler())
    try:
        with closing(Server(world, access_log=True)) as server, Client(server) as client:
            for _ in range(3):
                client.get(HOT[0])
            assert server.asked == 3
    finally:
        logging.getLogger("uvicorn.access").removeHandler(handler)


# The same bytes


def cased(name: str) -> st.SearchStrategy[str]:
    return st.lists(st.booleans(), min_size=len(name), max_size=len(name)).map(
        lambda upper: "".join(c.upper() if up else c.lower() for c, up in zip(name, upper, strict=True))
    )


SYMBOL = st.one_of(
    cased("BTCUSDT"), cased("ETHUSDT"), st.sampled_from(["SHIB", "%42TCUSDT", "BTCUSDT/", "BTC\xdfUSDT", "K"])
)
EXCHANGE = st.one_of(st.just(""), cased("exchange1").map("{}/".format), st.sampled_from(["EXCHANGE2/", "none/", "/"]))
QUERY = st.sampled_from(
    [
        *("", "?", "?period=1m", "?period=5m", "?period=6m", "?period=7m", "?period=1s", "?period=", "?period", "?&"),
        *("?period=1m&period=1s", "?period=1s&period=x", "?Period=1m", "?period=1%6d", "?window=1m", "?period=1m&x=1"),
        *("?period=00001m", "?period=1m30s", "?period=1m#x", "#x", "?period=366d"),
    ]
)
PATH = st.one_of(
    st.builds(
        "/prices/{}/{}{}{}".format, st.sampled_from(["latest", "highest", "lowest", "average"]), EXCHANGE, SYMBOL, QUERY
    ),
    st.sampled_from(
        [*HOT, "/mode", "/prices/latest", "/Prices/latest/BTCUSDT", "http://127.0.0.1" + HOT[0], "*", "//x"]
    ),
)
HOSTS = st.sampled_from(
    [
        *(["Host: 127.0.0.1"], ["Host: LOCALHOST:8080"], ["host: [::1]:1"], ["Host: evil.example"], ["Host: "], []),
        *(["Host: localhost", "Host: localhost"], ["Host: localhost", "Host: evil.example"]),
    ]
)
HEADERS = st.lists(
    st.sampled_from(
        [
            *("If-None-Match: *", "If-Modified-Since: Fri, 28 Nov 2036 00:00:00 GMT", "Range: bytes=0-1"),
            *("Accept: */*", "Accept: text/html", "Accept-Encoding: gzip", "Accept-Encoding: identity;q=0"),
            *("Authorization: Bearer x", "Origin: https://shop.example", "Origin: https://other.example"),
            *("Connection: close", "Connection: keep-alive", "Connection: Upgrade", "Upgrade: h2c", "Cookie: a=b"),
            *("Content-Length: 0", "Expect: 100-continue", "Transfer-Encoding: identity", "TE: trailers"),
            *("X-Forwarded-For: 10.0.0.1", "X-Forwarded-Host: evil.example", "Sec-Fetch-Site: cross-site"),
            *("X-Unknown: 1", "Cache-Control: no-cache", "X-Bad : 1", "X-\xff: 1"),
        ]
    ),
    max_size=4,
    unique=True,
)
REQUEST = st.builds(
    lambda path, host, headers, method, version: get(path, *host, *headers, method=method, version=version),
    PATH,
    HOSTS,
    HEADERS,
    st.sampled_from(["GET", "GET", "GET", "HEAD", "OPTIONS", "get"]),
    st.sampled_from(["1.1", "1.1", "1.1", "1.0", "2.0"]),
)


@given(REQUEST)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_request_is_answered_as_by_the_routes(market: Market, request_bytes: bytes) -> None:
    market.compare(request_bytes)


@given(PATH)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_path_is_answered_as_by_the_routes(market: Market, path: str) -> None:
    market.compare(get(path))


@pytest.mark.parametrize("path", HOT)
def test_hot_paths_are_answered_as_by_the_routes(market: Market, path: str) -> None:
    answer = market.compare(get(path))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncache-control: no-store\r\n")


@pytest.mark.parametrize(
    "http",
    [
        HttpSettings(allowed_origins=("https://shop.example",)),
        HttpSettings(allowed_origins=("*",)),
        HttpSettings(allowed_hosts=("prices.example",)),
        HttpSettings(allowed_hosts=("*",)),
        HttpSettings(host="0.0.0.0"),
    ],
)
def test_hosts_and_origins_are_checked_as_by_the_middleware(http: HttpSettings) -> None:
    world = World()
    trade(world)
    with both(world, http) as (prepared, reference):
        market = Market(world, prepared, reference)
        for host in ("127.0.0.1", "prices.example", "evil.example"):
            for headers in ([], ["Origin: https://shop.example"], ["Origin: https://other.example"]):
                market.compare(get(HOT[0], f"Host: {host}", *headers))


def test_unlisted_host_is_refused_after_a_prepared_answer(market: Market) -> None:
    market.compare(get(HOT[0]))
    assert b'"invalid_host"' in market.compare(get(HOT[0], "Host: evil.example"))


def test_requests_are_counted_as_by_the_routes(changing: Market) -> None:
    for path in (*HOT, "/prices/latest/SHIB", "/prices/latest/BTCUSDT?x=1"):
        for client in (changing.prepared, changing.reference):
            for _ in range(4):
                client.get(path)
    counted = [
        {
            key: value
            for key, value in samples_of(client.get("/metrics").partition(b"\r\n\r\n")[2].decode()).items()
            if key[0].endswith("http_request_seconds_count")
        }
        for client in (changing.prepared, changing.reference)
    ]
    assert counted[0] == counted[1]
    assert sum(counted[0].values()) == 4 * (len(HOT) + 2)


def test_client_limits_are_those_of_the_routes() -> None:
    """The share of a client is used up by long periods, each of another length; hot requests use none of it."""
    world = World()
    trade(world)
    with both(world, limited=True) as clients:
        statuses = [[client.get(path)[9:12] for path in _paths_of_a_greedy_client()] for client in clients]
    for each in statuses:
        assert set(each[::2]) == {b"200", b"429"}
        assert set(each[1::2]) == {b"200"}


def _paths_of_a_greedy_client() -> Iterator[str]:
    for hour in range(250):
        yield f"/prices/highest/BTCUSDT?period={300 * 24 + hour}h"
        yield HOT[2]


# Never an older answer


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("tick"), st.sampled_from(EXCHANGES), st.sampled_from(list(Mode)), st.floats(1, 1e6)),
        st.tuples(st.sampled_from(["mode", "cache", "archive", "memory", "later", "emptied"])),
    ),
    max_size=12,
)


@given(EVENTS, st.sampled_from(HOT))
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_answers_follow_every_change_of_the_market(
    changing: Market, events: list[tuple[object, ...]], path: str
) -> None:
    world = changing.world
    for event in events:
        match event:
            case ("tick", str(exchange), Mode() as mode, float(price)):
                world.trade(price, 0, series(exchange, mode=mode))
            case ("mode",):
                world.mode.current = Mode.LIVE if world.mode.current is Mode.TEST else Mode.TEST
            case ("cache",):
                world.cache.away = not world.cache.away
            case ("archive",):
                world.archive.away = not world.archive.away
            case ("memory",):
                world.cache.in_memory = not world.cache.in_memory
            case ("later",):
                world.now += 1_001  # answers of the archive are kept for a second of another clock
            case ("emptied",):
                world.cache.newest_ticks.clear()
        changing.compare(get(path))


def test_mode_switch_changes_the_next_answer(changing: Market) -> None:
    request = get("/prices/latest/exchange1/BTCUSDT")
    assert b'"price":7.5,' not in changing.compare(request)
    changing.world.mode.current = Mode.LIVE
    assert changing.asked(lambda: changing.prepared.ask(request)) == 0
    assert b'"price":7.5,' in changing.compare(request)


def test_newer_tick_is_in_the_next_answer(changing: Market) -> None:
    for price in (1.5, 2.5, 3.5):
        changing.world.now += 10
        changing.world.trade(price, 0)
        assert b'"price":%.1f,' % price in changing.compare(get("/prices/latest/BTCUSDT"))


@pytest.mark.parametrize("path", HOT)
def test_outage_is_answered_by_the_route(changing: Market, path: str) -> None:
    changing.compare(get(path))
    changing.world.cache.away = True
    assert changing.asked(lambda: changing.prepared.get(path)) == 1
    changing.world.archive.away = True
    changing.world.archive.minutes.clear()
    assert changing.prepared.get(path)[9:12] == changing.reference.get(path)[9:12]


# Connections


@pytest.mark.parametrize(
    "sent",
    [
        get(HOT[0]) * 2,
        get(HOT[0]) * 10,
        get(HOT[0]) + get("/mode") + get(HOT[0]),
        get("/mode") + get(HOT[0]),
    ],
)
def test_pipelined_requests_are_answered_in_order(market: Market, sent: bytes) -> None:
    count = sent.count(b"\r\n\r\n")
    answers = []
    for client in (market.reference, market.prepared, market.prepared):
        client.get(HOT[0])
        client.send(sent)
        received = b""
        assert client._socket is not None
        while len(re.findall(rb"HTTP/1.1 200", received)) < count or not received.endswith(b"}"):
            received += client._socket.recv(65536)
        answers.append(re.sub(rb"\r\ndate: [^\r]*", b"", received))
    assert answers[0] == answers[1] == answers[2]


LAST = get("/mode", "Host: localhost", "Connection: close")


@pytest.mark.parametrize(
    "rest", [b"rubbish\r\n\r\n", b"\r\n" + LAST, b"\n" + LAST, LAST, b"GET / HTTP/1.1\r\nHost: localhost\r\n"]
)
@pytest.mark.parametrize("begin", [b"", b"\r\n", get("/mode")])
def test_what_surrounds_a_request_is_treated_as_by_the_parser(market: Market, begin: bytes, rest: bytes) -> None:
    received = []
    for server in (market.reference.server, market.prepared.server):
        with socket.create_connection((HOST, server.port), timeout=5) as connection:
            connection.sendall(begin + get(HOT[0]) + rest)
            received.append(re.sub(rb"\r\ndate: [^\r]*", b"", _rest(connection)))
    assert received[0] == received[1]


def _rest(connection: socket.socket) -> bytes:
    received = b""
    while data := connection.recv(65536):
        received += data
    return received


@pytest.mark.parametrize("split", [1, 10, -3])
def test_request_in_two_reads_is_answered(market: Market, split: int) -> None:
    request = get(HOT[0])
    expected = market.compare(request)
    for _ in range(2):
        market.prepared.send(request[:split])
        time.sleep(0.02)
        assert market.asked(lambda: market.prepared.ask(request[split:])) == 1
        assert market.compare(request) == expected


def test_body_that_looks_like_a_request_is_no_request(market: Market) -> None:
    request = get(HOT[0])
    market.prepared.ask(request)
    market.prepared.send(get("/mode", "Host: localhost", f"Content-Length: {len(request)}"))
    time.sleep(0.02)
    market.prepared.send(request)
    assert b'{"mode":"test"}' in market.prepared.receive()
    market.compare(request)


def test_prepared_answers_keep_a_connection_alive() -> None:
    world = World()
    trade(world)
    with closing(Server(world, keep_alive=KEEP_ALIVE_SECONDS)) as server, Client(server) as client:
        client.get(HOT[0])
        connection = client._socket
        began = time.monotonic()
        while time.monotonic() < began + 2.5 * KEEP_ALIVE_SECONDS:
            assert client.get(HOT[0])
            time.sleep(KEEP_ALIVE_SECONDS / 10)
        last = time.monotonic()
        assert client._socket is connection
        assert server.asked == 1
        assert client.receive() == b""
        assert KEEP_ALIVE_SECONDS * 0.8 < time.monotonic() - last < KEEP_ALIVE_SECONDS * 3


def test_header_deadline_holds_after_a_prepared_answer(market: Market) -> None:
    market.prepared.get(HOT[0])
    with Client(market.prepared.server) as client:
        assert market.asked(lambda: client.get(HOT[0])) == 0  # the first of its connection
        assert client._socket is not None
        client.send(b"GET / HT")
        assert _rest(client._socket).startswith(b"HTTP/1.1 408 ")


def test_first_prepared_answer_ends_the_header_deadline(market: Market) -> None:
    market.prepared.get(HOT[0])
    with Client(market.prepared.server) as client:
        client.get(HOT[0])
        time.sleep(1.5 * HEADER_SECONDS)
        connection = client._socket
        assert client.get(HOT[0])
        assert client._socket is connection


def test_client_that_reads_nothing_is_waited_for(market: Market) -> None:
    """Requests without end from a client that reads no answers fill the buffers, and are then refused."""
    request = get(HOT[0])
    market.prepared.ask(request)
    with (
        socket.create_connection((HOST, market.prepared.server.port), timeout=0.5) as connection,
        pytest.raises((TimeoutError, ConnectionError)),
    ):
        _send_repeatedly(connection, request, 64 * 2**20)


def _send_repeatedly(connection: socket.socket, request: bytes, size: int) -> None:
    for _ in range(size // len(request)):
        connection.sendall(request)


def test_shutdown_closes_connections_with_prepared_answers() -> None:
    world = World()
    trade(world)
    with closing(Server(world)) as server, Client(server) as first, Client(server) as client:
        first.get(HOT[0])
        client.get(HOT[0])
        assert server.asked == 1
        began = time.monotonic()
        server.stop()
        assert client.receive() == b""
        assert time.monotonic() - began < 1
        wait_until(lambda: not server._server.server_state.connections)
