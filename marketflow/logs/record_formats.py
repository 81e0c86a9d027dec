"""The two formats of a record: a line of text, and a JSON object."""

import json
import logging
import math
import re
import traceback
from collections.abc import Mapping
from datetime import UTC
from typing import TYPE_CHECKING, Any, Literal

from marketflow.errors import MarketFlowError
from marketflow.text import rfc3339

if TYPE_CHECKING:  # exists in loguru's stubs only
    from loguru import Record

Format = Literal["text", "json"]

_FIELDS = ("time", "level", "msg", "logger", "error", "traceback")
"""Fields of a JSON record; a bound value of such a name gets a trailing underscore."""

# Control characters, line separators, marks that change the direction of text, and undecodable bytes.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_PLAIN_WORD = re.compile(r"[^\s\"=]+")


_COLOURS = {
    "TRACE": "2",
    "DEBUG": "2",
    "INFO": "32",
    "SUCCESS": "1;32",
    "WARNING": "33",
    "ERROR": "31",
    "CRITICAL": "1;31",
}
"""Parameters of SGR, the control sequence for colours, by level."""


def format_text(record: "Record", debug: bool, coloured: bool = False) -> str:
    """Return a record as text: time, level, message, bound values; a traceback is indented below."""
    extra = dict(record["extra"])
    error, trace = _error(record, debug)
    if error and not trace:
        extra["error"] = f"{error['type']}: {error['text']}"
    line = text_line(_time(record), record["level"].name, record["message"], extra, coloured)
    return "\n".join([line, *(f"  {_safe(step)}" for step in trace.splitlines())])


def text_line(at: str, level: str, message: str, extra: Mapping[str, object], coloured: bool = False) -> str:
    """Return the line of a record: its message, then its context as key=value."""
    context = "".join(f" {_safe(name)}={_word(value)}" for name, value in extra.items())
    shown = f"{level:<8}"
    if coloured and level in _COLOURS:
        shown = f"\x1b[{_COLOURS[level]}m{shown}\x1b[0m"
    return f"{at} {shown} {_safe(message)}{context}"


def format_json(record: "Record", debug: bool) -> str:
    """Return a record as a JSON object."""
    error, trace = _error(record, debug)
    extra: dict[str, object] = {"error": error} if error else {}
    if trace:
        extra["traceback"] = trace
    for name, value in record["extra"].items():
        extra[f"{name}_" if name in _FIELDS else name] = _scalar(value)
    return json_line(_time(record), record["level"].name, record["message"], record["name"], extra)


def json_line(at: str, level: str, message: str, source: str | None, extra: Mapping[str, object]) -> str:
    """Return the JSON object of a record, in ASCII: line separators and undecodable bytes are escaped."""
    return json.dumps({"time": at, "level": level, "msg": message, "logger": source, **extra})


def _time(record: "Record") -> str:
    return rfc3339(record["time"].astimezone(UTC))


def _error(record: "Record", debug: bool) -> tuple[Mapping[str, str] | None, str]:
    """Return type and text of the record's exception, and its traceback, empty for an expected exception."""
    exception = record["exception"]
    if exception is None or exception.type is None:
        return None, ""
    error = {"type": exception.type.__name__, "text": _text(exception.value)}
    expected = issubclass(exception.type, MarketFlowError) or record["level"].no < logging.ERROR
    if expected and not debug:
        return error, ""
    return error, "".join(traceback.format_exception(exception.type, exception.value, exception.traceback))


def _scalar(value: Any) -> object:
    """Return a value as JSON can represent it; others, NaN included, as text."""
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return _text(value)


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - logging a value must not fail
        return f"<{type(value).__name__}>"


def _word(value: object) -> str:
    text = _text(value)
    if _PLAIN_WORD.fullmatch(text) and not _UNSAFE.search(text):
        return text
    return _safe(json.dumps(text, ensure_ascii=False))


def _safe(text: str) -> str:
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
