"""Hostile and slow HTTP clients, and shutdown under load, against a real process.

tests/server/test_http_protocol.py tests the limits of one connection with short deadlines; here are the real ones.
"""

import json
import re
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Self

import httpx
import psutil
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from tests.faults.conftest import WINDOW_MS, StartApplication, through
from tests.support.application import NO_TLS, Application, ScriptedExchange, sent_by
from tests.support.core_waits import CoreWaits
from tests.support.exposition import samples_of
from tests.support.oracle import Rows, assert_rows_equal
from tests.support.proxy import Proxy
from tests.support.servers import HOST, PostgresServer, RedisServer, wait_until

STATUSES = {200, 400, 401, 403, 404, 405, 408, 413, 429, 431, 503}
"""All that there are, as documented."""

MEGABYTE = 1 << 20


pytestmark = pytest.mark.usefixtures("many_files")


@pytest.fixture(scope="module")
def application(server_root: Path, redis_server: RedisServer, postgres_server: PostgresServer) -> Iterator[Application]:
    """One application for all tests that only send requests; in a Redis database of its own."""
    folder = server_root / "http"
    folder.mkdir(mode=0o711)
    stores = {f"POSTGRES__{name.upper()}": value for name, value in postgres_server.keywords.items()}
    stores |= {
        "REDIS__HOST": HOST,
        "REDIS__PORT": redis_server.port,
        "REDIS__DB": 1,
        "HTTP__TOKEN": "sesame-sesame-sesame",
    }
    with Application(folder, stores) as application:
        wait_until(lambda: application.find("/prices/average/BTCUSDT"))
        yield application
        assert application.stop()[0] == 0
    assert "Traceback" not in application.log
    assert "ERROR" not in application.log


class Slow:
    """A client that sends a little again and again; knows how long it was let, and what it was told."""

    def __init__(self, port: int, begin: bytes, piece: bytes) -> None:
        self.seconds = 0.0
        self.answer = b""
        self._client = socket.create_connection((HOST, port))
        self._client.settimeout(0.05)  # never idle for long, so that no test with many sockets makes it give way
        self._piece = piece
        self._thread = threading.Thread(target=self._send, args=(begin,))
        self._thread.start()

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive(), "it was never cut off"

    def _send(self, data: bytes) -> None:
        began = time.monotonic()
        with self._client, suppress(OSError):
            while time.monotonic() - began < 15:
                self._client.sendall(data)
                data = self._piece
                with suppress(TimeoutError):
                    if not (received := self._client.recv(65536)):
                        break
                    self.answer += received
        self.seconds = time.monotonic() - began


@pytest.fixture(scope="module")
def slow_clients(application: Application) -> dict[str, Slow]:
    """Slow clients that run during the other tests."""
    body = b"POST /mode/live HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    return {
        "headers": Slow(application.port, b"GET /health HTTP/1.1\r\n", b"X: y\r\n"),
        "body": Slow(application.port, body, b"x"),
    }


@pytest.fixture(autouse=True)
def _meanwhile(slow_clients: dict[str, Slow]) -> None:
    pass


def problem_of(answer: bytes) -> tuple[int, str]:
    """Status and code of the first answer, which must be a problem in the documented shape."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head, answer
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    problem = json.loads(body[:length])
    assert set(problem) == {"type", "title", "status", "detail", "code"}
    assert head.startswith(f"HTTP/1.1 {problem['status']} ".encode())
    return problem["status"], problem["code"]


def flood(port: int, head: bytes, piece: bytes, count: int) -> tuple[bytes, int]:
    """Send until cut off; return the answer and the number of bytes sent."""
    sent, answer = 0, b""
    with socket.create_connection((HOST, port), timeout=5) as client:
        with suppress(OSError):
            client.sendall(head)
            for _ in range(count):
                client.sendall(piece)
                sent += len(piece)
        with suppress(OSError):
            while data := client.recv(65536):
                answer += data
    return answer, sent


def seconds_for_health(application: Application) -> float:
    """Return the seconds of a request on a new connection, which limits may refuse. Waits for a core do not count."""
    with CoreWaits.of_tests() as waits:
        began = time.monotonic()
        assert httpx.get(f"http://{HOST}:{application.port}/health", timeout=30, verify=NO_TLS).status_code == 200
        return waits.seconds_since(began)


# Sizes


@pytest.mark.parametrize(
    ("head", "piece", "expected"),
    [
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"X: " + b"x" * 1000 + b"\r\n", (431, "headers_too_large")),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ", b"x" * 1000, (431, "headers_too_large")),
        (b"GET /", b"x" * 1000, (431, "headers_too_large")),
    ],
)
def test_a_megabyte_of_headers_is_refused(
    application: Application, head: bytes, piece: bytes, expected: tuple[int, str]
) -> None:
    answer, _ = flood(application.port, head, piece, 1000)
    assert problem_of(answer) == expected


@pytest.mark.parametrize(
    ("framing", "piece"),
    [
        (b"Content-Length: 300000000", b"x" * MEGABYTE),
        (b"Transfer-Encoding: chunked", b"%x\r\n" % MEGABYTE + b"x" * MEGABYTE + b"\r\n"),
    ],
)
def test_a_body_of_300_megabytes_is_refused_early_and_not_kept(
    application: Application, framing: bytes, piece: bytes
) -> None:
    process = psutil.Process(application.process.pid)
    before = process.memory_info().rss
    head = b"POST /mode/live HTTP/1.1\r\nHost: localhost\r\n" + framing + b"\r\n\r\n"
    answer, sent = flood(application.port, head, piece, 300)
    assert problem_of(answer) == (413, "body_too_large")
    assert sent < 20 * MEGABYTE
    assert process.memory_info().rss - before < 20 * MEGABYTE
    assert seconds_for_health(application) < 1


# Numbers


def test_health_answers_while_300_sockets_idle(application: Application) -> None:
    with ExitStack() as stack:
        for n in range(300):
            client = stack.enter_context(socket.create_connection((HOST, application.port), timeout=5))
            if n % 3:
                client.sendall(b"GET /heal")
        assert max(seconds_for_health(application) for _ in range(10)) < 1


def test_health_answers_while_sockets_exceed_the_limit(application: Application) -> None:
    with ExitStack() as stack:
        for _ in range(10):
            for _ in range(300):
                stack.enter_context(socket.create_connection((HOST, application.port), timeout=5))
            assert seconds_for_health(application) < 1
    assert "the longest idle ones are closed" in application.log


class _Limited(Application):
    """An application that may open 256 files."""

    def start(self, wait: bool = True, timeout: float = 30.0) -> Self:
        super().start(wait=False)
        resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, (256, 256))  # before it asks how many
        wait_until(self.ready, timeout)
        return self


def test_socket_burst_over_the_descriptor_limit_is_survived(server_folder: Path, servers: dict[str, object]) -> None:
    with _Limited(server_folder, servers) as application:
        application.process.send_signal(signal.SIGSTOP)
        with ExitStack() as stack:
            for _ in range(1000):
                client = stack.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex((HOST, application.port))
            application.process.send_signal(signal.SIGCONT)
            wait_until(lambda: "the longest idle ones are closed" in application.log)
            assert seconds_for_health(application) < 3  # the kernel knocks again after a second
            assert application.stop()[0] == 0


# Anything at all


def answers_to(port: int, sent: bytes, ends: bool = False) -> bytes:
    """Return all that is answered; with `ends` the client closes its sending side."""
    with socket.create_connection((HOST, port), timeout=5) as client:
        received = b""
        with suppress(ConnectionError):
            client.sendall(sent)
            if ends:
                client.shutdown(socket.SHUT_WR)
            while data := client.recv(65536):
                received += data
    return received


def check(answer: bytes) -> int:
    """Check that the first answer is a documented one; return its status."""
    status = int(answer.split(b" ", 2)[1])
    assert status in STATUSES, answer
    assert b"x-content-type-options: nosniff" in answer
    if status >= 400:
        _, code = problem_of(answer)
        assert (status == 503) == (code == "unavailable")
    return status


METHODS = st.sampled_from([b"GET", b"GET", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"PATCH", b"QUERY"])
KNOWN_PATHS = st.sampled_from(
    [
        *(b"/prices/latest/BTCUSDT", b"/prices/highest/exchange1/ethusdt", b"/prices/average/BTCUSDT"),
        *(b"/mode", b"/mode/test", b"/health", b"/livez", b"/readyz", b"*", b"http://localhost/health"),
    ]
)
SEGMENTS = st.sampled_from([b"prices", b"lowest", b"BTCUSDT", b"exchange1", b"mode", b"", b".."]) | st.binary(
    max_size=8
).map(lambda raw: b"".join(b"%%%02x" % byte for byte in raw))
PATHS = KNOWN_PATHS | st.lists(SEGMENTS, max_size=5).map(lambda segments: b"/" + b"/".join(segments))
QUERIES = st.sampled_from([b"", b"?period=10s", b"?period=1d", b"?period=", b"?period=9999999999d"]) | st.text(
    st.characters(min_codepoint=33, max_codepoint=126), max_size=20
).map(lambda text: b"?period=" + text.encode())
HOSTS = st.sampled_from([b"localhost"] * 5 + [b"evil.example", b"[::1]:80", b"\xff", b""])
HEADERS = st.sampled_from(
    [
        *(
            b"Authorization: Bearer sesame-sesame-sesame",
            b"Authorization: Bearer \xff",
            b"Authorization:",
            b"Authorization: Basic x",
        ),
        *(b"Origin: null", b"Origin: http://localhost", b"Sec-Fetch-Site: cross-site", b"Sec-Fetch-Site: \xe9"),
        *(b"Connection: Upgrade", b"Upgrade: websocket", b"Upgrade: h2c", b"Range: bytes=0-1", b"Expect: x"),
        *(b"Accept: text/html", b"Content-Type: application/json", b"X-Forwarded-For: \x7f", b"Cookie: " + b"x" * 999),
    ]
)
BODIES = st.sampled_from(
    [
        *([b"\r\n"] * 5),
        b"Content-Length: 2\r\n\r\n{}",
        b"Content-Length: 70000\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n2\r\n{}\r\n0\r\nHost: x\r\n\r\n",
    ]
)
PIECES = st.sampled_from(
    [
        *(b"GET ", b"POST ", b"/", b"/health", b"/mode/test", b" HTTP/1.1", b" HTTP/1.0", b"\r\n", b"\r\n\r\n", b"\0"),
        *(b"Host: localhost\r\n", b"Content-Length: ", b"-1", b"2", b"Transfer-Encoding: ", b"chunked", b"gzip", b"0"),
    ]
)
PROFILE = settings(derandomize=True, database=None, max_examples=400, phases=[Phase.explicit, Phase.generate])


def test_any_request_gets_a_documented_answer(application: Application) -> None:
    seen = set()

    @PROFILE
    @given(METHODS, PATHS, QUERIES, HOSTS, st.lists(HEADERS, max_size=4), BODIES)
    @example(b"POST", b"/mode/live", b"", b"localhost", [b"Authorization: Bearer \xff"], b"\r\n")
    def ask(method: bytes, path: bytes, query: bytes, host: bytes, headers: list[bytes], body: bytes) -> None:
        lines = [method + b" " + path + query + b" HTTP/1.1", b"Host: " + host, b"Connection: close", *headers]
        answer = answers_to(application.port, b"\r\n".join(lines) + b"\r\n" + body)
        seen.add(check(answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")))

    ask()
    assert {200, 400, 401, 403, 404, 405, 413} <= seen


def test_any_bytes_get_a_documented_answer_or_none(application: Application) -> None:
    @PROFILE
    @given(st.binary(max_size=200) | st.lists(PIECES).map(b"".join))
    def ask(sent: bytes) -> None:
        answer = answers_to(application.port, sent, ends=True)
        if answer:
            check(answer)

    ask()


# Browsers


def test_cross_site_page_can_neither_post_nor_read(application: Application) -> None:
    token = {"Authorization": "Bearer sesame-sesame-sesame"}
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}):
        answer = application.http.post("/mode/live", headers=headers | token)
        assert (answer.status_code, answer.json()["code"]) == (403, "cross_site")
    for path in ("/health", "/livez", "/prices/latest/BTCUSDT"):
        answer = application.http.get(path, headers={"Host": f"evil.example:{application.port}"})
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_host")
    for name in ("localhost", "127.0.0.1", "[::1]"):
        assert application.http.get("/health", headers={"Host": f"{name}:{application.port}"}).status_code == 200
    assert application.get("/mode") == {"mode": "test"}
    assert application.http.post("/mode/test", headers=token).status_code == 200


# What is said


def stream_clients(application: Application) -> float:
    samples = samples_of(application.http.get("/metrics").text)
    return sum(samples.of("stream_clients", transport=each) or 0 for each in ("sse", "websocket"))


CONNECTIONS = 60
UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
PIPELINED = b"GET /stream/prices HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3600
MESSAGES = b"\x81\x80mask" * 40_000
FRAGMENTS = b"\x01\x80mask" + b"\x00\x80mask" * 40_000


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"GET /stream/prices HTTP/1.1\r\nHost: localhost\r\n\r\n", PIPELINED),
        (UPGRADE, MESSAGES),
        (UPGRADE, FRAGMENTS),
        (UPGRADE + MESSAGES, b""),
        (b"POST /mode/x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n" * 50_000),
    ],
    ids=["pipelined", "messages", "fragments", "messages before the handshake", "chunks"],
)
def test_pipelined_requests_take_no_memory_and_no_log(
    server_folder: Path, servers: dict[str, object], begin: bytes, more: bytes
) -> None:
    with Application(server_folder, servers) as application, ExitStack() as stack:
        wait_until(lambda: application.find("/prices/average/BTCUSDT"))
        process = psutil.Process(application.process.pid)
        before, logged = process.memory_info().rss, len(application.log)
        clients = [stack.enter_context(socket.create_connection((HOST, application.port))) for _ in range(CONNECTIONS)]
        for client in clients:
            client.settimeout(0.2)
            for sent in (begin, more):
                with suppress(OSError):  # cut off, or not read from any more
                    client.sendall(sent)
                    client.recv(12)
        wait_until(lambda: application.http.get("/livez").status_code == 200)
        assert (process.memory_info().rss - before) / MEGABYTE < 60
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
        wait_until(lambda: len(process.net_connections()) < CONNECTIONS)
        wait_until(lambda: stream_clients(application) == 0)
        assert "Traceback" not in application.log
        assert len(application.log) - logged < 2000, application.log[logged:]


def test_streams_of_one_client_are_held_to_its_limit(server_folder: Path, servers: dict[str, object]) -> None:
    with Application(server_folder, servers | {"HTTP__STREAMS_PER_CLIENT": 10}) as application, ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection((HOST, application.port), 5)) for _ in range(200)]
        for client in clients:
            client.sendall(b"GET /stream/prices HTTP/1.1\r\nHost: localhost\r\n\r\n")
        statuses = [client.recv(12)[-3:] for client in clients]
        assert (statuses.count(b"200"), statuses.count(b"429")) == (10, 190)
        assert application.log.count("http.streams_per_client") == 1


@pytest.mark.parametrize(
    ("host", "token", "warned"), [("0.0.0.0", "", True), ("0.0.0.0", "x" * 16, False), (HOST, "", False)]
)
def test_public_address_without_token_logs_a_warning(
    server_folder: Path, servers: dict[str, object], host: str, token: str, warned: bool
) -> None:
    with Application(server_folder, servers | {"HTTP__HOST": host, "HTTP__TOKEN": token}) as application:
        if warned:
            wait_until(lambda: "http.token" in application.log)
        lines = [line for line in application.log.splitlines() if "http.token" in line]
        assert [(" WARNING " in line, host in line) for line in lines] == [(True, True)] * warned


@pytest.mark.parametrize(("log_format", "right_password"), [("text", True), ("json", False)])
def test_secrets_are_in_no_log_and_no_response(
    server_folder: Path, servers: dict[str, object], log_format: str, right_password: bool
) -> None:
    secrets = {name: f"canary-{name.lower()}" for name in ("HTTP__TOKEN", "POSTGRES__PASSWORD", "REDIS__PASSWORD")}
    secret = secrets["REDIS__PASSWORD"] if right_password else "another"
    told: list[str] = []
    with RedisServer(server_folder / "redis", password=secret) as guarded:
        given = servers | secrets | {"REDIS__PORT": guarded.port, "LOG__LEVEL": "TRACE", "LOG__FORMAT": log_format}
        broken = Application(server_folder, given | {"HTTP__PORT": 99999, "REDIS__DB": "x"})
        assert broken.fails() == 2
        with Application(server_folder, given) as application:
            application.http.headers["Authorization"] = f"Bearer {secrets['HTTP__TOKEN']}"
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Host": "evil.example"}, {"Origin": "null"}):
                for path in ("/mode/live", "/mode/test", "/health"):
                    answer = application.http.post(path, headers=headers)
                    told.append(str(answer.headers) + answer.text)
            for sent in (
                b"rubbish\r\n\r\n",
                b"GET / HTTP/1.1\r\nAuthorization: Bearer canary-http__token\r\nA b: c\r\n\r\n",
            ):
                told.append(repr(answers_to(application.port, sent)))
            guarded.kill()
            wait_until(lambda: application.get("/health")["redis"] == "down")
            for path in ("/prices/latest/BTCUSDT", "/prices/average/BTCUSDT", "/prices/average/BTCUSDT?period=1d"):
                told.append(application.http.get(path).text)
            wait_until(lambda: "PostgreSQL cannot be used" in application.log)
            assert application.stop()[0] == 0
    assert "canary" not in application.log
    assert "canary" not in "".join(told)


# The end


def test_second_signal_ends_process_with_frozen_stores(
    server_folder: Path, servers: dict[str, object], redis_server: RedisServer, postgres_server: PostgresServer
) -> None:
    with Application(server_folder, servers) as application, ExitStack() as stack:
        wait_until(lambda: application.find("/prices/average/BTCUSDT"))
        for server in (redis_server, postgres_server):
            server.pause()
            stack.callback(server.resume)
        application.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping" in application.log)
        code, seconds = application.stop(signal.SIGTERM)
        assert code == 0
        assert seconds < 2.5
        assert re.search(r"drained: 0 minute rows are written; .*; [1-9]\d* are in neither store", application.log)
        assert "Traceback" not in application.log


def test_second_signal_ends_the_embedded_servers_too(server_folder: Path) -> None:
    with Application(server_folder) as application:
        family = psutil.Process(application.process.pid).children(recursive=True)
        assert len(family) >= 2
        for process in family:
            process.suspend()
        application.process.send_signal(signal.SIGINT)
        wait_until(lambda: "stopping" in application.log)
        code, seconds = application.stop(signal.SIGINT)
        assert code == 0
        assert seconds < 5  # of which 2 for the suspended watcher
        wait_until(lambda: not any(process.is_running() for process in family), 2)


def test_signals_in_quick_succession_lose_nothing(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    rows: Callable[[], Rows],
) -> None:
    application = start(servers)
    for n in range(200):
        exchanges[n % 3].send(100 + n / 8)
    wait_until(lambda: (application.find("/prices/average/BTCUSDT", period="1m") or {}).get("ticks") == 200)
    for _ in range(3):
        application.process.send_signal(signal.SIGINT)
    assert application.stop(signal.SIGTERM)[0] == 0
    assert_rows_equal(rows(), sent_by(exchanges), WINDOW_MS)


# What began with the first test


def test_slow_clients_are_cut_off_after_ten_seconds(slow_clients: dict[str, Slow]) -> None:
    for slow in slow_clients.values():
        slow.join()
        assert 9 < slow.seconds < 14
    assert problem_of(slow_clients["headers"].answer) == (408, "request_timeout")
    assert problem_of(slow_clients["body"].answer) == (408, "request_timeout")


def test_request_under_way_at_a_stop_is_answered_with_503(
    start: StartApplication, servers: dict[str, object], postgres_proxy: Proxy
) -> None:
    application = start(through(servers, postgres=postgres_proxy))
    postgres_proxy.stall()
    with closing(HTTPConnection(HOST, application.port, timeout=20)) as connection:
        connection.request("POST", "/alerts", '{"kind": "stale"}')
        application.get("/livez")  # after which the other one has begun
        code, seconds = application.stop()
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["code"]) == (503, "unavailable")
        assert answer.headers["Retry-After"] == "1"
    assert code == 0
    assert seconds < 5
    assert "Traceback" not in application.log
    assert " ERROR " not in application.log
