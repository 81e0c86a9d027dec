"""Conversion of the minutes into daily partitions (ddl/0012_partitions.sql), beside readers and writers.

The table as it is becomes the first partition, none of its rows is moved: it is renamed, and a partitioned table takes
its name, triggers and grants, in one transaction that locks it for milliseconds. PostgreSQL must know that no row lies
beyond the end of that partition. A small table it reads meanwhile; a large one has a constraint that is validated
before, without a lock that keeps others out. If a conversion is killed, the constraint is left for the next one to
replace; rows that it refuses once its time has come are kept by the writer and written after that.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime, timedelta
from typing import LiteralString

import psycopg
from loguru import logger
from psycopg import sql

from marketflow.errors import Unavailable
from marketflow.stores.postgres.connections.bounded_connection import BoundedConnection
from marketflow.stores.postgres.migrations import refuse_other_owners, refuse_shadows
from marketflow.stores.postgres.partitioning.daily_partitions import DAYS_AHEAD
from marketflow.stores.postgres.rows import FIRST_PARTITION, reason

SMALL_BYTES = 256 * 1024 * 1024
"""Size of a table that is read under the lock: about a million rows, a fraction of a second."""

CONVERSION_SECONDS = 1800.0
"""How long the rows of a large table may be read; its first partition ends a week later, so writers do not reach it."""

LOCK_ATTEMPTS = 60
"""How often the lock is tried for, half a second each; others wait behind it, then have a second for themselves."""

_PATIENCE: LiteralString = "set local lock_timeout = 500"

_STATE: LiteralString = """
select relkind in ('r', 'p'), relkind = 'p', partitioned_from, pg_get_userbyid(relowner) = current_user,
       (select convalidated from pg_constraint where conrelid = pg_class.oid and conname = 'aggregates_valid'),
       pg_table_size(pg_class.oid), date_trunc('day', coalesce(%s, now()), 'UTC')
from pg_class, aggregates_rolled_until where pg_class.oid = to_regclass('aggregates')
"""

# What the new table would lack, or what would stay with the old one.
_OBSTACLES: LiteralString = """
with minutes as (select 'aggregates'::regclass::oid as oid)
select 'view ' || ev_class::regclass from pg_depend join pg_rewrite on pg_rewrite.oid = objid, minutes
where classid = 'pg_rewrite'::regclass and refclassid = 'pg_class'::regclass and refobjid = minutes.oid
union select 'foreign key ' || conname from pg_constraint, minutes
where contype = 'f' and minutes.oid in (conrelid, confrelid)
union select 'row security policy ' || polname from pg_policy, minutes where polrelid = minutes.oid
union select 'publication ' || pubname
from pg_publication_rel join pg_publication on pg_publication.oid = prpubid, minutes where prrelid = minutes.oid
union select 'inheritance' from pg_inherits, minutes where minutes.oid in (inhrelid, inhparent)
union select 'privileges on the column ' || attname from pg_attribute, minutes
where attrelid = minutes.oid and attacl is not null
union select 'disabled trigger ' || tgname from pg_trigger, minutes where tgrelid = minutes.oid and tgenabled <> 'O'
order by 1
"""

_TRIGGERS: LiteralString = """
select tgname, pg_get_triggerdef(oid) from pg_trigger where tgrelid = 'aggregates'::regclass and not tgisinternal
order by tgname
"""

_PRIMARY_KEY: LiteralString = (
    "select conname from pg_constraint where conrelid = 'aggregates'::regclass and contype = 'p'"
)

_GRANTS: LiteralString = """
select case grantee when 0 then 'public' else quote_ident(pg_get_userbyid(grantee)) end, privilege_type, is_grantable
from pg_class, aclexplode(relacl) where oid = to_regclass(%s) and grantee <> relowner
"""


def partition(connection: BoundedConnection, today: datetime | None = None) -> None:
    """Convert the table, unless that is done.

    Args:
        connection: of the owner of the tables, which are up to date.
        today: PostgreSQL's by default.

    Raises:
        Unavailable: the table cannot be converted, with the reason.
        psycopg.Error: nothing was changed; see the module on a constraint that may be left.
    """
    with connection.pinned():
        refuse_shadows(connection)
        refuse_other_owners(connection)
        row = connection.execute(_STATE, [today]).fetchone()
    if row is None or not row[0]:
        raise Unavailable("aggregates is no table")
    _, is_partitioned, partitioned_from, is_owner, is_valid, size, begun = row
    if partitioned_from is not None:
        logger.info("aggregates has daily partitions from {:%Y-%m-%d} on", partitioned_from)
        return
    _refuse(connection, is_partitioned, is_owner, is_valid)
    is_small = size < SMALL_BYTES
    until: datetime = begun + timedelta(days=1 if is_small else 1 + DAYS_AHEAD)
    try:
        with nullcontext() if is_small else _bounded(connection, until):
            _swap_once_free(connection, until)
    except psycopg.errors.CheckViolation as error:
        raise Unavailable(
            f"there are minutes of {until:%Y-%m-%d} or later, beyond the first partition: correct or delete them"
        ) from error
    logger.info(
        "aggregates has daily partitions from {:%Y-%m-%d} on; earlier minutes are in the first, {}",
        until,
        FIRST_PARTITION,
    )


def _refuse(connection: BoundedConnection, is_partitioned: bool, is_owner: bool, is_valid: bool) -> None:
    if is_partitioned:
        raise Unavailable("aggregates is partitioned already, and not by MarketFlow: it stays as it is")
    if not is_owner:
        raise Unavailable("only the owner of aggregates can partition it")
    if not is_valid:
        raise Unavailable("there are minutes that are no candles (see the log): correct or delete them first")
    with connection.pinned():
        if obstacles := [text for (text,) in connection.execute(_OBSTACLES)]:
            raise Unavailable(f"drop these first, and make them again afterwards: {', '.join(obstacles)}")


@contextmanager
def _bounded(connection: BoundedConnection, until: datetime) -> Iterator[None]:
    """Have a valid constraint that all rows are from before `until`."""
    name = sql.Identifier(FIRST_PARTITION)
    drop = sql.SQL("alter table aggregates drop constraint if exists {}").format(name)
    try:
        with connection.pinned():
            connection.execute(_PATIENCE)
            connection.execute(drop)
            check = "alter table aggregates add constraint {} check (timestamp < {}) not valid"
            connection.execute(sql.SQL(check).format(name, sql.Literal(until)))
        logger.info("reading all minutes once; others may read and write meanwhile")
        with connection.pinned(), connection.patient(CONVERSION_SECONDS):
            connection.execute(sql.SQL("alter table aggregates validate constraint {}").format(name))
        yield
    except BaseException:
        with suppress(psycopg.Error), connection.pinned():
            connection.execute(drop)
        raise


def _swap_once_free(connection: BoundedConnection, until: datetime) -> None:
    for attempt in range(LOCK_ATTEMPTS):
        try:
            with connection.pinned(), connection.patient(CONVERSION_SECONDS):
                connection.execute(_PATIENCE)
                connection.execute("lock table aggregates in access exclusive mode")
                _swap(connection, until)
            return
        except psycopg.errors.LockNotAvailable as error:
            if attempt == 0:
                logger.info("waiting for long transactions on aggregates, such as an export or a dump")
            busy = reason(error)
        time.sleep(1.0)
    raise Unavailable(f"long transactions kept aggregates locked: {busy}")


def _swap(connection: BoundedConnection, until: datetime) -> None:
    """Put a partitioned table in the place of the locked one, which becomes its first partition."""

    def run(statement: LiteralString, *names: sql.Composable) -> None:
        connection.execute(sql.SQL(statement).format(*names))

    first = sql.Identifier(FIRST_PARTITION)
    triggers = connection.execute(_TRIGGERS).fetchall()
    grants = connection.execute(_GRANTS, ["aggregates"]).fetchall()
    for name, _ in triggers:
        run("drop trigger {} on aggregates", sql.Identifier(name))
    for (name,) in connection.execute(_PRIMARY_KEY).fetchall():
        run(
            "alter table aggregates rename constraint {} to {}",
            sql.Identifier(name),
            sql.Identifier(f"{FIRST_PARTITION}_pkey"),
        )
    run("alter table aggregates rename to {}", first)
    run("create table aggregates (like {} including all excluding statistics) partition by range (timestamp)", first)
    run("alter table aggregates drop constraint if exists {}", first)
    run("alter table aggregates attach partition {} for values from (minvalue) to ({})", first, sql.Literal(until))
    run("alter table {} drop constraint if exists {}", first, first)
    run("create table aggregates_other partition of aggregates default")
    for _, definition in triggers:
        connection.execute(definition)
    # Partitions are written through the table alone, for only there are the triggers that keep days right.
    for table in ("aggregates", FIRST_PARTITION, "aggregates_other"):
        for who, _, _ in connection.execute(_GRANTS, [table]).fetchall():
            run("revoke all on {} from {}", sql.Identifier(table), sql.SQL(who))
    for who, privilege, grantable in grants:
        option = sql.SQL("with grant option" if grantable else "")
        run("grant {} on aggregates to {} {}", sql.SQL(privilege), sql.SQL(who), option)
    connection.execute("update aggregates_rolled_until set partitioned_from = %s", [until])
    connection.execute(
        "select aggregates_add_partitions(%s::timestamptz, %s::timestamptz + interval '8 days')", [until, until]
    )
