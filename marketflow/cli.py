"""The command line. It knows the flags and the exit codes; what they mean is the business of others.

Modules are imported when they are needed, so that --help and a wrong argument are answered at once and by a broken
installation, too.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from marketflow import __version__
from marketflow.errors import SettingsError, StartError

USAGE = 2
"""Exit code for an argument or a setting that is wrong."""

FAILED = 1
"""Exit code for a start that fails."""

MAX_WORKERS = 64

_FLAGS = {"host": "http.host", "port": "http.port", "mode": "mode"}
"""The flags that are settings, and their keys."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` by default) until it's stopped, and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        # Until the servers have handlers of their own, a start can be given up by either signal.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if arguments[:1] == ["exchange"]:
            run, parsed = _exchange, _exchange_parser().parse_args(arguments[1:])
        else:
            parser = _parser()
            run, parsed = _market, parser.parse_args(arguments)
            _refuse_what_has_no_effect(parser, parsed)
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
    except KeyboardInterrupt:  # while starting; later the servers see to it themselves
        return 0


def _market(arguments: argparse.Namespace) -> int:
    from marketflow import logs, settings

    flags = {key: getattr(arguments, flag) for flag, key in _FLAGS.items() if getattr(arguments, flag) is not None}
    loaded = settings.load(arguments.config, flags)
    logs.setup(loaded.log.level, loaded.log.format)

    from marketflow import app

    match arguments.role:
        case "feeds":
            return app.serve_feeds(loaded)
        case "api":
            return app.serve_api(loaded, arguments.workers or 1)
        case _:
            return app.serve(loaded)


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
        epilog="`marketflow exchange --help` tells about a simulated exchange. Settings come from settings.toml or the"
        " file of --config, from MARKETFLOW_... variables (MARKETFLOW_HTTP__PORT is http.port), then from these flags.",
        allow_abbrev=False,
    )
    parser.add_argument("--port", metavar="N", type=_setting("http.port"), help="port of the API; 0: any free one")
    parser.add_argument("--host", metavar="H", type=_setting("http.host"), help="address on which the API listens")
    parser.add_argument("--config", metavar="FILE", type=Path, help="TOML, YAML or JSON, read instead of settings.toml")
    parser.add_argument("--mode", metavar="test|live", type=_setting("mode"), help="the mode to begin in")
    parser.add_argument(
        "--role",
        choices=("feeds", "api"),
        help="one half only: take ticks, or stand by while another process does; or answer requests. Without it: both",
    )
    parser.add_argument("--workers", metavar="N", type=_workers, help="processes that answer, with --role api; 1")
    parser.add_argument("--version", action="version", version=f"marketflow {__version__}")
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
