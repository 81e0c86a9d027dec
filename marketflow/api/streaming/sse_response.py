"""The response of a stream of server-sent events.

Imported with the first stream: the library it needs takes a thirtieth of the imports before the first price.
"""

from collections.abc import Callable
from typing import Any

from sse_starlette import EventSourceResponse
from starlette.types import Receive, Scope, Send


class SseResponse(EventSourceResponse):
    """A stream that releases its reservation when it ends, also before its first event."""

    def __init__(self, release: Callable[[], None], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, and release its reservation."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._release()
