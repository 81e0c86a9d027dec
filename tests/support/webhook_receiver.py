"""A receiver of webhooks on a real port: it remembers what came, and answers as a test tells it to."""

import http.server
import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

from marketflow.alerts.alert_model import Webhook
from marketflow.alerts.webhook_sender import signature
from tests.support.servers import HOST

SECRET = "a-secret-of-a-webhook"


class Post(NamedTuple):
    """One post: its path, headers in lower case, and body."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["idempotency-key"]

    @property
    def event(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found

    @property
    def is_signed(self) -> bool:
        expected = signature(SECRET, int(self.headers["marketflow-timestamp"]), self.body)
        return self.headers["marketflow-signature"] == expected


class WebhookReceiver:
    """Answers with `status` and `answer_headers`, after `before_answer`, which may block."""

    def __init__(self) -> None:
        self.posts: list[Post] = []
        self.acknowledged: Counter[str] = Counter()
        self.status = 204
        self.answer_headers: dict[str, str] = {}
        self.before_answer: Callable[[], object] = lambda: None
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                post = Post(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
                receiver.posts.append(post)
                status, headers = receiver.status, dict(receiver.answer_headers)
                receiver.before_answer()
                try:
                    self.send_response(status)
                    for name, value in (headers | {"Content-Length": "0"}).items():
                        self.send_header(name, value)
                    self.end_headers()
                except OSError:
                    return
                if 200 <= status < 300:
                    receiver.acknowledged[post.id] += 1

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer((HOST, 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def place(self) -> str:
        return f"http://{HOST}:{self._server.server_address[1]}"

    @property
    def webhook(self) -> Webhook:
        """The webhook that posts here."""
        return Webhook(f"{self.place}/hooks/path-secret", SECRET)

    @property
    def hook(self) -> dict[str, Any]:
        """The fields of a rule that post here."""
        return {"webhook": {"url": self.webhook.url, "secret": SECRET}}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
