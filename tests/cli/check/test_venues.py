"""`marketflow check` of venues: clock, instruments and one message, or the venue's refusal in words."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest
from websockets.sync.server import ServerConnection

from marketflow.cli.check import runner, venue_checks
from marketflow.cli.check.check_result import CheckResult, CheckState
from marketflow.clock import system_clock
from marketflow.feeds.simulated.rest_side import RestAnswer
from marketflow.settings import VENUES, ExchangeSettings, FlowSettings, load
from marketflow.settings.schema import VenueName
from tests.support.servers import HOST, free_port
from tests.support.venue_server import VenueServer

SYMBOLS = ("BTCUSDT", "ETHUSDT")


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(venue_checks, "LISTEN_SECONDS", 1.0)
    monkeypatch.setattr(venue_checks, "SAMPLE_SECONDS", 0.2)


def look(
    server: VenueServer, venue: str, needed: bool = True, path: str = "", history_ms: int = 0
) -> dict[str, CheckResult]:
    settings = ExchangeSettings(
        name="mine", venue=cast("VenueName", venue), url=f"{server.url}{path}", rest_url=server.rest_url
    )
    results = venue_checks.venue_check(settings, SYMBOLS, FlowSettings(), needed, history_ms).run()
    return {result.what.removeprefix("venue mine "): result for result in results}


@contextmanager
def trading(venue: str, symbols: tuple[str, ...] = SYMBOLS, **options: object) -> Iterator[VenueServer]:
    """Yield a venue that sends two trades on each connection."""
    with VenueServer(venue, symbols, **options) as server:  # type: ignore[arg-type]

        def send(_: ServerConnection) -> None:
            server.trade(server.make(1, symbols[0]), server.make(2, symbols[0]))

        server.on_connect = send
        yield server


@pytest.mark.parametrize("venue", VENUES)
def test_healthy_venue_is_ok_in_all_three_ways(venue: str) -> None:
    with trading(venue) as server:
        found = look(server, venue)
    assert {what: result.state for what, result in found.items()} == dict.fromkeys(
        ("REST", "symbols", "stream"), CheckState.OK
    )
    assert "its clock is" in found["REST"].found
    assert found["REST"].where == server.rest_url
    assert "BTCUSDT as " in found["symbols"].found
    assert "2 trades" in found["stream"].found
    assert found["stream"].where == server.url


def test_halted_symbols_are_a_warning_in_the_words_of_the_venue() -> None:
    with trading("binance") as server:
        server.statuses["ETHUSDT"] = "CANCEL_ONLY"
        found = look(server, "binance")
        assert found["symbols"].state is CheckState.WARNING
        assert found["symbols"].found == "trades BTCUSDT as BTCUSDT; has halted ETHUSDT (CANCEL_ONLY)"
        assert found["stream"].state is CheckState.OK
        server.statuses["BTCUSDT"] = "HALT"
        found = look(server, "binance")
        assert found["symbols"].found == "has halted BTCUSDT (HALT), ETHUSDT (CANCEL_ONLY)"
        assert (found["symbols"].state, "stream" in found) == (CheckState.WARNING, False)


@pytest.mark.parametrize(
    ("venue", "hours", "expected"),
    [
        ("binance", 24, "gives minutes; those of the last 24 h are 4 calls"),
        ("okx", 24 * 365, "gives minutes; those of the last 365 days are 3504 calls"),
        ("kraken", 24, "the last 12 h are 2 calls; of the 24 h that history asks for it gives no more"),
    ],
)
def test_history_of_a_venue_is_tried_and_counted(venue: str, hours: int, expected: str) -> None:
    with trading(venue) as server:
        found = look(server, venue, history_ms=hours * 3_600_000)
    assert [*found] == ["REST", "symbols", "history", "stream"]
    assert found["history"].state is CheckState.OK
    assert expected in found["history"].found


def test_venue_that_gives_no_minutes_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with trading("binance") as server:
        answer = server.rest.answer
        refusal = RestAnswer(b'{"code":-1121,"msg":"Invalid symbol."}', 400)
        monkeypatch.setattr(server.rest, "answer", lambda path: refusal if "klines" in path else answer(path))
        found = look(server, "binance", history_ms=3_600_000)
    assert found["history"].state is CheckState.FAILED
    assert "400" in found["history"].found
    assert found["stream"].state is CheckState.OK


def test_wrong_clock_is_a_warning() -> None:
    with trading("binance", clock=lambda: system_clock() - 40_000_000_000) as server:
        found = look(server, "binance")["REST"]
    assert found.state is CheckState.WARNING
    assert "its clock is 40 s behind this machine's" in found.found
    assert "NTP" in found.advice


def test_symbols_that_a_venue_lacks_are_named() -> None:
    with trading("kraken", ("BTCUSDT",)) as server:
        found = look(server, "kraken")
    assert found["symbols"].state is CheckState.WARNING
    assert "does not trade ETHUSDT" in found["symbols"].found
    assert found["stream"].state is CheckState.OK


def test_venue_without_any_symbol_fails() -> None:
    with trading("kraken", ("XRPUSDT",)) as server:
        found = look(server, "kraken")
    assert found["symbols"].state is CheckState.FAILED
    assert "does not trade BTCUSDT, ETHUSDT" in found["symbols"].found
    assert "stream" not in found


@pytest.mark.parametrize("status", [403, 451])
def test_refusal_by_rest_is_shown_in_words(status: int) -> None:
    with trading("binance") as server:
        server.rest_answers.append(RestAnswer(b'{"code":0,"msg":"restricted location"}', status))
        found = look(server, "binance")
    assert found["REST"].state is CheckState.FAILED
    assert found["REST"].found.startswith(f"{status}: refused by the venue for this")
    assert "restricted location" in found["REST"].found
    assert "HTTPS_PROXY" in found["REST"].advice
    assert "symbols" not in found


def test_refused_handshake_is_shown_in_words() -> None:
    with VenueServer("bybit", SYMBOLS, refusals=[(403, {})]) as server:
        found = look(server, "bybit")
    assert found["symbols"].state is CheckState.OK
    assert found["stream"].state is CheckState.FAILED
    assert found["stream"].found == "403: refused by the venue for this address or location"


def test_silent_venue_fails() -> None:
    with VenueServer("okx", SYMBOLS, acknowledging=False) as server:
        found = look(server, "okx")["stream"]
    assert (found.state, found.found) == (CheckState.FAILED, "connected, but no message came within 1 s")


def test_quiet_market_is_no_fault() -> None:
    with VenueServer("okx", SYMBOLS) as server:
        found = look(server, "okx")["stream"]
    assert found.state is CheckState.OK
    assert "no trade within 1 s" in found.found


def test_refused_subscription_is_a_warning() -> None:
    with trading("okx") as server:
        server.known = {"BTC-USDT"}
        found = look(server, "okx")["stream"]
    assert found.state is CheckState.WARNING
    assert "refuses a subscription" in found.found


def test_connection_that_is_closed_at_once_fails() -> None:
    with VenueServer("binance", SYMBOLS) as server:
        server.on_connect = lambda connection: connection.close(1013, "try again later")
        found = look(server, "binance")["stream"]
    assert found.state is CheckState.FAILED
    assert "1013 try again later" in found.found


def test_unreachable_venue_fails_by_rest_and_stream() -> None:
    settings = ExchangeSettings(
        name="mine", venue="okx", url=f"ws://{HOST}:{free_port()}", rest_url=f"http://{HOST}:{free_port()}"
    )
    results = venue_checks.venue_check(settings, SYMBOLS, FlowSettings(), True).run()
    assert [result.what for result in results] == ["venue mine REST", "venue mine stream"]
    assert {result.state for result in results} == {CheckState.FAILED}


def test_faults_are_hints_in_test_mode() -> None:
    with VenueServer("bybit", SYMBOLS, refusals=[(403, {})]) as server:
        found = look(server, "bybit", needed=False)["stream"]
    assert found.state is CheckState.HINT
    assert found.advice.startswith("nothing in test mode")


def test_keys_in_urls_are_not_shown() -> None:
    with VenueServer("okx", SYMBOLS, refusals=[(502, {})]) as server:
        found = look(server, "okx", path="/?key=swordfish")
    assert "swordfish" not in str(found)


def test_slow_venue_has_more_time_than_other_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "DEADLINE_SECONDS", 0.0)
    with VenueServer("okx", SYMBOLS) as server:  # its quiet market takes LISTEN_SECONDS
        exchange = {"name": "mine", "venue": "okx", "url": server.url, "rest_url": server.rest_url}
        stores = {"redis.host": HOST, "redis.port": free_port(), "postgres.host": HOST, "postgres.port": free_port()}
        given = {"mode": "live", "symbols": [*SYMBOLS], "exchanges": [exchange], "data_dir": str(tmp_path), **stores}
        results = runner.run_checks(load(None, given))
    found = {result.what: result.state for result in results if result.what.startswith("venue")}
    assert found == {f"venue mine {part}": CheckState.OK for part in ("REST", "symbols", "history", "stream")}
