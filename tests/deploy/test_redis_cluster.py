"""The Redis Cluster of deploy/: made of the nodes of the compose file, by the job that makes it there."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from marketflow.cli.check.check_result import Check, CheckState
from marketflow.cli.check.cluster_checks import cluster_check
from marketflow.runtime.store_servers import find_servers
from marketflow.settings import load
from tests.deploy.configuration import DEPLOY, compose, shell_blocks
from tests.support.application import Application
from tests.support.redis_cluster import ClusterNode, RedisCluster, redis_program
from tests.support.servers import HOST, free_port, wait_until

pytestmark = pytest.mark.usefixtures("nothing_set")

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


def check_of(address: str, username: str = "") -> Check:
    """Return what `marketflow check` does for a cluster."""
    settings = load(None, {"redis.nodes": [address], "redis.username": username, "redis.password": PASSWORD})
    return cluster_check(settings, find_servers(settings))


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
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_job_makes_the_cluster_that_check_wants(nodes: list[ComposedNode]) -> None:
    assert create(nodes).endswith("the cluster serves all slots\n")
    check = check_of(nodes[0].address)

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

        wait_until(answers, 60)


def _moved(client: "redis.Redis", key: str) -> bool:
    try:
        client.set(key, "kept")
    except redis.ResponseError:
        return True
    return False


# --- The section of deploy/README.md about operating a cluster, carried out as written


@pytest.fixture
def cluster(server_folder: Path) -> Iterator[RedisCluster]:
    if shutil.which("redis-cli") is None:
        pytest.skip("there is no redis-cli on PATH")
    with RedisCluster(server_folder / "operated") as running:
        yield running


class Shell:
    """Runs the commands of the section, each found by a word that it has."""

    def __init__(self) -> None:
        self._blocks = shell_blocks("Redis Cluster")

    def run(self, word: str, **variables: str) -> str:
        """Return what they print; they must succeed."""
        done = self._done(word, variables)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "[ERR]" not in done.stdout
        return done.stdout

    def succeeds(self, word: str, **variables: str) -> bool:
        """Whether they succeed; just after a change the nodes may not agree yet."""
        return self._done(word, variables).returncode == 0

    def _done(self, word: str, variables: dict[str, str]) -> "subprocess.CompletedProcess[str]":
        (commands,) = (block for block in self._blocks if word in block)
        command = ["bash", "-e", "-c", commands]
        return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)


def empty_node(folder: Path) -> ClusterNode:
    program = redis_program("redis-server")
    assert program
    node = ClusterNode(folder, program)
    node.start()
    return node


def test_users_of_the_acl_file_have_the_rights_they_need(
    cluster: RedisCluster, tmp_path: Path, servers: dict[str, object]
) -> None:
    text = (DEPLOY / "redis/cluster-users.acl").read_text().replace("change-me", PASSWORD)
    users = [line.split() for line in text.splitlines() if not line.startswith("user default")]
    assert [user[1] for user in users] == ["operator", "replica", "marketflow"]
    for node in cluster.nodes:
        for user in users:
            node.call("ACL", "SETUSER", *user[1:])
        node.call("CONFIG", "SET", "masteruser", "replica", "masterauth", PASSWORD)
    cluster.failover(cluster.masters()[0])  # whose new replica copies as this user
    results = check_of(cluster.nodes[0].address, "marketflow").run()
    assert {result.state for result in results} == {CheckState.OK}, results
    with redis.Redis(port=cluster.nodes[0].port, username="marketflow", password=PASSWORD) as client:
        for forbidden in (["flushall"], ["keys", "*"], ["config", "get", "*"], ["cluster", "failover"]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*forbidden)
    access = {"REDIS__NODES": cluster.nodes[0].address, "REDIS__USERNAME": "marketflow", "REDIS__PASSWORD": PASSWORD}
    given = {name: value for name, value in servers.items() if name.startswith("POSTGRES__")} | access
    (tmp_path / "api").mkdir()
    ingest = Application(tmp_path, given, ("--role", "ingest"))
    with ExitStack() as stack:
        stack.push(ingest)
        ingest.start(wait=False)
        application = stack.enter_context(Application(tmp_path / "api", given, ("--role", "api")))
        wait_until(lambda: application.find("/prices/latest/BTCUSDT"), 20)
        wait_until(
            lambda: (application.find("/prices/average/BTCUSDT", period="10s") or {"ticks": 0})["ticks"] > 50, 20
        )
        assert application.get("/health")["redis"] == "ok", ingest.log + application.log
        assert application.switch("live")["mode"] == "live"
        assert application.get("/feeds")["series"]  # a command
        logs = ingest.log + application.log
    assert "permission" not in logs.lower()
    assert "Redis cannot be used" not in logs


def test_lost_node_is_replaced_as_the_runbook_says(cluster: RedisCluster, server_folder: Path) -> None:
    shell, master = Shell(), cluster.masters()[0]
    (dead,) = cluster.replicas_of(master)
    dead_id = dead.name
    dead.kill()
    wait_until(lambda: "fail" in master.call("CLUSTER", "NODES"))
    new = empty_node(server_folder / "new")
    try:
        shell.run("cluster forget", NODE=master.address, DEAD_ID=dead_id, NEW=new.address, MASTER_ID=master.name)
        wait_until(lambda: "state=online" in master.call("INFO", "replication"), 20)
        assert dead_id not in master.call("CLUSTER", "NODES")
        wait_until(lambda: shell.succeeds("cluster check", NODE=master.address), 30)
    finally:
        new.stop()


def test_master_is_maintained_and_masters_are_added_and_removed(cluster: RedisCluster, server_folder: Path) -> None:
    shell, master = Shell(), cluster.masters()[0]
    (replica,) = cluster.replicas_of(master)
    shell.run("cluster failover", REPLICA_HOST=HOST, REPLICA_PORT=str(replica.port))
    wait_until(lambda: replica in cluster.masters(), 20)
    cluster.wait_until_whole()
    new = empty_node(server_folder / "new")
    cluster.nodes.append(new)
    try:
        shell.run("use-empty-masters", NEW=new.address, NODE=replica.address)
        assert new in cluster.masters()
        wait_until(lambda: shell.succeeds("cluster fix", NODE=replica.address), 30)
        shell.run("del-node", NODE=replica.address, ID=new.name)
        assert new not in cluster.masters()
    finally:
        cluster.nodes.remove(new)
        new.stop()
