"""Metrics of the stream: connected clients and events sent, by transport."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge

from marketflow.api.streaming.subscriber import CountSent

Transport = Literal["sse", "websocket"]


class StreamCounters:
    """Counters that are summed over all processes that share the metrics folder.

    Args:
        registry: where they are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._clients = Gauge(
            "marketflow_stream_clients",
            "Connected clients of the streams.",
            ["transport"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._events = Counter(
            "marketflow_stream_events", "Events sent to stream clients.", ["transport"], registry=registry
        )
        for transport in ("sse", "websocket"):
            self._clients.labels(transport).set(0)  # resets what a killed process with this id has left in the folder
        self._count_sent = {name: self._events.labels(name).inc for name in ("sse", "websocket")}

    @contextmanager
    def client(self, transport: Transport) -> Iterator[CountSent]:
        """Count a connected client, and yield the function that counts the events sent to it; one for a transport."""
        clients = self._clients.labels(transport)
        clients.inc()
        try:
            yield self._count_sent[transport]
        finally:
            clients.dec()
