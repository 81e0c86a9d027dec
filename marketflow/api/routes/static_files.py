"""Pages for browsers and what they are made of: files below static/, and nothing from anywhere else.

The headers of a page forbid the browser to load or run anything from elsewhere, whatever gets into it. Files change
only with the version, so a browser keeps them, and asks each time whether they are still those.
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
from marketflow.api.rendering import ALWAYS

_FOLDER = Path(__file__).parents[1] / "static"

_MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
"""Of the files that are served; others, such as licences, are only shipped."""

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
"""What the endpoint of a page answers."""


class _File(NamedTuple):
    body: bytes
    headers: dict[str, str]


def page(name: str) -> Endpoint:
    """Answers with a file of HTML, which may use the files that `static_route` serves."""

    async def answer(_: Request) -> Response:
        return Response(_read(name).body, media_type="text/html", headers=_PAGE_HEADERS)

    return answer


def static_route() -> Route:
    """Serves the files of all pages below /static; no operation, for it's nothing a program would ask for."""
    return Route("/static/{name:path}", _static, include_in_schema=False)


async def _static(request: Request) -> Response:
    name: str = request.path_params["name"]
    if name not in _served():
        raise NotFound("There is nothing at this path.")
    file = _read(name)
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if file.headers["etag"].removeprefix("W/") in known:
        return Response(status_code=304, headers=file.headers)
    return Response(file.body, media_type=_MEDIA_TYPES[Path(name).suffix], headers=file.headers)


@lru_cache(maxsize=1)
def _served() -> frozenset[str]:
    """The names of the files that may be asked for."""
    files = (path for path in _FOLDER.rglob("*") if path.suffix in _MEDIA_TYPES)
    return frozenset(path.relative_to(_FOLDER).as_posix() for path in files)


@lru_cache  # there are few of them, and only a browser asks
def _read(name: str) -> _File:
    body = (_FOLDER / name).read_bytes()
    tag = hashlib.sha256(body).hexdigest()[:32]
    return _File(body, {"cache-control": "no-cache", "etag": f'W/"{tag}"', "x-content-type-options": "nosniff"})
