"""Fixtures of the fault tests: exchanges, servers behind proxies, and the application as a process between them."""

import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx
import psutil
import pytest

from marketflow.model import Series, Tick
from tests.support.application import NO_TLS, Application, ScriptedExchange, Traffic, exchanges_setting, now_ms
from tests.support.core_waits import MOST_WAITED, CoreWaits
from tests.support.oracle import Rows, assert_rows_equal, differences, missing, ticks_by_slot
from tests.support.proxy import Proxy
from tests.support.roles import Broadcasting, Roles
from tests.support.servers import HOST, RedisServer, wait_until

WINDOW_SECONDS = 1
"""Length of a minute in these tests, so that several pass while something is broken."""

WINDOW_MS = WINDOW_SECONDS * 1000

LATE_MS = 200
"""How long a minute waits for late ticks."""

RATE = 50
"""Ticks a second and exchange: few enough that the tests themselves do not keep the machine busy."""


@pytest.fixture(scope="module")
def many_files() -> Iterator[None]:
    """Raise the limit of open files: the test opens more sockets than a process may by default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def redis_proxy(redis_db: RedisServer) -> Iterator[Proxy]:
    """A proxy before the session's Redis."""
    with Proxy(redis_db.port) as proxy:
        yield proxy


@pytest.fixture
def postgres_proxy(postgres_db: dict[str, Any]) -> Iterator[Proxy]:
    """A proxy before the session's PostgreSQL."""
    with Proxy(postgres_db["port"]) as proxy:
        yield proxy


def live_settings(exchanges: Iterable[ScriptedExchange]) -> dict[str, object]:
    """Return settings of live mode on these exchanges with minutes of WINDOW_SECONDS."""
    return {
        "MODE": "live",
        "EXCHANGES": exchanges_setting(*exchanges),
        "FLOW__WINDOW_SECONDS": WINDOW_SECONDS,
        "FLOW__LATE_AFTER_SECONDS": LATE_MS / 1000,
        "FLOW__RECONNECT_AFTER_SECONDS": 0.1,
    }


StartApplication = Callable[..., Application]


@pytest.fixture
def start(server_folder: Path, exchanges: list[ScriptedExchange]) -> Iterator[StartApplication]:
    """Starts applications in live mode on all three exchanges with minutes of WINDOW_SECONDS; ends them in the end.

    Takes more settings as a dict, `wait=False` to come back before the exchanges are connected, and what Python is to
    run in place of MarketFlow.
    """
    with ExitStack() as stack:

        def started(
            settings: dict[str, object], wait: bool = True, program: tuple[str, ...] = ("-m", "marketflow")
        ) -> Application:
            given = live_settings(exchanges) | settings
            application = stack.enter_context(Application(server_folder, given, program=program))
            if wait:
                wait_until_connected(application, exchanges)
            return application

        yield started


@pytest.fixture
def roles(server_folder: Path, servers: dict[str, object], exchanges: list[ScriptedExchange]) -> Iterator[Roles]:
    """Starts ingest and API processes as `start` starts applications; ends them after the test."""
    with ExitStack() as stack:
        yield Roles(stack, server_folder, servers | live_settings(exchanges))


@pytest.fixture
def broadcasting(roles: Roles) -> Iterator[list[ScriptedExchange]]:
    """The exchanges of `roles` where several processes ingest: each receives the same ticks."""
    with ExitStack() as stack:
        exchanges: list[ScriptedExchange] = [stack.enter_context(Broadcasting(f"exchange{n}")) for n in (1, 2, 3)]
        roles.settings["EXCHANGES"] = exchanges_setting(*exchanges)
        yield exchanges


def through(
    settings: dict[str, object], redis: Proxy | None = None, postgres: Proxy | None = None
) -> dict[str, object]:
    """Return settings of servers behind proxies."""
    ports = {"REDIS__PORT": redis, "POSTGRES__PORT": postgres}
    return settings | {name: proxy.port for name, proxy in ports.items() if proxy} | {"REDIS__HOST": HOST}


Record = Callable[[str, object], None]
"""Takes a figure for the report (pytest's record_property)."""


def says(application: Application, store: str, state: str) -> Callable[[], bool]:
    """Return whether /health reports this state of a store."""
    return lambda: application.get("/health")[store] == state


def wait_until_connected(application: Application, exchanges: Iterable[ScriptedExchange]) -> None:
    """Wait until all exchanges have been connected: one that sends nothing is stale soon, and until its first tick."""
    names = {exchange.name for exchange in exchanges}

    def connected() -> bool:
        states = application.get("/health")["exchanges"]
        return bool(states.keys() == names and {*states.values()} <= {"connected", "stale"})

    wait_until(connected)


def wait_until_warm(exchanges: Sequence[ScriptedExchange], count: int = 2) -> None:
    """Wait until `count` processes have been connected to every exchange for a second."""
    wait_until(lambda: all(exchange.connections() == count for exchange in exchanges), timeout=20)
    at = now_ms() + 1000
    wait_until(lambda: now_ms() >= at)


def wait_for_windows(number: int) -> None:
    """Wait until `number` minutes have closed, the current one included."""
    over = (now_ms() // WINDOW_MS + number) * WINDOW_MS + LATE_MS + 150
    wait_until(lambda: now_ms() >= over, timeout=number * WINDOW_SECONDS + 5)


def seconds_until(condition: Callable[[], object], timeout: float, message: str = "the condition was not met") -> float:
    """How long it takes until a condition is met, without waits for a core.

    Raises:
        AssertionError: longer than `timeout` seconds.
    """
    with CoreWaits.of_tests() as waits:
        began = time.monotonic()
        wait_until(lambda: condition() or waits.seconds_since(began) >= timeout, timeout / (1 - MOST_WAITED) + 1)
        seconds = waits.seconds_since(began)
    assert seconds < timeout, f"{message} (waited {timeout} s)"
    return round(seconds, 2)


Sent = Sequence[tuple[Series, Tick]]


def wrong_rows(rows: Rows, sent: Sent, at: int) -> list[str]:
    """Describe the wrong rows of the minutes that had closed at a time (Unix ms)."""
    until = (at - LATE_MS) // WINDOW_MS * WINDOW_MS
    closed = {slot: row for slot, row in rows.items() if slot.start < until}
    return differences(closed, [(series, tick) for series, tick in sent if tick.at < until], WINDOW_MS)


ROWS_SECONDS = 5.0
"""How long after PostgreSQL's return all rows of the minutes that have closed are there."""


def seconds_until_written(rows: Callable[[], Rows], traffic: Traffic) -> float:
    """Return the seconds until the rows of all minutes that have closed by now are exact."""
    at = now_ms()
    return seconds_until(lambda: not wrong_rows(rows(), traffic.sent, at), ROWS_SECONDS)


def stop_and_compare(application: Application, rows: Callable[[], Rows], traffic: Traffic) -> None:
    """Stop the application, which writes open minutes; then all rows must be exact."""
    assert application.stop()[0] == 0
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)
    assert "Traceback" not in application.log


def lost(rows: Rows, sent: Sent, minute_ms: int = WINDOW_MS) -> list[Tick]:
    """The ticks that the rows lack, one run of each row's.

    Raises:
        AssertionError: the rows are not exactly those of all other ticks.
    """
    found: set[tuple[Series, Tick]] = set()
    for slot, group in ticks_by_slot(sent, minute_ms).items():
        lacking = missing(rows[slot], group) if slot in rows else group
        assert lacking is not None, f"{slot}: the difference is no one run of ticks"
        found.update((slot.series, tick) for tick in lacking)
    assert_rows_equal(rows, [each for each in sent if each not in found], minute_ms)
    return [tick for _, tick in found]


class Asking:
    """Asks for everything again and again while it lasts; in the end every answer must have been a good one, in time.

    Waits for a core are no part of that time.

    The latest price must be new each time: ticks flow meanwhile.
    """

    QUESTIONS = (
        "/prices/latest/BTCUSDT",
        "/prices/highest/BTCUSDT?period=10s",
        "/prices/average/BTCUSDT?period=10m",
        "/prices/average/BTCUSDT",
        "/health",
        "/mode",
    )
    ANSWER_SECONDS = 1.0
    LATEST_SECONDS = 1.5

    def __init__(self, application: Application) -> None:
        self._application = application
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(question,)) for question in self.QUESTIONS]
        self._waits = CoreWaits.of_tests()
        self.worst = 0.0
        self.complaints: list[str] = []

    def __enter__(self) -> Self:
        wait_until(lambda: self._application.find(self.QUESTIONS[0]), message="there is no price yet")
        self._waits.__enter__()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(10)
        self._waits.__exit__()
        if not failed:
            assert not self.complaints, "\n".join(self.complaints)

    def _ask(self, question: str) -> None:
        with httpx.Client(base_url=self._application.http.base_url, timeout=5.0, verify=NO_TLS) as http:
            while not self._ended.wait(0.2):
                began, began_ms = time.monotonic(), now_ms()
                try:
                    answer = http.get(question)
                except httpx.HTTPError as error:
                    self.complaints.append(f"{question}: {error!r}")
                    return
                self._judge(question, answer, self._waits.seconds_since(began), began, began_ms)

    def _judge(self, question: str, answer: httpx.Response, seconds: float, began: float, began_ms: int) -> None:
        self.worst = max(self.worst, seconds)
        if seconds > self.ANSWER_SECONDS:
            self.complaints.append(f"{question}: took {seconds:.3f} s")
        if answer.status_code != 200:
            self.complaints.append(f"{question}: {answer.status_code} {answer.text}")
        elif "latest" in question:
            at = datetime.fromisoformat(answer.json()["timestamp"]).timestamp() * 1000
            age = (began_ms - at) / 1000
            age -= self._waits.between(began - age, began)
            if age > self.LATEST_SECONDS:
                self.complaints.append(f"{question}: {age:.3f} s old")


@contextmanager
def in_use(
    application: Application, exchanges: Sequence[ScriptedExchange], record_property: Record
) -> Iterator[Traffic]:
    """Send ticks and request everything within the context; record the slowest answer."""
    with Traffic(exchanges, rate=RATE) as traffic:
        with Asking(application) as asking:
            yield traffic
        record_property("worst request", asking.worst)


POOLED = 25
"""Threads and connections that may have come to pools, which grow to what was ever needed at once, and keep it."""


class Footprint(NamedTuple):
    """Resources of a process: threads, descriptors, children and memory."""

    threads: int
    descriptors: int
    children: int
    rss: int

    @classmethod
    def of(cls, application: Application) -> "Footprint":
        """Return the resources of an application now."""
        process = psutil.Process(application.process.pid)
        return cls(
            process.num_threads(), process.num_fds(), len(process.children(recursive=True)), process.memory_info().rss
        )

    def no_more_than(self, before: "Footprint", megabytes: float) -> bool:
        """Return whether it has not grown, except by the threads and descriptors of pools and so much memory."""
        return (
            self.threads <= before.threads + POOLED
            and self.descriptors <= before.descriptors + POOLED
            and self.children <= before.children
            and self.rss < before.rss + megabytes * 1e6
        )


def wait_until_back(application: Application, before: Footprint, megabytes: float = 10) -> Footprint:
    """Wait until an application has no more resources than before, and at most `megabytes` more memory."""
    try:
        wait_until(lambda: Footprint.of(application).no_more_than(before, megabytes))
    except AssertionError:
        raise AssertionError(f"it held {before} and now holds {Footprint.of(application)}") from None
    return Footprint.of(application)
