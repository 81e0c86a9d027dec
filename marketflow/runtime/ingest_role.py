"""The feeds as a half of their own: one process takes ticks, others on the same Redis stand by for their turn.

Whoever gets the lease runs the feeds until it is told to stop, or until another has the lease: because this one was
frozen, say, or cut off from Redis. Then it does not stop at once. Of the minute in which the other began, this one
alone has every tick, so it goes on to the end of that minute and writes its row, which is the fuller one; the minutes
after it are the other's. Generated ticks are nobody else's, so there it stops at once. And one that was frozen for so
long that the ticks that waited for it are no longer believed (flow.max_clock_skew_seconds) gives up what it has. Until
Redis has said whether another one took over it writes nothing: a question that failed is no answer.
"""

import math
import threading
import time
from collections.abc import Callable

from loguru import logger

from marketflow import __version__
from marketflow.clock import milliseconds, system_clock
from marketflow.cluster.leader import Leader
from marketflow.cluster.lease import LEASE_SECONDS, RENEW_SECONDS, Lease, connect, kept_mode
from marketflow.errors import Unavailable
from marketflow.model import Mode
from marketflow.resources import resource
from marketflow.runtime.engine import Engine
from marketflow.runtime.store_servers import Servers
from marketflow.server.service_notification import Supervisor
from marketflow.settings import Settings

TRY_SECONDS = 0.25
"""How often one that stands by tries to get the lease."""

FIRST_ANSWER_SECONDS = 1.0
"""How long it asks Redis before it begins without an answer."""

ALONE_SECONDS = 30.0
"""How long it stands by without hearing from Redis. What took Redis down may have taken the other process, too."""


class Turns:
    """Takes ticks whenever it is this process's turn.

    Args:
        settings: all of them.
        servers: where Redis and PostgreSQL are.
        on_failure: called once, from any thread, should the flow itself break.
        supervisor: told what this process does.
    """

    def __init__(
        self, settings: Settings, servers: Servers, on_failure: Callable[[], None], supervisor: Supervisor
    ) -> None:
        self._settings = settings
        self._servers = servers
        self._on_failure = on_failure
        self._supervisor = supervisor
        self._beat_at = 0.0
        self._client = connect(servers.redis)
        self._lease = Lease(self._client)
        self._mode = settings.mode
        self._standing_by = False
        self._stood_by = False  # ever
        self._stopping = threading.Event()
        self._engine: Engine | None = None
        self._looked_at = math.inf  # when this process was last seen not to be frozen, in seconds
        self._held_back = False

    def run(self) -> None:
        """Stand by and take ticks in turn, until told to stop and all that was taken is written."""
        try:
            while self._await_turn():
                self._take_ticks()
        finally:
            self._client.close()

    def stop(self) -> None:
        """Let `run` end. Returns at once."""
        self._stopping.set()

    def force(self) -> None:
        """Let it end quickly."""
        if self._engine is not None:
            self._engine.force()

    # Standing by

    def _await_turn(self) -> bool:
        """Wait for the lease; gives whether to take ticks, or else to end."""
        asked_at = heard_at = time.monotonic()
        while not self._stopping.is_set():
            try:
                if self._lease.hold():
                    self._keep_mode()
                    return True
                heard_at = time.monotonic()
                self._stand_by()
            except Unavailable as error:
                known = self._lease.holder is not None
                # One refused answer says nothing of other processes.
                alone = time.monotonic() - asked_at > FIRST_ANSWER_SECONDS
                if (alone and not known) or time.monotonic() - heard_at > ALONE_SECONDS:
                    logger.warning("begins without knowing whether another process takes ticks: {}", error)
                    return True
            self._beat()
            self._stopping.wait(TRY_SECONDS)
        return False

    def _stand_by(self) -> None:
        if not self._standing_by:
            logger.info("MarketFlow {} stands by: {} takes ticks", __version__, self._lease.holder)
            self._supervisor.ready("stands by: another process takes ticks")
        self._standing_by = self._stood_by = True
        self._keep_mode()

    def _keep_mode(self) -> None:
        """Begin in the mode of the one before, if there was one: only a fresh start is in the configured mode."""
        if self._stood_by:
            self._mode = kept_mode(self._client) or self._mode

    # Taking ticks

    def _take_ticks(self) -> None:
        self._standing_by = False
        self._engine = engine = Engine(
            self._settings,
            self._servers.redis,
            self._servers.postgres,
            resource("ddl"),
            system_clock,
            self._mode,
            self._on_failure,
            may_recover=lambda: self._lease.held,
            may_write=self._may_write,
            may_be_joined=True,
        )
        holder = Leader(self._lease, self._client, engine.state, engine.counters, engine.switch)
        holder.start()
        abandoned = False
        try:
            engine.start()
            logger.info("MarketFlow {} takes ticks in {} mode", __version__, self._mode)
            self._supervisor.ready("takes ticks")
            abandoned = self._until_over(engine, holder)
        finally:
            holder.listen_no_more()
            if abandoned:
                engine.abandon()
            else:
                engine.stop()
                self._tell_of_unwritten(engine)
            holder.close()
            self._engine = None
            self._looked_at, self._held_back = math.inf, False
        self._mode = engine.modes.current

    def _until_over(self, engine: Engine, holder: Leader) -> bool:
        """Wait until told to stop, or until what another process goes on with is all of it.

        Gives whether what was taken last is to be given up.
        """
        over_at: float | None = None
        self._looked_at = time.monotonic()
        while not self._stopping.wait(TRY_SECONDS):
            self._beat()
            self._look_for_freeze(engine)
            if self._held_back:
                over_at = None
                if self._must_abandon(holder):
                    return True
            elif (other := holder.replaced_by) is None:
                over_at = None
            elif over_at is None:
                seconds = self._rest_seconds(engine.modes.current)
                logger.warning("{} has taken over; this process goes on for {:.1f} s", other, seconds)
                over_at = time.monotonic() + seconds
            elif time.monotonic() >= over_at:
                break
        return self._held_back and self._must_abandon(holder)

    # Freezes

    def _may_write(self) -> bool:
        """Whether this process has not been frozen for long, or knows that nobody took over meanwhile.

        Asked before each write: once it is thawed, this may come before `_look_for_freeze`.
        """
        looked_at = self._looked_at  # read first, since it is written last
        return time.monotonic() - looked_at - TRY_SECONDS <= self._longest_freeze() and not self._held_back

    def _look_for_freeze(self, engine: Engine) -> None:
        now = time.monotonic()
        frozen_seconds = now - self._looked_at - TRY_SECONDS
        if frozen_seconds > self._longest_freeze() and engine.modes.current is Mode.LIVE:
            text = "frozen for {:.1f} s; nothing is written until Redis says whether another process took over"
            logger.warning(text, frozen_seconds)
            self._held_back = True
        self._looked_at = now

    def _longest_freeze(self) -> float:
        """For how many seconds ticks that wait are still believed, or nobody can have taken over."""
        return max(self._settings.flow.max_clock_skew_seconds, LEASE_SECONDS - 2 * RENEW_SECONDS)

    def _must_abandon(self, holder: Leader) -> bool:
        """Ask Redis whether another process has the lease; hold nothing back any more where none has."""
        try:
            holder.publish()
        except Unavailable:
            return False  # could not ask: asked again
        if (other := holder.replaced_by) is not None:
            logger.warning("{} has taken over while this process was frozen", other)
            return True
        logger.info("no other process took over; what was held back is written")
        self._held_back = False
        return False

    def _tell_of_unwritten(self, engine: Engine) -> None:
        if self._held_back and (rows := len(engine.flow.pending)):
            logger.error("{} minute rows are not written: another process may have taken over, and Redis is down", rows)

    def _beat(self) -> None:
        """Give a sign of life when it is time for one, and there is life."""
        if self._supervisor.beat_seconds is None or time.monotonic() < self._beat_at:
            return
        self._beat_at = time.monotonic() + self._supervisor.beat_seconds
        engine = self._engine
        self._supervisor.beat_if(lambda: engine is None or engine.is_alive())

    def _rest_seconds(self, mode: Mode) -> float:
        """How long until the minute that runs has closed."""
        if mode is Mode.TEST:
            return 0.0
        flow = self._settings.flow
        rest_ms = flow.minute_ms - milliseconds(system_clock()) % flow.minute_ms
        return (rest_ms + flow.late_after_ms) / 1000
