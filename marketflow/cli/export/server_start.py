"""The PostgreSQL to export from; an embedded one that is not running is started for the export."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from marketflow.embedded import EmbeddedPostgres, claim
from marketflow.embedded.folder_lock import lock_owner
from marketflow.embedded.ownership import refuse_unreachable
from marketflow.errors import StartError
from marketflow.runtime.store_servers import find_servers
from marketflow.settings import Settings


@contextmanager
def running_postgres(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield keywords for connections; an embedded server that was started for them is stopped at the end.

    Until then this process owns the data folder: the start of a MarketFlow fails, and names this process.

    Raises:
        StartError: there is no data folder, or its server cannot be started.
    """
    servers = find_servers(settings)
    postgres = next((server for server in servers.embedded if isinstance(server, EmbeddedPostgres)), None)
    if postgres is None or lock_owner(settings.data_dir) is not None:
        yield servers.postgres
        return
    if not _has_data(postgres):
        raise StartError(f"nothing to export: the data folder {settings.data_dir} has no PostgreSQL; set data_dir")
    refuse_unreachable(settings.data_dir)
    with claim(settings.data_dir), postgres:
        yield servers.postgres


def _has_data(postgres: EmbeddedPostgres) -> bool:
    try:
        return (postgres.data / "PG_VERSION").exists()
    except OSError as error:
        raise StartError(f"the data folder {postgres.data} cannot be used: {error.strerror}") from error
