import asyncio
import io
import itertools
import json
import logging
import os
import re
import select
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TextIO

import pytest
import uvloop
from loguru import logger

from marketflow import logs
from marketflow.errors import Unavailable
from marketflow.logs import Outage, RateLimit, writer
from tests.support.servers import HOST


class Sink(io.StringIO):
    def lines(self) -> list[str]:
        return self.getvalue().splitlines()

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().split("\n")[:-1]]


def opened(format: Literal["text", "json"], level: str = "INFO") -> Sink:
    sink = Sink()
    logs.setup(level, format, sink)
    return sink


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.root
    before = root.handlers[:], root.level
    yield
    logger.remove()
    logging.captureWarnings(False)
    root.handlers[:], root.level = before
    for name in ("uvicorn.access", "httpx", "httpcore", "websockets", "picows"):
        logging.getLogger(name).setLevel(logging.NOTSET)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


# --- formats


def test_text_is_time_level_message_and_bound_values() -> None:
    sink = opened("text")
    logger.bind(exchange="exchange1", wait=2.5, why="timed out").info("feed {} lost", "A")
    (line,) = sink.lines()
    time, rest = line.split(" ", 1)
    assert len(time) == len("2025-11-21T04:33:12.123Z")
    assert rest == 'INFO     feed A lost exchange=exchange1 wait=2.5 why="timed out"'


class Terminal(Sink):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("level", "code"), [("DEBUG", "2"), ("INFO", "32"), ("WARNING", "33"), ("ERROR", "31"), ("CRITICAL", "1;31")]
)
def test_levels_are_coloured_on_a_terminal(monkeypatch: pytest.MonkeyPatch, level: str, code: str) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    logs.setup("TRACE", "text", sink := Terminal())
    logger.bind(exchange="a").log(level, "feed lost")
    (line,) = sink.lines()
    assert line.partition(" ")[2] == f"\x1b[{code}m{level:<8}\x1b[0m feed lost exchange=a"


@pytest.mark.parametrize("without", ["terminal", "colour", "cursor", "text"])
def test_levels_are_plain_elsewhere(monkeypatch: pytest.MonkeyPatch, without: str) -> None:
    monkeypatch.setenv("TERM", "dumb" if without == "cursor" else "xterm")
    monkeypatch.setenv("NO_COLOR", "1" if without == "colour" else "")
    sink = Sink() if without == "terminal" else Terminal()
    logs.setup("INFO", "json" if without == "text" else "text", sink)
    logger.error("feed lost")
    assert "\x1b" not in sink.getvalue()


def test_process_colours_levels_only_if_stderr_is_a_terminal() -> None:
    program = "from marketflow import logs; from loguru import logger; logs.setup('INFO', 'text'); logger.error('lost')"
    here, there = os.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
    subprocess.run([sys.executable, "-c", program], stderr=there, env=environment, check=True, timeout=30)
    assert b"\x1b[31mERROR   \x1b[0m lost" in os.read(here, 4096)
    subprocess.run([sys.executable, "-c", program], stderr=there, env=environment | {"NO_COLOR": "1"}, check=True)
    assert b"\x1b" not in os.read(here, 4096)
    piped = subprocess.run([sys.executable, "-c", program], stdout=there, stderr=subprocess.PIPE, env=environment)
    assert piped.stderr.endswith(b"ERROR    lost\n")
    os.close(here)
    os.close(there)


def test_json_is_one_object_per_line() -> None:
    sink = opened("json")
    logger.bind(exchange="exchange1", symbol=None, wait=float("nan"), of=[1]).warning("one\ntwo\u2028three")
    (record,) = sink.records()
    assert record.pop("time").endswith("Z")
    assert record == {
        "level": "WARNING",
        "msg": "one\ntwo\u2028three",
        "logger": __name__,
        "exchange": "exchange1",
        "symbol": None,
        "wait": "nan",
        "of": "[1]",
    }
    assert len(sink.lines()) == 1


def test_bound_value_does_not_replace_a_json_field() -> None:
    sink = opened("json")
    logger.bind(level="x", msg="y", error="z").info("hello")
    (record,) = sink.records()
    assert (record["level"], record["msg"]) == ("INFO", "hello")
    assert (record["level_"], record["msg_"], record["error_"]) == ("x", "y", "z")


@pytest.mark.parametrize("hostile", ["a\nb", "a\r\nb", "\x1b[2J", "\x9b2J", "\u202egnp", "\udcff", "\x00", "\u2028"])
def test_hostile_text_is_escaped_in_both_formats(hostile: str) -> None:
    for format in ("text", "json"):
        sink = opened("text" if format == "text" else "json")
        logger.bind(symbol=hostile, **{hostile: 1}).warning(f"dropped {hostile}")
        assert sink.getvalue().endswith("\n")
        assert sink.getvalue()[:-1].isprintable()


def test_braces_in_a_message_are_kept() -> None:
    sink = opened("text")
    RateLimit(1.0).log("key", "INFO", "got {0} and {x} <red>", symbol="{y}")
    assert sink.lines()[0].endswith("got {0} and {x} <red> symbol={y}")


def test_value_without_text_does_not_stop_the_record() -> None:
    class Odd:
        def __str__(self) -> str:
            raise ValueError("no")

    sink = opened("json")
    logger.bind(odd=Odd()).info("hello")
    assert sink.records()[0]["odd"] == "<Odd>"


def test_repeated_setup_replaces_the_sink() -> None:
    first, second = opened("text"), opened("text", "ERROR")
    logger.info("one")
    logger.error("two")
    assert first.lines() == []
    assert len(second.lines()) == 1


# --- exceptions


def failed(error: Exception, level: str) -> None:
    try:
        raise error
    except type(error):
        logger.opt(exception=True).log(level, "it failed")


def test_expected_exception_is_one_line() -> None:
    text = opened("text")
    failed(Unavailable("Redis is down"), "ERROR")
    failed(OSError("refused\n"), "WARNING")
    one, two = text.lines()
    assert one.endswith('it failed error="Unavailable: Redis is down"')
    assert two.endswith('it failed error="OSError: refused\\n"')
    sink = opened("json")
    failed(OSError("refused"), "WARNING")
    (record,) = sink.records()
    assert record["error"] == {"type": "OSError", "text": "refused"}
    assert "traceback" not in record


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
def test_unexpected_exception_has_traceback_without_values(level: str) -> None:
    sink = opened("json", level)
    password = "hush"
    failed(ZeroDivisionError(len(password)), "ERROR")
    (record,) = sink.records()
    assert record["traceback"].startswith("Traceback")
    assert "hush" not in sink.getvalue()
    text = opened("text", level)
    failed(ZeroDivisionError("\x1b[2J"), "ERROR")
    assert "Traceback" in text.lines()[1]
    assert "\x1b" not in text.getvalue()


def test_expected_exception_has_traceback_at_debug() -> None:
    sink = opened("json", "DEBUG")
    failed(Unavailable("Redis is down"), "WARNING")
    assert "traceback" in sink.records()[0]


# --- the standard library


def test_standard_library_records_reach_the_sink() -> None:
    logging.getLogger("uvicorn.error").addHandler(logging.StreamHandler(io.StringIO()))
    logging.getLogger("uvicorn.error").propagate = False
    sink = opened("json")
    logging.getLogger("uvicorn.error").warning("taken: %s", 8080)
    logging.getLogger("asyncio").debug("left out")
    (record,) = sink.records()
    assert (record["logger"], record["level"], record["msg"]) == ("uvicorn.error", "WARNING", "taken: 8080")


def test_warning_is_one_record_of_one_line() -> None:
    sink = opened("text")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)  # inside catch_warnings, which replaces the hook
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(False)
    (line,) = sink.lines()
    assert line.endswith("DeprecationWarning: old")


def test_arguments_that_do_not_fit_are_logged() -> None:
    sink = opened("json")
    logging.getLogger("asyncio").warning("%d of %d", "x")
    assert sink.records()[0]["msg"] == "%d of %d ('x',)"


def test_requests_are_logged_at_debug_only() -> None:
    access = logging.getLogger("uvicorn.access")
    sink = opened("json")
    access.info('%s - "%s"', "127.0.0.1", "GET /")
    assert not access.isEnabledFor(logging.INFO)
    assert sink.records() == []
    sink = opened("json", "DEBUG")
    access.info('%s - "%s"', "127.0.0.1", "GET /")
    assert [record["level"] for record in sink.records()] == ["DEBUG"]


def test_lost_tls_connection_is_no_error() -> None:
    """uvloop logs it with a traceback, though the code that uses the connection gets the error as well."""
    sink = opened("text")

    async def write_to_closed() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server((HOST, 0)) as listener:
            transport, _ = await loop.create_connection(asyncio.Protocol, *listener.getsockname())
            transport.abort()
            await asyncio.sleep(0)
            try:
                transport.write(b"late")
            except RuntimeError as error:
                message = "Fatal error on SSL protocol"
                loop.call_exception_handler({"message": message, "exception": error, "transport": transport})

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(write_to_closed())
    assert sink.lines() == []
    logging.getLogger("asyncio").error("Fatal error on SSL protocol", exc_info=RuntimeError("another"))
    assert len(sink.lines()) > 1


@pytest.mark.parametrize("library", ["websockets.server", "picows.client", "httpx"])
def test_connections_of_libraries_are_not_logged(library: str) -> None:
    out = io.StringIO()
    logs.setup("INFO", "text", out)
    logging.getLogger(library).info("connection open")
    logging.getLogger(library).warning("connection failed")
    assert "connection open" not in out.getvalue()
    assert "connection failed" in out.getvalue()


def test_repeated_record_of_a_library_is_rate_limited() -> None:
    sink = opened("json")
    for attempt in range(50):
        logging.getLogger("redis.client").warning("error connecting in %r: %s", "pool-1", attempt)
        logging.getLogger("redis.connection").error("lost")
    assert [record["msg"] for record in sink.records()] == ["error connecting in 'pool-1': 0", "lost"]


# --- the reader of the log


@contextmanager
def piped(format: Literal["text", "json"] = "json") -> Iterator[tuple[int, TextIO]]:
    """Send the log to a pipe, and yield its two ends."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as sink:
        logs.setup("INFO", format, sink)
        try:
            yield reader, sink
        finally:
            logs.setup("INFO", format, Sink())
            with suppress(OSError):
                os.close(reader)


@pytest.fixture
def small_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound the queue by the size of a pipe, so that few records fill both."""
    monkeypatch.setattr(writer, "QUEUE_BYTES", 1 << 16)


_FILLER = "filler".ljust(63, ".")


def fill(sink: TextIO) -> None:
    """Fill a pipe, so that the log stalls at the next line, however fast its writer is."""
    os.set_blocking(sink.fileno(), False)
    with suppress(BlockingIOError):
        while True:
            os.write(sink.fileno(), f"{_FILLER}\n".encode())
    os.set_blocking(sink.fileno(), True)


def read_lines(reader: int, until: str) -> list[str]:
    """Return all lines of the log up to the first that contains a text."""
    data = b""
    while until not in data.decode(errors="replace").rpartition("\n")[0]:
        assert select.select([reader], [], [], 5)[0], f"nothing more came after {data[-200:]!r}"
        data += os.read(reader, 1 << 16)
    return [line for line in data.decode().splitlines() if line != _FILLER]


def sources() -> list[tuple[str, Callable[[int], None]]]:
    """Sources of records, each called with a number."""

    def warn(number: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(False)
            logging.captureWarnings(True)
            warnings.warn(f"number {number}", UserWarning, stacklevel=1)

    return [
        ("loguru", lambda number: logger.info("number {}", number)),
        ("uvicorn", lambda number: logging.getLogger("uvicorn").warning("number %d", number)),
        ("warnings", warn),
    ]


@pytest.mark.usefixtures("small_queue")
@pytest.mark.parametrize("source", [call for _, call in sources()], ids=[name for name, _ in sources()])
def test_stalled_reader_delays_no_caller(source: Callable[[int], None]) -> None:
    with piped() as (reader, sink):
        fill(sink)
        count = 0
        began = time.monotonic()
        while count < 5_000:  # several times the size of pipe and queue
            source(count)
            count += 1
        assert time.monotonic() - began < 10
        stalled = time.monotonic()
        logs.flush()
        assert time.monotonic() - stalled < 1
        lines = read_lines(reader, "dropped")
        logger.info("the last one")
        records = [json.loads(line) for line in [*lines, *read_lines(reader, "the last one")]]
    numbers = [int(record["msg"].split()[-1]) for record in records if "number" in record["msg"]]
    assert numbers == list(range(len(numbers)))
    (notice,) = [record for record in records if "dropped" in record]
    assert notice["dropped"] == count - len(numbers)
    assert (notice["level"], notice["logger"]) == ("WARNING", "marketflow.logs")
    assert records[-1]["msg"] == "the last one"


@pytest.mark.usefixtures("small_queue")
def test_dropped_lines_are_reported_in_their_place() -> None:
    with piped("text") as (reader, sink):
        fill(sink)
        for number in range(10_000):
            logger.info("number {}", number)
        lines = read_lines(reader, "dropped=")
        fill(sink)
        for number in range(10_000):
            logger.info("again {}", number)
        lines += read_lines(reader, "dropped=")
    assert re.fullmatch(r"\S+Z WARNING  log lines dropped, as their reader took none dropped=\d+", lines[-1])
    kinds = [line.split()[2] for line in lines]
    assert [kind for kind, _ in itertools.groupby(kinds)] == ["number", "log", "again", "log"]


def test_lines_keep_their_order_while_the_reader_reads() -> None:
    with piped() as (reader, _):
        for number in range(3000):
            logger.info("{}", number)
            if number % 100 == 99:
                assert json.loads(read_lines(reader, f'"{number}"')[-1])["msg"] == str(number)


def test_closed_pipe_loses_its_lines_only() -> None:
    with piped() as (reader, _):
        os.close(reader)
        for number in range(1000):
            logger.info("{}", number)
        began = time.monotonic()
        logs.flush()
        assert time.monotonic() - began < 1


def test_closed_log_loses_its_lines_only() -> None:
    with piped() as (_, sink):
        sink.close()
        for number in range(1000):
            logger.info("{}", number)
        logs.flush()


def test_returning_reader_gets_the_number_of_lost_lines(tmp_path: Path) -> None:
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with fifo.open("w") as sink:
        logs.setup("INFO", "json", sink)
        logger.info("one")
        read_lines(reader, "one")
        os.close(reader)
        for _ in range(3):
            logger.info("lost")
        logs.flush()
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        logger.info("two")
        records = [json.loads(line) for line in read_lines(reader, "two")]
        assert [record.get("dropped", record["msg"]) for record in records] == [3, "two"]
        logs.setup("INFO", "json", Sink())
    os.close(reader)


def test_non_blocking_descriptor_loses_no_line() -> None:
    with piped() as (reader, sink):
        os.set_blocking(sink.fileno(), False)
        for number in range(2000):  # exceeds the buffer of a pipe
            logger.info("{}", number)
        lines = read_lines(reader, '"1999"')
    assert [json.loads(line)["msg"] for line in lines] == [str(number) for number in range(2000)]


def test_missing_stderr_does_not_fail_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    logs.setup("INFO", "text")
    logger.info("one")


def test_process_flushes_its_log_unless_the_reader_stalls() -> None:
    program = (
        "from loguru import logger; from marketflow import logs; logs.setup('INFO', 'text');"
        "[logger.info('number {}', number) for number in range(COUNT)]"
    )
    for count in (5000, 50_000):
        command = [sys.executable, "-c", program.replace("COUNT", str(count))]
        with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1]) as process:
            assert process.stderr is not None
            if count == 5000:
                assert process.stderr.read().splitlines()[-1].endswith(b"number 4999")
            assert process.wait(20) == 0


def test_forked_child_logs_without_repeating_lines() -> None:
    with piped() as (reader, _):
        logger.info("of the parent")
        if not (pid := os.fork()):
            logger.info("of the child")
            logs.flush()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        logger.info("the last one")
        lines = read_lines(reader, "the last one")
    assert sorted(json.loads(line)["msg"] for line in lines) == ["of the child", "of the parent", "the last one"]


# --- the limit


def test_repeated_fault_is_logged_once_and_counted() -> None:
    sink, clock = opened("json"), Clock()
    limit = RateLimit(10.0, clock)
    assert limit.log("a", "WARNING", "down", exchange="x") is True
    assert limit.log("a", "WARNING", "down") is False
    clock.now = 9.9
    assert limit.log("a", "WARNING", "down") is False
    assert limit.log("b", "WARNING", "other") is True
    clock.now = 10.0
    assert limit.log("a", "WARNING", "down") is True
    clock.now = 20.0
    assert limit.log("a", "WARNING", "down") is True
    assert [record["msg"] for record in sink.records()] == ["down", "other", "down (2 more in the meantime)", "down"]
    assert sink.records()[0]["exchange"] == "x"
    assert sink.records()[0]["logger"] == __name__


def test_oldest_keys_are_evicted() -> None:
    limit = RateLimit(10.0, Clock())
    for key in range(RateLimit.KEYS + 1):
        assert limit.admit(key) == 0
    assert limit.admit(RateLimit.KEYS) is None
    assert limit.admit(0) == 0


def test_one_of_many_threads_logs() -> None:
    limit, start = RateLimit(10.0, Clock()), threading.Barrier(8)
    admitted: list[int | None] = []

    def repeat() -> None:
        start.wait()
        admitted.extend([limit.admit("a") for _ in range(1000)])

    threads = [threading.Thread(target=repeat, name=f"repeat-{number}") for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [count for count in admitted if count is not None] == [0]


# --- Outages


def test_outage_is_logged_at_beginning_and_end(log: list[str]) -> None:
    now = [100.0]
    outage = Outage("X cannot be used", "X can be used again", 600, lambda: now[0])
    outage.over("writer")
    assert outage.failed("writer", "3 rows wait: refused")
    for _ in range(599):
        now[0] += 1
        assert not outage.failed("writer", "4 rows wait: refused")
        assert not outage.failed("reader", "refused")
    now[0] += 1
    assert outage.failed("writer", "5 rows wait: refused")
    outage.over("writer")
    outage.over("nobody")
    assert len(log) == 2
    now[0] += 1.5
    outage.over("reader")
    outage.over("reader")
    texts = ["X cannot be used, 3 rows wait: refused", "X cannot be used (for 600 s now), 5 rows wait: refused"]
    assert [line.split("{}")[0].strip() for line in log] == [*texts, "X can be used again, after 601.5 s"]


def test_second_outage_is_logged_as_well_as_the_first(log: list[str]) -> None:
    now = [100.0]
    outage = Outage("X cannot be used", "X can be used again", monotonic=lambda: now[0])
    for _ in range(2):
        assert outage.failed("writer", "why")
        outage.failed("days", "why")
        outage.over("writer", for_all=True)
        now[0] += 10
    assert len(log) == 4


def test_rapid_outages_are_counted(log: list[str]) -> None:
    now = [100.0]
    outage = Outage("X cannot be used", "X can be used again", monotonic=lambda: now[0])
    for _ in range(200):
        outage.failed("writer", "why")
        outage.over("writer")
        now[0] += 0.04
    assert len(log) == 2
    outage.failed("writer", "why")
    now[0] += 3
    outage.failed("writer", "why")
    assert len(log) == 3
    assert "(for 3 s now), why (199 more in the meantime)" in log[2]
    outage.over("writer")
    assert len(log) == 4
