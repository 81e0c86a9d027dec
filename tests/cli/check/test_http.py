import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from marketflow.cli.check.check_result import CheckResult, CheckState
from marketflow.cli.check.http_checks import http_check, token_results
from marketflow.settings import HttpSettings
from tests.support.application import Application, ScriptedExchange
from tests.support.servers import HOST, free_port, wait_until

HEALTHY = b'{"status":"ok","mode":"live","uptime_seconds":7200.5,"postgres":"ok","redis":"ok","exchanges":{}}'


def look(port: int, host: str = HOST, allowed_hosts: tuple[str, ...] = ()) -> CheckResult:
    (result,) = http_check(HttpSettings(host=host, port=port, allowed_hosts=allowed_hosts)).run()
    return result


@contextmanager
def answering(answers: dict[str, bytes]) -> Iterator[int]:
    """Run a server of another program, and yield its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in answers else 404)
            self.end_headers()
            self.wfile.write(answers.get(self.path, b"no"))

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer((HOST, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join(5)


def test_free_port_is_ok_and_stays_free() -> None:
    port = free_port()
    assert (look(port).state, look(port).found) == (CheckState.OK, "the port is free")
    assert look(0).found == "any free port"


def test_running_marketflow_is_reported_with_health(server_folder: Path, servers: dict[str, object]) -> None:
    with Application(server_folder, servers) as application:
        wait_until(lambda: application.get("/health")["status"] == "ok")
        result = look(application.port)
        application.switch("live")
        degraded = look(application.port)
    assert result.state is CheckState.OK
    assert "answers in test mode" in result.found
    assert degraded.state is CheckState.WARNING
    assert "degraded (exchange1 connecting" in degraded.found


def test_marketflow_on_all_addresses_is_found(server_folder: Path, servers: dict[str, object]) -> None:
    names = {"HTTP__HOST": "0.0.0.0", "HTTP__ALLOWED_HOSTS": "prices.example.com,127.0.0.1"}
    with Application(server_folder, servers | names) as application:
        wait_until(lambda: application.get("/health")["status"] == "ok")
        assert look(application.port, "0.0.0.0", ("prices.example.com",)).state is CheckState.OK


def test_version_is_read_from_metrics() -> None:
    metrics = b'# TYPE marketflow_build_info gauge\nmarketflow_build_info{version="1.2.3"} 1.0\n'
    with answering({"/health": HEALTHY, "/metrics": metrics}) as port:
        assert look(port).found == "MarketFlow 1.2.3 answers in live mode, up for 2 h: ok"


@pytest.mark.parametrize(
    ("more", "causes"),
    [(b',"stalled":["archive","cache"]', " (branch archive stalled, branch cache stalled)"), (b"", "")],
)
def test_degraded_without_outage_names_stalled_branches(more: bytes, causes: str) -> None:
    health = HEALTHY[:-1].replace(b'"status":"ok"', b'"status":"degraded"') + more + b"}"
    with answering({"/health": health}) as port:
        assert look(port).found == f"a MarketFlow answers in live mode, up for 2 h: degraded{causes}"


@pytest.mark.parametrize("answer", [b"hello", b"{}", b"\xff", b'{"status":"fine"}'])
def test_port_of_another_program_fails(answer: bytes) -> None:
    with answering({"/health": answer}) as port:
        result = look(port)
    assert result.state is CheckState.FAILED
    assert "taken by another program" in result.found


@pytest.mark.long
def test_port_without_an_answer_fails() -> None:
    with ScriptedExchange() as silent:
        result = look(silent.port)
    assert result.state is CheckState.FAILED
    assert "without an answer" in result.found


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
def test_host_of_another_machine_fails(host: str) -> None:
    result = look(free_port(), host)
    assert result.state is CheckState.FAILED
    assert host in result.found


@pytest.mark.parametrize(
    ("host", "token", "warned"),
    [
        (HOST, "", False),
        ("::1", "", False),
        ("0.0.0.0", "", True),
        ("prices.example.com", "", True),
        ("::", "x", False),
    ],
)
def test_missing_token_warns_on_public_hosts(host: str, token: str, warned: bool) -> None:
    found = token_results(HttpSettings(host=host, token=token))
    assert [result.state for result in found] == [CheckState.WARNING] * warned
