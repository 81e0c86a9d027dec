"""The ingest role: one engine a process, for the shards that the table gives it.

A process owns some shards and stands by for others. It has the feeds of both connected and their ticks in memory, but
writes only what it owns. When an owner dies or is frozen, its standby has every tick since then already, so nothing is
lost. While Redis is unreachable an owner goes on with what it has, and nobody takes over.
"""

import threading
import time
from collections.abc import Callable, Collection

from loguru import logger

from marketflow import __version__
from marketflow.clock import system_clock
from marketflow.cluster.member import Member
from marketflow.cluster.shard_table import ShardTable, connect
from marketflow.resources import resource
from marketflow.runtime.engine import Engine
from marketflow.runtime.settings_reload import ReadSettings, SettingsReload
from marketflow.runtime.store_servers import Servers
from marketflow.server.service_notification import Supervisor
from marketflow.settings import Settings

LOOK_SECONDS = 0.25
"""How often it is looked at whether the table answers."""

FIRST_ANSWER_SECONDS = 1.0
"""How long a start waits for an answer of the table before it ingests everything."""

ALONE_SECONDS = 30.0
"""After which time without Redis a process owns everything: the outage may have ended the owners as well."""

NEWEST_PAUSE_SECONDS = 0.001
"""Pause between writes of newest ticks: at 3,000 ticks/s both roles and Redis take half the CPU with it."""


class ShardHolder:
    """Runs an engine with the shards that the table gives this process.

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
        """Reads the settings again."""
        self._supervisor = notified
        self._beat_at = 0.0
        self._client = connect(servers.redis)
        self._table = ShardTable(self._client, settings.shards.names)
        self._stopping = threading.Event()
        self._engine = engine = Engine(
            settings,
            servers.redis,
            servers.postgres,
            resource("ddl"),
            system_clock,
            settings.mode,
            on_failure,
            is_alone=False,
            newest_pause_seconds=NEWEST_PAUSE_SECONDS,
        )
        self._member = Member(self._table, self._client, engine, engine.feed_status.report, self.reload, self.assign)
        self._heard_at = time.monotonic()
        self._assigned: tuple[frozenset[str], frozenset[str]] | None = None
        self._is_alone = False

    def run(self) -> None:
        """Ingest what the table gives, until stopped; then write what was ingested."""
        try:
            self._engine.start()
            self._member.start()
            while not self._stopping.wait(LOOK_SECONDS):
                self._beat()
                self._look_at_table()
        finally:
            self._leave()
            self._client.close()

    def stop(self) -> None:
        """Request the end of `run`. Returns at once."""
        self._stopping.set()

    def force_stop(self) -> None:
        """Cut the end of `run` short."""
        self._engine.force_stop()

    def _leave(self) -> None:
        """Hand the shards over and end: to standbys that have all ticks at once, else once all is written."""
        if self._engine.owned_are_warm:
            self._member.leave()
            self._engine.stop()
        else:
            self._member.stop_commands()
            self._engine.stop()
            self._member.leave()

    def _apply(self, settings: Settings) -> None:
        self._engine.reconfigure(settings)
        self._table.shards = settings.shards.names

    # What the table gives

    def assign(self, owned: Collection[str], standby: Collection[str], leads: bool) -> None:
        """Own and stand by for these shards from now on."""
        self._is_alone = False
        if self._stopping.is_set():
            return
        before, self._assigned = self._assigned, (frozenset(owned), frozenset(standby))
        self._engine.assign(owned, standby, leads)
        if before == self._assigned:
            return
        names = {"owned": owned, "standby": standby}
        words = "; ".join(f"{kind}: {', '.join(sorted(of))}" for kind, of in names.items() if of) or "no shard is left"
        if owned:
            self._engine.wait_for_archive()
            logger.info("MarketFlow {} takes ticks in {} mode: {}", __version__, self._engine.modes.current, words)
        else:
            logger.info("MarketFlow {} stands by: {}", __version__, words)
        self._supervisor.ready("takes ticks" if owned else "stands by: other processes take ticks")

    def _look_at_table(self) -> None:
        """Ingest everything where Redis cannot say who does what, at the start or for long."""
        now = time.monotonic()
        if self._member.reachable:
            self._heard_at = now
            held = self._table.held
            if self._is_alone:
                self.assign(held.owned, held.standby, held.leads)
            return
        patience = FIRST_ANSWER_SECONDS if self._assigned is None else ALONE_SECONDS
        if now - self._heard_at > patience and not self._is_alone:
            logger.warning("ingesting all shards: Redis does not answer which process takes which")
            self.assign(self._table.shards, (), True)
            self._is_alone = True

    def _beat(self) -> None:
        """Send a watchdog notification when one is due and the pipeline is alive."""
        if self._supervisor.beat_seconds is None or time.monotonic() < self._beat_at:
            return
        self._beat_at = time.monotonic() + self._supervisor.beat_seconds
        self._supervisor.beat_if(self._engine.is_alive)
