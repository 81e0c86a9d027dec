"""Calls of Redis by the writer: circuit breaker, log of outages, and the flag that the cache may lack something."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis
from redis.client import Pipeline

from marketflow.errors import Unavailable
from marketflow.logs import Outage
from marketflow.model import Series
from marketflow.stores.circuit_breaker import CircuitBreaker
from marketflow.stores.redis.buckets.slot_map import is_redirection

_SERIES_A_READ = 50  # whose windows, of up to 4200 slices each, are read at once

SHORT_ANSWERS = 1000
"""Series in one pipeline where the answer is a number or a word. With 50 the probe before a refill of 15,000 series
made 900 calls, each of which waited behind writes: 44 s on a busy machine."""

_CLUSTER_ERRORS = (
    redis.exceptions.AskError,  # MovedError as well
    redis.exceptions.ClusterCrossSlotError,
    redis.exceptions.ClusterDownError,
)
"""Recognized by their type: redis-py cuts the error code off the text."""


class RedisCalls:
    """A client behind a circuit breaker; for any number of threads.

    Args:
        client: shared by all threads.
        circuit_breaker: returns the circuit breaker of the node in use.
        outage: logs failures; shared by the buckets of a cluster.
        name: of the caller, for the outage.
    """

    def __init__(
        self,
        client: "redis.Redis",
        circuit_breaker: Callable[[], CircuitBreaker],
        outage: Outage | None = None,
        name: str = "cache",
    ) -> None:
        self.client = client
        self.incomplete = False
        """Whether a call failed, so that the cache may lack what was written; reset by the probe alone."""
        self._circuit_breaker = circuit_breaker
        self._outage, self._name = outage or redis_outage(), name
        self._closed = False

    def close(self) -> None:
        """Close all connections, also under running calls; these raise Unavailable."""
        self._closed = True
        self.client.close()

    @contextmanager
    def calling(self) -> Iterator["redis.Redis"]:
        """Yield the client, for one or several calls.

        Raises:
            Unavailable: in place of any error of Redis, which opens the circuit breaker, and while that is open.
        """
        circuit_breaker: CircuitBreaker | None = None
        try:
            circuit_breaker = self._circuit_breaker()
            circuit_breaker.check()
            yield self.client
        except redis.RedisError as error:
            self.incomplete = True
            if circuit_breaker is not None and not is_redirection(error):
                circuit_breaker.failed()
            self._outage.failed(self._name, f"memory answers meanwhile: {self._reason(error)}")
            raise Unavailable(f"Redis cannot be used: {error}") from error
        except BaseException as error:
            self.incomplete = True
            if self._closed:  # by another thread: errors of the client are expected
                raise Unavailable("the cache is closed") from error
            raise
        circuit_breaker.succeeded()

    def end_outage(self) -> None:
        """Log the end of an outage, if there is one: all that should be in the cache has been written.

        A single call that succeeds does not prove that: a replica, or a user without a right, answers reads and fails
        each write.
        """
        self._outage.over(self._name)

    def _reason(self, error: redis.RedisError) -> str:
        """Return the text of an error, with the remedy where a cluster is configured as a plain Redis."""
        text = str(error)
        if self._name != "cache":
            return f"{self._name}: {text}"
        if isinstance(error, _CLUSTER_ERRORS) or "SELECT is not allowed in cluster" in text:
            return f"it is a node of a Redis Cluster; set redis.nodes instead of redis.host ({text})"
        return text

    def each(
        self,
        series: Sequence[Series],
        key_of: Callable[[Series], str],
        command: "Callable[[Pipeline, str], object]",
        at_once: int = _SERIES_A_READ,
    ) -> Iterator[tuple[Series, Any]]:
        """Yield each series with the answer to a command on its key; within `calling`, `at_once` in a pipeline."""
        for begin in range(0, len(series), at_once):
            some = series[begin : begin + at_once]
            with self.client.pipeline(transaction=False) as pipe:
                for each in some:
                    command(pipe, key_of(each))
                yield from zip(some, pipe.execute(), strict=True)


def redis_outage() -> Outage:
    """Return the log of outages of Redis, or of a part of a cluster."""
    return Outage("Redis cannot be used", "Redis can be used again")
