"""Same-site rule: refuses what a page of another site makes a browser send, unless it only reads.

A page in a browser on this machine can post to an API on this machine. The rule is that of Go's
http.CrossOriginProtection: browsers say by Sec-Fetch-Site, older ones by Origin, where a request comes from; programs
send neither and pass. A WebSocket can be read by any page that opens it, so each must come from a page of ours.
"""

from collections.abc import Awaitable, Callable, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from marketflow.api.middleware.allowed_hosts import REFUSALS_SECONDS
from marketflow.api.middleware.client_limits import ClientLimits
from marketflow.api.problems import CrossSite, answer_to
from marketflow.logs import RateLimit

HostOf = Callable[[Scope], str]
"""Returns the host to which a request was addressed."""

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class SameSiteOnly:
    """Middleware that answers 403 `cross_site` to a request that a page of another site sends.

    Args:
        app: the application.
        allowed: origins whose pages may open WebSockets as ours may; `*` is any.
        host_of: returns the host to which a request was addressed, as the client has it.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str] = (), host_of: HostOf | None = None) -> None:
        self._app = app
        self._allowed = {origin.lower() for origin in allowed}
        self._host_of = host_of or ClientLimits().host
        self._limit = RateLimit(REFUSALS_SECONDS)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve the request, or refuse it."""
        fine = scope["type"] == "lifespan" or scope.get("method") in _SAFE_METHODS or self._is_same_site(scope)
        return (self._app if fine else answer_to(CrossSite("Pages of other sites may not do this.")))(
            scope, receive, send
        )

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
