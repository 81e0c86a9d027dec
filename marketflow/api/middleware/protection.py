"""What is refused before a route sees it: foreign host names, requests of other sites' pages, long and slow bodies.

An API on this machine is not out of reach for a web page in a browser on the same machine. A page can post to it, which
`SameSiteOnly` refuses; and where the page's own name turns into 127.0.0.1 (DNS rebinding) it could even read the
answers, which `AllowedHosts` refuses.

Where there is nothing to refuse each of them returns the application's own coroutine, since one more around it would
cost every request.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import lru_cache
from http import HTTPStatus
from ipaddress import IPv6Address, ip_address
from typing import ClassVar

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marketflow.api.middleware.client_limits import ClientLimits
from marketflow.api.problems import Problem, answer_to
from marketflow.api.streaming.sse import STREAMING
from marketflow.logs import RateLimit

MAX_BODY_BYTES = 64 * 1024
"""No route takes a body, so this is for clients that send one all the same."""

BODY_SECONDS = 10.0
"""How long a body may take to arrive."""

REFUSALS_SECONDS = 60.0
"""How often a refused page is logged at most."""

HostOf = Callable[[Scope], str]
"""Gives the host that a request was addressed to."""

CLOSE = {"Connection": "close"}
"""Of an answer that is given before the request has arrived as a whole."""

_HOST = re.compile(r"(?:\[([^\]]*)\]|([^:\[\]]*))(?::[0-9]*)?")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class InvalidHost(Problem):
    """The Host header names none of the names by which this server may be addressed."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_host"


class CrossSite(Problem):
    """A page of another site sent it, by a browser."""

    status = HTTPStatus.FORBIDDEN
    code = "cross_site"


class BodyTooLarge(Problem):
    """The body is over 64 KiB; no request needs one."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "body_too_large"
    headers: ClassVar[Mapping[str, str]] = CLOSE


class RequestTimeout(Problem):
    """The headers or the body took more than ten seconds to arrive."""

    status = HTTPStatus.REQUEST_TIMEOUT
    code = "request_timeout"
    headers: ClassVar[Mapping[str, str]] = CLOSE


class AllowedHosts:
    """Refuses requests to another name than ours. Middleware.

    With no name allowed in particular, this machine's own names are ours where the connection came in on a loopback
    address, and any name elsewhere: what a machine is called by others, it cannot know.

    Args:
        app: the application.
        host: where we are told to listen; any name goes if that is no loopback address.
        allowed: the names; `*` is any.
    """

    def __init__(self, app: ASGIApp, host: str, allowed: Sequence[str]) -> None:
        self._app = app
        self._host = host.lower()
        self._allowed = {name.lower().strip("[]") for name in allowed}
        self._limit = RateLimit(REFUSALS_SECONDS)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve the request, or refuse it."""
        if scope["type"] == "lifespan" or self._is_ours(scope):
            return self._app(scope, receive, send)
        host = Headers(scope=scope).get("host", "")
        self._limit.log(
            "invalid_host",
            "WARNING",
            f"refused a request that was addressed to {host[:200] or 'no host'}: if clients call this server so,"
            " name it in http.allowed_hosts",
        )
        return _invalid_host()(scope, receive, send)

    def _is_ours(self, scope: Scope) -> bool:
        name = _host_name(tuple(value for name, value in scope["headers"] if name == b"host"))
        if self._allowed:
            return "*" in self._allowed or name in self._allowed
        if not is_loopback(self._host) or not is_loopback((scope.get("server") or ("",))[0]):
            return True
        return is_loopback(name) or name == self._host


class SameSiteOnly:
    """Refuses what a page of another site makes a browser send, unless it only reads. Middleware.

    What is read on a WebSocket a page of another site could read as well, so each of those must come from ours.

    The rule is that of Go's http.CrossOriginProtection: browsers say in Sec-Fetch-Site, old ones in Origin, where a
    request comes from. Programs send neither and pass.

    Args:
        app: the application.
        allowed: origins whose pages may open WebSockets as ours may; `*` is any.
        host_of: gives the host that a request was addressed to, as the client has it.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str] = (), host_of: HostOf | None = None) -> None:
        self._app = app
        self._allowed = {origin.lower() for origin in allowed}
        self._host_of = host_of or ClientLimits().host
        self._limit = RateLimit(REFUSALS_SECONDS)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve the request, or refuse it."""
        fine = scope["type"] == "lifespan" or scope.get("method") in _SAFE_METHODS or self._is_same_site(scope)
        return (self._app if fine else _cross_site())(scope, receive, send)

    def _is_same_site(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        origin, host = headers.get("origin", "").lower(), self._host_of(scope).lower()
        if scope["type"] == "websocket" and (origin in self._allowed or "*" in self._allowed):
            return True
        fetch_site = headers.get("sec-fetch-site", "")
        if fetch_site in ("same-origin", "none") or not (fetch_site or origin):
            return True
        if not fetch_site and host and origin.partition("://")[2] == host:
            return True
        self._limit.log(
            "cross_site",
            "WARNING",
            f"refused a request of a page of {origin[:200] or 'another site'} that was addressed to"
            f" {host[:200] or 'no host'}: if the page is this server's own, behind a proxy, have the proxy pass the"
            " Host header on as it came, with its port; if it is another one that may open streams, add its origin to"
            " http.allowed_origins",
        )
        return False


class BodyLimit:
    """Receives the body before anything is done, and refuses one that is too long or too slow. Middleware.

    A body that nobody reads would be taken for the next request if it had waited for `100 Continue`, and be received
    for as long as it is sent.
    """

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES, seconds: float = BODY_SECONDS) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve the request, or refuse it."""
        whole = scope["type"] != "http" or not _has_body(scope)
        return (self._app if whole else self._with_body)(scope, receive, send)

    async def _with_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        if STREAMING not in scope.get("extensions", {}) and Headers(scope=scope).get("transfer-encoding"):
            # Under another server trailers become headers: nobody is authorized by what stands behind a body.
            scope = {**scope, "headers": [each for each in scope["headers"] if each[0] != b"authorization"]}
        try:
            async with asyncio.timeout(self._seconds):
                messages = await self._received(scope, receive)
        except _TooLarge:
            await _body_too_large(self._max_bytes)(scope, receive, send)
        except TimeoutError:
            await request_timeout()(scope, receive, send)
        else:
            if messages[-1]["type"] == "http.disconnect":  # nobody asks to act on half a request
                return

            async def receive_again() -> Message:
                return messages.pop(0) if messages else await receive()

            await self._app(scope, receive_again, send)

    async def _received(self, scope: Scope, receive: Receive) -> list[Message]:
        """All messages of the body, up to the one that ends it."""
        # Before the first await, which would tell the client to go on.
        if any(
            len(digits := value.lstrip("0")) > 18
            or int(digits or "0") > self._max_bytes  # int() has a limit of its own
            for value in Headers(scope=scope).getlist("content-length")
            if value.isascii() and value.isdecimal()
        ):
            raise _TooLarge
        messages: list[Message] = []
        size = 0
        while not messages or messages[-1].get("more_body"):
            messages.append(await receive())
            size += len(messages[-1].get("body", b""))
            if size > self._max_bytes:
                raise _TooLarge
        return messages


class _TooLarge(Exception):
    pass


@lru_cache(maxsize=256)  # the same few names with every request
def is_loopback(host: str) -> bool:
    """Whether a name or an address is one by which a machine reaches itself."""
    if host.lower() == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


def request_timeout() -> Response:
    """408: the client took too long."""
    return answer_to(RequestTimeout("The request took too long to arrive."))


@lru_cache(maxsize=256)
def _host_name(hosts: tuple[bytes, ...]) -> str:
    """The name in the Host header without the port; nothing if there is no such header, or several."""
    match = _HOST.fullmatch(hosts[0].decode("latin-1").lower()) if len(hosts) == 1 else None
    return (match[1] or match[2] or "").removesuffix(".") if match else ""


def _has_body(scope: Scope) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])


def _invalid_host() -> Response:
    return answer_to(
        InvalidHost("The Host header names none of this server's hosts; http.allowed_hosts sets which there are.")
    )


def _cross_site() -> Response:
    return answer_to(CrossSite("Pages of other sites may not do this."))


def _body_too_large(max_bytes: int) -> Response:
    return answer_to(BodyTooLarge(f"The body is longer than {max_bytes} bytes; no request needs one."))
