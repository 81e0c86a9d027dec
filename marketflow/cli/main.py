"""Entry point of the command line: parses the arguments, runs a command and returns the exit code."""

import os
import signal
import sys
from collections.abc import Sequence

import click

from marketflow.cli.command import error_text
from marketflow.cli.exit_codes import FAILED, INTERRUPTED, USAGE
from marketflow.cli.root_command import COMPLETION_VARIABLE, root
from marketflow.cli.stdout import open_standard_descriptors, readable_output
from marketflow.errors import SettingsError, StartError, Unavailable
from marketflow.text import visible


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` by default) until it ends or is stopped, and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    open_standard_descriptors()
    try:
        # Until a server installs its own handlers, either signal interrupts the start.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if COMPLETION_VARIABLE in os.environ:
            return _complete(os.environ[COMPLETION_VARIABLE])
        return _run(arguments)
    except KeyboardInterrupt:  # during the start; servers handle the signals afterwards
        ends_by_itself = arguments[:1] in (["check"], ["export"]) or "--once" in arguments
        return INTERRUPTED if ends_by_itself else 0


def parse(arguments: Sequence[str]) -> click.Context:
    """Parse a command line; the command to run is `command` of the context, and `params` are its arguments.

    Raises:
        click.UsageError: an argument is wrong.
        click.exceptions.Exit: --help or --version was printed.
    """
    if not arguments or arguments[0].startswith("-"):
        return root.make_context("marketflow", list(arguments))
    parent = click.Context(root, info_name="marketflow")
    name, command, rest = root.resolve_command(parent, list(arguments))
    assert command is not None
    return command.make_context(name, rest, parent)


def _run(arguments: list[str]) -> int:
    try:
        context: click.Context | None = None
        with readable_output():
            context = parse(arguments)
        return 0 if context is None else int(context.command.invoke(context))
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.UsageError as error:
        context = error.ctx or click.Context(root, info_name="marketflow")
        print(context.get_usage(), file=sys.stderr)
        _print_error(f"{context.command_path}: error: {error_text(error)}")
        return USAGE
    except SettingsError as error:
        for problem in str(error).splitlines():
            _print_error(f"marketflow: {problem}")
        return USAGE
    except (StartError, Unavailable) as error:
        _print_error(f"marketflow: {error}")
        return FAILED


def _complete(instruction: str) -> int:
    """Print the completion script of a shell, or the completions that the script asks for."""
    from click.shell_completion import shell_complete

    code = 0
    with readable_output():
        code = shell_complete(root, {}, "marketflow", COMPLETION_VARIABLE, instruction)
    return code  # noqa: RET504 - 0 where the reader has closed the pipe


def _print_error(text: str) -> None:
    """Print one line to stderr. Control characters are escaped: names may come from a database or a server."""
    print(visible(text), file=sys.stderr)
