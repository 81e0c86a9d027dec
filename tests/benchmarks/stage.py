"""What every benchmark stands on: a folder, a Redis and a PostgreSQL of its own, and MarketFlow as a process."""

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.application import ROOT, Application
from tests.support.servers import HOST, PostgresServer, RedisServer

LOG_CHARACTERS = 4000

STALE_AFTER_SECONDS = 3600
"""`flow.stale_after_seconds` longer than any pause here: a silent connection would be closed before the feeder begins,
and what it sends until the next one is lost.
"""


class Stage:
    """Servers that are up, and applications that are ended with them; `settings` are those of all applications."""

    def __init__(
        self, folder: Path, redis: RedisServer, postgres: PostgresServer, stack: ExitStack, checkout: Path
    ) -> None:
        self.folder = folder
        self.applications: list[Application] = []
        self._checkout = checkout
        self.redis = redis
        self.postgres = postgres
        self._stack = stack
        self.settings: dict[str, object] = {
            "REDIS__HOST": HOST,
            "REDIS__PORT": redis.port,
        } | {f"POSTGRES__{name.upper()}": value for name, value in postgres.keywords.items()}

    def start(self, settings: Mapping[str, object], *arguments: str, wait: bool = True) -> Application:
        """Start MarketFlow on these servers, with more settings (as in the environment) and arguments.

        Comes back when it is ready to answer, unless it is a role that answers nobody: then without `wait`.
        """
        return self.prepare(settings, *arguments).start(wait)

    def prepare(self, settings: Mapping[str, object], *arguments: str) -> Application:
        """The same, to be started by the caller; once started it is ended with the stage."""
        folder = Path(tempfile.mkdtemp(prefix="application-", dir=self.folder))
        application = Application(folder, self.settings | dict(settings), arguments, checkout=self._checkout)
        self.applications.append(application)
        self._stack.push(application)
        return application


@contextmanager
def logs_on_error(applications: Iterable[Application]) -> Iterator[None]:
    """Add the end of each application's log to an error raised within the block."""
    try:
        yield
    except Exception as error:
        for application in applications:
            if application.log_path.exists():
                error.add_note(f"log of the application:\n{application.log[-LOG_CHARACTERS:]}")
        raise


@contextmanager
def stage(checkout: Path = ROOT, **postgres_settings: str) -> Iterator[Stage]:
    """Servers for one measurement, in a new folder in memory where there is room (a disk of others is no measure).

    The servers run the code of this tree, MarketFlow that of the tree `checkout`.
    """
    with ExitStack() as stack:
        memory = Path("/dev/shm")
        roomy = memory.is_dir() and shutil.disk_usage(memory).free > 4 << 30
        folder = Path(tempfile.mkdtemp(prefix="marketflow-", dir=memory if roomy else None))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.chmod(0o711)
        redis = stack.enter_context(RedisServer(folder / "redis"))

        class Configured(PostgresServer):
            settings = PostgresServer.settings | postgres_settings

        postgres = stack.enter_context(Configured(folder / "postgres", folder / "template"))
        servers = Stage(folder, redis, postgres, stack, checkout)
        with logs_on_error(servers.applications):
            yield servers
