"""Limits of an HTTP connection, on real sockets with short deadlines.

The protocol overrides undocumented methods of uvicorn's; each override is needed by a test here.
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from typing import Any, ClassVar

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from marketflow.api.middleware.body_limit import BodyLimit
from marketflow.server.http_protocol import LimitedHttpProtocol
from tests.support.servers import HOST, wait_until

OK = b"HTTP/1.1 200 OK"
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
HEADER_SECONDS = 0.3


class Impatient(LimitedHttpProtocol):
    HEADER_SECONDS = HEADER_SECONDS
    MAX_CONNECTIONS = 4
    all: ClassVar[list["Impatient"]] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.all.append(self)
        super().connection_made(transport)


class App:
    """Responds with the path; `/long` and `/steady` complete it once `end` is set, and `/steady` sends meanwhile."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.end = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/long":
            await send({"type": "http.response.body", "body": b"begin ", "more_body": True})
            await asyncio.to_thread(self.end.wait, 10)
        while scope["path"] == "/steady" and not self.end.is_set():
            await send({"type": "http.response.body", "body": b".", "more_body": True})
            await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": f"<{scope['path']}>".encode()})


class Server:
    """uvicorn in a thread."""

    def __init__(self) -> None:
        self.app = App()
        self._listener = socket.create_server((HOST, 0))
        self.port = self._listener.getsockname()[1]
        config = uvicorn.Config(
            BodyLimit(self.app, seconds=HEADER_SECONDS),
            interface="asgi3",
            http=Impatient,
            ws="none",
            lifespan="off",
            log_config=None,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]})
        self._thread.start()

    @property
    def connections(self) -> int:
        return len(self._server.server_state.connections)

    def close(self) -> None:
        self.app.end.set()
        self._server.should_exit = True
        self._thread.join(10)
        self._listener.close()

    def connect(self, *sent: bytes) -> socket.socket:
        """Connect and send."""
        client = socket.create_connection((HOST, self.port), timeout=5)
        for data in sent:
            client.sendall(data)
        return client

    def ask(self, *sent: bytes) -> bytes:
        """Send, and return all bytes until the server closes."""
        with self.connect(*sent) as client:
            return rest(client)


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with closing(Server()) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """The server without connections."""
    running.app.asked.clear()
    running.app.end.clear()
    Impatient.all.clear()
    yield running
    running.app.end.set()
    wait_until(lambda: not running.connections)


def rest(client: socket.socket) -> bytes:
    """Read until the server closes."""
    received = b""
    while True:
        try:
            data = client.recv(65536)
        except ConnectionResetError:
            return received
        if not data:
            return received
        received += data


def until(client: socket.socket, end: bytes) -> bytes:
    """Read until the received bytes end with `end`."""
    received = b""
    while not received.endswith(end):
        data = client.recv(65536)
        assert data, received
        received += data
    return received


def problem_of(answer: bytes) -> tuple[int, str]:
    """Return status and code of a response that is a problem."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert {"content-type: application/problem+json", "connection: close", "cache-control: no-store"} <= set(lines)
    assert "x-content-type-options: nosniff" in lines
    assert f"content-length: {len(body)}" in lines
    problem: dict[str, Any] = json.loads(body)
    assert f"http/1.1 {problem['status']} {problem['title']}".lower() == lines[0]
    return problem["status"], problem["code"]


# Deadlines


def test_connection_without_a_request_is_closed_silently(server: Server) -> None:
    began = time.monotonic()
    assert server.ask() == b""
    assert HEADER_SECONDS / 2 < time.monotonic() - began < HEADER_SECONDS + 1


@pytest.mark.parametrize("before", [[], [GET]])
def test_slow_headers_are_answered_with_408(server: Server, before: list[bytes]) -> None:
    with server.connect(*before) as client:
        for _ in before:
            until(client, b"0\r\n\r\n")
        began = time.monotonic()
        client.sendall(b"GET / HTTP/1.1\r\n")
        client.settimeout(0.02)
        answer = b""
        while not answer:
            try:
                answer = client.recv(65536)
            except TimeoutError:
                client.sendall(b"X: y\r\n")
            assert time.monotonic() - began < HEADER_SECONDS + 1
        assert problem_of(answer) == (408, "request_timeout")
        assert time.monotonic() - began > HEADER_SECONDS / 2


def test_line_breaks_do_not_extend_the_header_deadline(server: Server) -> None:
    with server.connect(GET) as client:
        until(client, b"0\r\n\r\n")
        client.sendall(b"\r\n")
        assert problem_of(rest(client)) == (408, "request_timeout")


@pytest.mark.parametrize("head", [b"Content-Length: 10\r\n\r\nx", b"Transfer-Encoding: chunked\r\n\r\n5\r\nx"])
def test_slow_body_is_answered_with_408(server: Server, head: bytes) -> None:
    assert problem_of(server.ask(b"POST / HTTP/1.1\r\nHost: x\r\n" + head)) == (408, "request_timeout")
    assert server.app.asked == []


@pytest.mark.parametrize("more", [b"", b"\r\n", b"GET / HT", GET + b"GET / HT"])
def test_header_deadline_never_cuts_a_running_response(server: Server, more: bytes) -> None:
    with server.connect(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n") as client:
        until(client, b"begin \r\n")
        client.sendall(more)
        client.settimeout(HEADER_SECONDS * 2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(5)
        server.app.end.set()
        until(client, b"</long>\r\n0\r\n\r\n" if GET not in more else b"</>\r\n0\r\n\r\n")


def test_header_deadline_is_cancelled_with_its_connection(server: Server) -> None:
    for sent in ([], [b"GET / H"], [GET], [GET, b"GET"]):
        server.connect(*sent).close()
    wait_until(lambda: len(Impatient.all) == 4)
    wait_until(lambda: all(each.transport.is_closing() and each._deadline is None for each in Impatient.all), 0.2)


# Sizes


@pytest.mark.parametrize(
    "sent",
    [
        GET[:-2] + b"X: " + b"x" * 70_000 + b"\r\n\r\n",
        GET[:-2] + b"X: y\r\n" * 20_000 + b"\r\n",
        GET[:-2] + b"X: " + b"x" * 1_000_000,
        GET[:-2] + b"x" * 1_000_000,
        b"GET /" + b"x" * 70_000 + GET[5:],
        b"GET /" + b"x" * 1_000_000,
    ],
)
def test_too_large_headers_are_answered_with_431(server: Server, sent: bytes) -> None:
    with server.connect() as client:
        with suppress(OSError):  # cut before all was sent
            client.sendall(sent)
        assert problem_of(rest(client)) == (431, "headers_too_large")
    assert server.app.asked == []


def test_headers_of_almost_64_kib_are_accepted(server: Server) -> None:
    with server.connect(GET[:-2] + b"X: " + b"x" * 65_400 + b"\r\n\r\n") as client:
        assert until(client, b"0\r\n\r\n").startswith(OK)


@pytest.mark.parametrize(
    "framing", [b"5;" + b"x" * 500_000, b"0\r\nX: " + b"x" * 500_000, b"0\r\n" + b"X: y\r\n" * 99999]
)
def test_chunk_extensions_and_trailers_are_limited(server: Server, framing: bytes) -> None:
    with server.connect(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n") as client:
        with suppress(OSError):
            client.sendall(framing)
        assert problem_of(rest(client)) == (431, "headers_too_large")


def test_too_large_body_is_refused_before_100_continue(server: Server) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 300000000\r\nExpect: 100-continue\r\n\r\n"
    assert problem_of(server.ask(head)) == (413, "body_too_large")


# Malformed requests


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"rubbish\r\n\r\n",
        b"NONSENSE / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nA b: c\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
    ],
)
def test_malformed_request_is_answered_with_a_problem(server: Server, sent: bytes) -> None:
    assert problem_of(server.ask(sent)) == (400, "malformed_request")
    assert server.app.asked == []


def test_upgrade_on_another_path_is_answered_and_closes(server: Server) -> None:
    answer = server.ask(GET[:-2] + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n")
    assert answer.startswith(OK)
    assert b"connection: close" in answer


# Several requests on a connection


def test_pipelined_requests_are_answered_in_their_order(server: Server) -> None:
    requests = [f"GET /{n} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for n in range(20)]
    with server.connect(b"".join(requests)) as client:
        answers = until(client, b"</19>\r\n0\r\n\r\n")
    assert answers.count(OK) == 20
    assert server.app.asked == [f"/{n}" for n in range(20)]


@pytest.mark.parametrize("fault", [b"rubbish\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000 + b"\r\n\r\n"])
def test_requests_before_a_malformed_one_are_answered(server: Server, fault: bytes) -> None:
    with server.connect(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n" + GET + fault) as client:
        until(client, b"begin \r\n")
        server.app.end.set()
        answers = rest(client)
    assert answers.count(b"HTTP/1.1") == 1  # the second; that to the long one had begun
    assert answers.endswith(b"</>\r\n0\r\n\r\n")
    assert server.app.asked == ["/long", "/"]


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 5\r\n\r\nhello", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"]
)
@pytest.mark.parametrize("step", [1, 1000])
def test_request_with_a_body_keeps_the_connection_alive(server: Server, framing: bytes, step: int) -> None:
    sent = b"POST /a HTTP/1.1\r\nHost: x\r\n" + framing + b"GET /b HTTP/1.1\r\nHost: x\r\n\r\n"
    with server.connect(*(sent[at : at + step] for at in range(0, len(sent), step))) as client:
        assert until(client, b"</b>\r\n0\r\n\r\n").count(OK) == 2
    assert server.app.asked == ["/a", "/b"]


def test_expect_100_continue_is_answered(server: Server) -> None:
    with server.connect(b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n") as client:
        assert until(client, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"hello")
        assert until(client, b"0\r\n\r\n").startswith(OK)
        client.sendall(GET)
        assert until(client, b"0\r\n\r\n").startswith(OK)


def test_shutdown_does_not_wait_for_a_partial_request(server: Server) -> None:
    with server.connect(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx") as client:
        wait_until(lambda: Impatient.all and Impatient.all[0].cycle)
        began = time.monotonic()
        Impatient.all[0].loop.call_soon_threadsafe(Impatient.all[0].shutdown)
        assert rest(client) == b""
        assert time.monotonic() - began < HEADER_SECONDS / 2
    assert server.app.asked == []


# Eviction


def test_longest_idle_connection_is_evicted(server: Server) -> None:
    with ExitStack() as stack:
        long = stack.enter_context(server.connect(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n"))
        until(long, b"begin \r\n")
        used, idle, silent = (stack.enter_context(server.connect()) for _ in range(3))
        for client in (idle, silent, used):
            client.sendall(GET)
            until(client, b"0\r\n\r\n")
        newcomer = stack.enter_context(server.connect(GET))
        until(newcomer, b"0\r\n\r\n")
        assert rest(idle) == b""
        for client in (silent, used):
            client.sendall(GET)
            until(client, b"0\r\n\r\n")
        server.app.end.set()
        until(long, b"</long>\r\n0\r\n\r\n")


def test_new_connection_is_accepted_while_all_others_are_busy(server: Server) -> None:
    with ExitStack() as stack:
        for _ in range(Impatient.MAX_CONNECTIONS):
            long = stack.enter_context(server.connect(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n"))
            until(long, b"begin \r\n")
        newcomer = stack.enter_context(server.connect(GET))
        assert until(newcomer, b"0\r\n\r\n").startswith(OK)


# Pipelines and trailers


def test_too_many_pipelined_requests_close_the_connection(server: Server) -> None:
    with server.connect(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n" + GET * 3600) as client:
        wait_until(lambda: server.app.asked)
        (connection,) = Impatient.all
        assert len(connection.pipeline) <= Impatient.MAX_PIPELINED
        server.app.end.set()
        answered = rest(client)
    assert 1 <= answered.count(OK) <= Impatient.MAX_PIPELINED + 1
    wait_until(lambda: server.connections == 0)


def test_large_pipelined_requests_are_bounded_by_their_bytes(server: Server) -> None:
    large = b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 30_000 + b"\r\n\r\n"
    with server.connect(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n" + large * 10) as client:
        wait_until(lambda: server.app.asked)
        (connection,) = Impatient.all
        wait_until(lambda: connection._pipelined_bytes > Impatient.MAX_HEADER_BYTES)
        assert len(connection.pipeline) <= 3
        server.app.end.set()
        assert 1 <= rest(client).count(OK) <= 4


def test_a_few_pipelined_requests_are_answered_in_order(server: Server) -> None:
    paths = [f"/{number}".encode() for number in range(Impatient.MAX_PIPELINED)]
    sent = b"".join(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n" for path in paths[:-1])
    answered = server.ask(sent + b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answered.count(OK) == len(paths)
    assert server.app.asked == [*(path.decode() for path in paths[:-1]), "/last"]


@pytest.mark.long
def test_reset_with_requests_waiting_starts_none_of_them(server: Server, log: list[str]) -> None:
    """Found by a write: while requests wait, nothing is read."""
    client = server.connect(b"GET /steady HTTP/1.1\r\nHost: x\r\n\r\n" + GET * 5)
    wait_until(lambda: server.app.asked)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    wait_until(lambda: server.connections == 0)
    server.app.end.set()
    assert server.ask(b"GET /next HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").count(OK) == 1
    assert server.app.asked == ["/steady", "/next"]
    assert log == []


def test_trailers_are_not_added_to_the_headers(server: Server) -> None:
    seen: list[list[bytes]] = []
    answer = server.app.__class__.__call__

    async def look(app: App, scope: Scope, receive: Receive, send: Send) -> None:
        seen.append([name for name, _ in scope["headers"]])
        await answer(app, scope, receive, send)

    request = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(App, "__call__", look)
        for pieces in (
            [request + b"0\r\nAuthorization: Bearer x\r\n\r\n"],
            [request, b"1\r\na\r\n0\r\n", b"Authorization: x\r\n\r\n"],
        ):
            assert OK in server.ask(*pieces)
    assert seen == [[b"host", b"transfer-encoding", b"connection"]] * 2
