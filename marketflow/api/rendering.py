"""The JSON form of an answer: msgspec's, never to be stored by anyone on the way, times in RFC 3339."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import msgspec
from starlette.responses import Response

_EPOCH = datetime.fromtimestamp(0, UTC)

_ALWAYS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


class JSONAnswer(Response):
    """Any value that msgspec can encode, as a JSON response.

    Prices age at once, so caches must not keep it; and no browser is to take it for anything but JSON.
    """

    media_type = "application/json"

    def __init__(self, content: object, status_code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(content, status_code, {**_ALWAYS, **(headers or {})})

    def render(self, content: object) -> bytes:
        """Encode the content."""
        return msgspec.json.encode(content)


def rfc3339(at: int) -> str:
    """A time in Unix ms as RFC 3339 in UTC with milliseconds, such as 2026-11-21T04:30:00.123Z."""
    # Whole milliseconds are added, for a float of seconds would be rounded.
    moment = _EPOCH + timedelta(milliseconds=at)
    return moment.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"
