"""Body limit: receives the whole body before a route runs, and refuses one that is too long or too slow.

Few routes read a body. Starlette's `max_body_size` counts a body only while a route reads it and sets no deadline, so a
unread body would be received for as long as the client sends it, or be parsed as the next request.
"""

import asyncio
from collections.abc import Awaitable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marketflow.api.problems import BodyTooLarge, answer_to, request_timeout
from marketflow.api.streaming.sse_route import STREAMING

MAX_BODY_BYTES = 64 * 1024
BODY_SECONDS = 10.0
"""Deadline for the whole body."""


class BodyLimit:
    """Middleware that answers 413 `body_too_large` or 408 `request_timeout` before a route runs.

    Args:
        app: the application.
        max_bytes: longest body.
        seconds: deadline for the whole body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES, seconds: float = BODY_SECONDS) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve the request, or refuse it."""
        whole = scope["type"] != "http" or not _has_body(scope)
        return (self._app if whole else self._with_body)(scope, receive, send)

    async def _with_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        if STREAMING not in scope.get("extensions", {}) and Headers(scope=scope).get("transfer-encoding"):
            # Other servers turn trailers into headers; a trailer must not authorize a request.
            scope = {**scope, "headers": [each for each in scope["headers"] if each[0] != b"authorization"]}
        try:
            async with asyncio.timeout(self._seconds):
                messages = await self._received(scope, receive)
        except _TooLarge:
            await answer_to(BodyTooLarge(f"The body is longer than {self._max_bytes} bytes."))(scope, receive, send)
        except TimeoutError:
            await request_timeout()(scope, receive, send)
        else:
            if messages[-1]["type"] == "http.disconnect":  # the request is incomplete
                return

            async def receive_again() -> Message:
                return messages.pop(0) if messages else await receive()

            await self._app(scope, receive_again, send)

    async def _received(self, scope: Scope, receive: Receive) -> list[Message]:
        """Return all messages of the body, up to the one that ends it."""
        # Before the first receive(), at which the server sends 100 Continue.
        if any(
            len(digits := value.lstrip("0")) > 18
            or int(digits or "0") > self._max_bytes  # int() has a limit of its own
            for value in Headers(scope=scope).getlist("content-length")
            if value.isascii() and value.isdecimal()
        ):
            raise _TooLarge
        messages: list[Message] = []
        size = 0
        while not messages or messages[-1].get("more_body"):
            messages.append(await receive())
            size += len(messages[-1].get("body", b""))
            if size > self._max_bytes:
                raise _TooLarge
        return messages


class _TooLarge(Exception):
    """The body exceeds the limit."""


def _has_body(scope: Scope) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])
