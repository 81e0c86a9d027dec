"""Base classes of all commands: strict parsing, and error messages that name the argument."""

from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any

import click


class Option(click.Option):
    """An option; with `variadic` it takes all values up to the next option, as in `--symbol A B`."""

    def __init__(self, *args: Any, variadic: bool = False, **attributes: Any) -> None:
        if variadic:
            attributes["multiple"] = True
        super().__init__(*args, **attributes)
        self.variadic = variadic


class Command(click.Command):
    """A command whose options never take the next option for their value."""

    allow_extra_args = True  # refused by parse_args, which lists them all

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments into `ctx.params`.

        Raises:
            click.UsageError: an argument is missing, unknown or wrong.
        """
        _parse(super(), self, ctx, args)
        if ctx.args and not ctx.resilient_parsing:
            raise click.UsageError(f"unrecognized arguments: {' '.join(ctx.args)}", ctx)
        return ctx.args


class CommandGroup(click.Group):
    """A command with subcommands, each in a module of its own that is imported when it is needed."""

    def __init__(self, *args: Any, modules: dict[str, str], **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self._modules = modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the subcommands, sorted."""
        return sorted(self._modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a subcommand; None for an unknown name."""
        if cmd_name not in self._modules:
            return None
        command: click.Command = import_module(self._modules[cmd_name]).command
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the options before a subcommand into `ctx.params`.

        Raises:
            click.UsageError: an argument is missing, unknown or wrong.
        """
        _parse(super(), self, ctx, args)
        return ctx.args

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the subcommand and its arguments.

        Raises:
            click.UsageError: there is no such subcommand, or options stand before it, which it would not heed.
        """
        if any(_is_given(ctx, name) for name in ctx.params) and not ctx.resilient_parsing:
            raise click.UsageError(f"unrecognized arguments: {' '.join(args)}", ctx)
        name = args[0]
        command = self.get_command(ctx, name)
        if command is None and not ctx.resilient_parsing:
            from difflib import get_close_matches  # no start without a mistake needs it

            known = self.list_commands(ctx)
            nearest = get_close_matches(name, known, n=1)
            hint = f", did you mean {nearest[0]}?" if nearest else ";"
            known_text = ", ".join(known)
            message = f"unknown command {name!r}{hint} there are {known_text}, and none to run everything"
            raise click.UsageError(message, ctx)
        return name if command else None, command, args[1:]


def error_text(error: click.UsageError) -> str:
    """Return what is wrong with the command line, beginning with the argument: `argument --port: ...`."""
    match error:
        case click.BadOptionUsage():
            return f"argument {error.option_name}: expected one argument"
        case click.MissingParameter(param=click.Parameter() as parameter):
            return f"the following arguments are required: {_name(parameter)}"
        case click.BadParameter(param=click.Parameter() as parameter):
            return f"argument {_name(parameter)}: {error.message}"
    return error.message


def _name(parameter: click.Parameter) -> str:
    """Return the name of a parameter as the user writes it."""
    return parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name.strip("[].")


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _parse(base: Any, command: click.Command, ctx: click.Context, args: list[str]) -> None:
    """Parse by click's own `parse_args`, which is that of `base`."""
    options = [each for each in command.get_params(ctx) if isinstance(each, click.Option) and not each.is_flag]
    with_value = {name for option in options for name in option.opts}
    variadic = {name for option in options if isinstance(option, Option) and option.variadic for name in option.opts}
    for name, value in pairwise(args):
        if name == "--":
            break
        if name in with_value and value.startswith("--") and not ctx.resilient_parsing:
            raise click.BadOptionUsage(name, "", ctx)
    try:
        base.parse_args(ctx, list(_expanded(args, variadic)))
    except click.NoSuchOption as error:
        raise click.UsageError(_unrecognized(error, args), ctx) from None


def _expanded(args: Sequence[str], variadic: set[str]) -> Iterator[str]:
    """Yield the arguments with `--symbol A B` as `--symbol A --symbol B`, which is how click takes several values."""
    option, is_first = "", True
    for argument in args:
        if argument.startswith("-"):
            option, is_first = (argument if argument in variadic else ""), True
        elif option:
            if not is_first:
                yield option
            is_first = False
        yield argument


def _unrecognized(error: click.NoSuchOption, args: Sequence[str]) -> str:
    """Return the message for an unknown option: the arguments from there on, and the nearest known option."""
    position = next((number for number, each in enumerate(args) if each.startswith(error.option_name)), len(args))
    unknown = " ".join(args[position:]) or error.option_name
    nearest = f"; did you mean {error.possibilities[0]}?" if error.possibilities else ""
    return f"unrecognized arguments: {unknown}{nearest}"
