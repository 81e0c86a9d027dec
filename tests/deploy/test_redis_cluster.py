"""The Redis Cluster of deploy/: made of the nodes of the compose file, by the job that makes it there."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from marketflow.cli.check.check_result import CheckState
from marketflow.cli.check.cluster_checks import cluster_check
from marketflow.stores.redis.connection import connection_keywords
from tests.deploy.configuration import DEPLOY, compose
from tests.support.redis_cluster import redis_program
from tests.support.servers import HOST, free_port, wait_until

PASSWORD = "open-sesame"


class ComposedNode:
    """A node of the compose file as a process: its shell command, at a port and with a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        folder.mkdir(parents=True)

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def start(self) -> None:
        own = f"dir {self._folder}\nport {self.port}\ncluster-port {free_port()}\nbind {HOST}"
        script = compose()["services"]["redis1"]["command"][2].replace("dir /data", own)
        environment = os.environ | {"REDISCLI_AUTH": PASSWORD, "HOSTNAME": "localhost"}
        self._process = subprocess.Popen(["sh", "-c", script], env=environment, stdout=subprocess.DEVNULL)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)

    def client(self) -> "redis.Redis":
        return redis.Redis(host=HOST, port=self.port, password=PASSWORD, socket_timeout=2, decode_responses=True)


@pytest.fixture(scope="module")
def nodes(server_root: Path) -> Iterator[list[ComposedNode]]:
    """Six nodes that know nothing of each other."""
    for name in ("redis-server", "redis-cli"):
        if redis_program(name) is None or shutil.which(name) is None:
            pytest.skip(f"there is no {name} of 7.0 or later on PATH")
    made = [ComposedNode(server_root / f"composed{number}") for number in range(6)]
    for node in made:
        node.start()
    yield made
    for node in made:
        node.stop()


def create(nodes: list[ComposedNode]) -> str:
    """Run the job of the compose file with the addresses of these nodes; return what it prints."""
    job = compose()["services"]["redis-cluster"]
    assert job["command"][:2] == ["sh", "/create-cluster"]
    assert job["volumes"] == ["./redis/create-cluster:/create-cluster:ro"]
    command = ["sh", str(DEPLOY / "redis/create-cluster"), *(node.address for node in nodes)]
    environment = os.environ | {"REDISCLI_AUTH": PASSWORD}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_job_makes_the_cluster_that_check_wants(nodes: list[ComposedNode]) -> None:
    assert create(nodes).endswith("the cluster serves all slots\n")
    buckets = [f"marketflow:{{b{number}}}:check:rights" for number in range(16)]
    check = cluster_check([(HOST, nodes[0].port)], connection_keywords(HOST, 0, PASSWORD, 0), buckets)

    def is_well() -> bool:  # a replica needs a moment for its first copy
        return {result.state for result in check.run()} == {CheckState.OK}

    wait_until(is_well, 20, f"{check.run()}")


def test_second_job_keeps_a_cluster_whose_addresses_changed(nodes: list[ComposedNode]) -> None:
    create(nodes)
    with nodes[0].client() as client:
        owned = client.execute_command("CLUSTER MYID")
        key = next(f"key{number}" for number in range(100) if not _moved(client, f"key{number}"))
    for node in nodes:
        node.stop()
        node.port = free_port()
    for node in nodes:
        node.start()
    create(nodes)
    with nodes[0].client() as client:
        assert client.execute_command("CLUSTER MYID") == owned

        def answers() -> bool:
            try:
                return bool(client.get(key) == "kept")
            except redis.RedisError:
                return False

        wait_until(answers, 20)


def _moved(client: "redis.Redis", key: str) -> bool:
    try:
        client.set(key, "kept")
    except redis.ResponseError:
        return True
    return False
