"""`marketflow watch` as a process, beside the real application and its servers."""

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing
from pathlib import Path
from typing import Self

import pytest

from marketflow.api.streaming.events import ChangedPrices, Snapshot
from marketflow.cli.watch import stream_client, url_of
from marketflow.cli.watch.stream_events import Connected, Lost
from marketflow.errors import SettingsError
from marketflow.settings import HttpSettings
from tests.support.application import Application, ScriptedExchange, exchanges_setting, now_ms
from tests.support.proxy import Proxy
from tests.support.servers import HOST, free_port, wait_until

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z [A-Z]+ exchange[123] [0-9.e+-]+")


SGR = re.compile(r"\x1b\[[0-9;]*m")


def environment(**given: object) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return inherited | {"HTTP_PROXY": "http://127.0.0.1:1"} | {name: str(value) for name, value in given.items()}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "marketflow", "watch", *arguments]


class Watching:
    """A watch with its output in pipes, and the lines that it has printed."""

    def __init__(self, *arguments: str, **given: object) -> None:
        self.process = subprocess.Popen(
            command(*arguments),
            env=environment(**given),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._threads = [
            threading.Thread(target=lines.extend, args=(pipe,), daemon=True)
            for lines, pipe in ((self.lines, self.process.stdout), (self.errors, self.process.stderr))
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(10)
        for thread in self._threads:
            thread.join(10)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def prints(self, end: str, lines: list[str] | None = None) -> str:
        """Wait for a line with this end on stdout, or in `lines`."""
        printed = self.lines if lines is None else lines
        return wait_until(
            lambda: next((line.rstrip("\n") for line in [*printed] if line.rstrip("\n").endswith(end)), ""),
            30,
            f"no line ends with {end!r}",
        )

    def reports(self, end: str) -> str:
        return self.prints(end, self.errors)

    def exit_code_on(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


class Terminal:
    """A watch on a terminal of 100 columns and 24 lines, and its output."""

    def __init__(self, *arguments: str, **given: object) -> None:
        self.here, self.there = pty.openpty()
        termios.tcsetwinsize(self.there, (24, 100))
        self.before = termios.tcgetattr(self.there)
        self.process = subprocess.Popen(
            command(*arguments),
            env=environment(**({"TERM": "xterm-256color"} | given)),
            stdin=self.there,
            stdout=self.there,
            stderr=self.there,
            start_new_session=True,
        )
        self.painted = b""
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(10)
        os.close(self.there)
        self._thread.join(10)
        os.close(self.here)

    def shows(self, *words: str) -> str:
        """Wait for a frame that contains all of these words, with or without its colours."""

        def frame() -> str:
            frames = self.painted.decode(errors="replace").split("\x1b[H")
            return next((each for each in frames[-3:] if all(map(f"{each}{SGR.sub('', each)}".count, words))), "")

        return wait_until(frame, 30, f"{words} were not painted")

    def types(self, text: str) -> None:
        os.write(self.here, text.encode())

    def _read(self) -> None:
        while True:
            try:
                self.painted += os.read(self.here, 65536)
            except OSError:  # the other side is closed
                return


@pytest.fixture
def live(servers: dict[str, object], exchanges: list[ScriptedExchange]) -> dict[str, object]:
    """Settings of an application in live mode with the scripted exchanges."""
    return servers | {"MODE": "live", "EXCHANGES": exchanges_setting(*exchanges)}


@pytest.fixture
def application(live: dict[str, object], tmp_path: Path) -> Iterator[Application]:
    with Application(tmp_path, live) as application:
        yield application


def url(port: int) -> str:
    return f"http://{HOST}:{port}"


def once(*arguments: str, check: int = 0, **given: object) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        command("--once", *arguments), env=environment(**given), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == check, done.stderr
    return done


# --- Line by line


def test_each_change_prints_time_symbol_exchange_and_price(
    application: Application, exchanges: list[ScriptedExchange]
) -> None:
    exchanges[0].send(67432.14, at=exchanges[0].send(1.5) + 1)
    wait_until(lambda: application.find("/prices/latest/BTCUSDT"))
    with Watching("--url", url(application.port)) as watching:
        watching.prints("BTCUSDT exchange1 67432.14")  # from the snapshot
        exchanges[1].send(0.00001, symbol="ETHUSDT")
        line = watching.prints("ETHUSDT exchange2 1e-05")
        latest = application.get("/prices/latest/ETHUSDT")
        assert line.split()[0] == latest["timestamp"]
        assert watching.exit_code_on(signal.SIGINT) == 0
    assert all(LINE.fullmatch(line.rstrip("\n")) for line in watching.lines)
    assert len(watching.lines) == 2
    assert watching.errors == []


def test_symbols_and_exchanges_match_in_any_case(application: Application, exchanges: list[ScriptedExchange]) -> None:
    arguments = ("btcusdt,ETHUSDT", "solusdt", "--exchange", "EXCHANGE1", "--exchange", "exchange3")
    with Watching(*arguments, "--url", url(application.port)) as watching:
        for exchange in exchanges:
            for symbol in ("TONUSDT", "BTCUSDT", "ETHUSDT", "SOLUSDT"):
                exchange.send(2.5, symbol=symbol)
        for name in ("exchange1", "exchange3"):
            for symbol in ("BTCUSDT", "ETHUSDT", "SOLUSDT"):
                watching.prints(f"{symbol} {name} 2.5")
    assert len(watching.lines) == 6


def test_watch_reconnects_to_a_restarted_application(
    application: Application, exchanges: list[ScriptedExchange]
) -> None:
    with Watching("--url", url(application.port)) as watching:
        exchanges[0].send(1.5)
        watching.prints("BTCUSDT exchange1 1.5")
        application.kill()
        watching.reports("; trying again")
        exchanges[0].cut()
        application.start()
        watching.reports(": connected")
        exchanges[0].send(2.5)
        watching.prints("BTCUSDT exchange1 2.5")
        application.stop()
        wait_until(lambda: len(watching.errors) == 3, 20)
        assert (
            watching.errors[-1]
            == f"marketflow: {url(application.port)}: the server has ended the stream; trying again\n"
        )
        assert watching.exit_code_on(signal.SIGTERM) == 0
    prices = [float(line.split()[-1]) for line in watching.lines]
    assert prices == [1.5, 2.5]  # unchanged prices are not printed again


def test_watch_may_start_before_the_application(live: dict[str, object], tmp_path: Path) -> None:
    application = Application(tmp_path, live | {"MODE": "test"})
    # Without --url the URL comes from the settings.
    with closing(application.http), Watching(MARKETFLOW_HTTP__PORT=application.port) as watching:
        line = watching.reports("Connection refused; trying again")
        assert line == f"marketflow: {url(application.port)}: Connection refused; trying again"
        with application:
            watching.reports(": connected")
            wait_until(lambda: len(watching.lines) >= 15, 30)
            application.switch("live")
            application.switch("test")
            so_far = len(watching.lines)
            wait_until(lambda: len(watching.lines) > so_far + 15, 30)


def test_reconnection_delivers_changes_of_the_outage(
    application: Application, exchanges: list[ScriptedExchange]
) -> None:
    with Proxy(application.port) as proxy, Watching("--url", url(proxy.port)) as watching:
        exchanges[0].send(1.5)
        watching.prints("BTCUSDT exchange1 1.5")
        proxy.refuse()
        watching.reports("; trying again")
        exchanges[0].send(2.5)
        wait_until(lambda: application.get("/prices/latest/BTCUSDT")["price"] == 2.5)
        proxy.heal()
        watching.prints("BTCUSDT exchange1 2.5")
    assert len(watching.lines) == 2


def test_silent_connection_is_replaced(application: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    application.switch("test")  # prices change all the time
    monkeypatch.setattr(stream_client, "SILENCE_SECONDS", 1.0)

    async def received(proxy: Proxy) -> list[type]:
        kinds: list[type] = []
        async with aclosing(stream_client.follow(url(proxy.port), {})) as events:
            async for event in events:
                kinds.append(type(event))
                if isinstance(event, ChangedPrices) and kinds.count(ChangedPrices) == 10:
                    proxy.forget()  # open connections fall silent, new ones pass
                if isinstance(event, Lost):
                    assert event == Lost("no sign of life for 1 s", 1.0)
                elif Lost in kinds and kinds[-1] is ChangedPrices:
                    return kinds
        raise AssertionError("the stream ended")

    with Proxy(application.port) as proxy:
        kinds = asyncio.run(received(proxy))
    assert kinds[:2] == [Connected, Snapshot]
    assert kinds[kinds.index(Lost) :][:2] == [Lost, Connected]


def test_closed_pipe_ends_without_an_error(application: Application, exchanges: list[ScriptedExchange]) -> None:
    application.switch("test")
    line = f"set -o pipefail; {' '.join(command('--url', url(application.port)))} | head -n 3"
    done = subprocess.run(["bash", "-c", line], env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 3)


# --- Once


def trade(exchange: ScriptedExchange, price: float, quantity: float) -> None:
    line = {"symbol": "BTCUSDT", "price": price, "timestamp": now_ms(), "quantity": quantity}
    exchange.send_raw(json.dumps(line).encode() + b"\n")


def test_once_prints_the_volume_of_24_hours(application: Application, exchanges: list[ScriptedExchange]) -> None:
    trade(exchanges[0], 100.25, 1.5)
    trade(exchanges[1], 101.5, 2)
    exchanges[2].send(7, symbol="ETHUSDT")  # without a quantity
    for exchange, symbol in zip(exchanges, ("BTCUSDT", "BTCUSDT", "ETHUSDT"), strict=True):
        wait_until(lambda e=exchange, s=symbol: application.find(f"/prices/latest/{e.name}/{s}"))  # type: ignore[misc]
    lines = once("--url", url(application.port)).stdout.splitlines()
    assert lines[2].endswith("24h vol")
    assert {line.split()[0]: line.split()[-1] for line in lines[4:]} == {
        "BTCUSDT": "3.5",
        "ETHUSDT": "-",
        "DOGEUSDT": "-",
        "TONUSDT": "-",
        "SOLUSDT": "-",
    }
    lines = once("--url", url(application.port), "--exchange", "exchange2").stdout.splitlines()
    assert [line.split()[-1] for line in lines if "BTCUSDT" in line] == ["2"]


def test_once_prints_the_current_table(application: Application, exchanges: list[ScriptedExchange]) -> None:
    for exchange, price in zip(exchanges, (100.25, 101.5, 100.5), strict=True):
        exchange.send(price)
        wait_until(lambda e=exchange: application.find(f"/prices/latest/{e.name}/BTCUSDT"))  # type: ignore[misc]
    done = once("--url", url(application.port))
    title, health, heading, _, *rows = done.stdout.splitlines()
    assert title.split() == ["live", "mode", "connected", url(application.port)]
    assert "Redis ok  PostgreSQL ok" in health
    assert heading.split() == [
        "symbol",
        "exchange1",
        "exchange2",
        "exchange3",
        *["gap", "bp", "buy", "on", "sell", "on"],
    ]
    assert [row.split()[0] for row in rows] == ["BTCUSDT", "DOGEUSDT", "TONUSDT", "SOLUSDT", "ETHUSDT"]
    cells = [cell for cell in rows[0].split() if not re.fullmatch(r"\d+s", cell)]
    assert cells == ["BTCUSDT", "100.25", "101.50", "100.50", "124.7", "exchange1", "exchange2"]
    assert "\x1b" not in done.stdout


def test_once_fails_at_once_when_unreachable() -> None:
    port = free_port()
    done = once("--url", url(port), check=1)
    assert done.stderr == f"marketflow: {url(port)}: Connection refused\n"


def test_password_of_the_url_is_never_shown() -> None:
    port = free_port()
    with_password = f"http://user:secret@{HOST}:{port}"
    assert once("--url", with_password, check=1).stderr == f"marketflow: {url(port)}: Connection refused\n"
    with Watching("--url", with_password) as watching:
        watching.prints("trying again", watching.errors)
        assert "secret" not in "".join(watching.errors + watching.lines)
    with Terminal("--url", with_password) as terminal:
        assert "secret" not in terminal.shows("disconnected: Connection refused; trying again", url(port))


def test_interrupted_once_exits_with_130(application: Application) -> None:
    with Proxy(application.port) as proxy:
        proxy.stall()
        with Watching("--once", "--url", url(proxy.port)) as watching:
            wait_until(lambda: proxy.open_connections, 20)
            assert watching.exit_code_on(signal.SIGINT) == 130
    assert (watching.lines, watching.errors) == ([], [])


# --- What is refused


def test_unknown_names_are_answered_with_the_known_ones(application: Application) -> None:
    for arguments in (["--once"], []):
        with Watching(*arguments, "SHIBUSDT", "--url", url(application.port)) as watching:
            assert watching.process.wait(20) == 2
        known = "BTCUSDT, DOGEUSDT, TONUSDT, SOLUSDT, ETHUSDT"
        assert watching.errors == [f"marketflow: No such symbol; there are {known}.\n"]
    with Watching("--exchange", "nyse", "--url", url(application.port)) as watching:
        assert watching.process.wait(20) == 2
    assert watching.errors == ["marketflow: No such exchange; there are exchange1, exchange2, exchange3.\n"]


def test_url_of_something_else_is_reported(application: Application, server: Callable[..., int]) -> None:
    wrong = f"{url(application.port)}/nowhere"
    assert once("--url", wrong, check=1).stderr == (
        f"marketflow: {wrong}: the server answers 404 Not Found: There is nothing at this path.\n"
    )
    page, other = (
        server(200, "text/html", "<p>Hello</p>"),
        server(200, "text/event-stream", "event: prices\ndata: []\n\n"),
    )
    for port in (page, other):
        with Watching("--url", url(port)) as watching:
            assert watching.process.wait(20) == 1
        assert watching.errors == [f"marketflow: {url(port)}: there is no stream of prices of MarketFlow\n"]


def test_overloaded_server_is_tried_again(server: Callable[..., int]) -> None:
    with Watching("--url", url(server(503, "text/plain", "Not now"))) as watching:
        watching.reports("the server answers 503 Service Unavailable; trying again")
        assert watching.exit_code_on(signal.SIGINT) == 0


@pytest.fixture
def server() -> Iterator[Callable[..., int]]:
    """Serve a fixed HTTP response on a free port."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    running: list[ThreadingHTTPServer] = []

    def serve(status: int, kind: str, body: str) -> int:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("content-type", kind)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None:
                pass

        running.append(ThreadingHTTPServer((HOST, 0), Handler))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return running[-1].server_port

    yield serve
    for each in running:
        each.shutdown()
        each.server_close()


@pytest.mark.parametrize(
    ("http", "expected"),
    [
        (HttpSettings(), "http://127.0.0.1:8080"),
        (HttpSettings(host="0.0.0.0", port=9000), "http://127.0.0.1:9000"),
        (HttpSettings(host="::"), "http://[::1]:8080"),
        (HttpSettings(host="prices.example.com"), "http://prices.example.com:8080"),
    ],
)
def test_url_of_the_settings_is_reachable(http: HttpSettings, expected: str) -> None:
    assert url_of(http) == expected


def test_url_is_required_when_the_port_is_any() -> None:
    with pytest.raises(SettingsError, match=r"http\.port is 0, any free one: set --url"):
        url_of(HttpSettings(port=0))


# --- On a terminal


def test_terminal_shows_changing_prices_until_q(application: Application, exchanges: list[ScriptedExchange]) -> None:
    with Terminal("--url", url(application.port)) as terminal:
        terminal.shows("live mode", "connected", "exchange3")
        exchanges[0].send(100.25)
        terminal.shows("100.25")
        exchanges[0].send(100.5)
        terminal.shows("\x1b[1;32m100.50")
        exchanges[0].send(100.25)
        terminal.shows("\x1b[1;31m100.25")
        application.switch("test")
        terminal.shows("test mode", "generated")
        application.kill()
        terminal.shows("disconnected: ", "trying again")
        termios.tcsetwinsize(terminal.there, (6, 40))
        terminal.shows("symbols 1-1 of 5")
        exchanges[0].cut()
        application.start()
        terminal.shows("live mode", "connected")
        assert terminal.process.poll() is None
        terminal.types("xq")
        assert terminal.process.wait(20) == 0
        assert termios.tcgetattr(terminal.there) == terminal.before
        wait_until(lambda: terminal.painted.endswith((b"\x1b[?1049l\x1b[?25h", b"\x1b[?25h\x1b[?1049l")))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_restores_the_terminal(number: int) -> None:
    with Terminal("--url", url(free_port())) as terminal:
        terminal.shows("disconnected: Connection refused; trying again")
        terminal.process.send_signal(number)
        assert terminal.process.wait(20) == 0
        assert termios.tcgetattr(terminal.there) == terminal.before
        wait_until(lambda: b"\x1b[?1049l" in terminal.painted)


def test_no_color_disables_colours_on_the_terminal(application: Application, exchanges: list[ScriptedExchange]) -> None:
    with Terminal("--url", url(application.port), NO_COLOR=1) as terminal:
        exchanges[0].send(1.5)
        terminal.shows("1.5")
        exchanges[0].send(2.5)
        assert "32m" not in terminal.shows("\x1b[1m2.5\x1b[0m\x1b[1m\u25b2")


def test_keys_sort_scroll_and_show_candles(application: Application, exchanges: list[ScriptedExchange]) -> None:
    application.switch("test")
    with Terminal("--url", url(application.port)) as terminal:
        terminal.shows("q quit", "s sort: as configured", "BTCUSDT", "\x1b[7mBTCUSDT")
        terminal.types("ss")
        terminal.shows("s sort: gap")
        terminal.types("ss")
        terminal.shows("s sort: as configured")
        terminal.types("\x1b[B")
        terminal.shows("\x1b[7mDOGEUSDT")
        terminal.types("\r")
        terminal.shows("reference  1m candles", "time, UTC", "Esc prices")
        terminal.types("\x1b[C")
        terminal.shows("exchange1  1m candles", "time, UTC")
        terminal.types("i")
        terminal.shows("exchange1  3m candles", "time, UTC")
        terminal.types("\x1b")
        terminal.shows("s sort: as configured", "\x1b[7mDOGEUSDT")
        terminal.types("\x1b[D\x04")
        assert terminal.process.wait(20) == 0
        assert termios.tcgetattr(terminal.there) == terminal.before


def test_dumb_terminal_gets_lines(application: Application, exchanges: list[ScriptedExchange]) -> None:
    with Terminal("--url", url(application.port), TERM="dumb") as terminal:
        exchanges[0].send(1.5)
        assert "\x1b" not in terminal.shows("BTCUSDT exchange1 1.5")
