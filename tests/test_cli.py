import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import marketflow
from marketflow import __version__, cli, logs
from marketflow.errors import StartError
from marketflow.model import Mode
from marketflow.settings import Settings

pytestmark = pytest.mark.usefixtures("nothing_set")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was called, in order; nothing is really served."""
    made: list[Any] = []
    monkeypatch.setattr(logs, "setup", lambda level, format: made.append((level, format)))
    return made


def stand_in(monkeypatch: pytest.MonkeyPatch, package: ModuleType, name: str, serve: Callable[..., int]) -> None:
    module = ModuleType(f"{package.__name__}.{name}")
    module.serve = serve  # type: ignore[attr-defined]
    module.serve_feeds = lambda settings: serve(settings, "feeds")  # type: ignore[attr-defined]
    module.serve_api = lambda settings, workers: serve(settings, "api", workers)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(package, name, module, raising=False)


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> list[Any]:
    def serve(settings: Settings, *half: object) -> int:
        calls.append(settings)
        calls.extend(half)
        return 0

    stand_in(monkeypatch, marketflow, "app", serve)
    return calls


@pytest.fixture
def exchange(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> list[Any]:
    import marketflow.feeds

    def serve(name: str, host: str, port: int, symbols: Sequence[str], rate: float, seed: int | None) -> int:
        calls.append((name, host, port, tuple(symbols), rate, seed))
        return 0

    stand_in(monkeypatch, marketflow.feeds, "exchange", serve)
    return calls


def test_without_arguments_everything_runs_by_the_settings(app: list[Any]) -> None:
    assert cli.main([]) == 0
    assert app == [("INFO", "text"), Settings()]


def test_flags_win_over_variables_and_files(monkeypatch: pytest.MonkeyPatch, app: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"http": {"port": 1, "host": "file"}, "log": {"format": "json"}, "redis": {"port": 9}}')
    monkeypatch.setenv("MARKETFLOW_HTTP__PORT", "2")
    monkeypatch.setenv("MARKETFLOW_MODE", "test")
    assert cli.main(["--config", str(path), "--port", "0", "--host", "::1", "--mode", "live"]) == 0
    logged, settings = app
    assert logged == ("INFO", "json")
    assert (settings.http.port, settings.http.host, settings.mode) == (0, "::1", Mode.LIVE)
    assert settings.redis.port == 9


@pytest.mark.parametrize(
    ("line", "half"),
    [
        ("--role feeds", ["feeds"]),
        ("--role api", ["api", 1]),
        ("--role api --workers 3", ["api", 3]),
    ],
)
def test_a_role_is_one_half(app: list[Any], line: str, half: list[object]) -> None:
    assert cli.main(line.split()) == 0
    assert app == [("INFO", "text"), Settings(), *half]


def test_an_exchange_is_served_as_asked(exchange: list[Any]) -> None:
    flags = "exchange --port 40101 --name a --rate 2.5 --seed 7 --symbols A,B --host 0.0.0.0"
    assert cli.main(flags.split()) == 0
    assert exchange == [("INFO", "text"), ("a", "0.0.0.0", 40101, ("A", "B"), 2.5, 7)]


def test_an_exchange_has_the_defaults_of_the_settings(exchange: list[Any]) -> None:
    assert cli.main(["exchange", "--port", "0"]) == 0
    assert exchange[-1] == ("exchange1", "127.0.0.1", 0, Settings().symbols, 100.0, None)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--port 99999", "argument --port: 99999: must be a whole number from 0 to 65535"),
        ("--port x", 'argument --port: "x": must be a whole number from 0 to 65535'),
        ("--port", "argument --port: expected one argument"),
        ("--mode demo", 'argument --mode: "demo": must be one of test, live'),
        ("--por 1", "unrecognized arguments: --por 1"),
        ("--role both", "argument --role: invalid choice: 'both'"),
        ("--workers 2", "argument --workers: only with --role api"),
        ("--role feeds --workers 2", "argument --workers: only with --role api"),
        ("--role api --workers 0", "argument --workers: '0': must be a whole number from 1 to 64"),
        ("--role api --workers two", "argument --workers: 'two': must be a whole number from 1 to 64"),
        ("--role feeds --port 1", "argument --port: not with --role feeds, which listens nowhere"),
        ("--role feeds --host ::1", "argument --host: not with --role feeds, which listens nowhere"),
        ("--role api --mode live", "argument --mode: not with --role api, which is in the mode of the feeds"),
        ("serve", "unrecognized arguments: serve"),
        ("--port 1 exchange", "unrecognized arguments: exchange"),
        ("--config none.toml", "marketflow: none.toml: can't be read: No such file or directory"),
        ("exchange", "the following arguments are required: --port"),
        ("exchange --port 65536", "argument --port: 65536: must be a whole number from 0 to 65535"),
        ("exchange --port 1 --rate 0", "argument --rate: 0: must be a number above 0"),
        ("exchange --port 1 --symbols a,b", 'argument --symbols: [0] = "a": must be'),
        ("exchange --port 1 --name a:b", 'argument --name: "a:b": must be'),
        ("exchange --port 1 --seed x", 'argument --seed: "x": must be a whole number'),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_allowed(
    app: list[Any], exchange: list[Any], capsys: pytest.CaptureFixture[str], line: str, told: str
) -> None:
    assert cli.main(line.split()) == 2
    assert told in capsys.readouterr().err
    assert app == []


def test_each_wrong_setting_is_a_line_and_nothing_is_started(
    monkeypatch: pytest.MonkeyPatch, app: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MARKETFLOW_HTTP__PORT", "70000")
    monkeypatch.setenv("MARKETFLOW_LOG__LEVEL", "LOUD")
    assert cli.main([]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" = ")[0] for line in sorted(lines)] == ["marketflow: http.port", "marketflow: log.level"]
    assert app == []


@pytest.mark.parametrize("line", ["", "exchange --port 1"])
def test_a_start_that_fails_says_why(
    monkeypatch: pytest.MonkeyPatch, calls: list[Any], capsys: pytest.CaptureFixture[str], line: str
) -> None:
    import marketflow.feeds

    def serve(*_: object) -> int:
        raise StartError("port 1 is taken")

    stand_in(monkeypatch, marketflow, "app", serve)
    stand_in(monkeypatch, marketflow.feeds, "exchange", serve)
    assert cli.main(line.split()) == 1
    assert capsys.readouterr().err == "marketflow: port 1 is taken\n"


def test_an_interrupted_start_ends_quietly(
    monkeypatch: pytest.MonkeyPatch, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def serve(_: Settings) -> int:
        raise KeyboardInterrupt

    stand_in(monkeypatch, marketflow, "app", serve)
    assert cli.main([]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("line", ["--help", "exchange --help"])
def test_help_names_every_flag(capsys: pytest.CaptureFixture[str], line: str) -> None:
    assert cli.main(line.split()) == 0
    flags = (
        ["--name", "--rate", "--seed", "--symbols"]
        if "exchange" in line
        else ["--config", "--mode", "--role", "--workers", "exchange"]
    )
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ["--port", "--host", *flags])


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"marketflow {__version__}\n"


def test_help_needs_nothing_but_python() -> None:
    script = (
        "import sys; from marketflow import cli; code = cli.main(['--help'])\n"
        "heavy = {'dynaconf', 'loguru', 'msgspec', 'reactivex', 'redis', 'psycopg', 'uvicorn'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else code)"
    )
    root = Path(marketflow.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
