"""What a session with PostgreSQL is held to, whatever the server, the database or the role has for defaults.

A default can change the text of a value (DateStyle), its meaning (TimeZone, search_path) or whether anything is stored
at all (default_transaction_read_only, a client encoding of SQL_ASCII). All of them are sent with the request for the
connection, where they win over defaults of the role and the database, so no session exists without them.

A pooler that lends a session for one transaction (PgBouncer, pool_mode = transaction) refuses such requests, and a SET
would reach its other clients. There (`postgres.prepared_statements = false`) each transaction sets what it needs for
itself alone, and results come in binary form, which no setting of the session changes. The same is done where a pooler
drops the request's settings and says nothing: each session is asked whether it got them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, LiteralString

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

_OF_A_TRANSACTION = (
    "search_path",
    "datestyle",
    "timezone",
    "extra_float_digits",
    "statement_timeout",
    "lock_timeout",
    "idle_in_transaction_session_timeout",
)
"""What is set in each transaction where there is no session; the others are of no concern to statements of ours."""

_MARK = "marketflow.session"
"""A setting that no server has: where it is set, the others of the request for the connection are as well."""

_TRANSACTION_TIMEOUT = 170_000
"""The first version with `transaction_timeout`; in the request for a connection older ones would refuse it."""


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
        return given | {"options": ""}  # not left out, which would let PGOPTIONS of the environment in
    wanted[_MARK] = "pinned"
    return given | {"options": " ".join(f"-c {name}={_escaped(value)}" for name, value in wanted.items())}


def is_pooled(keywords: Mapping[str, Any]) -> bool:
    """Whether a connection may be to a pooler that has no sessions."""
    return keywords.get("prepare_threshold", 0) is None


@contextmanager
def connecting() -> Iterator[None]:
    """Meanwhile a server that does not know what a session is held to is reported as the old one that it is.

    Raises:
        psycopg.OperationalError: as it was, or with the version that would do.
    """
    try:
        yield
    except psycopg.OperationalError as error:
        # The newest setting of those in _PINNED; its name stands in the message in whatever language that is.
        if "idle_session_timeout" not in str(error):
            raise
        raise psycopg.OperationalError(f"this PostgreSQL is {_too_old()}") from error


def pin(connection: "psycopg.Connection[Any]", keywords: Mapping[str, Any], **settings: object) -> sql.Composed | None:
    """Pin a new session in autocommit mode.

    Args:
        connection: made with session_keywords.
        keywords: see rows.connection_keywords.
        settings: as for session_keywords.

    Returns:
        what pins a transaction, to be executed first in each, where the session could not be; None where it is.

    Raises:
        psycopg.Error: the server is too old, or does not answer.
    """
    check_version(connection)
    if not is_pooled(keywords):
        cursor = connection.execute(_question(connection), prepare=False)
        while cursor.nextset():
            pass
        if cursor.fetchone() == (True,):
            if corrections := _corrections(connection):
                connection.execute(corrections, prepare=False)
            return None
        connection.prepare_threshold = None
    return _transaction_settings(connection, keywords, **settings)


async def pin_async(
    connection: "psycopg.AsyncConnection[Any]", keywords: Mapping[str, Any], **settings: object
) -> sql.Composed | None:
    """The same as `pin`, of an asynchronous connection."""
    check_version(connection)
    if not is_pooled(keywords):
        cursor = await connection.execute(_question(connection), prepare=False)
        while cursor.nextset():
            pass
        if await cursor.fetchone() == (True,):
            if corrections := _corrections(connection):
                await connection.execute(corrections, prepare=False)
            return None
        connection.prepare_threshold = None
    await connection.set_isolation_level(psycopg.IsolationLevel.READ_COMMITTED)
    return _transaction_settings(connection, keywords, **settings)


def _question(connection: "psycopg.BaseConnection[Any]") -> LiteralString:
    """Ask whether the session has the settings of the request for it, beyond the reach of its defaults."""
    question: LiteralString = f"select coalesce(current_setting('{_MARK}', true), '') = 'pinned'"
    if connection.info.server_version >= _TRANSACTION_TIMEOUT:
        return f"set local transaction_timeout = 0; {question}"
    return question


def _corrections(connection: "psycopg.BaseConnection[Any]") -> LiteralString:
    """Statements for what could not be in the request, or was overruled there by variables such as PGTZ."""
    corrections: list[LiteralString] = []
    if connection.info.server_version >= _TRANSACTION_TIMEOUT:
        corrections.append("set transaction_timeout = 0")
    if connection.info.parameter_status("DateStyle") != "ISO, YMD":
        corrections.append("set datestyle to iso, ymd")
    if connection.info.parameter_status("TimeZone") != "UTC":
        corrections.append("set timezone to 'UTC'")
    return "; ".join(corrections)


def _transaction_settings(
    connection: "psycopg.BaseConnection[Any]", keywords: Mapping[str, Any], **settings: object
) -> sql.Composed:
    """Statements that pin the transaction they stand in."""
    wanted = _PINNED | {"search_path": f"{keywords.get('schema', 'public')},pg_temp"}
    wanted |= {name: str(value) for name, value in settings.items()}
    chosen = {name: wanted[name] for name in (*_OF_A_TRANSACTION, *settings)}
    if connection.info.server_version >= _TRANSACTION_TIMEOUT:
        chosen = {"transaction_timeout": "0"} | chosen
    return sql.SQL("; ").join(
        # A list of schemas is not one name.
        sql.SQL("set local {} to {}").format(
            sql.Identifier(name),
            sql.SQL(", ").join(map(sql.Identifier, value.split(","))) if name == "search_path" else sql.Literal(value),
        )
        for name, value in chosen.items()
    )


def check_version(connection: "psycopg.BaseConnection[Any]") -> None:
    """Refuse a server that is too old.

    Raises:
        psycopg.OperationalError: it is; the text says which one would do.
    """
    if (version := connection.info.server_version) < OLDEST_VERSION * 10_000:
        raise psycopg.OperationalError(f"PostgreSQL {version // 10_000} is {_too_old()}")


def _too_old() -> str:
    return f"too old; {OLDEST_VERSION} is the oldest version that will do"


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
