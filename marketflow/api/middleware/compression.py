"""Compression of large responses: 1,000 candles are 190 kB uncompressed."""

import re
from collections.abc import Awaitable
from functools import cached_property

from starlette.types import ASGIApp, Receive, Scope, Send

MINIMUM_BYTES = 1024
LEVEL = 5
"""Of zlib: level 9 takes twice as long for 2 % less."""

_SMALL = ("/prices/", "/mode", "/health", "/livez", "/readyz", "/stream/")
"""Paths with small or endless responses, which bypass the compression."""

_GZIP = re.compile(rb"(?:^|,)[ \t]*gzip[ \t]*(?:;[ \t]*q=([0-9.]*)[ \t]*)?(?=,|$)", re.IGNORECASE)
_ACCEPTED = b"accept-encoding"


class GzipCompression:
    """Middleware that compresses responses by gzip for clients that accept it.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    @cached_property
    def _compressed(self) -> ASGIApp:
        from starlette.middleware.gzip import GZipMiddleware  # no price needs it

        return GZipMiddleware(self._app, MINIMUM_BYTES, LEVEL)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve the request."""
        if scope["type"] != "http" or scope["path"].startswith(_SMALL):
            return self._app(scope, receive, send)
        # Starlette looks for the letters "gzip" alone, but `gzip;q=0` refuses it (RFC 9110, 12.4.2).
        accepted = b",".join(value for name, value in scope["headers"] if name == _ACCEPTED)
        others = [header for header in scope["headers"] if header[0] != _ACCEPTED]
        scope["headers"] = [*others, (_ACCEPTED, b"gzip")] if _takes_gzip(accepted) else others
        return self._compressed(scope, receive, send)


def _takes_gzip(accepted: bytes) -> bool:
    """Return whether an `Accept-Encoding` accepts gzip."""
    found = _GZIP.search(accepted)
    return found is not None and (found[1] is None or found[1].strip(b"0.") != b"")
