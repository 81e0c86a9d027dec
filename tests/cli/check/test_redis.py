from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from marketflow.cli.check import redis_checks
from marketflow.cli.check.check_result import CheckResult, CheckState
from marketflow.runtime.store_servers import find_servers
from marketflow.settings import load
from tests.support.application import Application
from tests.support.oracle import Rows
from tests.support.proxy import Proxy
from tests.support.servers import HOST, RedisServer, free_port, wait_until

pytestmark = pytest.mark.usefixtures("nothing_set")

PASSWORD = "correct horse"


def look(port: int, password: str = "", **more: object) -> dict[str, CheckResult]:
    """Return the results by what was checked."""
    at = {"redis.host": HOST, "redis.port": port, "redis.password": password}
    settings = load(None, at | {f"redis.{name}": value for name, value in more.items()})
    return {result.what: result for result in redis_checks.redis_check(settings, find_servers(settings)).run()}


def only(results: dict[str, CheckResult]) -> CheckResult:
    (result,) = results.values()
    return result


@contextmanager
def server(folder: Path, *commands: str, password: str = "") -> Iterator[RedisServer]:
    """Yield a dedicated Redis that has executed some commands."""
    with RedisServer(folder / "redis", password, persistent=False) as running:
        with running.client() as client:
            for command in commands:
                client.execute_command(*command.split())
        yield running


def test_healthy_redis_is_ok_and_stays_empty(redis_db: RedisServer) -> None:
    found = look(redis_db.port)
    assert {what: each.state for what, each in found.items()} == dict.fromkeys(
        ["Redis", "Redis memory", "Redis rights"], CheckState.OK
    )
    assert found["Redis"].found.startswith("Redis 6.2")
    assert "noeviction" in found["Redis memory"].found
    with redis_db.client() as client:
        assert client.dbsize() == 0


def test_check_covers_all_commands_of_the_application(
    server_folder: Path, servers: dict[str, object], redis_db: RedisServer, rows: Callable[[], Rows]
) -> None:
    with redis_db.client() as client:
        client.config_resetstat()
        with Application(server_folder, servers | {"FLOW__WINDOW_SECONDS": 1}) as application:
            wait_until(rows)
            for path in ("/prices/latest/BTCUSDT", "/prices/average/BTCUSDT?period=5m", "/prices/highest/BTCUSDT"):
                application.get(path)
            application.switch("live")
        sent = {name.removeprefix("cmdstat_").upper() for name in client.info("commandstats")}
    by_any_client = {"PING", "SELECT", "MULTI", "EXEC", "CLIENT", "HELLO", "AUTH", "INFO", "CONFIG"}
    assert {"HSET", "EVAL", "SUBSCRIBE"} <= sent
    assert sent - by_any_client <= {name for name, *_ in redis_checks.COMMANDS} | {"SUBSCRIBE"}


@pytest.mark.parametrize(
    ("given", "message"), [("", "it asks for a password, and none is set"), ("hush", "it refuses the password")]
)
def test_wrong_password_fails_without_showing_it(server_folder: Path, given: str, message: str) -> None:
    with server(server_folder, password=PASSWORD) as running:
        result = only(look(running.port, given))
        assert look(running.port, PASSWORD)["Redis"].state is CheckState.OK
    assert (result.state, result.found) == (CheckState.FAILED, message)
    assert result.advice.startswith("set redis.password")
    assert PASSWORD not in str(result)
    assert "hush" not in str(result)


def test_refused_connection_and_unknown_name_fail() -> None:
    refused, unknown = only(look(free_port())), only(look(6379, host="no-such-host.invalid"))
    assert (refused.state, unknown.state) == (CheckState.FAILED, CheckState.FAILED)
    assert "refused" in refused.found
    assert "start Redis" in refused.advice
    assert "Name or service not known" in unknown.found or "name resolution" in unknown.found


def test_unknown_database_number_fails(redis_db: RedisServer) -> None:
    result = only(look(redis_db.port, db=99))
    assert (result.state, result.advice) == (CheckState.FAILED, "set redis.db to a smaller number")


def test_frozen_server_fails_at_the_timeout(server_folder: Path) -> None:
    with server(server_folder) as running:
        running.pause()
        result = only(look(running.port))
        running.resume()
    assert result.state is CheckState.FAILED
    assert "frozen" in result.advice


@pytest.mark.parametrize("fault", [Proxy.swallow, Proxy.vanish])
def test_dropped_packets_fail_at_the_timeout(redis_db: RedisServer, fault: object) -> None:
    with Proxy(redis_db.port) as proxy:
        fault(proxy)  # type: ignore[operator]
        result = only(look(proxy.port))
    assert result.state is CheckState.FAILED
    assert "firewall" in result.advice


def test_replica_fails_and_names_its_master(server_folder: Path, redis_db: RedisServer) -> None:
    with server(server_folder, f"REPLICAOF {HOST} {redis_db.port}") as running:
        found = look(running.port)
    assert found["Redis"].state is CheckState.FAILED
    assert found["Redis"].advice == f"set redis.host and redis.port to {HOST}:{redis_db.port}"
    assert found["Redis rights"].state is CheckState.FAILED
    assert "HSET" in found["Redis rights"].found
    assert "ZRANGE," not in found["Redis rights"].found


@pytest.mark.parametrize(
    ("maxmemory", "policy", "state"),
    [
        ("0", "allkeys-lru", CheckState.WARNING),
        ("100mb", "allkeys-lru", CheckState.FAILED),
        ("100mb", "volatile-ttl", CheckState.FAILED),
        ("100mb", "noeviction", CheckState.OK),
    ],
)
def test_eviction_policy_is_reported(server_folder: Path, maxmemory: str, policy: str, state: CheckState) -> None:
    with server(server_folder, f"CONFIG SET maxmemory {maxmemory}", f"CONFIG SET maxmemory-policy {policy}") as running:
        result = look(running.port)["Redis memory"]
    assert result.state is state
    assert ("noeviction" in result.advice) is (state is not CheckState.OK)


def test_full_memory_fails_memory_and_rights(server_folder: Path) -> None:
    with server(server_folder, "CONFIG SET maxmemory 1") as running:
        found = look(running.port)
    assert found["Redis memory"].state is CheckState.FAILED
    assert found["Redis memory"].advice.startswith("raise maxmemory")
    assert found["Redis rights"].state is CheckState.FAILED
    assert found["Redis rights"].advice == "raise maxmemory"


@pytest.mark.parametrize(
    ("rule", "refused"),
    [
        ("-hset -publish", "refused: HSET, PUBLISH ("),
        ("-eval", "refused: EVAL ("),
        ("-subscribe", "refused: SUBSCRIBE ("),
        ("resetkeys ~other:*", "refused: GET, SET, DEL"),
        ("resetchannels", "refused: PUBLISH, SUBSCRIBE ("),
    ],
)
def test_missing_acl_rights_are_named(server_folder: Path, rule: str, refused: str) -> None:
    with server(server_folder, f"ACL SETUSER default {rule}") as running:
        found = look(running.port)
    assert found["Redis"].state is CheckState.OK
    assert found["Redis rights"].state is CheckState.FAILED
    assert found["Redis rights"].found.startswith(refused)
    assert "ACL" in found["Redis rights"].advice


def test_rights_to_marketflow_keys_are_enough(server_folder: Path) -> None:
    rule = "ACL SETUSER default resetkeys resetchannels ~marketflow:* &marketflow:*"
    with server(server_folder, rule) as running:
        assert look(running.port)["Redis rights"].state is CheckState.OK


def test_missing_right_to_info_warns(server_folder: Path) -> None:
    with server(server_folder, "ACL SETUSER default -info") as running:
        found = look(running.port)
    assert found.keys() == {"Redis", "Redis rights"}
    assert found["Redis"].state is CheckState.WARNING


class RenamingServer(RedisServer):
    """A Redis without some commands, as hosting companies run it."""

    renamed = ("", "")

    def command(self) -> list[str]:
        return [*super().command(), "--rename-command", *self.renamed]


@pytest.mark.parametrize(
    ("renamed", "what", "message"),
    [
        (("EVAL", ""), "Redis rights", "refused: EVAL (unknown command"),
        (("HSET", "HSETX"), "Redis rights", "refused: HSET (unknown command"),
        (("INFO", ""), "Redis", "answers in"),
    ],
)
def test_renamed_commands_are_named(server_folder: Path, renamed: tuple[str, str], what: str, message: str) -> None:
    server = RenamingServer(server_folder / "redis", persistent=False)
    server.renamed = renamed
    with server as running:
        found = look(running.port)
    assert found.keys() >= {"Redis", "Redis rights"}
    assert found[what].state is (CheckState.WARNING if what == "Redis" else CheckState.FAILED)
    assert message in found[what].found
    assert "with args" not in found[what].found
    assert "rename-command" in found[what].advice


def test_missing_rights_are_those_of_the_configured_user(server_folder: Path) -> None:
    with server(server_folder, "ACL SETUSER app on >app-password +@all -hset -info ~* &*") as running:
        found = look(running.port, "app-password", username="app")
    assert found["Redis rights"].advice.startswith("permit them to the user app,")
    assert "ACL SETUSER app +info" in found["Redis"].advice


@pytest.mark.parametrize(
    ("about", "seconds", "state", "message"),
    [
        ({"redis_version": "5.0.14"}, 0.0, CheckState.WARNING, "MarketFlow is tested with 6.2 and newer"),
        ({"redis_version": "10.0.1"}, 0.0, CheckState.OK, "Redis 10.0.1"),
        ({"redis_version": "7.4", "aof_last_write_status": "err"}, 0.0, CheckState.WARNING, "cannot save"),
        ({"redis_version": "7.4", "rdb_last_bgsave_status": "err"}, 0.0, CheckState.WARNING, "cannot save"),
        ({"redis_version": "7.4"}, 0.4, CheckState.FAILED, "answers in 400 ms; MarketFlow's timeout is 250 ms"),
    ],
)
def test_info_and_latency_decide_the_state(
    about: dict[str, object], seconds: float, state: CheckState, message: str
) -> None:
    result = redis_checks.server_result("here", seconds, about)
    assert result.state is state
    assert message in result.found


def test_another_program_on_the_port_fails(postgres_server: object) -> None:
    result = only(look(postgres_server.port))  # type: ignore[attr-defined]
    assert result.state is CheckState.FAILED
    assert result.advice


def test_cluster_node_fails_the_check(server_folder: Path) -> None:
    class Node(RedisServer):
        def server_options(self) -> dict[str, str]:
            return super().server_options() | {"cluster-enabled": "yes"}

    with Node(server_folder / "redis", persistent=False) as running:
        result = look(running.port)["Redis"]
    assert result.state is CheckState.FAILED
    assert "a node of a Redis Cluster" in result.found
    assert "set redis.nodes" in result.advice
