"""Serves the pages and the files below static/ that they use.

The headers of a page forbid the browser to load or run anything from another server. A browser keeps the files and
revalidates them by ETag. Starlette's StaticFiles makes ETags of size and modification time, which differ between two
installations of the same version; here they are hashes of the content.
"""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from marketflow.api.openapi.operation import Content, Endpoint
from marketflow.api.problems import NotFound
from marketflow.api.rendering import ALWAYS, has_etag

_FOLDER = Path(__file__).parents[1] / "static"

_MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
"""Media types of the files that are served; others, such as licences, are not."""

_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}

_PAGE_HEADERS = {
    **ALWAYS,
    "content-security-policy": "; ".join(f"{what} {whence}" for what, whence in _POLICY.items()),
    "referrer-policy": "no-referrer",
}

PAGE = Content(("text/html",), "The page.", {"type": "string"}, ("Content-Security-Policy", "Referrer-Policy"))
"""Response of a page."""


class _File(NamedTuple):
    body: bytes
    headers: dict[str, str]


def page(name: str) -> Endpoint:
    """Return the endpoint of a page: an HTML file that may use the files of `static_route`."""

    async def answer(_: Request) -> Response:
        return Response(_read(name).body, media_type="text/html", headers=_PAGE_HEADERS)

    return answer


def static_route() -> Route:
    """Return the route of the files of all pages; it is left out of the OpenAPI description."""
    return Route("/static/{name:path}", _static, include_in_schema=False)


async def _static(request: Request) -> Response:
    name: str = request.path_params["name"]
    if name not in _served():
        raise NotFound("There is nothing at this path.")
    file = _read(name)
    if has_etag(request, file.headers["etag"]):
        return Response(status_code=304, headers=file.headers)
    return Response(file.body, media_type=_MEDIA_TYPES[Path(name).suffix], headers=file.headers)


@lru_cache(maxsize=1)
def _served() -> frozenset[str]:
    """Return the names of the files that are served."""
    files = (path for path in _FOLDER.rglob("*") if path.suffix in _MEDIA_TYPES)
    return frozenset(path.relative_to(_FOLDER).as_posix() for path in files)


@lru_cache  # there are few files
def _read(name: str) -> _File:
    body = (_FOLDER / name).read_bytes()
    tag = hashlib.sha256(body).hexdigest()[:32]
    return _File(body, {"cache-control": "no-cache", "etag": f'W/"{tag}"', "x-content-type-options": "nosniff"})
