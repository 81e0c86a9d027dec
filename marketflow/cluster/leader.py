"""The side of the process that takes ticks: it keeps the lease, publishes its state and carries out commands.

Two threads, since a switch may take its time and the lease must not wait for it. Nothing here is needed for ticks to
flow: while Redis is away they do, and the mode can be switched from within the process.
"""

import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import cast

import redis
from loguru import logger

from marketflow.cluster.lease import RENEW_SECONDS, Lease, asking
from marketflow.cluster.messages import IngestState, Published, Reply, encode, mode_of
from marketflow.counters import IngestCounters
from marketflow.errors import Unavailable
from marketflow.logs import RateLimit
from marketflow.model import Mode
from marketflow.stores.redis import keys

LOOK_SECONDS = 0.1
"""How often the state is looked at; one that has changed is published at once."""

COMMAND_SECONDS = 0.25
"""How long Redis holds on to a question for commands when there are none."""

TOLD_SECONDS = 5.0
"""How long another process must have the lease before it is told: that of one that was killed ends by itself."""

REPLY_SECONDS = 5
"""How long a reply waits for whoever asked."""


class Leader:
    """Keeps a lease from `start` to `close`.

    Args:
        lease: taken when it is to be had, used by nobody else meanwhile.
        client: of the same Redis.
        state: how the feeds do; published when it changes.
        counters: what they have counted; published with it.
        switch: runs another mode and gives the one before.
    """

    def __init__(
        self,
        lease: Lease,
        client: "redis.Redis",
        state: Callable[[], IngestState],
        counters: Callable[[], IngestCounters],
        switch: Callable[[Mode], Mode],
    ) -> None:
        self._lease = lease
        self._client = client
        self._state = state
        self._counters = counters
        self._switch = switch
        self._publishing = threading.Lock()
        self._published: IngestState | None = None
        self._renew_at = 0.0
        self._reachable = True
        self._tell_at: float | None = None
        self._limit = RateLimit(10.0)
        self._ended = threading.Event()
        self._deaf = threading.Event()
        self._threads = [
            threading.Thread(target=self._keep, name="lease", daemon=True),
            threading.Thread(target=self._obey, name="commands", daemon=True),
        ]

    @property
    def other_leader(self) -> str | None:
        """The process that has the lease in the place of this one, None where there is none."""
        return None if self._lease.held or self._lease.holder == self._lease.run else self._lease.holder

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop_commands(self) -> None:
        """Carry out no more commands. Returns at once; what waits for the next one ends meanwhile."""
        self._deaf.set()

    def close(self) -> None:
        """Give the lease back. Returns within about a second, whatever Redis does."""
        self._ended.set()
        self._deaf.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(1.0)
        if self._reachable:
            with suppress(Unavailable):
                self._lease.release()

    def publish(self) -> Published:
        """Renew the lease and publish the state, if this is the process to do so; gives what was to be published.

        Raises:
            Unavailable: Redis cannot be asked.
        """
        with self._publishing:
            state = self._state()
            # Later versions win, also where they arrive by another way, and whatever the clock does.
            published = Published(
                self._lease.run, time.monotonic_ns(), time.time_ns() // 1_000_000, state, self._counters()
            )
            self._published = state
            self._renew_at = time.monotonic() + RENEW_SECONDS
            self._lease.hold(published)
            return published

    def _keep(self) -> None:
        while True:
            try:
                if time.monotonic() >= self._renew_at or self._state() != self._published:
                    self.publish()
                    self._reachable = True
            except Unavailable as error:
                self._reachable = False
                logger.debug("the lease cannot be renewed: {}", error)
            except Exception as error:  # noqa: BLE001 - a lease that is not renewed would bring up a second process
                if self._limit.admit("publish") is not None:
                    logger.opt(exception=error).error("the state cannot be published, which is a bug")
            self._tell_of_another()
            if self._ended.wait(LOOK_SECONDS):
                return

    def _tell_of_another(self) -> None:
        """Tell once of a process that has the lease instead."""
        if (other := self.other_leader) is None:
            self._tell_at = None
        elif self._tell_at is None:
            self._tell_at = time.monotonic() + TOLD_SECONDS
        elif time.monotonic() >= self._tell_at:
            logger.warning("{} takes ticks into the same Redis, too, and is the one that other processes see", other)
            self._tell_at = math.inf

    # Commands

    def _obey(self) -> None:
        while not self._deaf.is_set():
            try:
                if self._lease.held and (command := self._next_command()) is not None:
                    self._carry_out(command)
                elif not self._lease.held:
                    self._deaf.wait(LOOK_SECONDS)
            except Unavailable as error:
                logger.debug("no commands can be taken: {}", error)
                self._deaf.wait(RENEW_SECONDS)
            except Exception as error:  # noqa: BLE001 - the next one may be better
                if self._limit.admit("command") is not None:
                    logger.opt(exception=error).error("a command failed, which is a bug")
                self._deaf.wait(LOOK_SECONDS)

    def _next_command(self) -> str | None:
        with asking():
            answer = self._client.blpop([keys.COMMANDS_KEY], timeout=COMMAND_SECONDS)
        return None if answer is None else cast("tuple[bytes, bytes]", answer)[1].decode(errors="replace")

    def _carry_out(self, command: str) -> None:
        """Switch and tell, in this order: the new state, then the reply. What comes too late is left alone."""
        if self._deaf.is_set() or (mode := mode_of(self._lease.claim(command))) is None:
            return
        previous = self._switch(mode)
        reply = Reply(previous, self.publish())
        with asking(), self._client.pipeline(transaction=True) as pipe:
            pipe.rpush(keys.reply_key(command), encode(reply))
            pipe.expire(keys.reply_key(command), REPLY_SECONDS)
            pipe.execute()
