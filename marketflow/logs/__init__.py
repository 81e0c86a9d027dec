"""Logs: one sink, one record a line, as text for a person or as JSON for a machine. Nothing waits for their reader.

The records of the standard library (uvicorn, psycopg, redis, asyncio, warnings) end in the same sink. What is logged
can hold text from an exchange or a client, so control characters are escaped: a line can't be forged, nor a terminal
driven. A fault that repeats is logged once in a while with the number of times it was left out (`RateLimit`), because
a server that is away for a night must not fill a disk.

A traceback is printed for what nobody expected. An expected fault is its one line, unless the level is DEBUG.
"""

import json
import logging
import math
import re
import sys
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TextIO

from loguru import logger

from marketflow.errors import MarketFlowError
from marketflow.logs.writer import LogWriter

if TYPE_CHECKING:  # these names exist in loguru's stubs only
    from loguru import Message, Record

_NOISY = ("psycopg", "redis", "uvicorn.error", "asyncio")
"""Libraries that say the same again and again while a server is away; with their children, as psycopg.pool."""

_CHATTY = {"httpx": logging.WARNING, "httpcore": logging.WARNING, "Rx": logging.WARNING, "psycopg": logging.ERROR}
"""Libraries that log each request, each pause of a timer or each try to connect, and the level that is news."""

# Control characters, line separators, marks that change the direction of text, and undecodable bytes.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_PLAIN_WORD = re.compile(r"[^\s\"=]+")


def setup(level: str, format: Literal["text", "json"], sink: TextIO | None = None) -> None:
    """Send everything that is logged from now on to `sink` (stderr by default), and nowhere else.

    `level` is one of loguru's. May be called again.
    """
    global _writer
    if _writer is not None:
        _writer.close()
    out = sink or sys.stderr
    floor = logger.level(level).no
    debug = floor <= logging.DEBUG
    render = _as_json if format == "json" else _as_text

    descriptor = _descriptor(out)
    _writer = None if descriptor is None else LogWriter(descriptor, partial(_dropped, format))

    def write(message: "Message") -> None:
        line = render(message.record, debug)
        if _writer is not None:
            _writer.put(line)
        elif out is not None:  # None where stderr is closed
            out.write(line + "\n")
            out.flush()

    logger.remove()
    # The sink renders the record by itself, so loguru has nothing to format.
    logger.add(write, level=level, format=lambda _: "", backtrace=False, diagnose=False, enqueue=False)
    _intercept(floor)


def flush() -> None:
    """Write what was logged, but do not wait for a reader that takes nothing. Python does it at its end."""
    if _writer is not None:
        _writer.flush()


_writer: LogWriter | None = None


def _descriptor(out: TextIO | None) -> int | None:
    """The file descriptor behind a stream; None for one in memory."""
    try:
        return None if out is None else out.fileno()
    except (AttributeError, OSError, ValueError):
        return None


def _dropped(format: Literal["text", "json"], count: int) -> str:
    """The line in the place of lines that were dropped."""
    level, text = "WARNING", "log lines dropped, as their reader took none"
    time = _rfc3339(datetime.now(UTC))
    if format == "json":
        return json.dumps({"time": time, "level": level, "msg": text, "logger": __name__, "dropped": count})
    return f"{time} {level:<8} {text} dropped={count}"


class RateLimit:
    """Logs a fault that repeats at most every so many seconds, each key by itself.

    Live as long as what may fail. Safe between threads. Remembers the 1,024 keys logged last: a stranger who makes
    up keys can't make it grow.
    """

    KEYS = 1024

    def __init__(self, seconds: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._seen: OrderedDict[Hashable, tuple[float, int]] = OrderedDict()  # when logged, how many left out since

    def log(self, key: Hashable, level: str, message: str, /, **extra: object) -> bool:
        """Log, unless `key` was logged within the time. True when it was.

        The text tells how many were left out since the last: `... (3 more in the meantime)`.
        """
        left_out = self.admit(key)
        if left_out is None:
            return False
        logger.opt(depth=1).bind(**extra).log(level, message + _more(left_out))
        return True

    def admit(self, key: Hashable) -> int | None:
        """How many were left out since the last one; None when this one is to be left out, too."""
        now = self._monotonic()
        with self._lock:
            logged_at, left_out = self._seen.get(key, (-math.inf, 0))
            if now - logged_at < self._seconds:
                self._seen[key] = (logged_at, left_out + 1)
                return None
            self._seen[key] = (now, 0)
            self._seen.move_to_end(key)
            if len(self._seen) > self.KEYS:
                self._seen.popitem(last=False)
        return left_out


def _more(left_out: int) -> str:
    return f" ({left_out} more in the meantime)" if left_out else ""


class Outage:
    """Logs the beginning of an outage, a reminder now and then while it lasts, and its end with its length.

    Several may find out that a store cannot be used; it can be again once none of them fails. One that comes back again
    and again is logged once in a while, and the others are counted. Safe between threads.

    Args:
        began: what is logged at its beginning, "X cannot be used".
        ended: what is logged at its end.
        reminder_seconds: how long after one line the next one comes, while it lasts.
        repeat_seconds: how long after one line the beginning of another outage is logged.
        monotonic: seconds by which the length is measured.
    """

    def __init__(
        self,
        began: str,
        ended: str,
        reminder_seconds: float = 600.0,
        monotonic: Callable[[], float] = time.monotonic,
        repeat_seconds: float = 10.0,
    ) -> None:
        self._texts = began, ended
        self._repeat_seconds = repeat_seconds
        self._reminder_seconds = reminder_seconds
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._failing: set[str] = set()
        self._began = 0.0
        self._logged = -math.inf
        self._told = False  # whether the beginning of this outage was logged
        self._left_out = 0  # outages since the last line

    def failed(self, by: str, text: str) -> bool:
        """Note that `by` has failed; logs `text` where that is news. True when it was."""
        now = self._monotonic()
        with self._lock:
            if not self._failing:
                self._began, self._told = now, False
                self._left_out += 1
            self._failing.add(by)
            if now - self._logged < (self._reminder_seconds if self._told else self._repeat_seconds):
                return False
            left_out = 0 if self._told else self._left_out - 1
            self._logged, self._told, self._left_out = now, True, 0
            lasted = now - self._began
        since = f" (for {lasted:.0f} s now)" if lasted else ""
        logger.opt(depth=1).warning(f"{self._texts[0]}{since}, {text}{_more(left_out)}")
        return True

    def over(self, by: str, for_all: bool = False) -> None:
        """Note that `by` has not failed; that the others have not either, with `for_all`."""
        if not self._failing:  # nearly always
            return
        with self._lock:
            if by not in self._failing and not for_all:
                return
            self._failing = set() if for_all else self._failing - {by}
            if self._failing or not self._told:
                return
            lasted = self._monotonic() - self._began
        logger.opt(depth=1).info(f"{self._texts[1]}, after {lasted:.1f} s")


# --- the standard library's records


class _Intercept(logging.Handler):
    """Hands the standard library's records to loguru."""

    def __init__(self) -> None:
        super().__init__()
        self._limit = RateLimit(10.0)

    def emit(self, record: logging.LogRecord) -> None:
        left_out: int | None = 0
        if record.name.startswith(_NOISY):
            left_out = self._limit.admit((record.name, str(record.msg).partition("\n")[0]))  # addresses follow
        if left_out is None:
            return

        def rename(entry: "Record") -> None:
            entry["name"] = record.name

        source = logger.patch(rename).opt(exception=record.exc_info)
        source.log(_level(record), _message(record) + _more(left_out))


def _message(record: logging.LogRecord) -> str:
    try:
        message = record.getMessage()
    except Exception:  # noqa: BLE001 - arguments that don't fit their format are no reason to fail the caller
        return f"{record.msg} {record.args!r}"
    if record.name == "py.warnings":  # the second line quotes the source
        return message.partition("\n")[0]
    return message


def _level(record: logging.LogRecord) -> str | int:
    if record.name == "uvicorn.access":
        return "DEBUG"
    try:
        return logger.level(record.levelname).name
    except ValueError:
        return record.levelno


def _intercept(floor: int) -> None:
    """Make every logger of the standard library, those set up by uvicorn included, end in loguru alone."""
    logging.basicConfig(handlers=[_Intercept()], level=floor, force=True)
    for known in list(logging.root.manager.loggerDict.values()):
        if isinstance(known, logging.Logger):
            known.handlers.clear()
            known.propagate = True
    logging.captureWarnings(True)
    for name, news in _CHATTY.items():
        logging.getLogger(name).setLevel(max(floor, news))
    # Its records are INFO until they get here; where they would be dropped they need not be made.
    access = logging.getLogger("uvicorn.access")
    access.setLevel(logging.INFO if floor <= logging.DEBUG else logging.CRITICAL)


# --- the two formats


def _as_text(record: "Record", debug: bool) -> str:
    extra = dict(record["extra"])
    error, trace = _error(record, debug)
    if error and not trace:
        extra["error"] = f"{error['type']}: {error['text']}"
    fields = "".join(f" {_safe(name)}={_word(value)}" for name, value in extra.items())
    line = f"{_time(record)} {record['level'].name:<8} {_safe(record['message'])}{fields}"
    return "\n".join([line, *(f"  {_safe(step)}" for step in trace.splitlines())])


def _as_json(record: "Record", debug: bool) -> str:
    line: dict[str, object] = {
        "time": _time(record),
        "level": record["level"].name,
        "msg": record["message"],
        "logger": record["name"],
    }
    error, trace = _error(record, debug)
    if error:
        line["error"] = error
    if trace:
        line["traceback"] = trace
    for name, value in record["extra"].items():
        line[f"{name}_" if name in _FIELDS else name] = _scalar(value)
    return json.dumps(line)  # ASCII: line separators and undecodable bytes are escaped as well


_FIELDS = ("time", "level", "msg", "logger", "error", "traceback")
"""The fields of a JSON record; what is bound by such a name gets an underscore behind it."""


def _time(record: "Record") -> str:
    return _rfc3339(record["time"].astimezone(UTC))


def _rfc3339(moment: datetime) -> str:
    """RFC 3339, UTC, milliseconds."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _error(record: "Record", debug: bool) -> tuple[Mapping[str, str] | None, str]:
    """Type and text of the record's exception, and its traceback where there is to be one."""
    exception = record["exception"]
    if exception is None or exception.type is None:
        return None, ""
    error = {"type": exception.type.__name__, "text": _text(exception.value)}
    expected = issubclass(exception.type, MarketFlowError) or record["level"].no < logging.ERROR
    if expected and not debug:
        return error, ""
    return error, "".join(traceback.format_exception(exception.type, exception.value, exception.traceback))


def _scalar(value: Any) -> object:
    """What JSON can say of a value: NaN and the like become text."""
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return _text(value)


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - whatever is logged, logging it must not fail
        return f"<{type(value).__name__}>"


def _word(value: object) -> str:
    text = _text(value)
    if _PLAIN_WORD.fullmatch(text) and not _UNSAFE.search(text):
        return text
    return _safe(json.dumps(text, ensure_ascii=False))


def _safe(text: str) -> str:
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
