"""Applies ddl/*.sql, each file once, in the order of their names."""

from pathlib import Path

import psycopg
from loguru import logger
from psycopg import sql

from marketflow.stores.bounded import BoundedConnection
from marketflow.stores.postgres_session import notices_to

DDL_SECONDS = 60.0
"""How long one file may take: more than a row, for it may have to rewrite a table."""

_LOCK = 7_364_017_241  # any number, the same in every instance
_TABLE = "create table if not exists ddl_applied (name text primary key, applied_at timestamptz not null default now())"


def apply_ddl(connection: BoundedConnection, folder: Path) -> None:
    """Bring the database up to date, in one transaction.

    An advisory lock lets one instance do it while another that starts at the same moment waits and then finds it done.
    A user without the right to create tables may run against a database that is up to date.

    Raises:
        psycopg.Error: not applied, nothing changed.
    """
    files = sorted(folder.glob("*.sql"))
    with connection.pinned(), notices_to(connection, logger.warning):
        _ensure_schema(connection)
        connection.execute("select pg_advisory_xact_lock(%s)", [_LOCK])
        done = applied(connection)
        waiting = [file for file in files if file.name not in done]
        if waiting and not done:
            connection.execute(_TABLE)
        for file in waiting:
            with connection.patient(DDL_SECONDS):
                connection.execute(file.read_text())
            connection.execute("insert into ddl_applied (name) values (%s)", [file.name])
    if waiting:
        logger.info("applied {}", ", ".join(file.name for file in waiting))


def _ensure_schema(connection: BoundedConnection) -> None:
    """Make the schema of postgres.schema where it is missing: without one no name resolves."""
    row = connection.execute("select (parse_ident(split_part(current_setting('search_path'), ',', 1)))[1]").fetchone()
    assert row is not None, "a function without a table gives one row"
    (found,) = connection.execute("select to_regnamespace(quote_ident(%s)) is not null", row).fetchone() or (False,)
    if not found:
        connection.execute(sql.SQL("create schema {}").format(sql.Identifier(row[0])))
        logger.info("created the schema {}", row[0])


def applied(connection: psycopg.Connection) -> set[str]:
    """Names of the files that the database has.

    Raises:
        psycopg.Error: it cannot be asked, or not by this user.
    """
    row = connection.execute("select to_regclass('ddl_applied') is not null").fetchone()
    if row is None or not row[0]:
        return set()
    return {name for (name,) in connection.execute("select name from ddl_applied")}
