"""The arguments of the command line: commands, flags, and what to say about them."""

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from marketflow import __version__
from marketflow.errors import SettingsError

MAX_WORKERS = 64

FLAGS = {"host": "http.host", "port": "http.port", "mode": "mode"}
"""The flags that are settings, and their keys."""


def parse(arguments: Sequence[str]) -> tuple[str, argparse.Namespace]:
    """The command, empty for none, and its flags.

    Raises:
        SystemExit: argparse has answered: --help, --version or a wrong argument.
    """
    command = arguments[0] if arguments else ""
    if command in _COMMANDS:
        parser, _ = _COMMANDS[command]
        return command, parser().parse_args(_with_times(arguments[1:]))
    parser_of_all = _parser()
    if command and not command.startswith("-"):
        nearest = difflib.get_close_matches(command, _COMMANDS, n=1)
        meant = f", did you mean {nearest[0]}?" if nearest else ";"
        known = ", ".join(_COMMANDS)
        parser_of_all.error(f"unknown command {command!r}{meant} there are {known}, and none to run everything")
    parsed = parser_of_all.parse_args(arguments)
    _refuse_what_has_no_effect(parser_of_all, parsed)
    return "", parsed


def _with_times(arguments: Sequence[str]) -> list[str]:
    """The arguments, with `--from -24h` as `--from=-24h`: argparse would take -24h for a flag."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] in ("--from", "--to") and re.match(r"-\d", argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="marketflow",
        description="Take ticks from exchanges, keep them in Redis and PostgreSQL, answer prices over HTTP.",
        usage="%(prog)s [flags]\n       %(prog)s {" + ",".join(_COMMANDS) + "} [flags]",
        epilog="commands, each with a --help of its own:\n"
        + "".join(f"  {name:<22}{about}\n" for name, (_, about) in _COMMANDS.items())
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


def _migrate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="marketflow migrate",
        description="Apply the files of ddl/ that the database of the settings does not have yet, and end. MarketFlow"
        " does so by itself at its start; this is for a role of its own (see deploy/postgres/roles.sql).",
        epilog="Exit code 0: the database is up to date, 1: it could not be brought there, 2: an argument or a setting"
        " is wrong.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", type=Path, help="TOML, YAML or JSON, read instead of settings.toml")
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


def _export_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="marketflow export",
        description="Write the stored minutes as CSV or Parquet, in constant memory however many they are. Rows are"
        " ordered by exchange, symbol and time; --from belongs to the range, --to does not.",
        epilog="A time is 2026-11-01T09:30:00Z, 2026-11-01 (its midnight, UTC), now, or back from now: -24h, -1h30m."
        " Rows are read from the PostgreSQL of the settings; an embedded one that does not run is started, and stopped"
        " at the end. Exit code 0: all is written, 1: it could not be, 2: an argument or a setting is wrong, 130:"
        " interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--from", dest="from_ms", metavar="T", type=_moment, help="first time; that of the oldest row")
    parser.add_argument("--to", dest="to_ms", metavar="T", type=_moment, help="end of time; after the newest row")
    parser.add_argument(
        "--symbol", metavar="S", nargs="+", action="extend", type=_symbols, default=[], help="only these; all"
    )
    parser.add_argument(
        "--exchange", metavar="E", nargs="+", action="extend", type=_exchanges, default=[], help="only these; all"
    )
    parser.add_argument("--mode", metavar="test|live", type=_setting("mode"), help="rows of this mode; the configured")
    parser.add_argument("--format", choices=("csv", "parquet"), help="csv; parquet where FILE ends in .parquet")
    parser.add_argument("--output", metavar="FILE", help="file to write, there once it is whole; - for stdout; stdout")
    parser.add_argument("--force", action="store_true", help="replace FILE")
    parser.add_argument("--config", metavar="FILE", type=Path, help="TOML, YAML or JSON, read instead of settings.toml")
    return parser


def _watch_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="marketflow watch",
        description="Show the newest prices of a running MarketFlow as they change: a row for each symbol, a column for"
        " each exchange, how old each price is, and how far the exchanges are apart. q ends it.",
        epilog="Where stdout is no terminal each change is a line: time, symbol, exchange, price. A MarketFlow that is"
        " away is tried again, after 1, 2, 4 ... at most 10 s. Exit code 0: ended by q or a signal, 1: there is no"
        " MarketFlow at the URL, 2: an argument or a setting is wrong, 130: --once was interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("symbols", metavar="SYMBOL", nargs="*", type=_symbols, help="only these; all")
    parser.add_argument(
        "--exchange",
        metavar="E",
        action="append",
        type=_exchanges,
        default=[],
        help="only this one, or these: E,E; all",
    )
    parser.add_argument("--url", metavar="URL", type=_url, help="of the MarketFlow; by http.host and http.port")
    parser.add_argument("--once", action="store_true", help="print the prices of now, and end")
    parser.add_argument("--config", metavar="FILE", type=Path, help="TOML, YAML or JSON, read instead of settings.toml")
    return parser


def _url(text: str) -> str:
    parts = urlsplit(text)
    with suppress(ValueError):  # a port that is none
        if (
            parts.scheme in ("http", "https")
            and parts.hostname
            and parts.port != 0
            and not parts.query + parts.fragment
        ):
            return text.rstrip("/")
    shown = text.rpartition("@")[2]  # without what may be a password
    raise argparse.ArgumentTypeError(f"{shown!r}: must be the URL of a MarketFlow, such as http://127.0.0.1:8080")


def _symbols(text: str) -> tuple[str, ...]:
    """One or more symbols with commas between them, in any case."""
    return tuple(_setting("symbols")(text.upper()))


def _exchanges(text: str) -> tuple[str, ...]:
    """One or more names of exchanges with commas between them."""
    return tuple(map(_setting("exchange.name"), text.split(",")))


def _moment(text: str) -> int:
    from marketflow.clock import milliseconds, system_clock
    from marketflow.time_parsing import moment_ms

    try:
        return moment_ms(text, milliseconds(system_clock()))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


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
    "check": (_check_parser, "whether everything is set up right, and what to do"),
    "config": (_config_parser, "the settings, and where each comes from"),
    "exchange": (_exchange_parser, "a simulated exchange"),
    "export": (_export_parser, "the stored minutes, as CSV or Parquet"),
    "migrate": (_migrate_parser, "bring the database up to date, and end"),
    "watch": (_watch_parser, "prices as they change, in the terminal"),
}
"""What may stand in the first place: its flags, and what it is for."""
