"""Leader election for the ingest role: one process ingests, the others on the same Redis are hot standbys.

The holder of the lease is the leader and ingests until it is stopped or another process holds the lease, because this
one was frozen or cut off from Redis. Then it does not stop at once: of the minute in which the other one began this one
alone has every tick, so it ingests to the end of that minute and writes the more complete row. Generated ticks exist in
one process only, so in test mode it stops at once. A leader that was frozen for longer than late ticks are accepted
(flow.max_clock_skew_seconds) discards what it holds. After a freeze nothing is written until Redis has answered whether
another process leads: a failed request is no answer.
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
from marketflow.runtime.settings_reload import ReadSettings, SettingsReload
from marketflow.runtime.store_servers import Servers
from marketflow.server.service_notification import Supervisor
from marketflow.settings import Settings

TRY_SECONDS = 0.25
"""How often a standby tries to acquire the lease."""

FIRST_ANSWER_SECONDS = 1.0
"""How long a start waits for an answer of Redis before it ingests without one."""

NEWEST_PAUSE_SECONDS = 0.001
"""Pause between writes of newest ticks: at 3,000 ticks/s it halves the CPU of both roles and of Redis."""

ALONE_SECONDS = 30.0
"""How long a standby waits without Redis before it ingests: the outage may have ended the leader as well."""


class LeaderElection:
    """Alternates between standby and leader, with a new engine per term as leader.

    Args:
        settings: the settings.
        read: reads them again.
        servers: addresses of Redis and PostgreSQL.
        on_failure: called once, from any thread, if the pipeline fails.
        notified: gets readiness and liveness.
    """

    def __init__(
        self,
        settings: Settings,
        read: ReadSettings,
        servers: Servers,
        on_failure: Callable[[], None],
        notified: Supervisor,
    ) -> None:
        self.reload = SettingsReload(settings, read, self._apply)
        """Reads the settings again; a standby takes them for its next term."""
        self._servers = servers
        self._on_failure = on_failure
        self._supervisor = notified
        self._beat_at = 0.0
        self._client = connect(servers.redis)
        self._lease = Lease(self._client)
        self._mode = settings.mode
        self._is_standby = False
        self._was_standby = False  # ever
        self._stopping = threading.Event()
        self._engine: Engine | None = None
        self._checked_at = math.inf  # of the last freeze check, in seconds
        self._writes_held = False

    def run(self) -> None:
        """Stand by and lead in turn, until stopped; then write what was ingested."""
        try:
            while self._wait_for_lease():
                self._lead()
        finally:
            self._client.close()

    def stop(self) -> None:
        """Request the end of `run`. Returns at once."""
        self._stopping.set()

    def force_stop(self) -> None:
        """Cut the end of `run` short."""
        if self._engine is not None:
            self._engine.force_stop()

    def _apply(self, settings: Settings) -> None:
        if (engine := self._engine) is not None:
            engine.reconfigure(settings)

    # Standby

    def _wait_for_lease(self) -> bool:
        """Wait for the lease; return whether to lead, False once stopped."""
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
                # A single failed request says nothing about other processes.
                alone = time.monotonic() - asked_at > FIRST_ANSWER_SECONDS
                if (alone and not known) or time.monotonic() - heard_at > ALONE_SECONDS:
                    logger.warning("ingesting without a lease, Redis is unreachable: {}", error)
                    return True
            self._beat()
            self._stopping.wait(TRY_SECONDS)
        return False

    def _stand_by(self) -> None:
        if not self._is_standby:
            logger.info("MarketFlow {} stands by: {} takes ticks", __version__, self._lease.holder)
            self._supervisor.ready("stands by: another process takes ticks")
        self._is_standby = self._was_standby = True
        self._keep_mode()

    def _keep_mode(self) -> None:
        """Adopt the mode of the previous leader, if there was one; only a fresh start uses the configured mode."""
        if self._was_standby:
            self._mode = kept_mode(self._client) or self._mode

    # Leader

    def _lead(self) -> None:
        self._is_standby = False
        self._engine = engine = Engine(
            self.reload.settings,
            self._servers.redis,
            self._servers.postgres,
            resource("ddl"),
            system_clock,
            self._mode,
            self._on_failure,
            may_recover=lambda: self._lease.held,
            may_write=self._may_write,
            may_be_joined=True,
            newest_pause_seconds=NEWEST_PAUSE_SECONDS,
        )
        leader = Leader(
            self._lease,
            self._client,
            engine.state,
            engine.counters,
            engine.switch,
            engine.feed_status.report,
            engine.change_rule,
            self.reload,
        )
        leader.start()
        abandoned = False
        try:
            engine.start()
            engine.wait_for_archive()
            logger.info("MarketFlow {} takes ticks in {} mode", __version__, self._mode)
            self._supervisor.ready("takes ticks")
            abandoned = self._run_term(engine, leader)
        finally:
            leader.stop_commands()
            if abandoned:
                engine.abandon()
            else:
                engine.stop()
                self._log_unwritten_rows(engine)
            leader.close()
            self._engine = None
            self._checked_at, self._writes_held = math.inf, False
        self._mode = engine.modes.current

    def _run_term(self, engine: Engine, leader: Leader) -> bool:
        """Wait until stopped, or until another leader has every tick of the running minute.

        Returns whether to discard what is not yet written.
        """
        over_at: float | None = None
        self._checked_at = time.monotonic()
        while not self._stopping.wait(TRY_SECONDS):
            self._beat()
            self._check_for_freeze(engine)
            if self._writes_held:
                over_at = None
                if self._must_abandon(leader):
                    return True
            elif (other := leader.other_leader) is None:
                over_at = None
            elif over_at is None:
                seconds = self._seconds_to_minute_end(engine.modes.current)
                logger.warning("{} has taken over; ingesting for {:.1f} s more", other, seconds)
                over_at = time.monotonic() + seconds
            elif time.monotonic() >= over_at:
                break
        return self._writes_held and self._must_abandon(leader)

    # Freezes

    def _may_write(self) -> bool:
        """Return whether no other process can have taken over unnoticed.

        Called before each write, which after a freeze may come before `_check_for_freeze`.
        """
        checked_at = self._checked_at  # read before `_writes_held`, which is written first
        return time.monotonic() - checked_at - TRY_SECONDS <= self._longest_harmless_freeze() and not self._writes_held

    def _check_for_freeze(self, engine: Engine) -> None:
        now = time.monotonic()
        frozen_seconds = now - self._checked_at - TRY_SECONDS
        if frozen_seconds > self._longest_harmless_freeze() and engine.modes.current is Mode.LIVE:
            text = "frozen for {:.1f} s; writes are held until Redis answers whether another process took over"
            logger.warning(text, frozen_seconds)
            self._writes_held = True
        self._checked_at = now

    def _longest_harmless_freeze(self) -> float:
        """Return the seconds for which delayed ticks are accepted, or for which the lease cannot have been lost."""
        return max(self.reload.settings.flow.max_clock_skew_seconds, LEASE_SECONDS - 2 * RENEW_SECONDS)

    def _must_abandon(self, leader: Leader) -> bool:
        """Return whether another process leads, by the answer of Redis; release held writes if none does."""
        try:
            leader.publish()
        except Unavailable:
            return False  # unknown; tried again
        if (other := leader.other_leader) is not None:
            logger.warning("{} has taken over while this process was frozen", other)
            return True
        logger.info("no other process took over; writing what was held")
        self._writes_held = False
        return False

    def _log_unwritten_rows(self, engine: Engine) -> None:
        if self._writes_held and (rows := len(engine.pipeline.backlog)):
            logger.error("{} minute rows are not written: another process may lead, and Redis is down", rows)

    def _beat(self) -> None:
        """Send a watchdog notification when one is due and the pipeline is alive."""
        if self._supervisor.beat_seconds is None or time.monotonic() < self._beat_at:
            return
        self._beat_at = time.monotonic() + self._supervisor.beat_seconds
        engine = self._engine
        self._supervisor.beat_if(lambda: engine is None or engine.is_alive())

    def _seconds_to_minute_end(self, mode: Mode) -> float:
        """Return the seconds until the running minute has closed; 0 in test mode."""
        if mode is Mode.TEST:
            return 0.0
        flow = self.reload.settings.flow
        rest_ms = flow.minute_ms - milliseconds(system_clock()) % flow.minute_ms
        return (rest_ms + flow.late_after_ms) / 1000
