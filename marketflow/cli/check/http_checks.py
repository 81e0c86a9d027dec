"""Health check of the API's port: it is free, or a MarketFlow answers there."""

import errno
import re
from contextlib import closing
from functools import partial
from http.client import HTTPConnection, HTTPException

import msgspec

from marketflow.cli.check.check_result import Check, CheckResult, CheckState, seconds_text
from marketflow.errors import StartError
from marketflow.health import Health
from marketflow.model import FINE_STATES
from marketflow.server.listeners import bind
from marketflow.settings import HttpSettings
from marketflow.text import host_port, is_loopback

ANSWER_SECONDS = 2.0
"""Timeout for an answer of the process that has the port."""

MAX_ANSWER_BYTES = 4 * 1024 * 1024

_VERSION = re.compile(rb'^marketflow_build_info\{[^}]*version="([^"]{1,40})"', re.MULTILINE)
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - the address to ask where a server listens on all


def http_check(http: HttpSettings) -> Check:
    """Return the check of http.host and http.port."""
    where = host_port(http.host, http.port)
    return Check("HTTP API", where, partial(_check_port, where, http))


def token_results(http: HttpSettings) -> list[CheckResult]:
    """Return a warning where other machines can reach the API and no token is set."""
    if is_loopback(http.host) or http.token:
        return []
    found = f"every client that can reach {http.host} can switch the mode"
    return [CheckResult("token", "http.token", CheckState.WARNING, found, "set http.token (MARKETFLOW_HTTP__TOKEN)")]


def _check_port(where: str, http: HttpSettings) -> list[CheckResult]:
    try:
        bind(http.host, http.port).close()
    except StartError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE:
            return [_occupant(where, http)]
        advice = "correct http.host and http.port; ports below 1024 need a privilege"
        return [CheckResult("HTTP API", where, CheckState.FAILED, str(error), advice)]
    return [CheckResult("HTTP API", where, CheckState.OK, "any free port" if http.port == 0 else "the port is free")]


def _occupant(where: str, http: HttpSettings) -> CheckResult:
    """Return which server has the port."""
    try:
        health = msgspec.json.decode(_get(http, "/health"), type=Health)
    except (OSError, HTTPException, msgspec.MsgspecError, UnicodeError):
        found = "the port is taken by another program, or by a MarketFlow without an answer"
        return CheckResult(
            "HTTP API", where, CheckState.FAILED, found, "stop the program that has it, or set http.port"
        )
    version = _version(http)
    name = f"MarketFlow {version}" if version else "a MarketFlow"
    found = f"{name} answers in {health.mode} mode, up for {seconds_text(health.uptime_seconds)}: {health.status}"
    if health.status == "ok":
        return CheckResult("HTTP API", where, CheckState.OK, found)
    troubles = [f"{name} {state}" for name, state in _parts(health) if state not in ("ok", *FINE_STATES)]
    causes = f" ({', '.join(troubles)})" if troubles else ""  # one of a newer version may be degraded by others
    return CheckResult("HTTP API", where, CheckState.WARNING, found + causes, "see its log")


def _parts(health: Health) -> list[tuple[str, str]]:
    stalled = [(f"branch {branch}", "stalled") for branch in health.stalled]
    return [("postgres", health.postgres), ("redis", health.redis), *health.exchanges.items(), *stalled]


def _version(http: HttpSettings) -> str:
    """Return the version of the MarketFlow that answers; empty without metrics."""
    try:
        match = _VERSION.search(_get(http, "/metrics"))
    except (OSError, HTTPException):
        return ""
    return match[1].decode(errors="replace") if match else ""


def _get(http: HttpSettings, path: str) -> bytes:
    """Return the body of a response."""
    host = _EVERYWHERE.get(http.host, http.host)
    name = next((name for name in http.allowed_hosts if name != "*"), host)
    with closing(HTTPConnection(host, http.port, timeout=ANSWER_SECONDS)) as connection:
        connection.request("GET", path, headers={"Host": f"[{name}]" if ":" in name and "[" not in name else name})
        return connection.getresponse().read(MAX_ANSWER_BYTES)
