"""The leader's side of the cluster: keeps the lease, publishes the state, runs commands.

Two threads, because a mode switch takes time and the lease must be renewed meanwhile. Ingest does not depend on either:
while Redis is unavailable it goes on, and a process with both roles can still switch its mode. While no other process
follows, as in a process with both roles on a laptop, only the lease is renewed: each renewal finds out.
"""

import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import cast

import redis
from loguru import logger

from marketflow.cluster.lease import RENEW_SECONDS, Lease, redis_errors
from marketflow.cluster.messages import (
    RELOAD,
    FeedsQuery,
    FeedsReport,
    IngestState,
    Published,
    ReloadReply,
    Reply,
    RuleChange,
    RuleChanged,
    decode,
    encode,
    mode_of,
)
from marketflow.counters import IngestCounters
from marketflow.errors import SettingsError, Unavailable
from marketflow.logs import RateLimit
from marketflow.model import Mode
from marketflow.settings.reloading import Changes
from marketflow.stores.redis import keys

LOOK_SECONDS = 0.25
"""How often the state is compared with the published one while other processes follow it; a change is published at
once.
"""

SOLE_RENEW_SECONDS = 1.0
"""How often the lease is renewed where no other process can lead and none follows. A command of one that has begun to
follow waits that long at most.
"""

COMMAND_SECONDS = 0.25
"""How long Redis blocks a poll for commands when there are none. Commands are polled while other processes follow."""

REPORT_SECONDS = 5.0
"""How long another process must hold the lease before this is logged: the lease of a killed process expires first."""

REPLY_SECONDS = 5
"""How long a reply is kept for its client."""


class Leader:
    """Keeps a lease from `start` to `close`.

    Args:
        lease: acquired when it is free; not used by others meanwhile.
        client: of the same Redis.
        state: returns the state of the pipeline; published when it changes.
        counters: returns its counters; published with the state.
        switch: switches the mode and returns the previous one.
        feeds: reports the feeds.
        change_rule: changes an alert rule.
        reload: reads the settings again and returns what has changed; raises SettingsError where they are wrong.
        is_sole: whether no other process can lead, since this one owns the Redis.
    """

    def __init__(
        self,
        lease: Lease,
        client: "redis.Redis",
        state: Callable[[], IngestState],
        counters: Callable[[], IngestCounters],
        switch: Callable[[Mode], Mode],
        feeds: Callable[[FeedsQuery], FeedsReport],
        change_rule: Callable[[RuleChange], RuleChanged],
        reload: Callable[[], Changes],
        is_sole: bool = False,
    ) -> None:
        self._lease = lease
        self._client = client
        self._state = state
        self._counters = counters
        self._switch = switch
        self._feeds = feeds
        self._change_rule = change_rule
        self._reload = reload
        self._rest_seconds = SOLE_RENEW_SECONDS if is_sole else RENEW_SECONDS
        self._publishing = threading.Lock()
        self._published: IngestState | None = None
        self._renew_at = 0.0
        self._reachable = True
        self._report_at: float | None = None
        self._limit = RateLimit(10.0)
        self._ended = threading.Event()
        self._commands_due = threading.Event()
        """Set while commands are to be polled, and when no more are to be run."""
        self._commands_stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._keep_lease, name="lease", daemon=True),
            threading.Thread(target=self._run_commands, name="commands", daemon=True),
        ]

    @property
    def other_leader(self) -> str | None:
        """The process that holds the lease instead of this one; None if there is none."""
        return None if self._lease.held or self._lease.holder == self._lease.run else self._lease.holder

    def start(self) -> None:
        """Start both threads."""
        for thread in self._threads:
            thread.start()

    def stop_commands(self) -> None:
        """Run no more commands. Returns at once; a poll that is under way ends by itself."""
        self._commands_stopped.set()
        self._commands_due.set()

    def close(self) -> None:
        """Release the lease. Returns within about a second, whatever Redis does."""
        self._ended.set()
        self.stop_commands()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(1.0)
        if self._reachable:
            with suppress(Unavailable):
                self._lease.release()

    def publish(self) -> Published:
        """Renew or acquire the lease, and publish the state if this process holds it; return that state.

        Raises:
            Unavailable: Redis did not answer.
        """
        with self._publishing:
            state = self._state()
            # Later numbers win, whichever way they arrive and whatever the wall clock does.
            published = Published(
                self._lease.run, time.monotonic_ns(), time.time_ns() // 1_000_000, state, self._counters()
            )
            self._published = state
            self._renew_at = time.monotonic() + RENEW_SECONDS
            self._lease.hold(published)
            if self._lease.held and self._lease.is_followed:
                self._commands_due.set()
            else:
                self._commands_due.clear()
            if self._commands_stopped.is_set():  # perhaps before `clear`
                self._commands_due.set()
            return published

    def _keep_lease(self) -> None:
        while True:
            try:
                if time.monotonic() >= self._renew_at or self._state() != self._published:
                    self.publish()
                    self._reachable = True
            except Unavailable as error:
                self._reachable = False
                logger.debug("the lease cannot be renewed: {}", error)
            except Exception as error:  # noqa: BLE001 - a lease that is not renewed would start a second leader
                if self._limit.admit("publish") is not None:
                    logger.opt(exception=error).error("the state cannot be published, which is a bug")
            self._report_other_leader()
            if self._ended.wait(self._pause_seconds):
                return

    @property
    def _pause_seconds(self) -> float:
        if self._lease.is_followed:
            return LOOK_SECONDS
        return self._rest_seconds if self._lease.held else RENEW_SECONDS

    def _report_other_leader(self) -> None:
        """Log once that another process holds the lease."""
        if (other := self.other_leader) is None:
            self._report_at = None
        elif self._report_at is None:
            self._report_at = time.monotonic() + REPORT_SECONDS
        elif time.monotonic() >= self._report_at:
            logger.warning(
                "{} takes ticks into the same Redis, too, and is the leader that other processes follow", other
            )
            self._report_at = math.inf

    # Commands

    def _run_commands(self) -> None:
        while not self._commands_stopped.is_set():
            try:
                self._commands_due.wait()
                if not self._commands_stopped.is_set() and (command := self._next_command()) is not None:
                    self._execute(command)
            except Unavailable as error:
                logger.debug("commands cannot be polled: {}", error)
                self._commands_stopped.wait(RENEW_SECONDS)
            except Exception as error:  # noqa: BLE001 - the next command may succeed
                if self._limit.admit("command") is not None:
                    logger.opt(exception=error).error("a command failed, which is a bug")
                self._commands_stopped.wait(LOOK_SECONDS)

    def _next_command(self) -> str | None:
        with redis_errors():
            answer = self._client.blpop([keys.COMMANDS_KEY], timeout=COMMAND_SECONDS)
        return None if answer is None else cast("tuple[bytes, bytes]", answer)[1].decode(errors="replace")

    def _execute(self, command: str) -> None:
        """Switch the mode or reload the settings, publish the new state and reply; or report feeds, or change a rule.

        An expired command, or one that this version does not know, is ignored.
        """
        if self._commands_stopped.is_set() or (content := self._lease.claim(command)) is None:
            return
        reply: Reply | FeedsReport | ReloadReply | RuleChanged
        if (mode := mode_of(content)) is not None:
            previous = self._switch(mode)
            reply = Reply(previous, self.publish())
        elif content == RELOAD.encode():
            reply = self._reloaded()
        elif (query := decode(content, FeedsQuery)) is not None:
            reply = self._feeds(query)
        elif (change := decode(content, RuleChange)) is not None:
            reply = self._change_rule(change)
        else:
            return
        with redis_errors(), self._client.pipeline(transaction=True) as pipe:
            pipe.rpush(keys.reply_key(command), encode(reply))
            pipe.expire(keys.reply_key(command), REPLY_SECONDS)
            pipe.execute()

    def _reloaded(self) -> ReloadReply:
        changes, problem = None, ""
        try:
            changes = self._reload()
        except SettingsError as error:
            problem = str(error)
        return ReloadReply(changes, problem, self.publish())
