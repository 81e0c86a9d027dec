"""Allowed host names: refuses requests that are addressed to another name.

A page whose own name resolves to 127.0.0.1 (DNS rebinding) could otherwise read the API of this machine. Starlette's
TrustedHostMiddleware knows no rule for loopback addresses and answers plain text, without a line in the log.

Where nothing is refused, the middleware returns the application's own coroutine: another one would cost every request.
"""

import re
from collections.abc import Awaitable, Iterable, Sequence
from functools import lru_cache

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from marketflow.api.problems import InvalidHost, answer_to
from marketflow.logs import RateLimit
from marketflow.text import is_loopback

REFUSALS_SECONDS = 60.0
"""Interval between two log lines about refused requests."""

_HOST = re.compile(r"(?:\[([^\]]*)\]|([^:\[\]]*))(?::[0-9]*)?")


_REFUSAL = "The Host header names none of this server's hosts; http.allowed_hosts sets which there are."


class HostRule:
    """Decides which names in a Host header are allowed.

    Without a list of names a connection on a loopback address allows the names of loopback addresses, and any other
    connection allows all names: a machine does not know its own.

    Args:
        host: the configured address; one that is no loopback address allows all names.
        allowed: the names; `*` is any.
    """

    def __init__(self, host: str, allowed: Sequence[str]) -> None:
        self._host = host.lower()
        self._allowed = {name.lower().strip("[]") for name in allowed}

    def allows(self, headers: Iterable[tuple[bytes, bytes]], server: tuple[str, int | None] | None) -> bool:
        """Return whether a request with these headers, received at this address, may be served."""
        name = _host_name(tuple(value for name, value in headers if name == b"host"))
        if self._allowed:
            return "*" in self._allowed or name in self._allowed
        if not is_loopback(self._host) or not is_loopback((server or ("",))[0]):
            return True
        return is_loopback(name) or name == self._host


class AllowedHosts:
    """Middleware that answers 400 `invalid_host` to a request whose Host header has no allowed name.

    Args:
        app: the application.
        host, allowed: see HostRule.
    """

    def __init__(self, app: ASGIApp, host: str, allowed: Sequence[str]) -> None:
        self._app = app
        self._rule = HostRule(host, allowed)
        self._limit = RateLimit(REFUSALS_SECONDS)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve the request, or refuse it."""
        if scope["type"] == "lifespan" or self._rule.allows(scope["headers"], scope.get("server")):
            return self._app(scope, receive, send)
        host = Headers(scope=scope).get("host", "")
        self._limit.log(
            "invalid_host",
            "WARNING",
            f"refused a request that was addressed to {host[:200] or 'no host'}: if clients call this server so,"
            " name it in http.allowed_hosts",
        )
        return answer_to(InvalidHost(_REFUSAL))(scope, receive, send)


@lru_cache(maxsize=256)  # the same few names with every request
@lru_cache(maxsize=256)
def _host_name(hosts: tuple[bytes, ...]) -> str:
    """Return the name in the Host header without the port; "" without such a header or with several."""
    match = _HOST.fullmatch(hosts[0].decode("latin-1").lower()) if len(hosts) == 1 else None
    return (match[1] or match[2] or "").removesuffix(".") if match else ""
