"""`marketflow config`: the effective settings and their sources."""

from pathlib import Path
from typing import Any

import click

from marketflow.cli.command import Command
from marketflow.cli.options import SETTINGS_FLAGS, Choice, option, settings_given, settings_options


@click.command(
    "config",
    cls=Command,
    short_help="Print the settings and where each value comes from.",
    epilog="toml is a file for --config that gives the same settings, without the secrets; json has values and"
    " sources. The options are those of marketflow.",
)
@settings_options
@option("--format", type=Choice(("table", "toml", "json")), default="table", help="Output format.  [table]")
def command(config: Path | None, format: str, **flags: Any) -> int:
    """Print the settings that MarketFlow would run with, and where each value comes from. Secrets are masked."""
    from marketflow import settings
    from marketflow.cli.stdout import readable_output
    from marketflow.cli.terminal_output import print_table
    from marketflow.settings import effective_settings

    given = settings_given(**flags)
    loaded, origins = settings.load_with_origins(config, given)
    origins |= {key: f"--{name.replace('_', '-')}" for name, key in SETTINGS_FLAGS.items() if key in given}
    entries = effective_settings.effective_values(loaded, origins)
    with readable_output():
        match format:
            case "toml":
                print(effective_settings.as_toml(entries), end="")
            case "json":
                print(effective_settings.as_json(entries))
            case _:
                rows = [(each.key, effective_settings.as_text(each.value), each.source) for each in entries]
                print_table(("key", "value", "from"), rows)
    return 0
