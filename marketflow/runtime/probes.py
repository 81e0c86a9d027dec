"""How the stores do, asked in the background: /health answers from the last answers and never waits for a store."""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from loguru import logger

from marketflow.errors import Unavailable
from marketflow.health import Health, StoreState
from marketflow.logs import Outage
from marketflow.model import FeedState, Mode

PROBE_SECONDS = 1.0

RETRY_SECONDS = 0.1
"""How soon a store that did not answer is asked again."""

FAILURES_OF_AN_OUTAGE = 3
"""After so many in a row a store is down. A busy machine may miss a deadline or two."""


class Pingable(Protocol):
    """A store that can be asked for a sign of life."""

    async def ping(self) -> None:
        """Ask for it.

        Raises:
            Unavailable: there is none.
        """
        ...


class Probe:
    """Asks one store again and again.

    Args:
        store: what is asked.
        writable: whether the flow could write to it when it last tried; a store may answer and yet refuse that.
        outage: logs when it stops answering, where nothing else in the process would.
    """

    def __init__(self, store: Pingable, writable: Callable[[], bool], outage: Outage | None = None) -> None:
        self._outage = outage
        self._failures = 0
        self._store = store
        self._writable = writable
        self.answers = False
        """Whether it did at the last attempt, or failed at fewer than FAILURES_OF_AN_OUTAGE since."""

    @property
    def state(self) -> StoreState:
        """Whether the store can be used, by its last answer."""
        return "ok" if self.answers and self._writable() else "down"

    async def ask(self) -> None:
        """Ask once."""
        try:
            await self._store.ping()
        except Unavailable as error:
            self._failures += 1
            if self._failures >= FAILURES_OF_AN_OUTAGE:
                self.answers = False
                if self._outage:
                    self._outage.failed("probe", f"answers lack what it has: {error}")
        except Exception as error:  # noqa: BLE001 - one that asked no more would say "ok" for ever
            self.answers = False
            logger.opt(exception=error).error("a store cannot be asked how it is, which is a bug")
        else:
            self.answers = True
            self._failures = 0
            if self._outage:
                self._outage.over("probe")

    async def ask_first(self) -> None:
        """Ask until it answers or is down."""
        await self.ask()
        while 0 < self._failures < FAILURES_OF_AN_OUTAGE:
            await asyncio.sleep(RETRY_SECONDS)
            await self.ask()

    async def ask_for_ever(self) -> None:
        """Ask every PROBE_SECONDS, sooner after a failure, until cancelled."""
        while True:
            await asyncio.sleep(RETRY_SECONDS if 0 < self._failures < FAILURES_OF_AN_OUTAGE else PROBE_SECONDS)
            await self.ask()


class HealthReport:
    """Puts together what /health says.

    Args:
        feeds: the mode that runs, and how its feeds do by the names of their exchanges.
        postgres, redis: the last answers of the stores.
        stalled: names of branches of the flow that have work and finish none.
        clock_offsets_ms: how far clocks of exchanges that are wrong are ahead, by exchange.
    """

    def __init__(
        self,
        feeds: Callable[[], tuple[Mode, Mapping[str, FeedState]]],
        postgres: Probe,
        redis: Probe,
        stalled: Callable[[], Collection[str]] = tuple,
        clock_offsets_ms: Callable[[], dict[str, int]] = dict,
    ) -> None:
        self._feeds = feeds
        self._stalled = stalled
        self._clock_offsets_ms = clock_offsets_ms
        self._postgres = postgres
        self._redis = redis
        self._began = time.monotonic()

    def __call__(self) -> Health:
        """The health at this moment, without waiting for anything."""
        mode, exchanges = self._feeds()
        postgres, redis = self._postgres.state, self._redis.state
        fine = {FeedState.CONNECTED, FeedState.GENERATED}
        ok = postgres == "ok" and redis == "ok" and fine.issuperset(exchanges.values()) and not self._stalled()
        return Health(
            status="ok" if ok else "degraded",
            mode=mode,
            uptime_seconds=round(time.monotonic() - self._began, 3),
            postgres=postgres,
            redis=redis,
            exchanges=dict(exchanges),
            clock_offsets_ms=self._clock_offsets_ms(),
        )
