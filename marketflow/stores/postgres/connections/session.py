"""Settings of a session with PostgreSQL, pinned against the defaults of server, database and role.

A default can change the text of a value (DateStyle), its meaning (TimeZone, search_path) or whether anything is stored
at all (default_transaction_read_only, a client encoding of SQL_ASCII). The settings are sent as libpq `options` with
the connection request, where they override the defaults, so no session exists without them.

A pooler in transaction mode (PgBouncer) rejects `options`, and a SET would leak to its other clients. There
(`postgres.prepared_statements = false`) each transaction begins with SET LOCAL, and results come in binary form, which
no setting of the session changes. The same is done where a pooler drops the options silently: each session is queried
for a marker setting.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, LiteralString

if TYPE_CHECKING:
    import psycopg
    from psycopg import sql

OLDEST_VERSION = 14
"""The oldest supported PostgreSQL, the first with `date_bin` and `create or replace trigger`."""

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
    "array_nulls",
    "statement_timeout",
    "lock_timeout",
    "idle_in_transaction_session_timeout",
)
"""Settings of each transaction where no session is pinned; the others do not affect our statements."""

_MARK = "marketflow.session"
"""A marker no server defines: where it is set, the other options of the connection request are as well."""

_TRANSACTION_TIMEOUT = 170_000
"""The first version with `transaction_timeout`; older ones reject it in the connection request."""


def session_keywords(keywords: Mapping[str, Any], **settings: object) -> dict[str, Any]:
    """Keywords for `psycopg.connect` whose session is pinned.

    Args:
        keywords: see rows.connection_keywords.
        settings: further ones of this session.
    """
    wanted = _PINNED | {"search_path": f"{keywords.get('schema', 'public')},pg_temp"}
    wanted |= {name: str(value) for name, value in settings.items()}
    given = {name: value for name, value in keywords.items() if name != "schema"}
    if is_pooled(given):
        return given | {"options": ""}  # explicitly empty: otherwise PGOPTIONS of the environment applies
    wanted[_MARK] = "pinned"
    return given | {"options": " ".join(f"-c {name}={_escaped(value)}" for name, value in wanted.items())}


def is_pooled(keywords: Mapping[str, Any]) -> bool:
    """Whether the connection may be to a pooler in transaction mode."""
    return keywords.get("prepare_threshold", 0) is None


@contextmanager
def looking_up(host: str) -> Iterator[None]:
    """Raise errors of a lookup of the host as psycopg does.

    Raises:
        psycopg.OperationalError: the host has no address, or there is no answer in time.
    """
    import psycopg

    try:
        yield
    except TimeoutError as error:
        raise psycopg.OperationalError(str(error)) from None
    except OSError as error:
        raise psycopg.OperationalError(f"failed to resolve host {host!r}: {error}") from None


def with_addresses(keywords: Mapping[str, Any], addresses: Sequence[str]) -> dict[str, Any]:
    """Keywords for `psycopg.connect`, which then does not look the host up itself: it would without a limit."""
    if not addresses:
        return dict(keywords)
    hosts = ",".join([keywords["host"]] * len(addresses))  # the name is what a certificate is checked against
    return {**keywords, "host": hosts, "hostaddr": ",".join(addresses)}


@contextmanager
def connecting() -> Iterator[None]:
    """Report a server that rejects an option it does not know as too old.

    Raises:
        psycopg.OperationalError: the original one, or one with the required version.
    """
    import psycopg

    try:
        yield
    except psycopg.OperationalError as error:
        # The newest setting of _PINNED; its name is in the message in every language.
        if "idle_session_timeout" not in str(error):
            raise
        raise psycopg.OperationalError(f"this PostgreSQL is {_too_old()}") from error


def pin(
    connection: "psycopg.Connection[Any]", keywords: Mapping[str, Any], **settings: object
) -> "sql.Composed | None":
    """Pin a new session in autocommit mode.

    Args:
        connection: made with session_keywords.
        keywords: see rows.connection_keywords.
        settings: as for session_keywords.

    Returns:
        statements to begin each transaction with, where the session could not be pinned; None where it is.

    Raises:
        psycopg.Error: the server is too old, or does not answer.
    """
    check_version(connection)
    if not is_pooled(keywords):
        cursor = connection.execute(_marker_query(connection), prepare=False)
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
) -> "sql.Composed | None":
    """The same as `pin`, of an asynchronous connection."""
    import psycopg

    check_version(connection)
    if not is_pooled(keywords):
        cursor = await connection.execute(_marker_query(connection), prepare=False)
        while cursor.nextset():
            pass
        if await cursor.fetchone() == (True,):
            if corrections := _corrections(connection):
                await connection.execute(corrections, prepare=False)
            return None
        connection.prepare_threshold = None
    await connection.set_isolation_level(psycopg.IsolationLevel.READ_COMMITTED)
    return _transaction_settings(connection, keywords, **settings)


def _marker_query(connection: "psycopg.BaseConnection[Any]") -> LiteralString:
    """A query of the marker, which no timeout of the session can end."""
    query: LiteralString = f"select coalesce(current_setting('{_MARK}', true), '') = 'pinned'"
    if connection.info.server_version >= _TRANSACTION_TIMEOUT:
        return f"set local transaction_timeout = 0; {query}"
    return query


def _corrections(connection: "psycopg.BaseConnection[Any]") -> LiteralString:
    """SET statements for what the options cannot contain, and for what variables such as PGTZ override."""
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
) -> "sql.Composed":
    """SET LOCAL statements that pin a transaction."""
    from psycopg import sql

    wanted = _PINNED | {"search_path": f"{keywords.get('schema', 'public')},pg_temp"}
    wanted |= {name: str(value) for name, value in settings.items()}
    chosen = {name: wanted[name] for name in (*_OF_A_TRANSACTION, *settings)}
    if connection.info.server_version >= _TRANSACTION_TIMEOUT:
        chosen = {"transaction_timeout": "0"} | chosen
    return sql.SQL("; ").join(
        # A list of schemas is several identifiers.
        sql.SQL("set local {} to {}").format(
            sql.Identifier(name),
            sql.SQL(", ").join(map(sql.Identifier, value.split(","))) if name == "search_path" else sql.Literal(value),
        )
        for name, value in chosen.items()
    )


def check_version(connection: "psycopg.BaseConnection[Any]") -> None:
    """Reject a server that is too old.

    Raises:
        psycopg.OperationalError: with the required version.
    """
    import psycopg

    if (version := connection.info.server_version) < OLDEST_VERSION * 10_000:
        raise psycopg.OperationalError(f"PostgreSQL {version // 10_000} is {_too_old()}")


def _too_old() -> str:
    return f"too old; {OLDEST_VERSION} is the oldest version that will do"


@contextmanager
def notices_to(connection: "psycopg.Connection[Any]", log: "Any") -> Iterator[None]:
    """Pass warnings of the server to `log(text)` within the context."""

    def handle(notice: "psycopg.errors.Diagnostic") -> None:
        if notice.severity_nonlocalized == "WARNING":
            log(notice.message_primary)

    connection.add_notice_handler(handle)
    try:
        yield
    finally:
        connection.remove_notice_handler(handle)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace(" ", "\\ ")
