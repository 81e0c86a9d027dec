"""Responses: JSON by msgspec, times in RFC 3339, the headers of every response, and ETags."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from http import HTTPStatus

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from marketflow.health import Time as Time

_EPOCH = datetime.fromtimestamp(0, UTC).replace(tzinfo=None)

ALWAYS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
"""Headers of every response: no cache may store a price, and no browser may guess a media type."""

_RAW = [(b"content-type", b"application/json"), *((key.encode(), value.encode()) for key, value in ALWAYS.items())]


RawHeaders = Sequence[tuple[bytes, bytes]]


class JSONAnswer(Response):
    """A JSON response of any value that msgspec can encode."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """Encode the content."""
        return msgspec.json.encode(content)

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        """Set the headers of every response, and `headers`."""
        if headers is None:  # the usual case, and a tenth of the time of a request
            self.raw_headers = [*_RAW, (b"content-length", b"%d" % len(self.body))]
        else:
            super().init_headers({**ALWAYS, **headers})


def message_of(response: Response, server_headers: RawHeaders, added: RawHeaders = ()) -> bytes:
    """Return a whole response as it is sent by HTTP/1.1; the server's headers come first, added ones last."""
    status = HTTPStatus(response.status_code)
    lines = [b"%s: %s\r\n" % header for header in (*server_headers, *response.raw_headers, *added)]
    return b"".join([b"HTTP/1.1 %d %s\r\n" % (status, status.phrase.encode()), *lines, b"\r\n", response.body])


def rfc3339(at: int) -> str:
    """Return a time in Unix ms as RFC 3339 in UTC with milliseconds, such as 2026-11-21T04:30:00.123Z."""
    seconds, milliseconds = divmod(at, 1000)
    return f"{_to_the_second(seconds)}.{milliseconds:03}Z"


@lru_cache(maxsize=1024)  # many times lie within the same second
def _to_the_second(seconds: int) -> str:
    return (_EPOCH + timedelta(seconds=seconds)).isoformat()


def has_etag(request: Request, etag: str) -> bool:
    """Return whether `If-None-Match` of a request names this ETag, weak or strong, or any."""
    known = [each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")]
    return etag.removeprefix("W/") in known or "*" in known
