"""What a session with PostgreSQL is held to, whatever the server, the database or the role has for defaults.

A default can change the text of a value (DateStyle), its meaning (TimeZone, search_path) or whether anything is stored
at all (default_transaction_read_only, a client encoding of SQL_ASCII). All of them are sent with the request for the
connection, where they win over defaults of the role and the database, so no session exists without them.

A pooler that lends a session for one transaction (PgBouncer, pool_mode = transaction) refuses such requests, and a SET
would reach its other clients. There (`postgres.prepared_statements = false`) each transaction sets what it needs for
itself alone, and results come in binary form, which no setting of the session changes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql

OLDEST_VERSION = 14
"""The oldest PostgreSQL that will do: `date_bin` and `create or replace trigger` are that old."""

_PINNED = {
    "datestyle": "ISO,YMD",
    "intervalstyle": "postgres",
    "timezone": "UTC",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "standard_conforming_strings": "on",
    "transform_null_equals": "off",
    "array_nulls": "on",
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "default_transaction_deferrable": "off",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
}

_OF_A_TRANSACTION = ("search_path", "timezone", "extra_float_digits", "statement_timeout", "lock_timeout")
"""What is set in each transaction where there is no session; the others are of no concern to statements of ours."""


def session_keywords(keywords: Mapping[str, Any], **settings: object) -> dict[str, Any]:
    """Keywords for `psycopg.connect` whose session is pinned.

    Args:
        keywords: see rows.connection_keywords.
        settings: of the session, in addition to what every session has.
    """
    wanted = _PINNED | {"search_path": f"{keywords.get('schema', 'public')},pg_temp"}
    wanted |= {name: str(value) for name, value in settings.items()}
    given = {name: value for name, value in keywords.items() if name != "schema"}
    if is_pooled(given):
        return given
    return given | {"options": " ".join(f"-c {name}={_escaped(value)}" for name, value in wanted.items())}


def is_pooled(keywords: Mapping[str, Any]) -> bool:
    """Whether a connection may be to a pooler that has no sessions."""
    return keywords.get("prepare_threshold", 0) is None


def transaction_settings(keywords: Mapping[str, Any], **settings: object) -> sql.Composed:
    """Statements that pin the transaction they stand in, for where the session is not."""
    wanted = _PINNED | {"search_path": f"{keywords.get('schema', 'public')},pg_temp"}
    wanted |= {name: str(value) for name, value in settings.items()}
    chosen = {name: wanted[name] for name in (*_OF_A_TRANSACTION, *settings)}
    return sql.SQL("; ").join(
        # A list of schemas is not one name.
        sql.SQL("set local {} to {}").format(
            sql.Identifier(name),
            sql.SQL(", ").join(map(sql.Identifier, value.split(","))) if name == "search_path" else sql.Literal(value),
        )
        for name, value in chosen.items()
    )


def check_version(connection: "psycopg.Connection[Any] | psycopg.AsyncConnection[Any]") -> None:
    """Refuse a server that is too old.

    Raises:
        psycopg.OperationalError: it is; the text says which one would do.
    """
    if (version := connection.info.server_version) < OLDEST_VERSION * 10_000:
        raise psycopg.OperationalError(
            f"PostgreSQL {version // 10_000} is too old; {OLDEST_VERSION} is the oldest version that will do"
        )


@contextmanager
def notices_to(connection: "psycopg.Connection[Any]", log: "Any") -> Iterator[None]:
    """Pass warnings of the server on to `log(text)` meanwhile."""

    def handle(notice: psycopg.errors.Diagnostic) -> None:
        if notice.severity_nonlocalized == "WARNING":
            log(notice.message_primary)

    connection.add_notice_handler(handle)
    try:
        yield
    finally:
        connection.remove_notice_handler(handle)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace(" ", "\\ ")
