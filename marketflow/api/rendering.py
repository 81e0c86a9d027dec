"""The JSON form of an answer: msgspec's, never to be stored by anyone on the way, times in RFC 3339."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache

import msgspec
from starlette.responses import Response

_EPOCH = datetime.fromtimestamp(0, UTC).replace(tzinfo=None)

_ALWAYS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}

_RAW = [(b"content-type", b"application/json"), *((key.encode(), value.encode()) for key, value in _ALWAYS.items())]


class JSONAnswer(Response):
    """Any value that msgspec can encode, as a JSON response.

    Prices age at once, so caches must not keep it; and no browser is to take it for anything but JSON.
    """

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """Encode the content."""
        return msgspec.json.encode(content)

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        """Set the headers that every answer has, and `headers`."""
        if headers is None:  # as nearly always, and it is a tenth of a request
            self.raw_headers = [*_RAW, (b"content-length", b"%d" % len(self.body))]
        else:
            super().init_headers({**_ALWAYS, **headers})


def rfc3339(at: int) -> str:
    """A time in Unix ms as RFC 3339 in UTC with milliseconds, such as 2026-11-21T04:30:00.123Z."""
    seconds, milliseconds = divmod(at, 1000)
    return f"{_to_the_second(seconds)}.{milliseconds:03}Z"


@lru_cache(maxsize=1024)  # times of one second come together
def _to_the_second(seconds: int) -> str:
    return (_EPOCH + timedelta(seconds=seconds)).isoformat()
