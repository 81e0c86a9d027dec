"""Health: probes ping the stores, and the report builds the answer of /health from their results."""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Protocol

from marketflow.errors import Unavailable
from marketflow.health import FeedProblem, Health, ShardHealth, StoreState
from marketflow.logs import Outage, RateLimit
from marketflow.model import FINE_STATES, FeedState, Mode

PROBE_SECONDS = 1.0
"""Interval of the pings, while their result is read."""

IDLE_PROBE_SECONDS = 5.0
"""Interval while it is not: every PROBE_SECONDS, they were a fifth of the CPU of an idle process."""

RETRY_SECONDS = 0.1
"""How soon a store that did not answer is pinged again."""

FAILURES_OF_AN_OUTAGE = 3
"""Missed pings in a row after which a store is down. A busy machine may miss a deadline or two."""


class Pingable(Protocol):
    """A store that answers pings."""

    async def ping(self) -> None:
        """Ping the store.

        Raises:
            Unavailable: the store did not answer.
        """
        ...


class StoreStatus(Protocol):
    """The status of a store."""

    @property
    def state(self) -> StoreState:
        """Whether the store is usable, as far as known."""
        ...


class WriterStatus:
    """Status of a store by the writes and probes of the pipeline in this process; no ping notices a failure sooner.

    Args:
        writable: returns whether all writes are confirmed.
    """

    def __init__(self, writable: Callable[[], bool]) -> None:
        self._writable = writable

    @property
    def state(self) -> StoreState:
        """Whether the store is usable, as far as known."""
        return "ok" if self._writable() else "down"


class Probe:
    """Pings one store periodically.

    Args:
        store: the store.
        writable: returns whether the last write of the pipeline succeeded; a store may answer and yet refuse writes.
        outage: logs outages, in a process where no other part does.
    """

    def __init__(self, store: Pingable, writable: Callable[[], bool], outage: Outage | None = None) -> None:
        self._outage = outage
        self._failures = 0
        self._store = store
        self._writable = writable
        self._limit = RateLimit(60.0)
        self._answers = False
        self._read = asyncio.Event()

    @property
    def answers(self) -> bool:
        """Whether it has answered, and missed fewer than FAILURES_OF_AN_OUTAGE pings since; for the event loop."""
        self._read.set()
        return self._answers

    @property
    def state(self) -> StoreState:
        """Whether the store is usable, as far as known; for the event loop."""
        return "ok" if self.answers and self._writable() else "down"

    async def ping(self) -> None:
        """Ping once."""
        try:
            await self._store.ping()
        except Unavailable as error:
            self._failures += 1
            if self._failures >= FAILURES_OF_AN_OUTAGE:
                self._answers = False
                if self._outage:
                    self._outage.failed("probe", f"answers lack what it has: {error}")
        except Exception as error:  # noqa: BLE001 - a probe that ended would say "ok" for ever
            self._answers = False
            self._limit.log_bug("a store cannot be pinged", error)
        else:
            self._answers = True
            self._failures = 0
            if self._outage:
                self._outage.over("probe")

    async def ping_until_known(self) -> None:
        """Ping until the store answers or counts as down."""
        await self.ping()
        while 0 < self._failures < FAILURES_OF_AN_OUTAGE:
            await asyncio.sleep(RETRY_SECONDS)
            await self.ping()

    async def ping_periodically(self) -> None:
        """Ping every PROBE_SECONDS, sooner after a miss, rarely while the result is not read; until cancelled."""
        while True:
            if 0 < self._failures < FAILURES_OF_AN_OUTAGE:
                await asyncio.sleep(RETRY_SECONDS)
            else:
                await asyncio.sleep(PROBE_SECONDS)
                with suppress(TimeoutError):
                    async with asyncio.timeout(IDLE_PROBE_SECONDS - PROBE_SECONDS):
                        await self._read.wait()
            self._read.clear()
            await self.ping()


class HealthReport:
    """Builds the answer of /health.

    Args:
        feeds: returns the current mode, and the state of its feeds by exchange.
        postgres, redis: status of the stores.
        stalled: returns the names of pipeline branches that have work and finish none.
        clock_offsets_ms: returns how far (ms) each wrong exchange clock is ahead, by exchange.
        problems: returns the problems of feeds, by exchange.
        shards: returns owner and standby of each shard.
        unavailable_symbols: returns the symbols whose part of the cache cannot be used.
    """

    def __init__(
        self,
        feeds: Callable[[], tuple[Mode, Mapping[str, FeedState]]],
        postgres: StoreStatus,
        redis: StoreStatus,
        stalled: Callable[[], Collection[str]] = tuple,
        clock_offsets_ms: Callable[[], dict[str, int]] = dict,
        problems: Callable[[], dict[str, FeedProblem]] = dict,
        shards: Callable[[], tuple[ShardHealth, ...]] = tuple,
        unavailable_symbols: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        self._feeds = feeds
        self._stalled = stalled
        self._clock_offsets_ms = clock_offsets_ms
        self._problems = problems
        self._shards = shards
        self._unavailable_symbols = unavailable_symbols
        self._postgres = postgres
        self._redis = redis
        self._began = time.monotonic()

    def __call__(self) -> Health:
        """Return the health at this moment, without any I/O."""
        mode, exchanges = self._feeds()
        postgres, redis, stalled = self._postgres.state, self._redis.state, tuple(self._stalled())
        ok = postgres == "ok" and redis == "ok" and FINE_STATES.issuperset(exchanges.values()) and not stalled
        return Health(
            status="ok" if ok else "degraded",
            mode=mode,
            uptime_seconds=round(time.monotonic() - self._began, 3),
            postgres=postgres,
            redis=redis,
            exchanges=dict(exchanges),
            clock_offsets_ms=self._clock_offsets_ms(),
            feeds=self._problems(),
            unavailable_symbols=self._unavailable_symbols(),
            stalled=stalled,
            shards=self._shards(),
        )
