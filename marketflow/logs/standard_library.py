"""Passes records of the standard library's loggers, and of libraries that use them, on to loguru."""

import logging
from typing import TYPE_CHECKING

from loguru import logger

from marketflow.logs.rate_limit import RateLimit, omitted_text

if TYPE_CHECKING:  # exists in loguru's stubs only
    from loguru import Record

_RATE_LIMITED = ("psycopg", "redis", "uvicorn.error", "asyncio")
"""Libraries that repeat the same record during an outage; their children, as psycopg.pool, included."""

_LEAST_LEVELS = {
    **dict.fromkeys(("httpx", "httpcore", "Rx", "websockets", "picows"), logging.WARNING),
    "psycopg": logging.ERROR,
}
"""Libraries that log each request, timer or connection attempt, and the lowest level that is logged of them."""


def intercept(floor: int) -> None:
    """Send the records of all loggers, including those set up by uvicorn, to loguru alone; `floor` is the level."""
    logging.basicConfig(handlers=[_LoguruHandler()], level=floor, force=True)
    for known in list(logging.root.manager.loggerDict.values()):
        if isinstance(known, logging.Logger):
            known.handlers.clear()
            known.propagate = True
    logging.captureWarnings(True)
    for name, least in _LEAST_LEVELS.items():
        logging.getLogger(name).setLevel(max(floor, least))
    # Access records are INFO until the handler lowers them to DEBUG; those that it would drop need not be created.
    access = logging.getLogger("uvicorn.access")
    access.setLevel(logging.INFO if floor <= logging.DEBUG else logging.CRITICAL)


class _LoguruHandler(logging.Handler):
    """Passes records on to loguru."""

    def __init__(self) -> None:
        super().__init__()
        self._limit = RateLimit(10.0)

    def emit(self, record: logging.LogRecord) -> None:
        is_lost_connection = _is_lost_connection(record)
        omitted: int | None = 0
        if record.name.startswith(_RATE_LIMITED) and not is_lost_connection:
            omitted = self._limit.admit((record.name, str(record.msg).partition("\n")[0]))  # addresses follow
        if omitted is None:
            return

        def rename(entry: "Record") -> None:
            entry["name"] = record.name

        source = logger.patch(rename).opt(exception=record.exc_info)
        source.log("DEBUG" if is_lost_connection else _level(record), _message(record) + omitted_text(omitted))


def _message(record: logging.LogRecord) -> str:
    try:
        message = record.getMessage()
    except Exception:  # noqa: BLE001 - arguments that do not fit their format must not fail the caller
        return f"{record.msg} {record.args!r}"
    if record.name == "py.warnings":  # the second line quotes the source
        return message.partition("\n")[0]
    return message


def _is_lost_connection(record: logging.LogRecord) -> bool:
    """Return whether a record is uvloop's error about a TLS connection that was lost during a write.

    It logs no other lost connection as an error, and the code that uses the connection gets this one as well.
    """
    error = record.exc_info[1] if record.exc_info else None
    is_of_loop = record.name == "asyncio" and isinstance(error, RuntimeError)
    return is_of_loop and str(error).endswith("the handler is closed")


def _level(record: logging.LogRecord) -> str | int:
    if record.name == "uvicorn.access":
        return "DEBUG"
    try:
        return logger.level(record.levelname).name
    except ValueError:
        return record.levelno
