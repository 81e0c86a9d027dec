"""Health checks of PostgreSQL: it answers, takes writes, and has or can get the tables of this version."""

import re
import shlex
from functools import partial
from typing import Any

import msgspec
from psycopg.conninfo import make_conninfo

from marketflow.cli.check.check_result import Check, CheckResult, CheckState, seconds_text
from marketflow.cli.check.data_folder_checks import AS_OWNER, results_if_stopped
from marketflow.clock import milliseconds, system_clock
from marketflow.embedded import EmbeddedPostgres
from marketflow.embedded.programs import postgres_programs
from marketflow.resources import resource
from marketflow.runtime.store_servers import Servers
from marketflow.settings import Settings
from marketflow.stores.postgres.connections.bounded_connection import BoundedConnection
from marketflow.stores.postgres.migrations import applied
from marketflow.stores.postgres.rows import FIRST_PARTITION, reason, to_unix_ms
from marketflow.text import host_port

POOLED = "set postgres.prepared_statements = false: a pooler, such as PgBouncer, lends a session for one transaction"

_NEEDED = {
    "aggregates": ("select", "insert", "update"),
    "aggregates_daily": ("select", "insert", "update", "delete"),
    "aggregates_hourly": ("select", "insert", "delete"),
    "aggregates_rolled_until": ("select", "update"),
    "holes": ("select", "insert", "update", "delete"),
    "history": ("select", "insert", "update"),
    "alert_rules": ("select", "insert", "update", "delete"),
    "alert_webhooks": ("select", "insert", "update", "delete"),
    "alert_states": ("select", "insert", "update", "delete"),
    "alert_events": ("select", "insert", "delete"),
    "alert_deliveries": ("select", "insert", "update", "delete"),
    "ddl_applied": ("select",),
}
"""Privileges that MarketFlow uses on existing tables."""

_LACKING = """
select name, privilege from unnest(%s::text[], %s::text[]) as needed (name, privilege)
where to_regclass(name) is not null and not has_table_privilege(to_regclass(name)::oid, privilege)
"""

_MAY_CREATE = """
select to_regnamespace(%(schema)s) is not null,
       coalesce(has_schema_privilege(to_regnamespace(%(schema)s)::oid, 'create'), false),
       coalesce((select pg_has_role(relowner, 'usage') from pg_class where oid = to_regclass('aggregates')), true),
       has_database_privilege(current_database(), 'create')
"""

_NOT_VALIDATED = """
select from pg_constraint
where conrelid = to_regclass('aggregates')::oid and conname = 'aggregates_valid' and not convalidated
"""

_TIMESCALE = """
select exists (select from pg_extension where extname = 'timescaledb'),
       to_regclass('timescaledb_information.hypertables') is not null
"""

_HYPERTABLE = """
select from timescaledb_information.hypertables
where hypertable_schema = current_schema()::text and hypertable_name = 'aggregates'
"""

_HAS_PARTITIONS = "select to_regprocedure('aggregates_drop_partition()') is not null"

_PARTITIONS = """
select partitioned_from, (select pg_catalog.count(*) from pg_inherits where inhparent = to_regclass('aggregates')::oid),
       has_function_privilege('aggregates_add_partitions(timestamptz, timestamptz)', 'execute')
       and has_function_privilege('aggregates_drop_partition()', 'execute'),
       exists (select from pg_constraint where conrelid = to_regclass('aggregates')::oid and conname = %s)
from aggregates_rolled_until
"""

_NEWEST = """
select max(newest.timestamp) from pg_catalog.unnest(%s::text[]) as wanted (exchange)
cross join pg_catalog.unnest(%s::text[]) as pair (name)
cross join lateral (
    select timestamp from aggregates where exchange = wanted.exchange and pair_name = pair.name and mode = %s
    order by timestamp desc limit 1
) as newest
"""


def postgres_check(settings: Settings, servers: Servers) -> Check:
    """Return the checks of the PostgreSQL of the settings."""
    embedded = next((server for server in servers.embedded if isinstance(server, EmbeddedPostgres)), None)
    run = partial(_check, settings, servers.postgres)
    if embedded is not None:
        where = "embedded"
        server = embedded

        def check_embedded() -> list[CheckResult]:
            if stopped := results_if_stopped(server, where):
                return stopped
            first, *others = run(where)
            return [msgspec.structs.replace(first, command=_psql(server, settings.postgres.schema)), *others]

        return Check("PostgreSQL", where, check_embedded)
    at = settings.postgres
    where = f"{host_port(at.host, at.port)}, database {at.dbname}"
    return Check("PostgreSQL", where, partial(run, where))


def _psql(server: EmbeddedPostgres, schema: str) -> str:
    """Return the command line of psql for an embedded server, by its own psql if that is installed."""
    own = postgres_programs(server.data) / "psql"
    keywords = make_conninfo("", **server.keywords, options=f"-csearch_path={schema}")
    return shlex.join([str(own) if own.exists() else "psql", keywords])


def _check(settings: Settings, keywords: dict[str, Any], where: str) -> list[CheckResult]:
    try:
        with BoundedConnection.open(keywords) as connection, connection.pinned():
            results: list[CheckResult] = []
            for check in (
                partial(_server, pooled=not settings.postgres.prepared_statements),
                partial(_schema, wanted=settings.postgres.schema),
                partial(_rows, settings=settings),
            ):
                results.append(check(where, connection))
                if results[-1].state is CheckState.FAILED:  # the next ones would fail for the same reason
                    break
            else:
                results += _partitions(where, connection, settings)
            return [*results, *_timescale(where, connection)]
    except Exception as error:  # noqa: BLE001 - the server would meet the same error
        # `where` names the server already.
        text = re.sub(r"^connection failed: connection to server .*? failed: (FATAL: +)?", "", reason(error))
        return [CheckResult("PostgreSQL", where, CheckState.FAILED, text, _advice(text))]


def _server(where: str, connection: BoundedConnection, pooled: bool) -> CheckResult:
    """Check the version, and whether the server takes writes."""

    def result(state: CheckState, found: str, advice: str = "") -> CheckResult:
        return CheckResult("PostgreSQL", where, state, found, advice)

    info = connection.info
    version = info.parameter_status("server_version") or str(info.server_version)
    encrypted = ", TLS" if info.pgconn.ssl_in_use else ""
    text = f"PostgreSQL {version}, user {info.user}{encrypted}"
    ((standby, read_only),) = connection.execute(
        "select pg_is_in_recovery(), current_setting('transaction_read_only')"
    ).fetchall()
    if standby:
        return result(
            CheckState.FAILED, f"{text}; a standby, which takes no writes", "set postgres.host to the primary server"
        )
    if read_only == "on":
        return result(
            CheckState.FAILED,
            f"{text}; transactions are read-only",
            "ALTER ROLE or ALTER DATABASE ... SET default_transaction_read_only = off",
        )
    # A superuser has set it for the role; the session cannot change it.
    if connection.execute("show session_replication_role").fetchall() == [("replica",)]:
        return result(
            CheckState.FAILED,
            f"{text}; triggers do not fire (session_replication_role = replica), so days do not follow their minutes",
            "ALTER ROLE or ALTER DATABASE ... RESET session_replication_role",
        )
    encoding = info.parameter_status("server_encoding")
    if encoding not in ("UTF8", "SQL_ASCII"):
        return result(
            CheckState.WARNING,
            f"{text}; the database is encoded in {encoding}, and alert rules with other characters cannot be stored",
            "CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0, and set postgres.dbname to it",
        )
    # A pooler reports a process id of its own for cancel requests.
    ((process,),) = connection.execute("select pg_backend_pid()").fetchall()
    if process != info.backend_pid and not pooled:
        return result(CheckState.WARNING, f"{text}, through a pooler", POOLED)
    if process != info.backend_pid:
        return result(CheckState.OK, f"{text}, through a pooler, without prepared statements")
    if not connection.has_session and not pooled:
        return result(CheckState.WARNING, f"{text}; session settings are dropped on the way", POOLED)
    return result(CheckState.OK, text)


def _schema(where: str, connection: BoundedConnection, wanted: str) -> CheckResult:
    """Check which files of ddl/ are applied, and whether the user may apply the others and use the tables."""

    def result(state: CheckState, found: str, advice: str = "") -> CheckResult:
        return CheckResult("PostgreSQL schema", where, state, found, advice)

    names, privileges = zip(*((name, each) for name, needed in _NEEDED.items() for each in needed), strict=True)
    lacking = connection.execute(_LACKING, [[*names], [*privileges]]).fetchall()
    if lacking:
        rights = ", ".join(f"{privilege} on {name}" for name, privilege in lacking)
        return result(CheckState.FAILED, f"the user may not: {rights}", f"GRANT {rights} TO the user")
    ours = {file.name for file in resource("ddl").glob("*.sql")}
    done = applied(connection)
    missing, newer = sorted(ours - done), sorted(done - ours)
    if missing:
        ((exists, may_create, owns, may_make_schema),) = connection.execute(_MAY_CREATE, {"schema": wanted}).fetchall()
        text = f"{', '.join(missing)} not applied yet"
        if not exists and not may_make_schema:
            return result(
                CheckState.FAILED,
                f"{text}, and there is no schema {wanted}, which the user may not create",
                f"CREATE SCHEMA {wanted} AUTHORIZATION the user, or set postgres.schema",
            )
        if not exists:
            return result(CheckState.OK, f"{text}, no schema {wanted} yet; MarketFlow creates both at its next start")
        if not may_create:
            return result(
                CheckState.FAILED,
                f"{text}, and the user may not create tables in the schema {wanted}",
                f"GRANT CREATE ON SCHEMA {wanted} TO the user, or make it the owner of the database",
            )
        if not owns:
            return result(
                CheckState.FAILED,
                f"{text}, and another user owns the table aggregates",
                "make the user its owner",
            )
        return result(CheckState.OK, f"{text}; MarketFlow applies it at its next start")
    if newer:
        text = f"{', '.join(newer)} applied by a newer MarketFlow"
        return result(CheckState.WARNING, text, "run that version; this one does not know the changes")
    if connection.execute(_NOT_VALIDATED).fetchall():
        return result(
            CheckState.WARNING,
            "up to date, but rows older than the constraint aggregates_valid may be invalid, and answers omit those",
            "correct or delete the rows that marketflow migrate, or the log of MarketFlow's next start, names",
        )
    return result(CheckState.OK, f"up to date: {', '.join(sorted(done))}; rights to read and write")


def _rows(where: str, connection: BoundedConnection, settings: Settings) -> CheckResult:
    """Report the age of the newest row."""
    mode = settings.mode.value
    exists = connection.execute("select to_regclass('aggregates') is not null").fetchall()[0][0]
    newest = None
    if exists:
        exchanges = [exchange.name for exchange in settings.exchanges]
        ((newest,),) = connection.execute(_NEWEST, [exchanges, list(settings.symbols), mode]).fetchall()
    if newest is None:
        return CheckResult("PostgreSQL rows", where, CheckState.OK, f"none of {mode} mode yet")
    age = (milliseconds(system_clock()) - to_unix_ms(newest)) / 1000
    text = f"the newest minute of {mode} mode began {seconds_text(age)} ago"
    return CheckResult("PostgreSQL rows", where, CheckState.OK, text)


def _partitions(where: str, connection: BoundedConnection, settings: Settings) -> list[CheckResult]:
    """Report daily partitions, and the rest of a conversion."""
    if connection.execute(_HAS_PARTITIONS).fetchall() != [(True,)]:
        return []
    ((since, number, may, is_bounded),) = connection.execute(_PARTITIONS, [FIRST_PARTITION]).fetchall()

    def warning(found: str, advice: str) -> list[CheckResult]:
        return [CheckResult("PostgreSQL partitions", where, CheckState.WARNING, found, advice)]

    if is_bounded:
        text = f"a conversion was killed: its constraint {FIRST_PARTITION} will refuse rows"
        return warning(text, "run marketflow migrate --partition as the owner of the tables again")
    if since is None:
        return []
    found = f"{number} partitions, daily ones from {since:%Y-%m-%d} on"
    if not may:
        functions = "aggregates_add_partitions, aggregates_drop_partition"
        return warning(f"{found}, and the user may neither add nor drop any", f"GRANT EXECUTE ON FUNCTION {functions}")
    if not settings.archive.keep_minutes:
        advice = "set it: queries slow down with each partition"
        return warning(f"{found}, and archive.keep_minutes is not set", advice)
    return [CheckResult("PostgreSQL partitions", where, CheckState.OK, found)]


def _timescale(where: str, connection: BoundedConnection) -> list[CheckResult]:
    """Report TimescaleDB, if it is there."""
    ((installed, has_view),) = connection.execute(_TIMESCALE).fetchall()
    if not installed and not has_view:
        return []
    is_hypertable = has_view and bool(connection.execute(_HYPERTABLE).fetchall())
    if not is_hypertable:
        return [
            CheckResult("TimescaleDB", where, CheckState.OK, "installed; aggregates is a plain table, as it must be")
        ]
    advice = "make it a plain table: triggers with transition tables, which keep days right, do not fire for chunks"
    return [CheckResult("TimescaleDB", where, CheckState.WARNING, "installed; aggregates is a hypertable", advice)]


def _advice(text: str) -> str:
    """Return advice by the words of libpq, and of a server whose messages are English."""
    for words, advice in {
        "too old": "upgrade PostgreSQL",
        "unsupported startup parameter": POOLED,
        "prepared statement": POOLED,
        "password": "set postgres.user and postgres.password (MARKETFLOW_POSTGRES__PASSWORD)",
        "pg_hba": "permit this machine, user and database in pg_hba.conf",
        "root certificate": "set postgres.sslrootcert to the file with the certificate of the server's authority",
        "SSL": "set postgres.sslmode to what the server offers; over a network, prefer or disable on purpose only",
        "certificate": "set postgres.sslrootcert to the certificate of the server's authority, or postgres.sslmode",
        "role": "CREATE ROLE ... LOGIN, or set postgres.user",
        "database": "CREATE DATABASE, or set postgres.dbname",
        "resolve": "correct postgres.host; empty, it is the embedded PostgreSQL",
        "refused": "start PostgreSQL, or correct postgres.host and postgres.port; no host: the embedded PostgreSQL",
        "timeout": "check whether it is frozen or overloaded, and whether a firewall is in between",
        "no answer": "check whether it is frozen or overloaded, and whether a firewall is in between",
        "too many": "raise max_connections, or end other clients",
        "Permission denied": AS_OWNER,
        "permission": "GRANT what is named to the user",
    }.items():
        if words in text:
            return advice
    return "see PostgreSQL's log"
