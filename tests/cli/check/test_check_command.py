import io
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from marketflow.cli import main
from marketflow.cli.check import CheckResult, CheckState
from marketflow.settings import Settings
from tests.support.application import ScriptedExchange, exchanges_setting
from tests.support.command_line import command, environment, run
from tests.support.proxy import Proxy
from tests.support.servers import HOST, RedisServer, free_port

pytestmark = pytest.mark.usefixtures("nothing_set")


def results(*states: CheckState) -> list[CheckResult]:
    return [CheckResult(f"part {number}", "here", state, "as found", "do it") for number, state in enumerate(states)]


@pytest.mark.parametrize(
    ("found", "code", "verdict"),
    [
        (results(CheckState.OK, CheckState.HINT), 0, "MarketFlow runs well with these settings. (1 ok, 1 hint)"),
        (results(CheckState.OK, CheckState.WARNING), 0, "but see the warnings. (1 ok, 1 warning)"),
        (
            results(CheckState.WARNING, CheckState.FAILED, CheckState.FAILED),
            1,
            "would not run well. (1 warning, 2 failed)",
        ),
    ],
)
def test_check_reports_each_result_and_fails_with_one(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    found: list[CheckResult],
    code: int,
    verdict: str,
) -> None:
    monkeypatch.setattr("marketflow.cli.check.run_checks", lambda _: found)
    assert main.main(["check"]) == code
    shown = capsys.readouterr().out
    assert verdict in shown
    assert all(f"part {number}" in shown and result.state in shown for number, result in enumerate(found))
    assert main.main(["check", "--format", "json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is (code == 0)
    assert [result["state"] for result in report["findings"]] == [result.state for result in found]
    assert report["findings"][0].keys() == {"what", "where", "state", "found", "advice"}


def test_check_report_is_escaped_and_complete(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "word" * 100
    hostile = CheckResult("[red]a[/red] :smile:", "\x1b]0;b\x07", CheckState.FAILED, f"\x1b[2J{long}\u202e\x9b", "")
    monkeypatch.setattr("marketflow.cli.check.run_checks", lambda _: [hostile])
    monkeypatch.setenv("COLUMNS", "60")
    assert main.main(["check"]) == 1
    shown = capsys.readouterr().out
    assert {"\x1b", "\x07", "\x9b", "\u202e"}.isdisjoint(shown)
    assert max(map(len, shown.splitlines())) <= 60
    below_the_headings = shown.partition("\u251c")[2]
    cells = [line.split("\u2502")[1:-1] for line in below_the_headings.splitlines() if "\u2502" in line]
    place, _, found = ("".join(row[column].strip() for row in cells) for column in range(3))
    assert place.replace(" ", "") == "[red]a[/red]:smile:\\x1b]0;b\\x07"
    assert long in found


def test_check_colours_only_terminals_without_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marketflow.cli.check.run_checks", lambda _: results(CheckState.FAILED))
    assert "\x1b[1;31mfailed" in in_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in in_terminal(monkeypatch)
    assert "31mfailed" not in in_terminal(monkeypatch)


def in_terminal(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what a check prints to a terminal."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    main.main(["check"])
    return terminal.getvalue()


def test_interrupted_check_does_not_exit_with_zero(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: Settings) -> list[CheckResult]:
        raise KeyboardInterrupt

    monkeypatch.setattr("marketflow.cli.check.run_checks", interrupted)
    assert main.main(["check"]) == 130
    assert capsys.readouterr() == ("", "")


def test_healthy_deployment_passes_check(
    servers: dict[str, object], exchanges: list[ScriptedExchange], tmp_path: Path
) -> None:
    settings = servers | {"EXCHANGES": exchanges_setting(*exchanges), "SYMBOLS": "BTCUSDT", "DATA_DIR": tmp_path}
    ended = threading.Event()

    def send() -> None:
        while not ended.wait(0.02):
            for exchange in exchanges:
                exchange.offer(1.5)

    sending = threading.Thread(target=send, daemon=True)
    sending.start()
    done = run("check", "--mode", "live", "--port", str(free_port()), **settings)
    ended.set()
    sending.join(5)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "MarketFlow runs well with these settings. (10 ok)"
    assert "\x1b" not in done.stdout
    assert str(servers["POSTGRES__PASSWORD"]) not in done.stdout


def test_broken_deployment_fails_check_in_time(
    servers: dict[str, object], redis_db: RedisServer, postgres_db: dict[str, Any]
) -> None:
    with Proxy(redis_db.port) as redis, Proxy(postgres_db["port"]) as postgres, Proxy(1) as taken:
        redis.vanish()
        postgres.swallow()
        settings = servers | {"REDIS__PORT": redis.port, "POSTGRES__PORT": postgres.port, "REDIS__PASSWORD": "hush"}
        settings |= {"EXCHANGES": f'[{{name="a",address="{HOST}:{free_port()}"}}]', "HTTP__PORT": taken.port}
        done = run("check", "--mode", "live", "--format", "json", **settings)
    assert (done.returncode, done.stderr) == (1, "")
    report = json.loads(done.stdout)
    assert {result["what"]: result["state"] for result in report["findings"]} == dict.fromkeys(
        ["Redis", "PostgreSQL", "exchange a", "HTTP API"], "failed"
    )
    assert all(result["advice"] for result in report["findings"])
    assert "hush" not in done.stdout
    assert str(servers["POSTGRES__PASSWORD"]) not in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_check_at_once_and_quietly(servers: dict[str, object], number: int) -> None:
    with ScriptedExchange() as silent:
        given = environment(servers | {"EXCHANGES": exchanges_setting(silent), "MODE": "live"})
        with subprocess.Popen(command("check"), env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as check:
            silent.client()  # the check listens now, for seconds
            check.send_signal(number)
            output, _ = check.communicate(timeout=30)
    assert (check.returncode, output) == (130, b"")
