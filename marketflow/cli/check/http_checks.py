"""Looks at where the API is to listen: the port must be free, or there is a MarketFlow that tells how it does."""

import errno
import re
from contextlib import closing
from functools import partial
from http.client import HTTPConnection, HTTPException

import msgspec

from marketflow.api.middleware.protection import is_loopback
from marketflow.cli.check.findings import Check, Finding, State, address_text, seconds_text
from marketflow.errors import StartError
from marketflow.health import Health
from marketflow.server.uvicorn_server import bind
from marketflow.settings import HttpSettings

ANSWER_SECONDS = 2.0
"""How long whoever has the port may take for an answer."""

MAX_ANSWER_BYTES = 4 * 1024 * 1024

_VERSION = re.compile(rb'^marketflow_build_info\{[^}]*version="([^"]{1,40})"', re.MULTILINE)
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - where to ask who listens everywhere


def http_check(http: HttpSettings) -> Check:
    """A check of http.host and http.port."""
    where = address_text(http.host, http.port)
    return Check("HTTP API", where, partial(_look, where, http))


def token_finding(http: HttpSettings) -> list[Finding]:
    """What is to be said of the token where others can reach the API."""
    if is_loopback(http.host) or http.token:
        return []
    found = f"whoever can reach {http.host} can switch the mode"
    return [Finding("token", "http.token", State.WARNING, found, "set http.token (MARKETFLOW_HTTP__TOKEN)")]


def _look(where: str, http: HttpSettings) -> list[Finding]:
    try:
        bind(http.host, http.port).close()
    except StartError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE:
            return [_occupant(where, http)]
        advice = "correct http.host and http.port; ports below 1024 need a privilege"
        return [Finding("HTTP API", where, State.FAILED, str(error), advice)]
    return [Finding("HTTP API", where, State.OK, "any free port" if http.port == 0 else "the port is free")]


def _occupant(where: str, http: HttpSettings) -> Finding:
    """Who has the port."""
    try:
        health = msgspec.json.decode(_get(http, "/health"), type=Health)
    except (OSError, HTTPException, msgspec.MsgspecError, UnicodeError):
        found = "the port is taken by something that is no MarketFlow, or one that does not answer"
        return Finding("HTTP API", where, State.FAILED, found, "end what has it, or set http.port")
    version = _version(http)
    name = f"MarketFlow {version}" if version else "a MarketFlow"
    found = f"{name} answers in {health.mode} mode, up for {seconds_text(health.uptime_seconds)}: {health.status}"
    troubles = [f"{name} {state}" for name, state in _parts(health) if state not in ("ok", "connected", "generated")]
    if health.status == "ok":
        return Finding("HTTP API", where, State.OK, found)
    return Finding("HTTP API", where, State.WARNING, f"{found} ({', '.join(troubles)})", "see its log")


def _parts(health: Health) -> list[tuple[str, str]]:
    return [("postgres", health.postgres), ("redis", health.redis), *health.exchanges.items()]


def _version(http: HttpSettings) -> str:
    """The version of the MarketFlow that answers; empty when it does not tell."""
    try:
        match = _VERSION.search(_get(http, "/metrics"))
    except (OSError, HTTPException):
        return ""
    return match[1].decode(errors="replace") if match else ""


def _get(http: HttpSettings, path: str) -> bytes:
    """The body of an answer."""
    host = _EVERYWHERE.get(http.host, http.host)
    name = next((name for name in http.allowed_hosts if name != "*"), host)
    with closing(HTTPConnection(host, http.port, timeout=ANSWER_SECONDS)) as connection:
        connection.request("GET", path, headers={"Host": f"[{name}]" if ":" in name and "[" not in name else name})
        return connection.getresponse().read(MAX_ANSWER_BYTES)
