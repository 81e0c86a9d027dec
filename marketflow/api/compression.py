"""Compression of answers that are large enough to be worth it: 1,000 candles are 190 kB as they are."""

from collections.abc import Awaitable

from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

MINIMUM_BYTES = 1024
LEVEL = 5
"""Of zlib: level 9 takes twice as long for 2 % less."""

_SMALL = ("/prices/", "/mode", "/health", "/livez", "/readyz", "/stream/")
"""Paths whose answers are small, or never end: what asks for them most often goes past the compression."""


class Compressed:
    """Compresses answers by gzip for clients that take it. Middleware.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._compressed = GZipMiddleware(app, MINIMUM_BYTES, LEVEL)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve the request."""
        plain = scope["type"] != "http" or scope["path"].startswith(_SMALL)
        return (self._app if plain else self._compressed)(scope, receive, send)
