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
    """What is found, by what was looked at."""
    at = {"redis.host": HOST, "redis.port": port, "redis.password": password}
    settings = load(None, at | {f"redis.{name}": value for name, value in more.items()})
    return {result.what: result for result in redis_checks.redis_check(settings, find_servers(settings)).run()}


def only(results: dict[str, CheckResult]) -> CheckResult:
    (result,) = results.values()
    return result


@contextmanager
def server(folder: Path, *commands: str, password: str = "") -> Iterator[RedisServer]:
    """A Redis of its own, which has been told some commands."""
    with RedisServer(folder / "redis", password, persistent=False) as running:
        with running.client() as client:
            for command in commands:
                client.execute_command(*command.split())
        yield running


def test_a_healthy_one_is_ok_in_all_respects_and_nothing_is_written(redis_db: RedisServer) -> None:
    found = look(redis_db.port)
    assert {what: each.state for what, each in found.items()} == dict.fromkeys(
        ["Redis", "Redis memory", "Redis rights"], CheckState.OK
    )
    assert found["Redis"].found.startswith("Redis 6.2")
    assert "noeviction" in found["Redis memory"].found
    with redis_db.client() as client:
        assert client.dbsize() == 0


def test_all_that_the_application_sends_is_tried(
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
    ("given", "told"), [("", "it asks for a password, and none is set"), ("hush", "it refuses the password")]
)
def test_a_password_that_is_missing_or_wrong_is_told_but_not_shown(server_folder: Path, given: str, told: str) -> None:
    with server(server_folder, password=PASSWORD) as running:
        result = only(look(running.port, given))
        assert look(running.port, PASSWORD)["Redis"].state is CheckState.OK
    assert (result.state, result.found) == (CheckState.FAILED, told)
    assert result.advice.startswith("set redis.password")
    assert PASSWORD not in str(result)
    assert "hush" not in str(result)


def test_a_refused_connection_and_an_unknown_name_are_told() -> None:
    refused, unknown = only(look(free_port())), only(look(6379, host="no-such-host.invalid"))
    assert (refused.state, unknown.state) == (CheckState.FAILED, CheckState.FAILED)
    assert "refused" in refused.found
    assert "start Redis" in refused.advice
    assert "Name or service not known" in unknown.found or "name resolution" in unknown.found


def test_a_database_that_is_not_there_is_told(redis_db: RedisServer) -> None:
    result = only(look(redis_db.port, db=99))
    assert (result.state, result.advice) == (CheckState.FAILED, "set redis.db to a smaller number")


def test_a_frozen_server_is_given_up(server_folder: Path) -> None:
    with server(server_folder) as running:
        running.pause()
        result = only(look(running.port))
        running.resume()
    assert result.state is CheckState.FAILED
    assert "frozen" in result.advice


@pytest.mark.parametrize("fault", [Proxy.swallow, Proxy.vanish])
def test_a_server_that_is_swallowed_is_given_up(redis_db: RedisServer, fault: object) -> None:
    with Proxy(redis_db.port) as proxy:
        fault(proxy)  # type: ignore[operator]
        result = only(look(proxy.port))
    assert result.state is CheckState.FAILED
    assert "firewall" in result.advice


def test_a_replica_is_told_with_its_master(server_folder: Path, redis_db: RedisServer) -> None:
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
def test_a_policy_that_lets_prices_go_is_told(
    server_folder: Path, maxmemory: str, policy: str, state: CheckState
) -> None:
    with server(server_folder, f"CONFIG SET maxmemory {maxmemory}", f"CONFIG SET maxmemory-policy {policy}") as running:
        result = look(running.port)["Redis memory"]
    assert result.state is state
    assert ("noeviction" in result.advice) is (state is not CheckState.OK)


def test_full_memory_is_told_for_both_reasons(server_folder: Path) -> None:
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
        ("resetkeys ~other:*", "refused: GET, MGET, SET, DEL"),
        ("resetchannels", "refused: PUBLISH, SUBSCRIBE ("),
    ],
)
def test_commands_keys_and_channels_that_the_user_may_not_use_are_named(
    server_folder: Path, rule: str, refused: str
) -> None:
    with server(server_folder, f"ACL SETUSER default {rule}") as running:
        found = look(running.port)
    assert found["Redis"].state is CheckState.OK
    assert found["Redis rights"].state is CheckState.FAILED
    assert found["Redis rights"].found.startswith(refused)
    assert "ACL" in found["Redis rights"].advice


def test_the_right_to_keys_of_marketflow_alone_will_do(server_folder: Path) -> None:
    rule = "ACL SETUSER default resetkeys resetchannels ~marketflow:* &marketflow:*"
    with server(server_folder, rule) as running:
        assert look(running.port)["Redis rights"].state is CheckState.OK


def test_a_server_that_may_not_be_asked_about_itself_is_a_warning(server_folder: Path) -> None:
    with server(server_folder, "ACL SETUSER default -info") as running:
        found = look(running.port)
    assert found.keys() == {"Redis", "Redis rights"}
    assert found["Redis"].state is CheckState.WARNING


@pytest.mark.parametrize(
    ("about", "seconds", "state", "told"),
    [
        ({"redis_version": "5.0.14"}, 0.0, CheckState.WARNING, "MarketFlow is tested with 6.2 and newer"),
        ({"redis_version": "10.0.1"}, 0.0, CheckState.OK, "Redis 10.0.1"),
        ({"redis_version": "7.4", "aof_last_write_status": "err"}, 0.0, CheckState.WARNING, "cannot save"),
        ({"redis_version": "7.4", "rdb_last_bgsave_status": "err"}, 0.0, CheckState.WARNING, "cannot save"),
        ({"redis_version": "7.4"}, 0.4, CheckState.FAILED, "answers in 400 ms; MarketFlow gives up after 250 ms"),
    ],
)
def test_what_a_server_says_of_itself_is_judged(
    about: dict[str, object], seconds: float, state: CheckState, told: str
) -> None:
    result = redis_checks.server_result("here", seconds, about)
    assert result.state is state
    assert told in result.found


def test_something_else_on_the_port_is_told(postgres_server: object) -> None:
    result = only(look(postgres_server.port))  # type: ignore[attr-defined]
    assert result.state is CheckState.FAILED
    assert result.advice


def test_a_node_of_a_cluster_is_told(server_folder: Path) -> None:
    class Node(RedisServer):
        def server_options(self) -> dict[str, str]:
            return super().server_options() | {"cluster-enabled": "yes"}

    with Node(server_folder / "redis", persistent=False) as running:
        result = look(running.port)["Redis"]
    assert result.state is CheckState.FAILED
    assert "cluster" in result.found
