"""Posts events to webhooks: signed, without redirects, within a time limit.

The signature is an HMAC-SHA256, by the secret of the webhook, of the timestamp, a point and the body, so that a
receiver can refuse an old post that is sent again. The id of the event is the Idempotency-Key: an event may come more
than once.
"""

import asyncio
import hashlib
import hmac
import threading
from contextlib import suppress
from typing import Any, NamedTuple

from marketflow.alerts.alert_model import Webhook
from marketflow.clock import Clock
from marketflow.tasks import LookupLoop
from marketflow.text import connection_error_text, one_line

POST_SECONDS = 10.0
"""Limit of one post, from the connection to the status."""

MOST_RETRY_AFTER_SECONDS = 3600.0

MOST_ERROR_LENGTH = 200
"""Characters of an error that are kept: it may quote an answer that is not HTTP."""


class PostResult(NamedTuple):
    """What became of a post: None as the error means that it was acknowledged, by a status of 200 to 299.

    Args:
        error: what went wrong, without the address.
        retry_after_seconds: how long the receiver asks to wait, 0 if it does not.
    """

    error: str | None
    retry_after_seconds: float = 0.0


def signature(secret: str, timestamp: int, body: bytes) -> str:
    """Return the signature of a body that is posted at a time (Unix seconds)."""
    signed = b"%d.%s" % (timestamp, body)
    return f"v1={hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()}"


class WebhookSender:
    """Posts from any number of threads. The HTTP client is loaded with the first post.

    Args:
        clock: wall-clock time.
        seconds: limit of one post.
    """

    def __init__(self, clock: Clock, seconds: float = POST_SECONDS) -> None:
        self._clock = clock
        self._seconds = seconds
        self._lock = threading.Lock()
        self._posts: dict[asyncio.Task[PostResult], asyncio.AbstractEventLoop] = {}
        self._closed = False

    def post(self, webhook: Webhook, event: str, body: str) -> PostResult:
        """Post an event; blocks until there is a status, or none in time.

        Args:
            webhook: the receiver.
            event: id of the event.
            body: the event as JSON.
        """
        content, timestamp = body.encode(), self._clock() // 1_000_000_000
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "MarketFlow",
            "Idempotency-Key": event,
            "Marketflow-Timestamp": str(timestamp),
            "Marketflow-Signature": signature(webhook.secret, timestamp, content),
        }
        try:
            with asyncio.Runner(loop_factory=LookupLoop) as runner:
                return runner.run(self._post(webhook.url, headers, content))
        except asyncio.CancelledError:
            return PostResult("stopping")

    def close(self) -> None:
        """End all posts that are under way, and refuse others."""
        with self._lock:
            self._closed = True
            posts, self._posts = self._posts, {}
        for task, loop in posts.items():
            with suppress(RuntimeError):  # it has just ended
                loop.call_soon_threadsafe(task.cancel)

    async def _post(self, url: str, headers: dict[str, str], content: bytes) -> PostResult:
        import httpx

        task: Any = asyncio.current_task()
        with self._lock:
            if self._closed:
                return PostResult("stopping")
            self._posts[task] = asyncio.get_running_loop()
        try:
            # The body of the answer is not read, and the timeout of each step is that of all of them.
            async with (
                asyncio.timeout(self._seconds),
                httpx.AsyncClient(follow_redirects=False, timeout=None) as client,  # noqa: S113 - limited as a whole
                client.stream("POST", url, headers=headers, content=content) as response,
            ):
                return _result(response.status_code, response.headers.get("retry-after", ""))
        except TimeoutError:
            return PostResult(f"no answer within {self._seconds:g} s")
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            return PostResult(one_line(connection_error_text(error))[:MOST_ERROR_LENGTH])
        finally:
            with self._lock:
                self._posts.pop(task, None)


def _result(status: int, retry_after: str) -> PostResult:
    if 200 <= status < 300:
        return PostResult(None)
    seconds = float(retry_after) if retry_after.isascii() and retry_after.isdecimal() and len(retry_after) < 7 else 0.0
    return PostResult(f"status {status}", min(seconds, MOST_RETRY_AFTER_SECONDS))
