"""`marketflow watch` as a process, beside the real application and its servers."""

import asyncio
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

from marketflow.cli.watch import stream, url_of
from marketflow.cli.watch.messages import ChangedPrices, Connected, Lost, Snapshot
from marketflow.errors import SettingsError
from marketflow.settings import HttpSettings
from tests.support.application import Application, ScriptedExchange, exchanges_setting
from tests.support.proxy import Proxy
from tests.support.servers import HOST, free_port, wait_until

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z [A-Z]+ exchange[123] [0-9.e+-]+")


def environment(**given: object) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return inherited | {"HTTP_PROXY": "http://127.0.0.1:1"} | {name: str(value) for name, value in given.items()}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "marketflow", "watch", *arguments]


class Watching:
    """A watch whose output is a pipe, and what it has printed."""

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
        self.said: list[str] = []
        self._threads = [
            threading.Thread(target=lines.extend, args=(pipe,), daemon=True)
            for lines, pipe in ((self.lines, self.process.stdout), (self.said, self.process.stderr))
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

    def waits_for(self, end: str, lines: list[str] | None = None) -> str:
        """The first line that ends like that; of stdout, or of the lines given."""
        printed = self.lines if lines is None else lines
        return wait_until(
            lambda: next((line.rstrip("\n") for line in [*printed] if line.rstrip("\n").endswith(end)), ""),
            30,
            f"no line ends with {end!r}",
        )

    def says(self, end: str) -> str:
        return self.waits_for(end, self.said)

    def ends(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


class Terminal:
    """A watch on a terminal of 100 columns and 24 lines, and what it has painted last."""

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
        """What was painted in one go and holds all of these."""

        def frame() -> str:
            frames = self.painted.decode(errors="replace").split("\x1b[H")
            return next((each for each in frames[-3:] if all(word in each for word in words)), "")

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
    """Settings of an application that takes what the exchanges send."""
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


def test_each_change_is_a_line_of_time_symbol_exchange_and_price(
    application: Application, exchanges: list[ScriptedExchange]
) -> None:
    exchanges[0].send(67432.14, at=exchanges[0].send(1.5) + 1)
    wait_until(lambda: application.find("/prices/latest/BTCUSDT"))
    with Watching("--url", url(application.port)) as watching:
        watching.waits_for("BTCUSDT exchange1 67432.14")  # what there was
        exchanges[1].send(0.00001, symbol="ETHUSDT")
        line = watching.waits_for("ETHUSDT exchange2 1e-05")
        told = application.get("/prices/latest/ETHUSDT")
        assert line.split()[0] == told["timestamp"]
        assert watching.ends(signal.SIGINT) == 0
    assert all(LINE.fullmatch(line.rstrip("\n")) for line in watching.lines)
    assert len(watching.lines) == 2
    assert watching.said == []


def test_symbols_and_exchanges_may_be_chosen_in_any_case(
    application: Application, exchanges: list[ScriptedExchange]
) -> None:
    arguments = ("btcusdt,ETHUSDT", "solusdt", "--exchange", "EXCHANGE1", "--exchange", "exchange3")
    with Watching(*arguments, "--url", url(application.port)) as watching:
        for exchange in exchanges:
            for symbol in ("TONUSDT", "BTCUSDT", "ETHUSDT", "SOLUSDT"):
                exchange.send(2.5, symbol=symbol)
        for name in ("exchange1", "exchange3"):
            for symbol in ("BTCUSDT", "ETHUSDT", "SOLUSDT"):
                watching.waits_for(f"{symbol} {name} 2.5")
    assert len(watching.lines) == 6


def test_a_restarted_application_is_found_again(application: Application, exchanges: list[ScriptedExchange]) -> None:
    with Watching("--url", url(application.port)) as watching:
        exchanges[0].send(1.5)
        watching.waits_for("BTCUSDT exchange1 1.5")
        application.kill()
        watching.says("; trying again")
        exchanges[0].cut()
        application.start()
        watching.says(": connected")
        exchanges[0].send(2.5)
        watching.waits_for("BTCUSDT exchange1 2.5")
        application.stop()
        wait_until(lambda: len(watching.said) == 3, 20)
        assert (
            watching.said[-1] == f"marketflow: {url(application.port)}: the server has ended the stream; trying again\n"
        )
        assert watching.ends(signal.SIGTERM) == 0
    prices = [float(line.split()[-1]) for line in watching.lines]
    assert prices == [1.5, 2.5]  # what is known already is no news


def test_an_application_may_come_later(live: dict[str, object], tmp_path: Path) -> None:
    application = Application(tmp_path, live | {"MODE": "test"})
    # Where nobody says otherwise, it is the one of the settings.
    with closing(application.http), Watching(MARKETFLOW_HTTP__PORT=application.port) as watching:
        line = watching.says("Connection refused; trying again")
        assert line == f"marketflow: {url(application.port)}: Connection refused; trying again"
        with application:
            watching.says(": connected")
            wait_until(lambda: len(watching.lines) >= 15, 30)
            application.switch("live")
            application.switch("test")
            so_far = len(watching.lines)
            wait_until(lambda: len(watching.lines) > so_far + 15, 30)


def test_after_a_lost_connection_nothing_is_missing(
    application: Application, exchanges: list[ScriptedExchange]
) -> None:
    with Proxy(application.port) as proxy, Watching("--url", url(proxy.port)) as watching:
        exchanges[0].send(1.5)
        watching.waits_for("BTCUSDT exchange1 1.5")
        proxy.refuse()
        watching.says("; trying again")
        exchanges[0].send(2.5)
        wait_until(lambda: application.get("/prices/latest/BTCUSDT")["price"] == 2.5)
        proxy.heal()
        watching.waits_for("BTCUSDT exchange1 2.5")
    assert len(watching.lines) == 2


def test_a_connection_without_a_sign_of_life_is_given_up(
    application: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    application.switch("test")  # in which prices never cease
    monkeypatch.setattr(stream, "SILENCE_SECONDS", 1.0)

    async def told(proxy: Proxy) -> list[type]:
        kinds: list[type] = []
        async with aclosing(stream.follow(url(proxy.port), {})) as messages:
            async for message in messages:
                kinds.append(type(message))
                if isinstance(message, ChangedPrices) and kinds.count(ChangedPrices) == 10:
                    proxy.forget()  # what is open falls silent, new connections are let through
                if isinstance(message, Lost):
                    assert message == Lost("no sign of life for 1 s", 1.0)
                elif Lost in kinds and kinds[-1] is ChangedPrices:
                    return kinds
        raise AssertionError("it never ends")

    with Proxy(application.port) as proxy:
        kinds = asyncio.run(told(proxy))
    assert kinds[:2] == [Connected, Snapshot]
    assert kinds[kinds.index(Lost) :][:2] == [Lost, Connected]


def test_nobody_reading_on_is_no_fault(application: Application, exchanges: list[ScriptedExchange]) -> None:
    application.switch("test")
    line = f"set -o pipefail; {' '.join(command('--url', url(application.port)))} | head -n 3"
    done = subprocess.run(["bash", "-c", line], env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 3)


# --- Once


def test_once_prints_the_table_of_now(application: Application, exchanges: list[ScriptedExchange]) -> None:
    for exchange, price in zip(exchanges, (100.25, 101.5, 100.5), strict=True):
        exchange.send(price)
        wait_until(lambda e=exchange: application.find(f"/prices/latest/{e.name}/BTCUSDT"))  # type: ignore[misc]
    done = once("--url", url(application.port))
    title, health, heading, _, *rows = done.stdout.splitlines()
    assert title.split() == ["live", "mode", "connected", url(application.port)]
    assert "Redis ok  PostgreSQL ok" in health
    assert heading.split() == ["symbol", "exchange1", "exchange2", "exchange3", "spread", "%"]
    assert [row.split()[0] for row in rows] == ["BTCUSDT", "DOGEUSDT", "TONUSDT", "SOLUSDT", "ETHUSDT"]
    assert [cell for cell in rows[0].split() if "s" not in cell] == [
        "BTCUSDT",
        "100.25",
        "101.50",
        "100.50",
        "1.25",
        "1.247",
    ]
    assert "\x1b" not in done.stdout


def test_once_does_not_wait_for_what_is_away() -> None:
    port = free_port()
    done = once("--url", url(port), check=1)
    assert done.stderr == f"marketflow: {url(port)}: Connection refused\n"


def test_password_of_the_url_is_shown_nowhere() -> None:
    port = free_port()
    with_password = f"http://user:secret@{HOST}:{port}"
    assert once("--url", with_password, check=1).stderr == f"marketflow: {url(port)}: Connection refused\n"
    with Watching("--url", with_password) as watching:
        watching.waits_for("trying again", watching.said)
        assert "secret" not in "".join(watching.said + watching.lines)
    with Terminal("--url", with_password) as terminal:
        assert "secret" not in terminal.shows("disconnected: Connection refused; trying again", url(port))


def test_once_that_is_interrupted_does_not_say_that_all_is_told(application: Application) -> None:
    with Proxy(application.port) as proxy:
        proxy.stall()
        with Watching("--once", "--url", url(proxy.port)) as watching:
            wait_until(lambda: proxy.open_connections, 20)
            assert watching.ends(signal.SIGINT) == 130
    assert (watching.lines, watching.said) == ([], [])


# --- What is refused


def test_an_unknown_symbol_is_told_those_that_are_known(application: Application) -> None:
    for arguments in (["--once"], []):
        with Watching(*arguments, "SHIBUSDT", "--url", url(application.port)) as watching:
            assert watching.process.wait(20) == 2
        known = "BTCUSDT, DOGEUSDT, TONUSDT, SOLUSDT, ETHUSDT"
        assert watching.said == [f"marketflow: No such symbol; there are {known}.\n"]
    with Watching("--exchange", "nyse", "--url", url(application.port)) as watching:
        assert watching.process.wait(20) == 2
    assert watching.said == ["marketflow: No such exchange; there are exchange1, exchange2, exchange3.\n"]


def test_what_is_no_stream_of_marketflow_is_said(application: Application, server: Callable[..., int]) -> None:
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
        assert watching.said == [f"marketflow: {url(port)}: there is no stream of prices of MarketFlow\n"]


def test_a_server_that_is_overloaded_is_tried_again(server: Callable[..., int]) -> None:
    with Watching("--url", url(server(503, "text/plain", "Not now"))) as watching:
        watching.says("the server answers 503 Service Unavailable; trying again")
        assert watching.ends(signal.SIGINT) == 0


@pytest.fixture
def server() -> Iterator[Callable[..., int]]:
    """Serves what is no MarketFlow on a port."""
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
def test_the_url_is_where_the_application_of_the_settings_listens(http: HttpSettings, expected: str) -> None:
    assert url_of(http) == expected


def test_any_free_port_is_one_that_must_be_told() -> None:
    with pytest.raises(SettingsError, match=r"http\.port is 0, any free one: set --url"):
        url_of(HttpSettings(port=0))


# --- On a terminal


def test_a_terminal_shows_prices_as_they_change_until_q(
    application: Application, exchanges: list[ScriptedExchange]
) -> None:
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
        terminal.shows("... 4 more symbols")
        exchanges[0].cut()
        application.start()
        terminal.shows("live mode", "connected")
        assert terminal.process.poll() is None
        terminal.types("xq")
        assert terminal.process.wait(20) == 0
        assert termios.tcgetattr(terminal.there) == terminal.before
        wait_until(lambda: terminal.painted.endswith((b"\x1b[?1049l\x1b[?25h", b"\x1b[?25h\x1b[?1049l")))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_terminal_as_it_was(number: int) -> None:
    with Terminal("--url", url(free_port())) as terminal:
        terminal.shows("disconnected: Connection refused; trying again")
        terminal.process.send_signal(number)
        assert terminal.process.wait(20) == 0
        assert termios.tcgetattr(terminal.there) == terminal.before
        wait_until(lambda: b"\x1b[?1049l" in terminal.painted)


def test_a_terminal_without_colours_gets_none(application: Application, exchanges: list[ScriptedExchange]) -> None:
    with Terminal("--url", url(application.port), NO_COLOR=1) as terminal:
        exchanges[0].send(1.5)
        terminal.shows("1.5")
        exchanges[0].send(2.5)
        assert "32m" not in terminal.shows("\x1b[1m2.5")


def test_a_terminal_that_cannot_be_painted_on_gets_lines(
    application: Application, exchanges: list[ScriptedExchange]
) -> None:
    with Terminal("--url", url(application.port), TERM="dumb") as terminal:
        exchanges[0].send(1.5)
        assert "\x1b" not in terminal.shows("BTCUSDT exchange1 1.5")
