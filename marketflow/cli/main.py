"""The command line. It knows what to run and the exit codes; what that does is the business of others.

Modules are imported when they are needed, so that --help and a wrong argument are answered at once and by a broken
installation, too.
"""

import argparse
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

from marketflow.cli.arguments import FLAGS, parse
from marketflow.errors import SettingsError, StartError, Unavailable
from marketflow.text import visible

USAGE = 2
"""Exit code for an argument or a setting that is wrong."""

FAILED = 1
"""Exit code for a start that fails, for a check that finds something that would, and for an export that cannot be."""

INTERRUPTED = 130
"""Exit code for what has an end that was not waited for: 0 would say that all is well, or all written."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` by default) until it's stopped, and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_standard_descriptors()
    try:
        # Until the servers have handlers of their own, a start can be given up by either signal.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return _main(arguments)
    except KeyboardInterrupt:  # while starting; later the servers see to it themselves
        has_an_end = arguments[:1] in (["check"], ["export"]) or "--once" in arguments
        return INTERRUPTED if has_an_end else 0


def _open_standard_descriptors() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed: or a socket would get its number, and what is printed."""
    null = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: with one of them closed, that one
    while null <= 2:
        null = os.dup(null)
    os.close(null)
    if sys.stderr is None:  # print would take None for stdout
        sys.stderr = os.fdopen(2, "w", closefd=False)


def _main(arguments: list[str]) -> int:
    try:
        command, parsed = parse(arguments)
    except SystemExit as stop:  # argparse has answered: --help, --version or a wrong argument
        return USAGE if stop.code else 0
    try:
        return _RUN[command](parsed)
    except SettingsError as error:
        for problem in str(error).splitlines():
            _complain(problem)
        return USAGE
    except (StartError, Unavailable) as error:
        _complain(str(error))
        return FAILED


def _complain(problem: str) -> None:
    """Print one line to stderr; names in it may come from a database or a server."""
    print(f"marketflow: {visible(problem)}", file=sys.stderr)


def _market(arguments: argparse.Namespace) -> int:
    from marketflow import logs, settings

    loaded = settings.load(arguments.config, _flags(arguments))
    logs.setup(loaded.log.level, loaded.log.format)

    from marketflow.runtime import processes

    match arguments.role:
        case "feeds":
            return processes.serve_feeds(loaded)
        case "api":
            return processes.serve_api(loaded, arguments.workers or 1)
        case _:
            return processes.serve(loaded)


def _check(arguments: argparse.Namespace) -> int:
    from marketflow import logs, settings

    loaded = settings.load(arguments.config, _flags(arguments))
    logs.setup("CRITICAL", loaded.log.format)  # what libraries would say is in the report, in fewer words

    from marketflow.cli.check import look_at_everything, report

    findings = look_at_everything(loaded)
    with _readable_output():
        (report.print_json if arguments.format == "json" else report.print_report)(findings)
    return 0 if report.is_well(findings) else FAILED


def _config(arguments: argparse.Namespace) -> int:
    from marketflow import settings
    from marketflow.cli.tables import print_table
    from marketflow.settings import effective

    flags = _flags(arguments)
    loaded, origins = settings.load_with_origins(arguments.config, flags)
    origins |= {key: f"--{flag}" for flag, key in FLAGS.items() if key in flags}
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
    given = vars(arguments)
    return {key: given[flag] for flag, key in FLAGS.items() if given.get(flag) is not None}


@contextmanager
def _readable_output() -> Iterator[None]:
    """Print what stdout cannot encode as escapes, and end quietly when nobody reads on, as `head` does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        if sys.stdout is not None:  # None where it is closed
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exchange(arguments: argparse.Namespace) -> int:
    from marketflow import logs
    from marketflow.settings import Settings

    defaults = Settings()
    symbols = arguments.symbols or defaults.symbols
    rate = arguments.rate or defaults.generator.rate
    logs.setup(defaults.log.level, defaults.log.format)

    from marketflow.feeds import simulator

    return simulator.serve(arguments.name, arguments.host, arguments.port, symbols, rate, arguments.seed)


def _export(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from marketflow import logs, settings

    loaded = settings.load(arguments.config, _flags(arguments))
    logs.setup("CRITICAL", loaded.log.format)  # what goes wrong is said in one line

    from marketflow.cli.export import Export, Selection, export

    output = None if arguments.output in (None, "-") else Path(arguments.output)
    by_name = "parquet" if output is not None and output.suffix.lower() == ".parquet" else "csv"
    symbols, exchanges = (tuple(chain.from_iterable(names)) for names in (arguments.symbol, arguments.exchange))
    selection = Selection(loaded.mode, arguments.from_ms, arguments.to_ms, symbols, exchanges)
    with _readable_output():
        rows = export(loaded, Export(selection, arguments.format or by_name, output, arguments.force))
        print(f"{rows} rows of {loaded.mode.value} mode", file=sys.stderr)
    return 0


def _migrate(arguments: argparse.Namespace) -> int:
    from marketflow import logs, settings

    loaded = settings.load(arguments.config)
    if not loaded.postgres.host:
        raise SettingsError("postgres.host: the embedded PostgreSQL is brought up to date by MarketFlow's own start")
    logs.setup(loaded.log.level, loaded.log.format)

    from marketflow.resources import resource
    from marketflow.runtime.store_servers import find_servers
    from marketflow.stores.postgres.bounded_connection import ReconnectingConnection
    from marketflow.stores.postgres.migrations import apply_ddl

    database = ReconnectingConnection(find_servers(loaded).postgres)
    try:
        with database.opened() as connection:
            apply_ddl(connection, resource("ddl"), report_seconds=1800.0)
    finally:
        database.close()
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    from marketflow import logs, settings

    loaded = settings.load(arguments.config)
    logs.setup("CRITICAL", loaded.log.format)  # what becomes of the connection is shown

    from marketflow.cli.watch import Watch, url_of, watch

    symbols, exchanges = (tuple(chain.from_iterable(names)) for names in (arguments.symbols, arguments.exchange))
    interrupted = False
    with _readable_output():
        interrupted = watch(Watch(arguments.url or url_of(loaded.http), symbols, exchanges, arguments.once))
    return INTERRUPTED if interrupted else 0


_RUN = {
    "": _market,
    "check": _check,
    "config": _config,
    "exchange": _exchange,
    "export": _export,
    "migrate": _migrate,
    "watch": _watch,
}
"""By the command, which is empty for everything together."""
