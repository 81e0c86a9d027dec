"""Responses: JSON by msgspec, times in RFC 3339, the headers of every response, and ETags."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

_EPOCH = datetime.fromtimestamp(0, UTC).replace(tzinfo=None)

Time = Annotated[
    str,
    Meta(
        pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z$",
        examples=["2026-11-21T05:12:57.069Z"],
        extra_json_schema={"format": "date-time"},
    ),
]
"""RFC 3339 in UTC with milliseconds, as `rfc3339` makes it."""

ALWAYS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
"""Headers of every response: no cache may store a price, and no browser may guess a media type."""

_RAW = [(b"content-type", b"application/json"), *((key.encode(), value.encode()) for key, value in ALWAYS.items())]


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
