import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from marketflow.cli.check import exchange_checks as checkup
from marketflow.cli.check.findings import Finding, State
from marketflow.settings import ExchangeSettings, FlowSettings
from tests.support.application import ScriptedExchange, now_ms
from tests.support.proxy import Proxy
from tests.support.servers import HOST, free_port

SYMBOLS = ("BTCUSDT", "ETHUSDT")


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "LISTEN_SECONDS", 1.5)
    monkeypatch.setattr(checkup, "SAMPLE_SECONDS", 0.3)


def look(address: str, needed: bool = True) -> Finding:
    settings = ExchangeSettings(name="exchange1", address=address)
    (finding,) = checkup.exchange_check(settings, SYMBOLS, FlowSettings(), needed).look()
    return finding


@contextmanager
def sending(line: Callable[[str], object], symbols: tuple[str, ...] = SYMBOLS) -> Iterator[ScriptedExchange]:
    """An exchange that sends a line for each symbol, again and again, while it lasts."""
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


def test_a_healthy_one_is_ok_with_what_was_heard() -> None:
    with sending(tick()) as exchange:
        finding = look(exchange.address)
    assert finding.state is State.OK
    assert finding.what == "exchange exchange1"
    assert "of BTCUSDT, ETHUSDT" in finding.found
    assert not finding.advice


def test_in_test_mode_a_missing_one_is_a_hint() -> None:
    finding = look(f"{HOST}:{free_port()}", needed=False)
    assert (finding.state, finding.found) == (State.HINT, "connection refused")
    assert finding.advice.startswith("nothing in test mode")


def test_one_that_refuses_is_told() -> None:
    finding = look(f"{HOST}:{free_port()}")
    assert (finding.state, finding.found) == (State.FAILED, "connection refused")


def test_a_name_that_cannot_be_looked_up_is_told() -> None:
    finding = look("no-such-host.invalid:1")
    assert finding.state is State.FAILED
    assert finding.found.startswith("its name cannot be looked up")


@pytest.mark.parametrize(("fault", "told"), [(Proxy.swallow, "nothing came"), (Proxy.vanish, "no connection within")])
def test_one_that_is_swallowed_is_given_up(fault: Callable[[Proxy], None], told: str) -> None:
    with sending(tick()) as exchange, Proxy(exchange.port) as proxy:
        fault(proxy)
        finding = look(f"{HOST}:{proxy.port}")
    assert finding.state is State.FAILED
    assert told in finding.found


def test_one_that_says_nothing_is_told() -> None:
    with ScriptedExchange() as exchange:
        finding = look(exchange.address)
    assert finding.state is State.FAILED
    assert finding.found == "connected, but nothing came within 1.5 s"


def test_one_that_hangs_up_is_told() -> None:
    with ScriptedExchange() as exchange:
        hanging_up = threading.Thread(target=lambda: exchange.client().close(), daemon=True)
        hanging_up.start()
        finding = look(exchange.address)
        hanging_up.join(5)
    assert finding.state is State.FAILED
    assert "closes the connection" in finding.found


def test_rubbish_alone_has_failed_and_is_shown_harmlessly() -> None:
    with sending(lambda _: b"<h1>\x1b[31mhello</h1>\n") as exchange:
        finding = look(exchange.address)
    assert finding.state is State.FAILED
    assert "malformed (such as b'<h1>\\x1b[31mhello</h1>')" in finding.found
    assert "\x1b" not in finding.found
    assert '{"symbol":"BTCUSDT"' in finding.advice


def test_bad_lines_among_good_ones_are_counted_by_reason() -> None:
    with sending(lambda symbol: tick(price=-1)(symbol) if symbol == "bad" else tick()(symbol), (*SYMBOLS, "bad")) as it:
        finding = look(it.address)
    assert finding.state is State.WARNING
    assert "unknown_symbol (such as 'bad')" in finding.found


def test_a_symbol_that_does_not_come_is_named() -> None:
    with sending(tick(), ("ETHUSDT",)) as exchange:
        finding = look(exchange.address)
    assert finding.state is State.WARNING
    assert "of ETHUSDT" in finding.found
    assert "nothing within 1.5 s of BTCUSDT" in finding.found


@pytest.mark.parametrize(
    ("timestamp", "told", "advice"),
    [
        (lambda: now_ms() + 3_600_000, "60 min ahead of", "NTP"),
        (lambda: now_ms() - 60_000, "60 s behind", "NTP"),
        (lambda: now_ms() // 1000, "behind", "look like seconds"),
        (lambda: now_ms() * 1000, "ahead of", "look like microseconds"),
        (lambda: now_ms() * 1_000_000, "ahead of", "look like nanoseconds"),
        (lambda: None, "ticks without a timestamp", "let it send timestamps"),
    ],
)
def test_timestamps_that_are_off_are_told_with_the_likely_cause(
    timestamp: Callable[[], int | None], told: str, advice: str
) -> None:
    with sending(lambda symbol: {"symbol": symbol, "price": 1.5, "timestamp": timestamp()}) as exchange:
        finding = look(exchange.address)
    assert finding.state is State.WARNING
    assert told in finding.found
    assert advice in finding.advice


def test_a_skew_that_is_allowed_is_ok() -> None:
    with sending(lambda symbol: tick(timestamp=now_ms() - 2000)(symbol)) as exchange:
        finding = look(exchange.address)
    assert finding.state is State.OK
    assert "s behind this machine's clock" in finding.found
