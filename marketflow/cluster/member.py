"""An ingest process's side of the cluster: calls the shard table, publishes the state, runs commands.

Three threads, because a mode switch or an assignment takes time and the lease must be renewed meanwhile. Ingest does
not depend on them: while Redis is unavailable it goes on with the shards that it has. While no API process follows the
states, as with both roles in one process on a laptop, commands are not polled; each call of the table checks that.
"""

import math
import threading
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Protocol, cast

import redis
from loguru import logger

from marketflow.cluster.messages import (
    RELOAD,
    FeedsQuery,
    FeedsReport,
    IngestState,
    Published,
    ReloadReply,
    RuleChange,
    RuleChanged,
    ShardState,
    decode,
    encode,
)
from marketflow.cluster.shard_table import ANSWER_SECONDS, CALL_SECONDS, LAPSED_SECONDS, ShardTable, redis_errors
from marketflow.counters import IngestCounters
from marketflow.errors import SettingsError, Unavailable
from marketflow.logs import RateLimit
from marketflow.model import Mode
from marketflow.settings.reloading import Changes
from marketflow.stores.redis import keys

COMMAND_SECONDS = 0.25
"""How long Redis blocks a poll for commands when there are none."""

POLL_ANSWER_SECONDS = COMMAND_SECONDS + CALL_SECONDS + ANSWER_SECONDS
"""Timeout of a poll. Redis ends it with the first event after COMMAND_SECONDS, which may be the next call of the table:
its own timer may run as rarely as once a second.
"""

FIRST_ANSWER_SECONDS = 1.0
"""How long a start waits for an answer of the table before it ingests everything."""

ALONE_SECONDS = 30.0
"""After which time without Redis a process owns everything: the outage may have ended the owners as well."""

REPORT_SECONDS = 5.0
"""How long another process must own shards that this one ingests as well before that is logged: a lease may expire."""

LEAVE_SECONDS = 1.0
"""How long a stop waits for a call, a command or an assignment that is under way."""

REPLY_SECONDS = 5
"""How long a reply is kept for its client."""

_Shards = tuple[Collection[str], Collection[str], bool]
"""The shards that a process owns, those that it is the standby of, and whether it is the leader."""


class _Engine(Protocol):
    """The engine, called from several threads. `switch` raises Unavailable if it cannot.

    `shards` returns the state of each shard here, `ready` the shards of the standby that it could own at once.
    """

    def state(self) -> IngestState: ...
    def counters(self) -> IngestCounters: ...
    def switch(self, mode: Mode) -> Mode: ...
    def change_rule(self, change: RuleChange) -> RuleChanged: ...
    def shards(self) -> Mapping[str, ShardState]: ...
    def ready(self) -> Collection[str]: ...
    def is_cut_off(self) -> bool: ...


class Member:
    """A member of the cluster from `start` to `leave`.

    Args:
        table: the shard table; nothing else may call it.
        client: of the same Redis; waits POLL_ANSWER_SECONDS for an answer.
        ingest: the engine.
        report: reports the feeds.
        reload: reads the settings again and returns what has changed; raises SettingsError where they are wrong.
        assign: called with what the table assigns: the shards that are owned, those of the standby, and whether it
            leads. None for a process that ingests all shards, whatever it owns, and may switch the mode itself.
    """

    def __init__(
        self,
        table: ShardTable,
        client: "redis.Redis",
        ingest: _Engine,
        report: Callable[[FeedsQuery], FeedsReport],
        reload: Callable[[], Changes],
        assign: Callable[[Collection[str], Collection[str], bool], None] | None,
    ) -> None:
        self._table = table
        self._client = client
        self._ingest = ingest
        self._report = report
        self._reload = reload
        self._assign = assign
        self._switching = threading.Lock()
        self._new_mode: Mode | None = ingest.state().mode if assign is None else None
        """The mode that was switched to here, until the table has it."""
        self._new_mode_lock = threading.Lock()
        self._assigned: _Shards | None = None
        self._answered_at = self._sole_at = time.monotonic()
        self._is_alone = False
        """Whether the table has not answered for so long that this process ingests everything."""
        self.reachable = False
        """Whether the table has answered the last call."""
        self._limit = RateLimit(10.0)
        self._left = threading.Event()
        self._call_due = threading.Event()
        self._apply_due = threading.Event()
        self._commands_due = threading.Event()
        """Set while commands are to be polled, and when no more are to be run."""
        self._commands_stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._run_calls, name="shards", daemon=True),
            threading.Thread(target=self._run_assignments, name="assignments", daemon=True),
            threading.Thread(target=self._run_commands, name="commands", daemon=True),
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop_commands(self) -> None:
        """Run no more commands. Returns at once; a poll that is under way ends by itself."""
        self._commands_stopped.set()
        self._commands_due.set()

    def leave(self) -> None:
        """Release all shards: their standbys take over at once. What was ingested can still be written.

        Returns within LEAVE_SECONDS, whatever Redis does. No assignment follows.
        """
        self.stop_commands()
        self._left.set()
        self._call_due.set()
        self._apply_due.set()
        until = time.monotonic() + LEAVE_SECONDS
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(until - time.monotonic(), 0.0))

    def switch(self, mode: Mode) -> Mode:
        """Switch the mode here and put it into the table, from which others adopt it; return the previous one.

        Raises:
            Unavailable: it cannot be switched now.
        """
        with self._switching:
            previous = self._ingest.switch(mode)
            with self._new_mode_lock:
                self._new_mode = mode
        self._call_due.set()
        return previous

    def _run_calls(self) -> None:
        """Call the table until this process leaves, then release its shards."""
        while not self._left.is_set():
            # Also after a bug: shards whose lease is not renewed get a second owner.
            self.reachable = self._succeeds(self._call_table, "the shard table cannot be called")
            self._check_outage()
            self._report_other_owner()
            if self._assign is not None:
                self._apply_due.set()
            self._call_due.wait(self._table.call_again_seconds)
            self._call_due.clear()
        if self.reachable:
            self.reachable = False
            self._succeeds(partial(self._table.hold, leaving=True), "the shards cannot be released")

    def _call_table(self) -> None:
        """Renew the lease, and publish the state of this moment.

        Raises:
            Unavailable: Redis did not answer.
        """
        ready = self._ingest.ready() if self._assign else ()
        shards = self._ingest.shards() if self._assign else dict.fromkeys(self._table.shards, ShardState("owner"))
        # Later numbers win, whichever way they arrive and whatever the wall clock does.
        number, at = time.monotonic_ns(), time.time_ns() // 1_000_000
        state, counters = self._ingest.state(), self._ingest.counters()
        published = Published(self._table.run, number, at, state, counters, dict(shards))
        # Of two processes that ingest everything, only the owner of the shards decides the mode.
        new_mode = self._new_mode if self._table.held.owned else None
        had_lapsed = self._table.has_lapsed
        self._table.hold(ready, published, new_mode, cut_off=self._assign is not None and self._ingest.is_cut_off())
        if self._table.has_lapsed and not had_lapsed:
            logger.warning(
                "the lease of its shards has expired before it was renewed: this process may be short of CPU. For {:g}"
                " s it becomes the owner of no shard that another process can own",
                LAPSED_SECONDS,
            )
        with self._new_mode_lock:
            if new_mode is self._new_mode:
                self._new_mode = None
        if self._mode_to_adopt(state.mode) is not None:
            self._apply_due.set()
        if not self._table.is_followed:
            self._commands_due.clear()
        if self._table.is_followed or self._commands_stopped.is_set():  # perhaps before `clear`
            self._commands_due.set()

    def _check_outage(self) -> None:
        """Ingest everything where the table does not answer at the start, or has not for long."""
        limit_seconds = FIRST_ANSWER_SECONDS if self._assigned is None else ALONE_SECONDS
        if self.reachable:
            self._answered_at, self._is_alone = time.monotonic(), False
        elif self._assign is not None and not self._is_alone and time.monotonic() - self._answered_at > limit_seconds:
            logger.warning("ingesting all shards: Redis does not answer which process takes which")
            self._is_alone = True

    # Assignments and the mode

    def _shards_to_have(self) -> _Shards | None:
        """Return what to own, what to stand by for, and whether to lead; None before the first answer of the table."""
        if self._is_alone:
            return frozenset(self._table.shards), frozenset(), True
        table, held = self._table.table, self._table.held[:3]
        # A process that has started without Redis ingests all shards until the table assigns them.
        return held if any(held) or (table.rows and table.at >= table.grace) else self._assigned

    def _mode_to_adopt(self, current: Mode) -> Mode | None:
        if self._new_mode is not None or (self._assign is None and not self._table.held.owned):
            return None
        mode = self._table.held.mode
        return None if mode is current else mode

    def _run_assignments(self) -> None:
        while not self._left.is_set():
            self._succeeds(self._assign_once, "an assignment failed")  # tried again after the next call
            self._apply_due.wait()
            self._apply_due.clear()

    def _assign_once(self) -> None:
        """Adopt the mode, then the shards, which begin in it; publish changes at once."""
        with self._switching:
            if (mode := self._mode_to_adopt(self._ingest.state().mode)) is not None:
                previous = self._ingest.switch(mode)
                logger.info("mode switched to {} by another process, from {}", mode, previous)
                self._call_due.set()
        shards = self._shards_to_have()
        if self._assign is not None and shards is not None and shards != self._assigned:
            self._assign(*shards)
            self._assigned = shards
            self._call_due.set()

    def _report_other_owner(self) -> None:
        """Log once that another process owns shards which this one ingests as well."""
        others = sorted({row.owner for row in self._table.table.rows.values() if row.owner} - {self._table.run})
        if self._assign is not None or not others:
            self._sole_at = time.monotonic()
        elif time.monotonic() - self._sole_at >= REPORT_SECONDS:
            logger.warning(
                "{} takes ticks into the same Redis, too, and is the owner that other processes follow", others[0]
            )
            self._sole_at = math.inf

    # Commands

    def _run_commands(self) -> None:
        while self._commands_due.wait() and not self._commands_stopped.is_set():
            if not self._succeeds(self._run_command, "a command failed"):
                self._commands_stopped.wait(COMMAND_SECONDS)

    def _succeeds(self, act: Callable[[], object], failure: str) -> bool:
        """Call `act`, which is repeated later if it fails; log the error, and return whether it has succeeded."""
        try:
            act()
        except Unavailable as error:
            logger.debug("{}: {}", failure, error)
        except Exception as error:  # noqa: BLE001 - the thread goes on
            self._limit.log_bug(failure, error)
        else:
            return True
        return False

    def _run_command(self) -> None:
        """Execute the next command and reply; a command without content, or an expired one, calls the table at once.

        A command that this version does not know is ignored.
        """
        with redis_errors():
            answer = self._client.blpop([keys.commands_key(self._table.run)], timeout=COMMAND_SECONDS)
            if answer is None or self._commands_stopped.is_set():
                return
            command = cast("tuple[bytes, bytes]", answer)[1].decode(errors="replace")
            content = cast("bytes | None", self._client.get(keys.command_key(command)))
        reply: FeedsReport | ReloadReply | RuleChanged
        if content is None:
            self._call_due.set()
            return
        if content == RELOAD.encode():
            reply = self._reloaded()
        elif (query := decode(content, FeedsQuery)) is not None:
            reply = self._report(query)
        elif (change := decode(content, RuleChange)) is not None:
            reply = self._ingest.change_rule(change)
        else:
            return
        with redis_errors(), self._client.pipeline(transaction=True) as pipe:
            pipe.rpush(keys.reply_key(command), encode(reply))
            pipe.expire(keys.reply_key(command), REPLY_SECONDS)
            pipe.execute()

    def _reloaded(self) -> ReloadReply:
        try:
            return ReloadReply(self._reload(), "")
        except SettingsError as error:
            return ReloadReply(None, str(error))
