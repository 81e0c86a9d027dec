"""The command line. It knows the flags and the exit codes; what they mean is the business of others.

Modules are imported when they are needed, so that --help and a wrong argument are answered at once and by a broken
installation, too.
"""

import argparse
import difflib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from marketflow import __version__
from marketflow.errors import SettingsError, StartError

USAGE = 2
"""Exit code for an argument or a setting that is wrong."""

FAILED = 1
"""Exit code for a start that fails, and for a check that finds something that would."""

INTERRUPTED = 130
"""Exit code for a check that was not waited for: 0 would say that all is well."""

MAX_WORKERS = 64

_FLAGS = {"host": "http.host", "port": "http.port", "mode": "mode"}
"""The flags that are settings, and their keys."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` by default) until it's stopped, and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        # Until the servers have handlers of their own, a start can be given up by either signal.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return _main(arguments)
    except KeyboardInterrupt:  # while starting; later the servers see to it themselves
        return INTERRUPTED if arguments[:1] == ["check"] else 0


def _main(arguments: list[str]) -> int:
    try:
        run, parsed = _parsed(arguments)
    except SystemExit as stop:  # argparse has answered: --help, --version or a wrong argument
        return USAGE if stop.code else 0
    try:
        return run(parsed)
    except SettingsError as error:
        for problem in str(error).splitlines():
            print(f"marketflow: {problem}", file=sys.stderr)
        return USAGE
    except StartError as error:
        print(f"marketflow: {error}", file=sys.stderr)
        return FAILED


def _parsed(arguments: list[str]) -> tuple[Callable[[argparse.Namespace], int], argparse.Namespace]:
    """What is to be run, and with what."""
    name = arguments[0] if arguments else ""
    if name in _COMMANDS:
        run, command_parser, _ = _COMMANDS[name]
        return run, command_parser().parse_args(arguments[1:])
    parser = _parser()
    if name and not name.startswith("-"):
        nearest = difflib.get_close_matches(name, _COMMANDS, n=1)
        meant = f", did you mean {nearest[0]}?" if nearest else ";"
        parser.error(f"unknown command {name!r}{meant} there are {', '.join(_COMMANDS)}, and none to run everything")
    parsed = parser.parse_args(arguments)
    _refuse_what_has_no_effect(parser, parsed)
    return _market, parsed


def _market(arguments: argparse.Namespace) -> int:
    from marketflow import logs, settings

    loaded = settings.load(arguments.config, _flags(arguments))
    logs.setup(loaded.log.level, loaded.log.format)

    from marketflow import app

    match arguments.role:
        case "feeds":
            return app.serve_feeds(loaded)
        case "api":
            return app.serve_api(loaded, arguments.workers or 1)
        case _:
            return app.serve(loaded)


def _check(arguments: argparse.Namespace) -> int:
    from marketflow import logs, settings

    loaded = settings.load(arguments.config, _flags(arguments))
    logs.setup("CRITICAL", loaded.log.format)  # what libraries would say is in the report, in fewer words

    from marketflow.checkup import look_at_everything, report

    findings = look_at_everything(loaded)
    with _readable_output():
        (report.print_json if arguments.format == "json" else report.print_report)(findings)
    return 0 if report.is_well(findings) else FAILED


def _config(arguments: argparse.Namespace) -> int:
    from marketflow import settings
    from marketflow.settings import effective
    from marketflow.tables import print_table

    flags = _flags(arguments)
    loaded, origins = settings.load_with_origins(arguments.config, flags)
    origins |= {key: f"--{flag}" for flag, key in _FLAGS.items() if key in flags}
    entries = effective.effective(loaded, origins)
    with _readable_output():
        match arguments.format:
            case "toml":
                print(effective.as_toml(entries), end="")
            case "json":
                print(effective.as_json(entries))
            case _:
                print_table(
                    ("key", "value", "from"),
                    [(each.key, effective.as_text(each.value), each.source) for each in entries],
                )
    return 0


def _flags(arguments: argparse.Namespace) -> dict[str, object]:
    """The settings among the flags that were given, by their keys."""
    return {key: getattr(arguments, flag) for flag, key in _FLAGS.items() if getattr(arguments, flag) is not None}


@contextmanager
def _readable_output() -> Iterator[None]:
    """Print what stdout cannot encode as escapes, and end quietly when nobody reads on, as `head` does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse_what_has_no_effect(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """A flag that does nothing would leave somebody waiting for what it says."""
    if arguments.workers is not None and arguments.role != "api":
        parser.error("argument --workers: only with --role api")
    if arguments.role == "feeds":
        for flag in ("host", "port"):
            if getattr(arguments, flag) is not None:
                parser.error(f"argument --{flag}: not with --role feeds, which listens nowhere")
    if arguments.role == "api" and arguments.mode is not None:
        parser.error("argument --mode: not with --role api, which is in the mode of the feeds")


def _exchange(arguments: argparse.Namespace) -> int:
    from marketflow import logs
    from marketflow.settings import Settings

    defaults = Settings()
    symbols = arguments.symbols or defaults.symbols
    rate = arguments.rate or defaults.generator.rate
    logs.setup(defaults.log.level, defaults.log.format)

    from marketflow.feeds import exchange

    return exchange.serve(arguments.name, arguments.host, arguments.port, symbols, rate, arguments.seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="marketflow",
        description="Take ticks from exchanges, keep them in Redis and PostgreSQL, answer prices over HTTP.",
        usage="%(prog)s [flags]\n       %(prog)s {" + ",".join(_COMMANDS) + "} [flags]",
        epilog="commands, each with a --help of its own:\n"
        + "".join(f"  {name:<22}{about}\n" for name, (_, _, about) in _COMMANDS.items())
        + "\nSettings come from settings.toml or the file of --config, from MARKETFLOW_... variables\n"
        "(MARKETFLOW_HTTP__PORT is http.port), then from these flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_settings(parser)
    parser.add_argument(
        "--role",
        choices=("feeds", "api"),
        help="one half only: take ticks, or stand by while another process does; or answer requests. Without it: both",
    )
    parser.add_argument("--workers", metavar="N", type=_workers, help="processes that answer, with --role api; 1")
    parser.add_argument("--version", action="version", version=f"marketflow {__version__}")
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """The flags that say what the settings are."""
    parser.add_argument("--port", metavar="N", type=_setting("http.port"), help="port of the API; 0: any free one")
    parser.add_argument("--host", metavar="H", type=_setting("http.host"), help="address on which the API listens")
    parser.add_argument("--config", metavar="FILE", type=Path, help="TOML, YAML or JSON, read instead of settings.toml")
    parser.add_argument("--mode", metavar="test|live", type=_setting("mode"), help="the mode to begin in")


def _check_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="marketflow check",
        description="Look at everything the settings name (Redis, PostgreSQL, exchanges, port, data folder), and say"
        " what is wrong and what to do. Changes nothing, starts nothing, and takes a few seconds.",
        epilog="Exit code 0: MarketFlow would run well, 1: something failed, 2: an argument or a setting is wrong. The"
        " flags are those of marketflow.",
        allow_abbrev=False,
    )
    _add_settings(parser)
    parser.add_argument("--format", choices=("table", "json"), default="table", help="what is printed; %(default)s")
    return parser


def _config_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="marketflow config",
        description="Print the settings that MarketFlow would run with, and where each comes from. Secrets are masked.",
        epilog="toml is a file for --config that gives the same settings, without the secrets; json has values and"
        " sources. The flags are those of marketflow.",
        allow_abbrev=False,
    )
    _add_settings(parser)
    parser.add_argument(
        "--format", choices=("table", "toml", "json"), default="table", help="what is printed; %(default)s"
    )
    return parser


def _exchange_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="marketflow exchange",
        description="Serve generated ticks over TCP, one JSON object a line, to every client that connects.",
        allow_abbrev=False,
    )
    parser.add_argument("--port", metavar="N", type=_setting("http.port"), required=True, help="0: any free one")
    parser.add_argument("--host", metavar="H", type=_setting("http.host"), default="127.0.0.1", help="%(default)s")
    parser.add_argument("--name", type=_setting("exchange.name"), default="exchange1", help="%(default)s")
    parser.add_argument("--rate", metavar="R", type=_setting("generator.rate"), help="ticks a second; 100")
    parser.add_argument("--seed", metavar="N", type=_setting("generator.seed"), help="the same ticks at every start")
    parser.add_argument("--symbols", metavar="A,B", type=_setting("symbols"), help="those of the default settings")
    parser.add_argument("--version", action="version", version=f"marketflow {__version__}")
    return parser


def _workers(text: str) -> int:
    if text.isascii() and text.isdecimal() and 1 <= int(text) <= MAX_WORKERS:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number from 1 to {MAX_WORKERS}")


def _setting(key: str) -> Callable[[str], Any]:
    """A type for argparse that follows the rule of a setting."""

    def checked(text: str) -> Any:
        from marketflow import settings

        try:
            return settings.convert(key, text)
        except SettingsError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


_COMMANDS = {
    "check": (_check, _check_parser, "whether everything is set up right, and what to do"),
    "config": (_config, _config_parser, "the settings, and where each comes from"),
    "exchange": (_exchange, _exchange_parser, "a simulated exchange"),
}
"""What may stand in the first place: what runs it, its arguments, and what it is for."""
