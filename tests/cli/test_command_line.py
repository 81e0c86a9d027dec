import gc
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import marketflow.feeds
import marketflow.runtime
from marketflow import __version__, logs, settings
from marketflow.api.queries.boundaries import INTERVALS
from marketflow.cli import main
from marketflow.errors import SettingsError, StartError
from marketflow.model import Mode
from marketflow.settings import Settings
from tests.support.command_line import command

pytestmark = pytest.mark.usefixtures("nothing_set")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of fakes, in order; no server is started."""
    made: list[Any] = []
    monkeypatch.setattr(logs, "setup", lambda level, format: made.append((level, format)))
    return made


def replace_module(monkeypatch: pytest.MonkeyPatch, package: ModuleType, name: str, serve: Callable[..., int]) -> None:
    module = ModuleType(f"{package.__name__}.{name}")
    module.serve = serve  # type: ignore[attr-defined]
    module.serve_ingest = lambda settings, read: serve(settings, read, "feeds")  # type: ignore[attr-defined]
    module.serve_api = lambda settings, read, workers: serve(settings, read, "api", workers)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(package, name, module, raising=False)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> list[Any]:
    def serve(settings: Settings, read: object, *role: object) -> int:
        calls.append(settings)
        calls.extend(role)
        return 0

    replace_module(monkeypatch, marketflow.runtime, "processes", serve)
    return calls


@pytest.fixture
def exchange(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> list[Any]:
    def serve(name: str, host: str, port: int, symbols: Sequence[str], rate: float, seed: int | None) -> int:
        calls.append((name, host, port, tuple(symbols), rate, seed))
        return 0

    replace_module(monkeypatch, marketflow.feeds, "simulator", serve)
    return calls


def test_no_arguments_run_both_roles_by_settings(server: list[Any]) -> None:
    assert main.main([]) == 0
    assert server == [("INFO", "text"), Settings()]


def test_flags_override_variables_and_files(monkeypatch: pytest.MonkeyPatch, server: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"http": {"port": 1, "host": "file"}, "log": {"format": "json"}, "redis": {"port": 9}}')
    monkeypatch.setenv("MARKETFLOW_HTTP__PORT", "2")
    monkeypatch.setenv("MARKETFLOW_MODE", "test")
    assert main.main(["--config", str(path), "--port", "0", "--host", "::1", "--mode", "live"]) == 0
    logged, settings = server
    assert logged == ("INFO", "json")
    assert (settings.http.port, settings.http.host, settings.mode) == (0, "::1", Mode.LIVE)
    assert settings.redis.port == 9


def test_venues_and_symbols_of_the_command_line_are_settings(server: list[Any]) -> None:
    assert main.main(["--venues", "binance,kraken", "--symbols", "btcusdt,ETHUSDT"]) == 0
    _, settings = server
    assert [(each.name, each.venue) for each in settings.exchanges] == [("binance", "binance"), ("kraken", "kraken")]
    assert (settings.symbols, settings.mode) == (("BTCUSDT", "ETHUSDT"), Mode.LIVE)


@pytest.mark.parametrize(
    ("line", "role"),
    [
        ("--role ingest", ["feeds"]),
        ("--role feeds", ["feeds"]),
        ("--role api", ["api", 1]),
        ("--role api --workers 3", ["api", 3]),
    ],
)
def test_role_runs_one_role_only(server: list[Any], line: str, role: list[object]) -> None:
    assert main.main(line.split()) == 0
    assert server == [("INFO", "text"), Settings(), *role]


@pytest.mark.parametrize("between", [",", " ", ", "])
def test_lists_of_options_have_commas_or_spaces(server: list[Any], between: str) -> None:
    venues, symbols = between.join(("binance", "kraken")), between.join(("btcusdt", "ETHUSDT"))
    assert main.main(["--venues", venues, "--symbols", symbols]) == 0
    assert [each.venue for each in server[1].exchanges] == ["binance", "kraken"]
    assert server[1].symbols == ("BTCUSDT", "ETHUSDT")
    arguments = ["--symbol", symbols, "--exchange", between.join(("a", "B"))]
    params = main.parse(["export", *arguments]).params
    assert (params["symbols"], params["exchanges"]) == ((("BTCUSDT", "ETHUSDT"),), (("a", "B"),))
    params = main.parse(["watch", symbols, *arguments[2:]]).params
    assert (params["symbols"], params["exchanges"]) == ((("BTCUSDT", "ETHUSDT"),), (("a", "B"),))


@pytest.mark.parametrize("line", ["", "check", "config", "export"])
def test_data_dir_of_the_command_line_is_the_setting(
    monkeypatch: pytest.MonkeyPatch, server: list[Any], tmp_path: Path, line: str
) -> None:
    monkeypatch.setenv("MARKETFLOW_DATA_DIR", "/variable")
    loaded = []
    load = settings.load_with_origins

    def keep(*given: Any) -> tuple[Settings, dict[str, str]]:
        loaded.append(load(*given)[0])
        raise SettingsError("enough")

    monkeypatch.setattr(settings, "load", keep)
    monkeypatch.setattr(settings, "load_with_origins", keep)
    assert main.main([*line.split(), "--data-dir", str(tmp_path)]) == 2
    assert [each.data_dir for each in loaded] == [tmp_path]


def test_exchange_options_reach_the_simulator(exchange: list[Any]) -> None:
    flags = "exchange --port 40101 --name a --rate 2.5 --seed 7 --symbols A,B --host 0.0.0.0"
    assert main.main(flags.split()) == 0
    assert exchange == [("INFO", "text"), ("a", "0.0.0.0", 40101, ("A", "B"), 2.5, 7)]


def test_exchange_defaults_come_from_settings(exchange: list[Any]) -> None:
    assert main.main(["exchange", "--port", "0"]) == 0
    assert exchange[-1] == ("exchange1", "127.0.0.1", 0, Settings().symbols, 100.0, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--port 99999", "argument --port: 99999: must be a whole number from 0 to 65535"),
        ("--port x", 'argument --port: "x": must be a whole number from 0 to 65535'),
        ("--port", "argument --port: expected one argument"),
        ("--mode demo", 'argument --mode: "demo": must be one of test, live'),
        ("--por 1", "unrecognized arguments: --por 1; did you mean --port?"),
        ("--role both", "argument --role: invalid choice: 'both'"),
        (
            "--venues binance,mtgox",
            "argument --venues: 'mtgox': no such venue; there are binance, coinbase, kraken, okx, bybit",
        ),
        ("--venues ,", "argument --venues: ',': must name one or more venues"),
        ("--venues okx,OKX", "argument --venues: 'okx,OKX': a venue is named twice"),
        (
            "exchange --port 1 --replay nothing.frames.zst",
            "argument --replay: File 'nothing.frames.zst' does not exist",
        ),
        (
            "exchange --port 1 --replay /dev/null --venue okx",
            "--replay: venue, symbols, rate and seed are those of",
        ),
        ("exchange --port 1 --speed 2", "--speed: nothing is replayed without --replay"),
        (
            "exchange --port 1 --replay /dev/null --speed 0",
            "argument --speed: 0: must be a number from 0.001 to 1000000",
        ),
        ("exchange --port 1 --venue mtgox", "argument --venue: 'mtgox': no such venue"),
        ("--workers 2", "argument --workers: only with --role api"),
        ("--role feeds --workers 2", "argument --workers: only with --role api"),
        ("--role api --workers 0", "argument --workers: '0': must be a whole number from 1 to 64"),
        ("--role api --workers two", "argument --workers: 'two': must be a whole number from 1 to 64"),
        (
            f"--role api --workers {'9' * 5000}",
            f"argument --workers: '{'9' * 5000}': must be a whole number from 1 to 64",
        ),
        ("--role feeds --port 1", "argument --port: not with --role feeds, which listens nowhere"),
        ("--role ingest --port 1", "argument --port: not with --role ingest, which listens nowhere"),
        ("--role feeds --host ::1", "argument --host: not with --role feeds, which listens nowhere"),
        ("--role api --mode live", "argument --mode: not with --role api, which has the mode of the ingest process"),
        (
            "serve",
            "unknown command 'serve'; there are check, config, exchange, export, migrate, watch, and none to run",
        ),
        ("chek", "unknown command 'chek', did you mean check?"),
        ("check --role api", "unrecognized arguments: --role api"),
        ("check exchange", "unrecognized arguments: exchange"),
        ("check --format xml", "argument --format: invalid choice: 'xml'"),
        ("check --port x", 'argument --port: "x": must be a whole number from 0 to 65535'),
        ("check --config none.toml", "marketflow: none.toml: can't be read: No such file or directory"),
        ("config --mode demo", 'argument --mode: "demo": must be one of test, live'),
        ("config --config none.toml", "marketflow: none.toml: can't be read: No such file or directory"),
        ("--port 1 exchange", "unrecognized arguments: exchange"),
        ("--config none.toml", "marketflow: none.toml: can't be read: No such file or directory"),
        ("exchange", "the following arguments are required: --port"),
        ("exchange --port 65536", "argument --port: 65536: must be a whole number from 0 to 65535"),
        ("exchange --port 1 --rate 0", "argument --rate: 0: must be a number from 0.001 to 100000"),
        ("exchange --port 1 --symbols a,b", 'argument --symbols: [0] = "a": must be'),
        ("exchange --port 1 --name a:b", 'argument --name: "a:b": must be'),
        ("exchange --port 1 --seed x", 'argument --seed: "x": must be a whole number'),
        (
            "export --from yesterday",
            "argument --from: 'yesterday': must be a time such as 2026-11-01T09:30:00Z, a date",
        ),
        ("export --to -24", "argument --to: '-24': must be a time such as"),
        ("export --from", "argument --from: expected one argument"),
        ("export --from --to now", "argument --from: expected one argument"),
        ("export --format xlsx", "argument --format: invalid choice: 'xlsx' (choose from"),
        ("export --config --force", "argument --config: expected one argument"),
        ("export --symbol a b/c", 'argument --symbol: [0] = "B/C": must be 1 to 32 of'),
        ("export a", "unrecognized arguments: a"),
        ("export --symbol a/b", 'argument --symbol: [0] = "A/B": must be 1 to 32 of'),
        ("export --exchange ,", "argument --exchange: ',': must name one or more exchanges"),
        ("export --mode demo", 'argument --mode: "demo": must be one of test, live'),
        ("export --port 1", "unrecognized arguments: --port 1"),
        ("export --config none.toml", "marketflow: none.toml: can't be read: No such file or directory"),
        ("watch a/b", 'argument SYMBOL: [0] = "A/B": must be 1 to 32 of'),
        ("watch --exchange a:b", 'argument --exchange: "a:b": must be'),
        ("watch --url 127.0.0.1:8080", "argument --url: '127.0.0.1:8080': must be the URL of a MarketFlow"),
        ("watch --url http://[::1", "argument --url: 'http://[::1': must be the URL of a MarketFlow"),
        ("watch --url http://a..b", "argument --url: 'http://a..b': must be the URL of a MarketFlow"),
        ("watch --url http://h:99999", "argument --url: 'http://h:99999': must be the URL of a MarketFlow"),
        ("watch --url ftp://user:secret@h", "argument --url: 'h': must be the URL of a MarketFlow"),
        ("watch --url ftp://h", "argument --url: 'ftp://h': must be the URL of a MarketFlow"),
        ("watch --config none.toml", "marketflow: none.toml: can't be read: No such file or directory"),
    ],
)
def test_wrong_argument_is_named_with_allowed_values(
    server: list[Any], exchange: list[Any], capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    assert main.main(line.split()) == 2
    assert message in capsys.readouterr().err
    assert server == []


def test_settings_file_that_is_gone_is_an_error_at_a_reload(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: list[Any]
) -> None:
    reads: list[Callable[[], Settings]] = []

    def serve(settings: Settings, read: Callable[[], Settings]) -> int:
        reads.append(read)
        return 0

    replace_module(monkeypatch, marketflow.runtime, "processes", serve)
    monkeypatch.chdir(tmp_path)
    assert main.main([]) == 0
    path = tmp_path / "settings.toml"
    path.write_text('symbols = ["MINE"]')
    assert main.main([]) == 0
    assert [read().symbols for read in reads] == [("MINE",), ("MINE",)]
    path.unlink()
    assert reads[0]() == Settings()
    with pytest.raises(SettingsError, match=r"^settings\.toml: can't be read: No such file or directory$"):
        reads[1]()


@pytest.mark.parametrize("command", [[], ["check"], ["config"], ["export"], ["watch"]])
def test_each_wrong_setting_is_one_line_before_start(
    monkeypatch: pytest.MonkeyPatch, server: list[Any], capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    monkeypatch.setenv("MARKETFLOW_HTTP__PORT", "70000")
    monkeypatch.setenv("MARKETFLOW_LOG__LEVEL", "LOUD")
    assert main.main(command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" = ")[0] for line in sorted(lines)] == ["marketflow: http.port", "marketflow: log.level"]
    assert server == []


@pytest.mark.parametrize("line", ["", "exchange --port 1"])
def test_failed_start_prints_the_reason(
    monkeypatch: pytest.MonkeyPatch, calls: list[Any], capsys: pytest.CaptureFixture[str], line: str
) -> None:
    def serve(*_: object) -> int:
        raise StartError("port 1 is taken")

    replace_module(monkeypatch, marketflow.runtime, "processes", serve)
    replace_module(monkeypatch, marketflow.feeds, "simulator", serve)
    assert main.main(line.split()) == 1
    assert capsys.readouterr().err == "marketflow: port 1 is taken\n"


def test_interrupted_start_ends_quietly(
    monkeypatch: pytest.MonkeyPatch, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def serve(*_: object) -> int:
        raise KeyboardInterrupt

    replace_module(monkeypatch, marketflow.runtime, "processes", serve)
    assert main.main([]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("line", "code"), [("--port 1", 0), ("check --port 1", 130), ("export --symbol A", 130), ("watch A", 0)]
)
def test_interrupt_while_parsing_ends_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, code: int
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("marketflow.settings.convert", interrupted)
    assert main.main(line.split()) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        (
            "--help",
            "--port --host --data-dir --config --mode --role --workers check config exchange export migrate watch",
        ),
        ("migrate --help", "--config ddl"),
        ("--help", "bash_source zsh_source fish_source | source"),
        ("exchange --help", "--port --host --name --rate --seed --symbols --venue --replay --speed"),
        ("check --help", "--port --host --data-dir --config --mode --format"),
        ("config --help", "--port --host --data-dir --config --mode --format"),
        (
            "export --help",
            "--from --to --symbol --exchange --mode --format --output --force --data-dir --config -24h 130",
        ),
        ("export --help", "--interval --columns ohlcv feather milliseconds"),
        ("watch --help", "[SYMBOL]... --exchange --url --once --config 130"),
    ],
)
def test_help_of_each_command_names_its_options(capsys: pytest.CaptureFixture[str], line: str, flags: str) -> None:
    assert main.main(line.split()) == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in flags.split())


def test_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"marketflow {__version__}\n"


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("ex", {"exchange", "export"}),
        ("--ro", {"--role"}),
        ("--role ", {"ingest", "feeds", "api"}),
        ("--mode l", {"live"}),
        ("export --format p", {"parquet"}),
        ("export --symbol BTCUSDT --fro", {"--from"}),
        ("export --interval 1", {name for name in INTERVALS if name.startswith("1")}),
        ("watch --o", {"--once"}),
    ],
)
def test_shell_completion_suggests_commands_options_and_values(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, completed: set[str]
) -> None:
    monkeypatch.setenv("_MARKETFLOW_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", f"marketflow {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" "))))
    assert main.main([]) == 0
    assert {line.partition(",")[2] for line in capsys.readouterr().out.splitlines()} == completed


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_script_is_printed_for_a_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    monkeypatch.setenv("_MARKETFLOW_COMPLETE", f"{shell}_source")
    assert main.main([]) == 0
    assert f"_MARKETFLOW_COMPLETE={shell}_complete" in capsys.readouterr().out


def test_completion_line_of_help_works_in_bash(tmp_path: Path) -> None:
    program = tmp_path / "marketflow"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m marketflow "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(_MARKETFLOW_COMPLETE=bash_source marketflow)"\n'
        'COMP_WORDS=(marketflow ch) COMP_CWORD=1; _marketflow_completion marketflow; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", f"PATH={tmp_path}:$PATH\n{script}"], capture_output=True, text=True, timeout=30
    )
    assert (done.stdout, done.stderr) == ("check\n", "")


def test_reader_that_closes_the_pipe_does_not_fail_help() -> None:
    with subprocess.Popen(command("--help"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
        assert done.stdout is not None
        assert done.stderr is not None
        done.stdout.close()
        assert (done.wait(30), done.stderr.read()) == (0, b"")


@pytest.mark.parametrize("line", ["--help", "--version", "config", "config --format json"])
def test_full_disk_behind_stdout_is_one_line(line: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command(*line.split()), stdout=full, stderr=subprocess.PIPE, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (1, "marketflow: stdout cannot be written: No space left on device\n")


def test_help_imports_no_heavy_library() -> None:
    script = (
        "import sys; from marketflow.cli import main\n"
        "commands = [[], ['check'], ['config'], ['exchange'], ['export'], ['migrate'], ['watch']]\n"
        "code = max(main.main([*command, '--help']) for command in commands)\n"
        "heavy = {'dynaconf', 'loguru', 'msgspec', 'reactivex', 'redis', 'psycopg', 'uvicorn', 'rich', 'httpx'}\n"
        "heavy = (heavy | {'pyarrow'}) & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else code)"
    )
    root = Path(marketflow.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def assert_not_loaded(names: set[str], imported: str) -> None:
    """Importing these modules loads none of the names."""
    script = f"import sys, {imported}\nsys.exit(str({names!r} & sys.modules.keys() or '') or 0)"
    root = Path(marketflow.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_server_loads_heavy_libraries_after_the_first_price() -> None:
    """What reads a request or ticks needs none of them; they are loaded with the first use."""
    heavy = {"psycopg", "psycopg_pool", "websockets", "httpx", "rich", "jsonschema", "pyarrow", "zstandard"}
    heavy |= {"prometheus_client", "sse_starlette", "ctypes", "statistics", "difflib"}
    assert_not_loaded(heavy, "marketflow.runtime.processes, marketflow.runtime.engine")


def test_default_command_loads_nothing_that_other_roles_need() -> None:
    """Nor what no price needs: completion of the shell, compression, and pages of other origins."""
    others = {"marketflow.cluster.remote_control", "marketflow.server.workers"}
    others |= {"marketflow.runtime.sharded_engine", "marketflow.cluster.owner_states"}
    others |= {"marketflow.cluster.shared_alerts", "marketflow.cluster.shared_slices"}
    others |= {"click.shell_completion", "starlette.middleware.gzip", "starlette.middleware.cors"}
    imported = "marketflow.cli.main, marketflow.logs, marketflow.settings"
    assert_not_loaded(others, f"{imported}, marketflow.runtime.processes, marketflow.runtime.engine")


def test_garbage_is_collected_again_after_the_imports(tmp_path: Path) -> None:
    assert main.main(["--config", str(tmp_path / "missing.toml")]) == 2
    assert gc.isenabled()


def test_api_role_imports_no_engine() -> None:
    """It is imported where it is run: in both roles while the embedded Redis starts."""
    script = (
        "import sys, marketflow.runtime.processes\n"
        "engine = {'marketflow.runtime.engine', 'marketflow.runtime.sharded_engine', 'reactivex'} & set(sys.modules)\n"
        "sys.exit(str(engine) if engine else 0)"
    )
    root = Path(marketflow.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_recording_names_the_package_that_it_needs(tmp_path: Path) -> None:
    """The default installation has no zstandard."""
    script = (
        "import sys; sys.modules['zstandard'] = None\n"
        "from marketflow.cli import main\n"
        "from marketflow.feeds.factory import configured_recorder\n"
        "from marketflow.settings import Settings\n"
        "from marketflow.settings.schema import RecordSettings\n"
        "code = main.main(['exchange', '--port', '0', '--replay', sys.argv[1]])\n"
        "try:\n"
        "    configured_recorder(Settings(record=RecordSettings(dir='frames')), lambda: 0)\n"
        "except main.StartError as error:\n"
        "    print(error, file=sys.stderr)\n"
        "sys.exit(code)"
    )
    file = tmp_path / "binance.frames.zst"
    file.touch()
    done = subprocess.run([sys.executable, "-c", script, file], capture_output=True, text=True, timeout=30)
    text = "recording and --replay need the package zstandard: pip install zstandard\n"
    assert (done.returncode, done.stderr) == (1, f"marketflow: {text}{text}")


def test_check_loads_no_server_and_no_api() -> None:
    script = (
        "import sys, marketflow.cli.check.runner\n"
        "heavy = {'uvicorn', 'starlette', 'prometheus_client', 'marketflow.runtime.engine'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    root = Path(marketflow.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_command_imports_no_module_of_another_command() -> None:
    script = (
        "import sys; from marketflow.cli import main\n"
        "main.main(['config', '--help'])\n"
        "imported = [name for name in sys.modules if name.startswith('marketflow.cli.commands.')]\n"
        "sys.exit('' if imported == ['marketflow.cli.commands.config_command'] else str(imported))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.stderr.strip() == ""


INTERRUPTED_IN_EVAL = """
import os

contains = os._Environ.__contains__


def interrupting(environment, name):
    if name == "_MARKETFLOW_COMPLETE":
        eval('os.kill(os.getpid(), 15) or [None for _ in "until the signal is handled"]')
    return contains(environment, name)


os._Environ.__contains__ = interrupting
"""
"""Python's start-up sends SIGTERM while the command line is in the code of a string, as namedtuple is."""


def test_module_that_is_interrupted_within_eval_ends_with_0(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED_IN_EVAL)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command(), env=environment, capture_output=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
