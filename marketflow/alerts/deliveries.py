"""Delivers stored events to the webhooks of their rules, each receiver on its own, until it acknowledges them.

An acknowledgement is recorded before anything else is sent to its receiver. So an event comes more than once only where
an acknowledgement was lost on its way, or this process was killed before it was recorded.
"""

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol

from marketflow.alerts.alert_model import DueDelivery, Webhook
from marketflow.alerts.watched_rule import WatchedRule
from marketflow.alerts.webhook_sender import PostResult
from marketflow.clock import Clock, milliseconds
from marketflow.logs import RateLimit
from marketflow.tasks import Backoff

CLAIM_MS = 30_000
"""For how long a delivery is this process's own: longer than a post takes."""

GIVEN_UP_AFTER_MS = 86_400_000
"""For how long an event is posted again and again."""

Post = Callable[[Webhook, str, str], PostResult]
"""Posts to a webhook: the webhook, id and body of the event."""


class DeliveryStore(Protocol):
    """Where deliveries are kept for good; every call raises Unavailable while it cannot be reached."""

    def receivers(self, now_ms: int) -> dict[str, tuple[int, bool]]:
        """The receivers with pending deliveries: how many these are, and whether one is due."""
        ...

    def claim(self, receiver: str, now_ms: int, until_ms: int) -> DueDelivery | None:
        """A due delivery of a receiver, which no other process gets until a time (Unix ms)."""
        ...

    def finish(self, states: dict[str, str]) -> None:
        """Record deliveries as acknowledged or given up, by event."""
        ...

    def retry(self, event: str, at_ms: int) -> None:
        """Make a delivery due again at a time (Unix ms)."""
        ...


class _Receiver:
    """A receiver, and how its last posts went."""

    def __init__(self) -> None:
        self.busy = False
        self.failures = 0
        self.paused_until = 0  # Unix ms


class Deliveries:
    """Delivers events; for any number of threads, of which each serves one receiver.

    Args:
        store: where deliveries are kept.
        rules: returns the rules by id, with their webhooks.
        post: posts an event.
        clock: wall-clock time.
        backoff: pauses before an event is posted again.
    """

    def __init__(
        self,
        store: DeliveryStore,
        rules: Callable[[], Mapping[str, WatchedRule]],
        post: Post,
        clock: Clock,
        backoff: Backoff | None = None,
    ) -> None:
        self._store, self._rules, self._post, self._clock = store, rules, post, clock
        self._backoff = backoff or Backoff(1.0, 300.0)
        self._lock = threading.Lock()
        self._receivers: dict[str, _Receiver] = {}
        self._finished: dict[str, str] = {}  # and not yet recorded
        self._limit = RateLimit(60.0)
        self._stopped = False
        self._looked = False
        self.pending = 0
        """Deliveries that were pending when last looked at."""
        self.results: Counter[str] = Counter()
        """Posts by their result: acknowledged, failed; and deliveries that were given up."""

    @property
    def may_be_due(self) -> bool:
        """Whether any delivery may be due, beside those of events that are stored from now on."""
        return bool(not self._looked or self.pending or self._finished)

    def stop(self) -> None:
        """Begin no more posts."""
        self._stopped = True

    def due(self) -> list[str]:
        """Return the receivers that are to be served now; each must be, by one call of `serve`.

        Raises:
            Unavailable: the store cannot be reached.
        """
        self._record()
        now_ms = self._now_ms()
        found = self._store.receivers(now_ms)
        self.pending = sum(count for count, _ in found.values())
        self._looked = True
        with self._lock:
            for name in self._receivers.keys() - found.keys():
                if not self._receivers[name].busy:
                    del self._receivers[name]
            due = []
            for name, (_, is_due) in found.items():
                receiver = self._receivers.setdefault(name, _Receiver())
                if is_due and not receiver.busy and now_ms >= receiver.paused_until:
                    receiver.busy = True
                    due.append(name)
            return due

    def serve(self, name: str) -> None:
        """Post what is due for a receiver, one event after the other, until one fails.

        Raises:
            Unavailable: the store cannot be reached.
        """
        receiver = self._receivers[name]
        try:
            while not self._stopped:
                self._record()
                now_ms = self._now_ms()
                delivery = self._store.claim(name, now_ms, now_ms + CLAIM_MS)
                if delivery is None or not self._deliver(name, receiver, delivery):
                    return
        finally:
            receiver.busy = False

    def _deliver(self, name: str, receiver: _Receiver, delivery: DueDelivery) -> bool:
        """Post an event; return whether the receiver may get another one."""
        watched = self._rules().get(delivery.rule)
        webhook = None if watched is None else watched.rule.webhook
        if webhook is None:
            self._finish(delivery, "given_up")  # the rule was deleted, or has no webhook any more
            return True
        result = self._post(webhook, delivery.event, delivery.body)
        if result.error is None:
            receiver.failures = 0
            self._finish(delivery, "acknowledged")
            return True
        self._failed(name, receiver, delivery, result)
        return False

    def _failed(self, name: str, receiver: _Receiver, delivery: DueDelivery, result: PostResult) -> None:
        if self._stopped:
            return
        with self._lock:
            self.results["failed"] += 1
        self._limit.log(name, "WARNING", f"an alert is not delivered: receiver={name} error={result.error}")
        now_ms = self._now_ms()
        receiver.failures += 1
        pause = max(self._backoff.pause(receiver.failures), result.retry_after_seconds)
        receiver.paused_until = now_ms + round(1000 * pause)
        if now_ms - delivery.found_at >= GIVEN_UP_AFTER_MS:
            self._finish(delivery, "given_up")
            return
        again = max(self._backoff.pause(delivery.attempts + 1), result.retry_after_seconds)
        self._store.retry(delivery.event, now_ms + round(1000 * again))

    def _finish(self, delivery: DueDelivery, state: str) -> None:
        with self._lock:
            self.results[state] += 1
            self._finished[delivery.event] = state
        self._record()

    def _record(self) -> None:
        """Record what is finished."""
        with self._lock:
            if not self._finished:
                return
            self._store.finish(dict(self._finished))
            self._finished.clear()

    def _now_ms(self) -> int:
        return milliseconds(self._clock())
