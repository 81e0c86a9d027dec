"""The sink of all records: formats them and writes them to stderr."""

import logging
import os
import sys
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, TextIO

from loguru import logger

from marketflow.logs.record_formats import Format, format_json, format_text, json_line, text_line
from marketflow.logs.standard_library import intercept
from marketflow.logs.writer import LogWriter
from marketflow.text import rfc3339

if TYPE_CHECKING:  # exists in loguru's stubs only
    from loguru import Message

_writer: LogWriter | None = None


def setup(level: str, format: Format, sink: TextIO | None = None) -> None:
    """Send all records from now on to `sink` (stderr by default), and nowhere else.

    `level` is one of loguru's. May be called again, which replaces the sink.
    """
    global _writer
    if _writer is not None:
        _writer.close()
    out = sink or sys.stderr
    floor = logger.level(level).no
    debug = floor <= logging.DEBUG
    coloured = format == "text" and _takes_colours(out)
    render = format_json if format == "json" else partial(format_text, coloured=coloured)

    descriptor = _descriptor(out)
    _writer = None if descriptor is None else LogWriter(descriptor, partial(_dropped_line, format, coloured))

    def write(message: "Message") -> None:
        line = render(message.record, debug)
        if _writer is not None:
            _writer.put(line)
        elif out is not None:  # None where stderr is closed
            out.write(line + "\n")
            out.flush()

    logger.remove()
    # The sink formats the record itself, so loguru has nothing to format.
    logger.add(write, level=level, format=lambda _: "", backtrace=False, diagnose=False, enqueue=False)
    intercept(floor)


def flush() -> None:
    """Write all records, but do not wait for a stalled reader. Python calls it at exit."""
    if _writer is not None:
        _writer.flush()


def _descriptor(out: TextIO | None) -> int | None:
    """Return the file descriptor of a stream; None for one in memory."""
    try:
        return None if out is None else out.fileno()
    except (AttributeError, OSError, ValueError):
        return None


def _takes_colours(out: TextIO | None) -> bool:
    """Return whether a stream is a terminal with colours, and the user has not switched them off by NO_COLOR."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        return False
    with suppress(ValueError):  # closed
        return out is not None and out.isatty()
    return False


def _dropped_line(format: Format, coloured: bool, count: int) -> str:
    """Return the line that replaces dropped lines."""
    at, level, text = rfc3339(datetime.now(UTC)), "WARNING", "log lines dropped, as their reader took none"
    if format == "json":
        return json_line(at, level, text, "marketflow.logs", {"dropped": count})
    return text_line(at, level, text, {"dropped": count}, coloured)
