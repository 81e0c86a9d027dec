"""The bearer token that requests which change something need, if one is configured."""

import secrets

from starlette.requests import Request

from marketflow.api.context import context_of
from marketflow.api.middleware.request_metrics import RequestMetrics
from marketflow.api.problems import Unauthorized
from marketflow.errors import QuotaExceeded
from marketflow.logs import RateLimit

_limit = RateLimit(10.0)


def client_of(request: Request) -> str:
    """Return the address of the client."""
    return context_of(request).clients.of(request.scope)


def authorize(request: Request, times: RequestMetrics, refused: str, detail: str) -> None:
    """Check the token of a request, if one is configured.

    Args:
        request: the request.
        times: counts requests without the token.
        refused: what is not done without it, for the log.
        detail: the text of the problem.

    Raises:
        Unauthorized: the token is missing or wrong.
        QuotaExceeded: this client has sent too many wrong tokens; this one is not checked.
    """
    context = context_of(request)
    token = context.token
    if not token:
        return
    client = client_of(request)
    if wait := context.clients.guesses.wait(client):
        times.registered.unauthorized.inc()
        raise QuotaExceeded(wait)
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Headers are bytes that Starlette shows as latin-1; a token is compared as the bytes of its UTF-8.
    matches = secrets.compare_digest(given.encode("latin-1").strip(b" "), token.encode("utf-8", "surrogateescape"))
    if scheme.lower() != "bearer" or not matches:
        times.registered.unauthorized.inc()
        context.clients.guesses.take(client, 1.0)
        _limit.log(f"unauthorized {refused}", "WARNING", f"{refused}: no valid token from {client}")
        raise Unauthorized(detail)
