"""Streams of a real process during faults of stores, feeds, clients and the process itself."""

import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.api.streaming.stream_client import Event, Stream, prices_in
from tests.faults.conftest import StartApplication
from tests.support.application import Application, ScriptedExchange
from tests.support.exposition import samples_of
from tests.support.roles import Roles
from tests.support.servers import HOST, RedisServer, free_port, wait_until

BTC = ("exchange1", "BTCUSDT")
MANY = {"HTTP__STREAMS_PER_CLIENT": 1000}
"""All clients of a test have one address."""


pytestmark = pytest.mark.usefixtures("many_files")


@pytest.fixture(scope="module")
def application(server_root: Path) -> Iterator[Application]:
    """One with generated prices for all tests that only look; with servers of its own, for others run beside it."""
    folder = server_root / "stream"
    folder.mkdir(mode=0o711)
    with Application(folder, MANY) as application:
        wait_until(lambda: application.find("/prices/average/BTCUSDT"))
        yield application
        assert application.stop()[0] == 0
    assert "Traceback" not in application.log
    assert "ERROR" not in application.log


def websocket(application: Application, query: str = "") -> ClientConnection:
    connection: ClientConnection = connect(f"ws://{HOST}:{application.port}/ws?{query}")
    return connection


def clients_of(application: Application, transport: str) -> float:
    return samples_of(application.http.get("/metrics").text).of("stream_clients", transport=transport) or 0


def tells(price: float, series: tuple[str, str] = BTC) -> Callable[[Event], bool]:
    return lambda event: prices_in(event).get(series) == price


# What is sent


def test_stream_sends_snapshot_then_every_change(
    start: StartApplication, servers: dict[str, object], exchanges: list[ScriptedExchange]
) -> None:
    application = start(servers)
    with Stream(application.port) as stream:
        snapshot = stream.next()
        assert snapshot.name == "snapshot"
        assert snapshot.data["exchanges"] == [exchange.name for exchange in exchanges]
        assert snapshot.data["prices"] == []
        for price in (5.0, 6.0, 7.0):
            exchanges[0].send(price)
            assert prices_in(stream.next("prices")) == {BTC: price}
        assert "content-type: text/event-stream" in stream.head
        assert "cache-control: no-store" in stream.head
        assert "x-accel-buffering: no" in stream.head
        exchanges[1].close()
        health = stream.next("health")
        assert health.data["exchanges"]["exchange2"] == "connecting"
        exchanges[1].open()
        stream.next("heartbeat")
        last = stream.last_id
    exchanges[0].send(8.0)
    exchanges[2].send(9.0, symbol="ETHUSDT")
    wait_until(lambda: application.find("/prices/latest/ETHUSDT"))
    wait_until(lambda: application.get("/prices/latest/BTCUSDT")["price"] == 8.0)
    with Stream(application.port, headers={"Last-Event-ID": last}) as stream:
        first = stream.next()
        assert first.name == "prices"
        assert prices_in(first) == {BTC: 8.0, ("exchange3", "ETHUSDT"): 9.0}
    with Stream(application.port, "symbols=ethusdt,&exchanges=EXCHANGE3", {"Last-Event-ID": last}) as stream:
        assert prices_in(stream.next("snapshot")) == {("exchange3", "ETHUSDT"): 9.0}


@pytest.mark.parametrize(
    ("query", "code"), [("symbols=BTCUSDT,NONE", "unknown_symbol"), ("exchanges=none", "unknown_exchange")]
)
def test_unknown_name_is_404_over_sse_and_websocket(application: Application, query: str, code: str) -> None:
    answer = application.http.get(f"/stream/prices?{query}")
    assert (answer.status_code, answer.json()["code"]) == (404, code)
    with pytest.raises(InvalidStatus) as refused, websocket(application, query):
        pass
    assert refused.value.response.status_code == 404
    assert json.loads(refused.value.response.body or b"")["code"] == code


def test_head_is_answered_at_once(application: Application) -> None:
    answer = application.http.head("/stream/prices")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"].startswith("text/event-stream")


def test_mode_switch_is_sent_before_any_price_of_the_new_mode(
    start: StartApplication, servers: dict[str, object], exchanges: list[ScriptedExchange]
) -> None:
    application = start(servers)
    exchanges[0].send(1e9)  # what no generator would come to
    with Stream(application.port) as stream, websocket(application) as socket:
        stream.until(tells(1e9))
        for mode, previous in (("test", "live"), ("live", "test")):
            application.switch(mode)
            seen = stream.until(lambda event: event.name == "mode")
            assert all(each.data.get("mode", previous) == previous for each in seen[:-1])
            assert seen[-1].data == {"mode": mode, "previous": previous}
            snapshot = stream.next("snapshot", "prices")
            assert (snapshot.name, snapshot.data["mode"]) == ("snapshot", mode)
            if mode == "test":
                events = [snapshot, *(stream.next("prices") for _ in range(10))]
                assert not any(1e9 in prices_in(event).values() for event in events)
            else:
                assert prices_in(snapshot) == {BTC: 1e9}
        names = iter(json.loads(message)["event"] for message in socket)
        assert [next(name for name in names if name != "prices") for _ in range(2)] == ["snapshot", "mode"]


# Stores


def test_stream_continues_through_a_redis_outage(
    start: StartApplication, servers: dict[str, object], exchanges: list[ScriptedExchange], redis_db: RedisServer
) -> None:
    application = start(servers)
    with Stream(application.port) as stream:
        exchanges[0].send(5.0)
        stream.until(tells(5.0))
        redis_db.kill()
        try:
            stream.until(lambda event: event.name == "health" and event.data["redis"] == "down")
            for price in (6.0, 7.0):
                exchanges[0].send(price)
                stream.until(tells(price))
        finally:
            redis_db.start()
        stream.until(lambda event: event.name == "health" and event.data["redis"] == "ok")
        for price in (8.0, 9.0):
            exchanges[0].send(price)
            seen = stream.until(tells(price))
            assert all(prices_in(event).get(BTC, price) in (price - 1, price) for event in seen)


def test_api_processes_and_workers_stream_ingested_ticks(
    server_folder: Path, servers: dict[str, object], redis_db: RedisServer
) -> None:
    given = servers | {"GENERATOR__RATE": 50}
    with ExitStack() as stack:
        roles = Roles(stack, server_folder, given)
        feeds, api = roles.ingest(), roles.api("--workers", "2")
        wait_until(lambda: api.find("/prices/average/BTCUSDT"))
        streams = [stack.enter_context(Stream(api.port)) for _ in range(16)]
        for stream in streams:
            stream.until(lambda event: event.name == "prices")
        wait_until(lambda: clients_of(api, "sse") == 16)
        runs = {stream.last_id.partition("-")[0] for stream in streams}
        assert len(runs) == 2, "each worker has streams of its own"
        api.switch("live")
        for stream in streams:
            assert stream.next("mode").data == {"mode": "live", "previous": "test"}
            assert stream.next("snapshot", "prices").data["mode"] == "live"
        api.switch("test")
        for stream in streams:
            stream.until(lambda event: event.name == "prices")
        redis_db.kill()
        try:
            for stream in streams:
                stream.until(lambda event: event.name == "health" and event.data["redis"] == "down")
        finally:
            redis_db.start()
        for stream in streams:
            stream.until(lambda event: event.name == "health" and event.data["redis"] == "ok")
            stream.until(lambda event: event.name == "prices")
        assert api.stop()[0] == 0
        for stream in streams:
            stream.until(lambda event: event.name == "end")
            assert list(stream) == []
            assert stream.ended
        assert feeds.stop()[0] == 0
    assert "Traceback" not in api.log
    assert " ERROR " not in api.log


def test_clients_of_a_killed_worker_can_reconnect(server_folder: Path, servers: dict[str, object]) -> None:
    with ExitStack() as stack:
        api = stack.enter_context(Application(server_folder, servers, ("--role", "api", "--workers", "2")))
        streams = [stack.enter_context(Stream(api.port)) for _ in range(16)]
        for stream in streams:
            stream.next("snapshot")
        wait_until(lambda: clients_of(api, "sse") == 16)
        killed = psutil.Process(api.process.pid).children()[0]
        theirs = sum(each.status == "ESTABLISHED" for each in killed.net_connections("tcp"))
        killed.kill()
        cut = [stream for stream in streams if is_cut(stream)]
        assert 0 < len(cut) <= theirs
        wait_until(lambda: clients_of(api, "sse") == 16 - len(cut))
        for stream in cut:
            with Stream(api.port, headers={"Last-Event-ID": stream.last_id}) as again:
                assert again.next().name in ("snapshot", "heartbeat")


def is_cut(stream: Stream) -> bool:
    """Return whether the stream ends before another heartbeat."""
    try:
        stream.next("heartbeat")
    except ConnectionError:
        return True
    return False


# Clients


def test_stalled_client_costs_nothing_and_resumes_at_newest(
    start: StartApplication, servers: dict[str, object], exchanges: list[ScriptedExchange]
) -> None:
    application = start(servers)
    process = psutil.Process(application.process.pid)
    with ExitStack() as stack:
        fast = stack.enter_context(Stream(application.port))
        slow = [stack.enter_context(Stream(application.port, receive_bytes=4096)) for _ in range(20)]
        for each in (fast, *slow):
            each.next("snapshot")
        before, ticks = process.memory_info().rss, 6000
        for number in range(ticks):
            exchanges[0].send(1.0 + number)
            if number % 20 == 19:
                fast.until(tells(1.0 + number))
        assert process.memory_info().rss - before < 20 * 200_000
        for stream in slow:
            seen = stream.until(tells(float(ticks)))
            prices = [prices_in(event)[BTC] for event in seen if event.name == "prices"]
            assert prices == sorted(prices)
            assert len(prices) < ticks / 2, "what it did not take was not kept for it"


def test_three_hundred_clients_get_all_and_leak_nothing(application: Application) -> None:
    with ExitStack() as stack:
        streams = [stack.enter_context(Stream(application.port, f"symbols={'BTCUSDT' * (n % 2)}")) for n in range(300)]
        sockets = [stack.enter_context(websocket(application)) for _ in range(20)]
        for stream in streams:
            assert stream.next().name == "snapshot"
            assert stream.next("prices").data["prices"]
        for socket_ in sockets:
            assert json.loads(socket_.recv())["event"] == "snapshot"
        assert clients_of(application, "sse") == 300
        assert clients_of(application, "websocket") == 20
        assert application.get("/health")["status"] == "ok"
    wait_until(lambda: clients_of(application, "sse") == clients_of(application, "websocket") == 0)
    timed = samples_of(application.http.get("/metrics").text).requests()
    assert ("/stream/prices", "GET", "200") not in timed


# WebSockets


def event_of(socket: ClientConnection, *names: str) -> dict[str, object]:
    """Return the next message with one of these names."""
    while True:
        message: dict[str, object] = json.loads(socket.recv(timeout=10))
        if message["event"] in names:
            return message


def test_websocket_changes_its_subscription(application: Application) -> None:
    with websocket(application, "symbols=btcusdt&exchanges=exchange1") as socket:
        first = json.loads(socket.recv())
        assert first["event"] == "snapshot"
        assert first["id"]
        assert [each["symbol"] for each in first["data"]["prices"]] == ["BTCUSDT"]
        socket.send('{"op":"subscribe","symbols":["ethusdt"],"exchanges":["EXCHANGE2"]}')
        assert event_of(socket, "subscribed")["data"] == {
            "symbols": ["BTCUSDT", "ETHUSDT"],
            "exchanges": ["exchange1", "exchange2"],
            "series": [["exchange1", "BTCUSDT"], ["exchange2", "ETHUSDT"]],
        }
        following = json.loads(socket.recv())
        assert following["event"] == "snapshot"
        assert {(each["exchange"], each["symbol"]) for each in following["data"]["prices"]} == {
            ("exchange1", "BTCUSDT"),
            ("exchange2", "ETHUSDT"),
        }
        socket.send('{"op":"unsubscribe","exchanges":["exchange1"]}')
        assert event_of(socket, "subscribed")["data"] == {
            "symbols": ["ETHUSDT"],
            "exchanges": ["exchange2"],
            "series": [["exchange2", "ETHUSDT"]],
        }
        for _ in range(10):
            told = event_of(socket, "prices", "snapshot")["data"]
            assert {each["symbol"] for each in told["prices"]} == {"ETHUSDT"}  # type: ignore[index]
        socket.send('{"op":"unsubscribe"}')
        assert event_of(socket, "subscribed")["data"] == {"symbols": [], "exchanges": [], "series": []}
        assert event_of(socket, "snapshot", "prices")["data"]["prices"] == []  # type: ignore[index]
        socket.send('{"op":"subscribe"}')
        assert len(event_of(socket, "subscribed")["data"]["series"]) == 15  # type: ignore[index]


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("{", "malformed_message"),
        ("", "malformed_message"),
        ("[]", "malformed_message"),
        (b"\xff", "malformed_message"),
        ('{"op":"buy"}', "malformed_message"),
        ('{"op":"subscribe","symbols":"BTCUSDT"}', "malformed_message"),
        ('{"op":"subscribe","symbols":["NONE"]}', "unknown_symbol"),
        ('{"op":"unsubscribe","exchanges":["none"]}', "unknown_exchange"),
    ],
)
def test_invalid_message_is_reported_and_changes_nothing(
    application: Application, message: str | bytes, code: str
) -> None:
    with websocket(application, "symbols=BTCUSDT") as socket:
        socket.send(message)
        assert event_of(socket, "error")["data"]["code"] == code  # type: ignore[index]
        assert {each["symbol"] for each in event_of(socket, "prices")["data"]["prices"]} == {"BTCUSDT"}  # type: ignore[index]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Host": "evil.example"}, 400),
    ],
)
def test_pages_of_other_sites_are_refused(application: Application, headers: dict[str, str], status: int) -> None:
    assert handshake(application, headers).startswith(f"HTTP/1.1 {status} ")


def test_same_site_pages_and_programs_may_connect(application: Application) -> None:
    for headers in ({}, {"Origin": f"http://localhost:{application.port}"}, {"Sec-Fetch-Site": "same-origin"}):
        assert handshake(application, headers).startswith("HTTP/1.1 101 ")


@pytest.mark.parametrize(
    ("path", "status"), [("/", 200), ("/ws/", 404), ("/nothing", 404), ("/livez", 200), ("/ws?symbols=none", 404)]
)
def test_upgrade_of_another_path_is_a_plain_request(application: Application, path: str, status: int) -> None:
    assert handshake(application, {}, path).startswith(f"HTTP/1.1 {status} ")


def test_plain_request_for_the_websocket_is_refused(application: Application) -> None:
    answer = application.http.get("/ws")
    assert (answer.status_code, answer.json()["code"]) == (426, "upgrade_required")
    assert application.http.post("/ws").status_code == 405


def handshake(application: Application, headers: dict[str, str], path: str = "/ws") -> str:
    """Return the first line and the headers of the answer."""
    given = {
        "Host": f"localhost:{application.port}",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    } | headers
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
    with socket.create_connection((HOST, application.port), timeout=5) as client:
        client.sendall("\r\n".join([*lines, "", ""]).encode())
        received = b""
        while b"\r\n\r\n" not in received:
            received += client.recv(65536)
        return received.decode(errors="replace")


@pytest.mark.parametrize(("code", "messages"), [(1009, ["x" * 65_537]), (1008, ["{}"] * 1000)])
def test_too_large_or_too_many_messages_end_the_connection(
    application: Application, code: int, messages: list[str]
) -> None:
    def code_of_the_end() -> int | None:
        with websocket(application) as socket:
            with suppress(ConnectionClosed):
                for message in messages:
                    socket.send(message)
            with pytest.raises(ConnectionClosed) as closed:
                event_of(socket, "nothing")
            return None if closed.value.rcvd is None else closed.value.rcvd.code

    # The kernel resets a connection that is closed with messages unread, which may overtake the code.
    codes = {code_of_the_end() for _ in range(10)}
    assert code in codes
    assert codes <= {code, None}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    messages=st.lists(
        st.one_of(
            st.text(max_size=50),
            st.binary(max_size=50),
            st.builds(
                lambda op, symbols, more: json.dumps({"op": op, "symbols": symbols, **more}),
                st.sampled_from(["subscribe", "unsubscribe", "x", None, 1]),
                st.one_of(st.none(), st.lists(st.sampled_from(["BTCUSDT", "ethusdt", "", "\u212a", 7]), max_size=3)),
                st.dictionaries(st.sampled_from(["exchanges", "x"]), st.lists(st.text(max_size=9), max_size=2)),
            ),
        ),
        max_size=8,
    )
)
def test_every_message_gets_one_answer(application: Application, messages: list[str | bytes]) -> None:
    with websocket(application) as socket:
        for message in messages:
            socket.send(message)
            event_of(socket, "subscribed", "error")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sent=st.binary(min_size=1, max_size=300))
def test_any_bytes_after_the_handshake_do_no_harm(application: Application, sent: bytes) -> None:
    lines = f"GET /ws HTTP/1.1\r\nHost: localhost:{application.port}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    lines += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    with socket.create_connection((HOST, application.port), timeout=5) as client:
        client.sendall(lines.encode())
        assert client.recv(12) == b"HTTP/1.1 101"
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while client.recv(65536):
                pass
    assert application.http.get("/livez").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        "Sec-WebSocket-Key: x",
        "X: " + "y" * 20_000,
        "\r\n".join(f"X{n}: y" for n in range(300)),
        "Sec-WebSocket-Version: 12",
        "Sec-WebSocket-Extensions: ;;;",
        "Sec-WebSocket-Protocol: \x7f",
    ],
)
def test_malformed_handshake_is_refused_and_closed(application: Application, headers: str) -> None:
    lines = f"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n{headers}\r\n\r\n"
    with socket.create_connection((HOST, application.port), timeout=5) as client:
        client.sendall(lines.encode())
        received = b"".join(iter(lambda: client.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 4"), received


# The end


def test_signal_ends_every_stream_with_a_close_frame(server_folder: Path, servers: dict[str, object]) -> None:
    with Application(server_folder, servers | MANY) as application, ExitStack() as stack:
        streams = [stack.enter_context(Stream(application.port)) for _ in range(100)]
        sockets = [stack.enter_context(websocket(application)) for _ in range(20)]
        for stream in streams:
            stream.next("snapshot")
        for each in sockets:
            each.recv()
        code, seconds = application.stop(signal.SIGTERM)
        assert code == 0
        assert seconds < 5
        for stream in streams:
            assert_ended(stream)
        for each in sockets:
            assert event_of(each, "end")["data"] == {"reason": "shutdown"}
            with pytest.raises(ConnectionClosed) as closed:
                each.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1001
    assert "Traceback" not in application.log
    assert "ERROR" not in application.log


def test_streams_end_under_plain_uvicorn_too(server_folder: Path, servers: dict[str, object]) -> None:
    port = free_port()
    program = ("-m", "uvicorn", "marketflow.app:app", "--port", str(port))
    application = Application(server_folder, servers | {"HTTP__PORT": port}, program=program)
    application.http.base_url = f"http://{HOST}:{port}"
    with application, ExitStack() as stack:
        streams = [stack.enter_context(Stream(port)) for _ in range(100)]
        for stream in streams:
            stream.next("snapshot")
        application.stop(signal.SIGTERM)
        for stream in streams:
            assert_ended(stream)
    assert "Traceback" not in application.log
    assert "ERROR" not in application.log


def assert_ended(stream: Stream) -> None:
    assert stream.until(lambda event: event.name == "end")[-1].data == {"reason": "shutdown"}
    assert list(stream) == []
    assert stream.ended


def test_stalled_clients_do_not_delay_shutdown(server_folder: Path, servers: dict[str, object]) -> None:
    with Application(server_folder, servers | {"GENERATOR__RATE": 1000}) as application, ExitStack() as stack:
        streams = [stack.enter_context(Stream(application.port, receive_bytes=2048)) for _ in range(20)]
        sockets = [stack.enter_context(socket.socket()) for _ in range(5)]
        for stream in streams:
            stream.next("snapshot")
        for each in sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            each.connect((HOST, application.port))
            lines = "GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            lines += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
            each.sendall(lines.encode())
        wait_until(lambda: unsent(application) >= 25, message="the clients were able to take everything")
        code, seconds = application.stop(signal.SIGTERM)
        assert code == 0
        assert seconds < 5
    assert "Traceback" not in application.log
    assert "ERROR" not in application.log


def unsent(application: Application) -> int:
    """Return how many connections of an application have unsent data in the kernel."""
    with Path("/proc/net/tcp").open() as table:
        lines = [line.split() for line in table.readlines()[1:]]
    port = f":{application.port:04X}"
    return sum(line[1].endswith(port) and int(line[4].partition(":")[0], 16) > 4096 for line in lines)


def test_second_signal_with_open_streams_ends_cleanly(server_folder: Path, servers: dict[str, object]) -> None:
    with Application(server_folder, servers) as other, Stream(other.port) as stream:
        stream.next("snapshot")
        ended = threading.Event()

        def read() -> None:
            with suppress(ConnectionError, AssertionError):
                stream.until(lambda event: event.name == "end")
            ended.set()

        threading.Thread(target=read, daemon=True).start()
        other.process.send_signal(signal.SIGTERM)
        assert other.stop(signal.SIGINT)[0] == 0
        assert ended.wait(5)
    assert "Traceback" not in other.log
