"""The ingest role: one engine a process, for the shards that the table assigns to it.

A process owns some shards and stands by for others. It has the feeds of both connected and their ticks in memory, but
writes only what it owns. When an owner dies or is frozen, its standby has every tick since then already, so nothing is
lost. While Redis is unreachable an owner goes on with its shards, and none is taken over.
"""

import threading
from collections.abc import Callable, Collection

from loguru import logger

from marketflow import __version__
from marketflow.clock import system_clock
from marketflow.cluster.member import POLL_ANSWER_SECONDS, Member
from marketflow.cluster.shard_table import ShardTable, connect
from marketflow.resources import resource
from marketflow.runtime.engine import Engine
from marketflow.runtime.settings_reload import ReadSettings, SettingsReload
from marketflow.runtime.store_servers import Servers
from marketflow.server.service_notification import Supervisor
from marketflow.settings import Settings

NEWEST_PAUSE_SECONDS = 0.001
"""Pause between writes of newest ticks: at 3,000 ticks/s both roles and Redis take half the CPU with it."""


class ShardedEngine:
    """Runs an engine with the shards that the table assigns to this process.

    Args:
        settings: the settings.
        read: reads the settings again.
        servers: addresses of Redis and PostgreSQL.
        on_failure: called once, from any thread, if the pipeline fails.
        notified: is notified of readiness.
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
        """Reloads the settings."""
        self._supervisor = notified
        self._client, self._commands = connect(servers.redis), connect(servers.redis, POLL_ANSWER_SECONDS)
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
        self.is_alive = engine.is_alive
        self._member = Member(self._table, self._commands, engine, engine.feed_status.report, self.reload, self._assign)

    def run(self) -> None:
        """Ingest the assigned shards until stopped; then write what was ingested."""
        try:
            self._engine.start()
            self._member.start()
            self._stopping.wait()
        finally:
            self._leave()
            self._client.close()
            self._commands.close()

    def stop(self) -> None:
        """Request the end of `run`. Returns at once."""
        self._stopping.set()

    def force_stop(self) -> None:
        """Cut the end of `run` short."""
        self._engine.force_stop()

    def _leave(self) -> None:
        """Release the shards and stop: first release them if standbys have all ticks, else first write everything."""
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

    def _assign(self, owned: Collection[str], standby: Collection[str], leads: bool) -> None:
        """Own and stand by for these shards from now on."""
        if self._stopping.is_set():
            return
        self._engine.assign(owned, standby, leads)
        names = {"owned": owned, "standby": standby}
        words = "; ".join(f"{kind}: {', '.join(sorted(of))}" for kind, of in names.items() if of) or "no shard is left"
        if owned:
            self._engine.wait_for_archive()
            logger.info("MarketFlow {} takes ticks in {} mode: {}", __version__, self._engine.modes.current, words)
        else:
            logger.info("MarketFlow {} stands by: {}", __version__, words)
        self._supervisor.ready("takes ticks" if owned else "stands by: other processes take ticks")
