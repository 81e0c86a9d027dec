"""Schema migrations: applies ddl/*.sql, each file once, in the order of their names."""

from pathlib import Path

import psycopg
from loguru import logger
from psycopg import sql

from marketflow.stores.postgres.connections.bounded_connection import BoundedConnection
from marketflow.stores.postgres.connections.session import notices_to
from marketflow.stores.postgres.rows import reason

DDL_SECONDS = 60.0
"""Limit of one file: longer than that of a row, for it may rewrite a table."""

REPORT_SECONDS = 10.0
"""How long a start may search for invalid rows; writes wait for it."""

EXAMPLES = 5
"""Invalid rows that are logged at most."""

_NOT_VALIDATED = """
select pg_get_expr(conbin, conrelid) from pg_constraint
where conrelid = to_regclass('aggregates') and conname = 'aggregates_valid' and not convalidated
  and pg_has_role((select relowner from pg_class where oid = conrelid), 'usage')
"""

_BROKEN = """
select pg_catalog.concat(mode, ':', exchange, ':', pair_name, ' ', timestamp, ' average ', average_price,
                         ' low ', min_price, ' high ', max_price, ' ticks ', tick_count)
from aggregates where ({condition}) is not true limit %s
"""

# Functions and operators in the schema of the tables with names of PostgreSQL's own, made by roles without rights to
# our tables: they would be called in place of PostgreSQL's, with the rights of the role that applies a file.
_SHADOWING = """
select distinct pg_catalog.pg_get_userbyid(owner)::text from (
    select proowner as owner from pg_proc where pronamespace = to_regnamespace(current_schema()::text)::oid
      and proname in (select proname from pg_proc where pronamespace = oid '11')
    union all
    select oprowner from pg_operator where oprnamespace = to_regnamespace(current_schema()::text)::oid
) as found join pg_roles on pg_roles.oid = owner
where rolname <> current_user and not rolsuper
order by 1
"""

_OTHER_OWNERS = """
select relname::text, pg_catalog.pg_get_userbyid(relowner)::text from pg_class
where oid in (to_regclass('aggregates')::oid, to_regclass('aggregates_daily')::oid,
              to_regclass('aggregates_hourly')::oid, to_regclass('aggregates_rolled_until')::oid,
              to_regclass('holes')::oid, to_regclass('history')::oid, to_regclass('alert_rules')::oid,
              to_regclass('alert_webhooks')::oid, to_regclass('alert_states')::oid, to_regclass('alert_events')::oid,
              to_regclass('alert_deliveries')::oid, to_regclass('ddl_applied')::oid)
  and pg_catalog.pg_get_userbyid(relowner) <> current_user
  and (select rolsuper from pg_roles where rolname = current_user)
order by 1 limit 1
"""

_ELSEWHERE = """
select nspname from pg_class join pg_namespace on pg_namespace.oid = relnamespace
where relname = 'ddl_applied' and relkind in ('r', 'p') and nspname <> current_schema() order by nspname
"""

_LOCK = 7_364_017_241  # any number, the same in every instance
_TABLE = "create table if not exists ddl_applied (name text primary key, applied_at timestamptz not null default now())"


def apply_ddl(connection: BoundedConnection, folder: Path, report_seconds: float = REPORT_SECONDS) -> None:
    """Bring the database up to date, in one transaction.

    An advisory lock serializes instances that start at the same moment. A user without the right to create tables may
    run against a database that is up to date.

    Args:
        connection: of the owner of the tables, where there is anything to apply.
        folder: of the files.
        report_seconds: how long to search for invalid rows, see report_invalid; 0 is not at all.

    Raises:
        psycopg.Error: nothing was applied or changed.
    """
    files = sorted(folder.glob("*.sql"))
    with connection.pinned(), notices_to(connection, logger.warning):
        _ensure_schema(connection)
        connection.execute("select pg_advisory_xact_lock(%s)", [_LOCK])
        done = applied(connection)
        waiting = [file for file in files if file.name not in done]
        if waiting:
            refuse_shadows(connection)
            refuse_other_owners(connection)
        if waiting and not done:
            # An earlier version used the search_path of the role.
            for (other,) in connection.execute(_ELSEWHERE).fetchall():
                logger.warning(
                    "PostgreSQL: tables are in the schema {} as well; postgres.schema says which to use", other
                )
            connection.execute(_TABLE)
        for file in waiting:
            with connection.patient(DDL_SECONDS):
                connection.execute(file.read_text())
            connection.execute("insert into ddl_applied (name) values (%s)", [file.name])
    if waiting:
        logger.info("applied {}", ", ".join(file.name for file in waiting))
    if report_seconds:
        try:
            report_invalid(connection, report_seconds)
        except psycopg.Error as error:
            logger.warning(
                "PostgreSQL: rows older than their constraint were not looked at; marketflow migrate has longer: {}",
                reason(error),
            )


def report_invalid(connection: BoundedConnection, seconds: float = REPORT_SECONDS) -> int:
    """Log rows older than the constraint they break; validate the constraint once there are none.

    Reads the whole table until the constraint is validated. Does nothing for a user other than the owner.

    Returns:
        the number of rows that break it, EXAMPLES + 1 at most.

    Raises:
        psycopg.Error: it takes longer than `seconds`, or the connection is lost.
    """
    with connection.pinned(), connection.patient(seconds):
        found = connection.execute(_NOT_VALIDATED).fetchone()
        if found is None:
            return 0
        broken = connection.execute(_BROKEN.format(condition=found[0]), [EXAMPLES + 1]).fetchall()
        if not broken:
            connection.execute("alter table aggregates validate constraint aggregates_valid")
            return 0
    examples = "; ".join(text for (text,) in broken[:EXAMPLES])
    more = " and others" if len(broken) > EXAMPLES else ""
    logger.warning(
        "PostgreSQL: rows in aggregates are no candles (ddl/0005_valid_candles.sql) and left out of answers until they"
        " are corrected or deleted: {}{}",
        examples,
        more,
    )
    return len(broken)


def refuse_shadows(connection: BoundedConnection) -> None:
    """Reject a schema in which other roles have made what would run with the rights of the owner of the tables."""
    owners = [owner for (owner,) in connection.execute(_SHADOWING)]
    if owners:
        raise psycopg.errors.InsufficientPrivilege(
            f"nothing is applied: {', '.join(owners)} made functions or operators with names of PostgreSQL's own in the"
            " schema of the tables; drop them, and revoke create on schema public from public"
        )


def refuse_other_owners(connection: BoundedConnection) -> None:
    """Reject a superuser on tables of another role: that role's functions would run with superuser rights."""
    for name, owner in connection.execute(_OTHER_OWNERS).fetchall():
        raise psycopg.errors.InsufficientPrivilege(
            f"nothing is applied: the table {name} belongs to {owner}, and this user is a superuser; apply ddl/ as"
            f" {owner} (marketflow migrate), or alter table {name} owner to this user"
        )


def _ensure_schema(connection: BoundedConnection) -> None:
    """Create the schema of postgres.schema where it is missing."""
    row = connection.execute(
        "select (pg_catalog.parse_ident(split_part(current_setting('search_path'), ',', 1)))[1]"
    ).fetchone()
    assert row is not None, "a function without a table gives one row"
    (found,) = connection.execute("select to_regnamespace(quote_ident(%s)) is not null", row).fetchone() or (False,)
    if not found:
        connection.execute(sql.SQL("create schema {}").format(sql.Identifier(row[0])))
        logger.info("created the schema {}", row[0])


def applied(connection: psycopg.Connection) -> set[str]:
    """Names of the applied files.

    Raises:
        psycopg.Error: the query failed, or is not permitted.
    """
    row = connection.execute("select to_regclass('ddl_applied') is not null").fetchone()
    if row is None or not row[0]:
        return set()
    return {name for (name,) in connection.execute("select name from ddl_applied")}
