"""The compose file: sound, closed, and about the application as it is."""

import json
import os
import re
import subprocess
from typing import Any

import pytest

from marketflow import __version__
from marketflow.cli.main import parse
from marketflow.errors import SettingsError
from marketflow.model import Mode
from tests.deploy.configuration import DEPLOY, compose, env_file, load_with, program
from tests.deploy.image import instructions

SIMULATED = ("exchange1", "exchange2", "exchange3")
SCALED = ("ingest", "api")  # which take the place of `app` on a cluster
OURS = ("app", "migrate", *SIMULATED, *SCALED)
OF_THE_IMAGE = ("app", "migrate", "api")  # whose health check is that of the image
NODES = tuple(f"redis{number}" for number in range(1, 7))
JOBS = ("migrate", "redis-cluster")
MONITORING = ("prometheus", "grafana")
PROFILES = {"monitoring": MONITORING, "demo": SIMULATED, "cluster": (*SCALED, *NODES, "redis-cluster")}


@pytest.fixture
def services() -> dict[str, Any]:
    found: dict[str, Any] = compose()["services"]
    return found


def test_docker_compose_reads_the_file_as_these_tests_do(services: dict[str, Any]) -> None:
    command = [program("docker-compose"), "--file", str(DEPLOY / "compose.yaml")]
    profiles = [word for name in PROFILES for word in ("--profile", name)]
    example = ["--env-file", str(DEPLOY / "compose.env.example")]
    done = subprocess.run(
        [*command, *profiles, *example, "config", "--format", "json"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    theirs = json.loads(done.stdout)["services"]
    assert theirs.keys() == services.keys()
    for name, service in services.items():
        assert theirs[name]["image"] == service["image"]
        assert theirs[name].get("environment", {}) == service.get("environment", {})
        assert ("healthcheck" in theirs[name]) == ("healthcheck" in service)

    without_profiles = subprocess.run(
        [*command, *example, "config", "--services"], capture_output=True, text=True, check=True
    )
    assert {*without_profiles.stdout.split()} == {"app", "migrate", "redis", "postgres"}
    chosen = {"MARKETFLOW_EXCHANGES": "okx,mine=10.0.0.1:40101", "MARKETFLOW_SYMBOLS": "XRPUSDT"}
    other = subprocess.run(
        [*command, *example, "config", "--format", "json"],
        capture_output=True, text=True, check=True, env=os.environ | chosen,
    )  # fmt: skip
    environment = json.loads(other.stdout)["services"]["app"]["environment"]
    assert {name: environment[name] for name in chosen} == chosen

    without = subprocess.run([*command, "config", "--quiet"], capture_output=True, text=True, check=False)
    assert without.returncode != 0
    assert "copy compose.env.example to .env" in without.stderr


def test_compose_file_follows_the_specification() -> None:
    command = [program("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_service_is_hardened_limited_and_health_checked(services: dict[str, Any]) -> None:
    assert services.keys() == {*OURS, *MONITORING, *NODES, "redis", "redis-cluster", "postgres"}
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == ("on-failure" if name in JOBS else "unless-stopped"), name
        assert service["mem_limit"], name
        assert service["stop_grace_period"], name
        if name == "ingest":  # it has no port
            assert service["healthcheck"] == {"disable": True}
        elif name not in (*OF_THE_IMAGE, *JOBS):
            assert service["healthcheck"]["test"], name
        assert service["image"].count(":") == 1, name
        assert not service["image"].endswith(":latest"), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service.get("profiles", []) == [profile for profile, own in PROFILES.items() if name in own], name
    # The application is not stopped in the middle of what it still writes.
    for name in ("app", *SCALED):
        assert int(services[name]["stop_grace_period"].removesuffix("s")) > 5
    for name in ("redis", *NODES, "postgres"):
        assert "ports" not in services[name]
        assert services[name]["networks"] == ["stores"]
    assert compose()["networks"]["stores"] == {"internal": True}


def test_application_settings_name_existing_services(
    services: dict[str, Any], monkeypatch: pytest.MonkeyPatch, nothing_set: None
) -> None:
    app, redis, postgres = (services[name] for name in ("app", "redis", "postgres"))
    image = [each for each in instructions(DEPLOY / "Dockerfile") if each.word == "ENV"]
    own = dict(pair.split("=", 1) for each in image for pair in each.arguments if pair.startswith("MARKETFLOW_"))
    # The example's own is refused: it is to be changed.
    with pytest.raises(SettingsError, match=r"http\.token = \*\*\*"):
        load_with(monkeypatch, own | app["environment"])
    token = "a token of one's own".replace(" ", "-")
    found = load_with(monkeypatch, own | app["environment"] | {"MARKETFLOW_HTTP__TOKEN": token})
    assert found.mode is Mode.LIVE
    assert (found.http.host, found.http.token) == ("0.0.0.0", token)
    assert app["ports"] == [f"127.0.0.1:8080:{found.http.port}"]
    assert {"localhost", "app"} <= {*found.http.allowed_hosts}
    assert (found.redis.host, found.postgres.host) == ("redis", "postgres")
    assert found.redis.password == redis["environment"]["REDISCLI_AUTH"]
    roles = (DEPLOY / "postgres/roles.sql").read_text()
    owner = services["migrate"]["environment"]
    users = {found.postgres.user: found.postgres.password}
    users |= {owner["MARKETFLOW_POSTGRES__USER"]: owner["MARKETFLOW_POSTGRES__PASSWORD"]}
    assert users.keys() == {"marketflow_writer", "marketflow_owner"}
    for user, password in users.items():
        kind = user.removeprefix("marketflow_")
        assert f"create role {user} login password :'{kind}_password'" in roles
        assert password == postgres["environment"][f"{kind.upper()}_PASSWORD"]
    assert f"create database {found.postgres.dbname} " in roles
    assert {"default", "stores"} == {*app["networks"]}
    assert {exchange.venue for exchange in found.exchanges} == {"binance", "coinbase", "kraken"}
    assert found.symbols == ("BTCUSDT", "DOGEUSDT", "TONUSDT", "SOLUSDT", "ETHUSDT")
    demo = re.search(r"^# (MARKETFLOW_EXCHANGES)=(.+)$", (DEPLOY / "compose.env.example").read_text(), re.M)
    assert demo is not None
    found = load_with(monkeypatch, {demo[1]: demo[2]})
    for exchange in found.exchanges:
        command = services[exchange.host]["command"]
        options = {"host": "0.0.0.0", "port": exchange.port, "name": exchange.name, "symbols": ",".join(found.symbols)}
        assert command == ["exchange", *(f"--{name}={value}" for name, value in options.items())]
        assert parse(command).params["symbols"] == found.symbols
        assert f":{exchange.port:X} " in services[exchange.host]["healthcheck"]["test"][3]
    assert {*SIMULATED} == {exchange.host for exchange in found.exchanges}
    assert app["depends_on"].keys() == {"redis", "postgres", "migrate"}


def test_cluster_profile_runs_both_roles_on_six_nodes(
    services: dict[str, Any], monkeypatch: pytest.MonkeyPatch, nothing_set: None
) -> None:
    started = {*SCALED}
    while more := {each for name in started for each in services[name].get("depends_on", ())} - started:
        started |= more
    assert started == {*SCALED, *NODES, "redis-cluster", "migrate", "postgres"}  # neither `app` nor its Redis
    ingest, api, job = (services[name] for name in ("ingest", "api", "redis-cluster"))
    assert [parse(service["command"]).params["role"] for service in (ingest, api)] == ["ingest", "api"]
    assert ingest["scale"] == 2
    assert ingest["environment"] == api["environment"]
    assert api["ports"] == services["app"]["ports"]
    token = {"MARKETFLOW_HTTP__TOKEN": "a-token-of-ones-own"}
    found = load_with(monkeypatch, api["environment"] | token)
    assert found.redis.host == ""
    assert found.redis.nodes == tuple(f"{name}:6379" for name in NODES[:3])
    assert found.redis.password == services["redis1"]["environment"]["REDISCLI_AUTH"]
    assert job["command"][2:] == [f"{name}:6379" for name in NODES]
    assert {*job["depends_on"]} == {*NODES}
    assert {services[name]["hostname"] for name in NODES} == {*NODES}
    assert len({services[name]["volumes"][0] for name in NODES}) == len(NODES)
    # Prometheus asks for the service whose place it takes.
    assert api["networks"]["default"] == {"aliases": ["app"]}
    assert "app" in found.http.allowed_hosts


def test_own_services_share_one_image_of_this_version(services: dict[str, Any]) -> None:
    assert {services[name]["image"] for name in OURS} == {f"marketflow:{__version__}"}


def test_redis_has_a_memory_limit_and_never_evicts(services: dict[str, Any]) -> None:
    for name in ("redis", *NODES):
        script = services[name]["command"][2].split("\n")
        assert "maxmemory-policy noeviction" in script
        assert "maxmemory 256mb" in script
        assert "requirepass $REDISCLI_AUTH" in script
        assert script[-2:] == ["END", ""]


def test_each_variable_of_the_example_is_used() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    for name in env_file(DEPLOY / "compose.env.example"):
        assert f"${{{name}:" in text


def test_mounted_files_exist(services: dict[str, Any]) -> None:
    mounts = [mount.split(":") for service in services.values() for mount in service.get("volumes", [])]
    files = [mount for mount in mounts if mount[0].startswith("./")]
    assert len(files) == 6
    assert all(mount[2] == "ro" and (DEPLOY / mount[0]).exists() for mount in files)
    assert {mount[0] for mount in mounts if mount not in files} == compose()["volumes"].keys()
