"""The command `marketflow`: runs the server in one role or in both."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from marketflow import __version__
from marketflow.cli.command import CommandGroup
from marketflow.cli.options import Choice, WorkerCount, option, settings_given, settings_options

COMPLETION_VARIABLE = "_MARKETFLOW_COMPLETE"
"""The variable by which a shell asks for completions; the name is click's convention."""

_EPILOG = f"""\b
Each command has a --help of its own.
Settings come from settings.toml or the file of --config, then from variables
(MARKETFLOW_HTTP__PORT is http.port), then from options.

\b
Completion, by a line in the start-up file of the shell:
  bash  eval "$({COMPLETION_VARIABLE}=bash_source marketflow)"
  zsh   eval "$({COMPLETION_VARIABLE}=zsh_source marketflow)"
  fish  {COMPLETION_VARIABLE}=fish_source marketflow | source
"""

_COMMANDS = ("check", "config", "exchange", "export", "migrate", "watch")


@click.group(
    cls=CommandGroup,
    modules={name: f"marketflow.cli.commands.{name}_command" for name in _COMMANDS},
    invoke_without_command=True,
    help="Ingest ticks from exchanges, store them in Redis and PostgreSQL, and serve prices over HTTP.",
    epilog=_EPILOG,
)
@settings_options
@option(
    "--role",
    type=Choice(("ingest", "feeds", "api")),
    help="Run one role only: ingest ticks, or stand by while another process does (feeds is an alias); or serve the"
    " API. Without it: both.",
)
@option("--workers", metavar="N", type=WorkerCount(), help="Processes that serve the API, with --role api.  [1]")
@click.version_option(__version__, message="marketflow %(version)s")
@click.pass_context
def root(ctx: click.Context, /, config: Path | None, role: str | None, workers: int | None, **flags: Any) -> int:
    """Run the server until a signal ends it, and return the exit code."""
    if ctx.invoked_subcommand is not None:
        return 0
    _refuse_options_without_effect(role, workers, **flags)

    with _without_collections():
        from marketflow import logs, settings

        # A settings.toml that is there now must be there at a reload, which would take the defaults instead.
        read = partial(settings.load, config or settings.own_settings_file(), settings_given(**flags))
        loaded = read()
        logs.setup(loaded.log.level, loaded.log.format)

        from marketflow.runtime import processes

    match role:
        case "ingest" | "feeds":
            return processes.serve_ingest(loaded, read)
        case "api":
            return processes.serve_api(loaded, read, workers or 1)
        case _:
            return processes.serve(loaded, read)


@contextmanager
def _without_collections() -> Iterator[None]:
    """Import without garbage collections: they took a tenth of the CPU of a start, and nothing imported is garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _refuse_options_without_effect(role: str | None, workers: int | None, **flags: object) -> None:
    """Refuse an option that the role does not use, before anything starts.

    Raises:
        click.UsageError: an option has no effect in this role.
    """
    if workers is not None and role != "api":
        raise click.UsageError("argument --workers: only with --role api")
    for name in ("host", "port"):
        if role in ("ingest", "feeds") and flags[name] is not None:
            raise click.UsageError(f"argument --{name}: not with --role {role}, which listens nowhere")
    if role == "api" and flags["mode"] is not None:
        raise click.UsageError("argument --mode: not with --role api, which has the mode of the ingest process")
