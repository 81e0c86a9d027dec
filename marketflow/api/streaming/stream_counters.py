"""How many clients look at prices as they change, and how many events they are sent."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge

Transport = Literal["sse", "websocket"]

Sent = Callable[[int], None]
"""Counts so many events that were sent."""


class StreamCounters:
    """Counts, together with other processes that count in the same folder.

    Args:
        registry: where they are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._clients = Gauge(
            "marketflow_stream_clients",
            "Clients that are told of prices as they change.",
            ["transport"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._events = Counter("marketflow_stream_events", "Events sent to them.", ["transport"], registry=registry)
        for transport in ("sse", "websocket"):
            self._clients.labels(transport).set(0)  # of a process that was killed nobody else would take them away
            self._events.labels(transport)

    @contextmanager
    def client(self, transport: Transport) -> Iterator[Sent]:
        """One more client, and what counts the events that it is sent."""
        clients = self._clients.labels(transport)
        clients.inc()
        try:
            yield self._events.labels(transport).inc
        finally:
            clients.dec()
