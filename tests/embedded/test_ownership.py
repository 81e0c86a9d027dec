"""Whose files and processes embedded servers trust: ours and root's, and nobody else's; nothing above is changed."""

import os
import pwd
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from marketflow.cli.check.check_result import CheckState
from marketflow.cli.check.data_folder_checks import data_folder_checks
from marketflow.embedded import EmbeddedPostgres, EmbeddedRedis, claim
from marketflow.embedded import ownership as owners
from marketflow.embedded.folder_lock import LOCK
from marketflow.embedded.programs import postgres_programs
from marketflow.embedded.server_process import find_servers
from marketflow.errors import StartError
from marketflow.settings import Settings, load
from tests.support.application import Application
from tests.support.servers import wait_until

NOBODY = pwd.getpwnam("nobody")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of others")


@pytest.fixture
def data_dir(server_folder: Path) -> Path:
    return server_folder / "data"


@contextmanager
def impostor(program: str, folder: Path, user: int | None = None) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that calls itself a server on a folder."""
    command = ["/bin/bash", "-c", f'exec -a {program} /bin/bash -c "echo up; read -t 60 < <(sleep 60)" x {folder}']
    with subprocess.Popen(command, user=user, stdout=subprocess.PIPE, cwd="/", start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        yield process
        os.killpg(process.pid, 9)


def test_servers_get_no_secret_of_the_environment(server_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MARKETFLOW_HTTP__TOKEN", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "PYTHONPATH"):
        monkeypatch.setenv(name, "open sesame")
    with EmbeddedRedis(server_folder / "redis") as redis, EmbeddedPostgres(server_folder / "postgres") as postgres:
        for server in (redis, postgres):
            assert server.process is not None
            for process in (server.process, *server.process.children()):
                found = Path(f"/proc/{process.pid}/environ").read_bytes()
                assert b"open sesame" not in found
                names = {each.partition(b"=")[0] for each in found.split(b"\0") if b"=" in each}
                assert names <= {
                    b"PATH",
                    b"LC_ALL",
                    b"TZ",
                    b"TMPDIR",
                    b"LD_LIBRARY_PATH",
                    b"PWD",
                    b"PGLOCALEDIR",
                    b"PGSYSCONFDIR",
                    b"LC_COLLATE",
                    b"LC_CTYPE",
                    b"LC_MESSAGES",
                    b"LC_MONETARY",
                    b"LC_NUMERIC",
                    b"LC_TIME",
                }


@as_root
def test_log_of_postgres_follows_no_link_of_its_user(data_dir: Path) -> None:
    victim = data_dir.parent / "victim"
    victim.write_text("as it was\n")
    with EmbeddedPostgres(data_dir / "postgres"):
        pass
    folder = data_dir / "postgres"
    user = folder.stat().st_uid
    assert user != 0
    for name in ("log", "postgres.log"):  # wherever its own folder might have it
        (folder / name).symlink_to(victim)
        os.chown(folder / name, user, -1, follow_symlinks=False)
    with EmbeddedPostgres(folder) as server:
        assert victim.read_text() == "as it was\n"
        assert server.log.stat().st_uid == 0
        assert server.log.parent.stat().st_uid == 0


def test_log_that_is_a_link_is_refused(data_dir: Path) -> None:
    victim = data_dir.parent / "victim"
    victim.write_text("as it was\n")
    server = EmbeddedRedis(data_dir / "redis")
    data_dir.mkdir()
    server.log.symlink_to(victim)
    with pytest.raises(StartError, match="cannot be started"):
        server.start()
    assert victim.read_text() == "as it was\n"


# Whose the data folder is


@pytest.mark.parametrize("mode", [0o777, 0o722, 0o770, 0o1777])
def test_data_folder_that_others_may_write_to_is_refused(data_dir: Path, mode: int) -> None:
    data_dir.mkdir()
    data_dir.chmod(mode)
    with pytest.raises(StartError, match=f"other users may write to .*{mode:04o}.*chmod go-w"):
        claim(data_dir).__enter__()
    assert list(data_dir.iterdir()) == []
    assert stat.S_IMODE(data_dir.stat().st_mode) == mode


@as_root
def test_data_folder_of_another_user_is_refused(data_dir: Path) -> None:
    data_dir.mkdir()
    os.chown(data_dir, NOBODY.pw_uid, -1)
    with pytest.raises(StartError, match="belongs to the user nobody, not to root"):
        claim(data_dir).__enter__()
    assert list(data_dir.iterdir()) == []


@as_root
def test_link_of_another_user_as_data_folder_is_refused(data_dir: Path) -> None:
    (data_dir.parent / "mine").mkdir()
    data_dir.symlink_to(data_dir.parent / "mine")
    os.chown(data_dir, NOBODY.pw_uid, -1, follow_symlinks=False)
    with pytest.raises(StartError, match="belongs to the user nobody"):
        claim(data_dir).__enter__()


def test_link_of_the_same_user_as_data_folder_is_followed(data_dir: Path) -> None:
    (data_dir.parent / "mine").mkdir(mode=0o700)
    data_dir.symlink_to(data_dir.parent / "mine")
    with claim(data_dir) as claimed:
        assert claimed == (data_dir.parent / "mine").resolve()


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "folder", "second name", "open", "foreign"])
def test_lock_that_somebody_planted_is_refused(data_dir: Path, kind: str) -> None:
    if kind == "foreign" and os.geteuid() != 0:
        pytest.skip("only root can make files of others")
    data_dir.mkdir(mode=0o700)
    lock, victim = data_dir / LOCK, data_dir.parent / "victim"
    victim.write_text("as it was\n")
    match kind:
        case "link":
            lock.symlink_to(victim)
        case "dangling":
            lock.symlink_to(data_dir.parent / "none")
        case "fifo":
            os.mkfifo(lock)
        case "folder":
            lock.mkdir()
        case "second name":
            lock.hardlink_to(victim)
        case "open":
            lock.touch()
            lock.chmod(0o666)
        case _:
            lock.touch(0o600)
            os.chown(lock, NOBODY.pw_uid, -1)
    with pytest.raises(StartError):
        claim(data_dir).__enter__()
    assert victim.read_text() == "as it was\n"
    assert not (data_dir.parent / "none").exists()


@as_root
@pytest.mark.parametrize("what", ["redis", "redis/redis.sock", "redis/appendonly.aof", "postgres", "postgres/data"])
def test_what_another_user_left_in_the_data_folder_is_refused(data_dir: Path, what: str) -> None:
    path = data_dir / what
    path.parent.mkdir(parents=True)
    if what.endswith("sock"):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif "." in what:
        path.touch()
    else:
        path.mkdir()
    os.chown(path, NOBODY.pw_uid, -1)
    kind = EmbeddedRedis if what.startswith("redis") else EmbeddedPostgres
    server = kind(data_dir / what.split("/")[0])
    with pytest.raises(StartError, match="belongs to the user nobody"):
        server.start()
    assert not server.running
    assert path.lstat().st_uid == NOBODY.pw_uid


def test_refused_data_folder_is_one_line_and_exit_code_1(server_folder: Path) -> None:
    (server_folder / "data").mkdir()
    (server_folder / "data").chmod(0o777)
    for arguments in ((), ("--role", "ingest")):
        application = Application(server_folder, arguments=arguments)
        assert application.fails() == 1
        assert "other users may write to" in application.log.splitlines()[-1]
    assert "Traceback" not in application.log
    assert list((server_folder / "data").iterdir()) == []


# Processes of others


@pytest.mark.parametrize("program", ["redis-server", "postgres"])
@pytest.mark.parametrize("user", [None, "nobody"])
def test_process_that_only_calls_itself_a_server_is_left_alone(data_dir: Path, program: str, user: str | None) -> None:
    if user is not None and os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    kind = EmbeddedRedis if program == "redis-server" else EmbeddedPostgres
    server = kind(data_dir / program)
    with impostor(program, server.data, None if user is None else pwd.getpwnam(user).pw_uid) as process:
        assert find_servers(program, server.data) == []
        with server:
            assert server.running
        assert process.poll() is None


@as_root
def test_process_of_another_user_named_redis_server_stops_no_start(server_folder: Path) -> None:
    """As an ordinary user, who may not signal it."""
    owned = server_folder / "owned"
    owned.mkdir(mode=0o700)
    os.chown(owned, NOBODY.pw_uid, NOBODY.pw_gid)
    program = (
        "import os, sys; sys.path.insert(0, os.getcwd()); "
        "import marketflow.cli.main as cli, marketflow.runtime.processes;"
        "from marketflow.embedded import EmbeddedRedis; import importlib;"
        f"os.setgroups([]); os.setgid({NOBODY.pw_gid}); os.setuid({NOBODY.pw_uid});"
        "from pathlib import Path; server = EmbeddedRedis(Path(sys.argv[1]));"
        "server.start(); print(server.running); server.stop()"
    )
    if not owners.reaches(NOBODY, Path(sys.executable).resolve()):
        pytest.skip("the user nobody cannot run this Python")
    with impostor("redis-server", owned / "redis"):
        done = subprocess.run([sys.executable, "-c", program, str(owned / "redis")], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


# As root: where PostgreSQL's user can get to


@as_root
def test_unreachable_data_folder_is_refused_and_nothing_is_changed(server_folder: Path) -> None:
    closed = server_folder / "closed"
    closed.mkdir(mode=0o700)
    application = Application(server_folder, {"DATA_DIR": closed / "a" / "data"})
    assert application.fails() == 1
    (line,) = application.log.splitlines()
    assert f"the user pgserver, as which it runs, may not enter {closed} (mode 0700)" in line
    assert "set data_dir to" in line
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    assert list(closed.iterdir()) == []


@as_root
def test_start_as_root_changes_no_folder_above_the_data_folder(server_folder: Path) -> None:
    above = server_folder / "above"
    above.mkdir()
    above.chmod(0o711)
    before = {folder: folder.stat().st_mode for folder in (above, *above.parents, Path.home())}
    with Application(server_folder, {"DATA_DIR": above / "data"}) as application:
        assert application.stop()[0] == 0
    assert {folder: folder.stat().st_mode for folder in before} == before


@as_root
def test_folders_made_as_root_are_passable_with_any_umask(server_folder: Path) -> None:
    data_dir = server_folder / "a" / "b" / "data"
    before = os.umask(0o077)
    try:
        with claim(data_dir):
            assert owners.unreachable(data_dir / "postgres") is None
    finally:
        os.umask(before)
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (*data_dir.parents[:2], data_dir)] == [
        0o755,
        0o755,
        0o711,
    ]


def test_user_without_a_home_folder_must_set_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> object:
        raise KeyError

    for name in ("HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    data_dir = load().data_dir  # own servers need none
    with pytest.raises(StartError, match=r"this user has no home folder, .*; set data_dir$"), claim(data_dir):
        pass
    (check,) = data_folder_checks(load())
    (result,) = check.run()
    assert (result.state, result.advice) == (CheckState.FAILED, "set data_dir")


@as_root
def test_programs_that_postgres_cannot_reach_are_copied_once(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """As with a virtual environment below root's home, made with umask 077."""
    closed = data_dir.parent / "closed"
    closed.mkdir(mode=0o700)
    package = postgres_programs(data_dir).parent.parent
    for source in (package, *package.parent.glob(f"{package.name}.libs")):
        shutil.copytree(source, closed / source.name, symlinks=True)
    for path in closed.rglob("*"):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & 0o700)
    programs = closed / package.name / postgres_programs(data_dir).parent.name / "bin"
    monkeypatch.setattr("marketflow.embedded.postgres_server.postgres_programs", lambda _: programs)
    before = os.umask(0o077)
    request.addfinalizer(lambda: os.umask(before))
    with claim(data_dir), EmbeddedPostgres(data_dir / "postgres") as server:
        with psycopg.connect(**server.keywords) as database:
            assert database.execute("select 1").fetchone() == (1,)
        assert server.process is not None
        assert Path(f"/proc/{server.process.pid}/exe").readlink().is_relative_to(data_dir / "programs")
    (copy,) = (data_dir / "programs").iterdir()
    made = copy.stat().st_ctime_ns
    with claim(data_dir), EmbeddedPostgres(data_dir / "postgres"):
        assert [each.stat().st_ctime_ns for each in (data_dir / "programs").iterdir()] == [made]
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    assert {path.lstat().st_uid for path in (data_dir / "programs").rglob("*")} == {0}
    os.utime(programs / "postgres")  # another version
    with claim(data_dir), EmbeddedPostgres(data_dir / "postgres"):
        (other,) = (data_dir / "programs").iterdir()
        assert other != copy


@as_root
def test_data_of_root_are_below_var_lib_by_default() -> None:
    assert Settings().data_dir == load(None, {"data_dir": ""}).data_dir == Path("/var/lib/marketflow")


def test_two_starts_at_once_on_a_folder_share_no_server(server_folder: Path) -> None:
    applications = [Application(server_folder) for _ in range(2)]
    for application in applications:
        application.start(wait=False)
    wait_until(lambda: any(each.process.poll() is not None for each in applications), timeout=20)
    second, first = sorted(applications, key=lambda each: each.process.poll() is None)
    assert second.process.returncode == 1
    wait_until(first.ready, timeout=20)
    assert first.stop()[0] == 0
    for application in applications:
        application.http.close()
    assert second.log.count("in use by another MarketFlow") == 1
