"""`marketflow migrate`: schema migrations of the database."""

from pathlib import Path

import click

from marketflow.cli.command import Command
from marketflow.cli.options import config_option
from marketflow.errors import SettingsError


@click.command(
    "migrate",
    cls=Command,
    short_help="Apply the schema migrations of ddl/, and end.",
    epilog="Exit code 0: the database is up to date, 1: the migration failed, 2: an argument or a setting is wrong.",
)
@config_option()
@click.option("--partition", is_flag=True, help="Give aggregates daily partitions, for many series (deploy/README.md).")
def command(config: Path | None, partition: bool) -> int:
    """Apply the files of ddl/ that the database of the settings does not have yet, and end.

    MarketFlow does the same at its start; this command is for a database role of its own (see
    deploy/postgres/roles.sql).
    """
    from marketflow import logs, settings

    loaded = settings.load(config)
    if not loaded.postgres.host:
        raise SettingsError("postgres.host: the embedded PostgreSQL is migrated by MarketFlow at its start")
    logs.setup(loaded.log.level, loaded.log.format)

    from marketflow.resources import resource
    from marketflow.runtime.store_servers import find_servers
    from marketflow.stores.postgres.connections.reconnecting_connection import ReconnectingConnection
    from marketflow.stores.postgres.migrations import apply_ddl
    from marketflow.stores.postgres.partitioning import conversion

    database = ReconnectingConnection(find_servers(loaded).postgres)
    try:
        with database.opened() as connection:
            apply_ddl(connection, resource("ddl"), report_seconds=1800.0)
            if partition:
                conversion.partition(connection)
    finally:
        database.close()
    return 0
