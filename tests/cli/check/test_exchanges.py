import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from marketflow.cli.check import exchange_checks
from marketflow.cli.check.check_result import CheckResult, CheckState
from marketflow.settings import ExchangeSettings, FlowSettings
from tests.support.application import ScriptedExchange, now_ms
from tests.support.proxy import Proxy
from tests.support.servers import HOST, free_port

SYMBOLS = ("BTCUSDT", "ETHUSDT")


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_checks, "LISTEN_SECONDS", 1.5)
    monkeypatch.setattr(exchange_checks, "SAMPLE_SECONDS", 0.3)


def look(address: str, needed: bool = True) -> CheckResult:
    settings = ExchangeSettings(name="exchange1", address=address)
    (result,) = exchange_checks.exchange_check(settings, SYMBOLS, FlowSettings(), needed).run()
    return result


@contextmanager
def sending(line: Callable[[str], object], symbols: tuple[str, ...] = SYMBOLS) -> Iterator[ScriptedExchange]:
    """Yield an exchange that sends a line for each symbol repeatedly."""
    with ScriptedExchange() as exchange:
        ended = threading.Event()

        def send() -> None:
            while not ended.wait(0.02):
                client = exchange.connected()
                for value in map(line, symbols):
                    if client is not None:
                        client.sendall(value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n")

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        yield exchange
        ended.set()
        thread.join(5)


def tick(**more: Any) -> Callable[[str], dict[str, Any]]:
    return lambda symbol: {"symbol": symbol, "price": 1.5, "timestamp": now_ms(), **more}


def test_healthy_exchange_is_ok_with_symbols_and_count() -> None:
    with sending(tick()) as exchange:
        result = look(exchange.address)
    assert result.state is CheckState.OK
    assert result.what == "exchange exchange1"
    assert "of BTCUSDT, ETHUSDT" in result.found
    assert not result.advice


def test_missing_exchange_is_a_hint_in_test_mode() -> None:
    result = look(f"{HOST}:{free_port()}", needed=False)
    assert (result.state, result.found) == (CheckState.HINT, "connection refused")
    assert result.advice.startswith("nothing in test mode")


def test_refused_connection_fails_with_advice() -> None:
    result = look(f"{HOST}:{free_port()}")
    assert (result.state, result.found) == (CheckState.FAILED, "connection refused")


def test_unresolvable_name_fails_the_check() -> None:
    result = look("no-such-host.invalid:1")
    assert result.state is CheckState.FAILED
    assert result.found.startswith("its name cannot be resolved")


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "message"), [(Proxy.swallow, "received nothing"), (Proxy.vanish, "no connection within")]
)
def test_dropped_packets_fail_at_the_timeout(fault: Callable[[Proxy], None], message: str) -> None:
    with sending(tick()) as exchange, Proxy(exchange.port) as proxy:
        fault(proxy)
        result = look(f"{HOST}:{proxy.port}")
    assert result.state is CheckState.FAILED
    assert message in result.found


@pytest.mark.long
def test_silent_exchange_fails_at_the_timeout() -> None:
    with ScriptedExchange() as exchange:
        result = look(exchange.address)
    assert result.state is CheckState.FAILED
    assert result.found == "connected, but received nothing within 1.5 s"


def test_closed_connection_fails_the_check() -> None:
    with ScriptedExchange() as exchange:
        hanging_up = threading.Thread(target=lambda: exchange.client().close(), daemon=True)
        hanging_up.start()
        result = look(exchange.address)
        hanging_up.join(5)
    assert result.state is CheckState.FAILED
    assert "closes the connection" in result.found


@pytest.mark.long
def test_malformed_lines_fail_and_are_escaped() -> None:
    with sending(lambda _: b"<h1>\x1b[31mhello</h1>\n") as exchange:
        result = look(exchange.address)
    assert result.state is CheckState.FAILED
    assert "malformed (such as b'<h1>\\x1b[31mhello</h1>')" in result.found
    assert "\x1b" not in result.found
    assert '{"symbol":"BTCUSDT"' in result.advice


def test_rejected_lines_warn_with_counts_by_reason() -> None:
    with sending(lambda symbol: tick(price=-1)(symbol) if symbol == "bad" else tick()(symbol), (*SYMBOLS, "bad")) as it:
        result = look(it.address)
    assert result.state is CheckState.WARNING
    assert "unknown_symbol (such as 'bad')" in result.found


@pytest.mark.long
def test_symbol_without_ticks_is_named() -> None:
    with sending(tick(), ("ETHUSDT",)) as exchange:
        result = look(exchange.address)
    assert result.state is CheckState.WARNING
    assert "of ETHUSDT" in result.found
    assert "no tick within 1.5 s of BTCUSDT" in result.found


@pytest.mark.parametrize(
    ("timestamp", "message", "advice"),
    [
        (lambda: now_ms() + 3_600_000, "60 min ahead of", "NTP"),
        (lambda: now_ms() - 60_000, "60 s behind", "NTP"),
        (lambda: now_ms() // 1000, "behind", "look like seconds"),
        (lambda: now_ms() * 1000, "ahead of", "look like microseconds"),
        (lambda: now_ms() * 1_000_000, "ahead of", "look like nanoseconds"),
        (lambda: None, "ticks without a timestamp", "make it send timestamps"),
    ],
)
def test_skewed_timestamps_warn_with_likely_cause(
    timestamp: Callable[[], int | None], message: str, advice: str
) -> None:
    with sending(lambda symbol: {"symbol": symbol, "price": 1.5, "timestamp": timestamp()}) as exchange:
        result = look(exchange.address)
    assert result.state is CheckState.WARNING
    assert message in result.found
    assert advice in result.advice


def test_allowed_skew_is_ok() -> None:
    with sending(lambda symbol: tick(timestamp=now_ms() - 2000)(symbol)) as exchange:
        result = look(exchange.address)
    assert result.state is CheckState.OK
    assert "s behind this machine's clock" in result.found
