"""The API process's side of the cluster: follows the states of the ingest processes, and sends them commands.

States are polled with the shard table, four times a second. The state of a shard is the one that its owner reports;
counters are summed over all processes.
"""

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from operator import attrgetter
from typing import Any, TypeVar, cast
from uuid import uuid4

import msgspec
import redis
import redis.asyncio
from loguru import logger

from marketflow.cluster.merging import merged_report, merged_state, owner_by_shard, owners_of, page_of_each
from marketflow.cluster.messages import (
    RELOAD,
    FeedsQuery,
    FeedsReport,
    IngestState,
    Published,
    ReloadReply,
    RuleChange,
    RuleChanged,
    decode,
    encode,
    mode_of,
)
from marketflow.cluster.shard_table import ANSWER_SECONDS, KEPT_SECONDS, NO_TABLE, STATE_SECONDS, Row, decode_cluster
from marketflow.counters import IngestCounters, merged_counters
from marketflow.errors import SettingsError, Unavailable
from marketflow.health import ModeUnconfirmed, ShardHealth, StandbyState
from marketflow.logs import RateLimit
from marketflow.model import FeedState, Mode
from marketflow.settings.reloading import Changes
from marketflow.settings.shards import LEAD
from marketflow.stores.postgres.request_coalescing import CoalescedAnswers
from marketflow.stores.redis import keys
from marketflow.stores.redis.connection import async_client
from marketflow.tasks import raise_if_cancelled, timeout

_T = TypeVar("_T")

POLL_SECONDS = 0.25
"""How often the states are polled."""

COMMAND_MS = 1500
"""Expiry of a command: its sender does not wait longer."""

REPLY_SECONDS = 2.0
"""Timeout of a reply, and of a mode switch."""

REPORTS_KEPT = 100
"""Queries of /feeds whose reports are cached for a moment."""

FOLLOWER_SECONDS = 2.0
"""How long after its last poll an API process still counts as running."""

ADOPTED_SECONDS = 0.05
"""How often a mode switch checks whether the other API processes have adopted it."""

STATE_CONNECTIONS = 2
"""One for the periodic poll, and one for the first poll at the start."""

COMMAND_CONNECTIONS = 32
"""Commands that may await their replies at a time; further ones wait up to ANSWER_SECONDS for a connection."""


class RemoteIngest:
    """Client of all ingest processes in an API process; for one event loop.

    Args:
        keywords: of a Redis client.
        exchanges: the configured ones.
        mode: assumed until the first state arrives.
    """

    def __init__(self, keywords: Mapping[str, Any], exchanges: Sequence[str], mode: Mode) -> None:
        # Two pools: the states arrive however many commands await their replies.
        self._client = _client(keywords, STATE_CONNECTIONS)
        self._commands = _client(keywords, COMMAND_CONNECTIONS)
        self.exchanges = exchanges
        """The configured ones."""
        self.reloaded = asyncio.Event()
        """Set when an ingest process has read its settings again."""
        self._mode = mode
        self._id = uuid4().hex
        self._states: dict[str, Published] = {}  # by run
        self._polled_at = 0.0
        self._table = NO_TABLE
        self._changed = asyncio.Event()
        self._limit = RateLimit(60.0)
        self._reports: CoalescedAnswers[FeedsReport] = CoalescedAnswers(REPORTS_KEPT, time.monotonic)

    @property
    def current(self) -> Mode:
        """The current mode, or the last known one."""
        return self._mode

    @property
    def state(self) -> IngestState | None:
        """The state of all ingest processes; None if there is none or they are unreachable."""
        known = self._known()
        if not known:
            return None
        owners = {exchange: [each.state for each in of] for exchange, of in owners_of(self._table, known).items()}
        # A standby writes nothing, so it knows little of the stores.
        writers = [each for each in known.values() if each.owned] or known.values()
        return merged_state(self._mode, [each.state for each in writers], owners)

    @property
    def last_state(self) -> IngestState:
        """The state, or an empty one if there is none."""
        return self.state or IngestState(self._mode, {}, cache_complete=True, archive_available=True)

    @property
    def counters(self) -> IngestCounters | None:
        """The counters of all ingest processes; None if there is none or they are unreachable."""
        known = self._known()
        counted = [each.counters for each in known.values() if each.counters is not None]
        if not counted:
            return None
        owners = owners_of(self._table, known)
        of_owners = {name: [each.counters for each in of if each.counters is not None] for name, of in owners.items()}
        merged = merged_counters(counted, of_owners)
        owned = {shard: row.owner in known for shard, row in self._table.rows.items() if shard != LEAD}
        return msgspec.structs.replace(
            merged,
            shards_owned=owned,
            shards_standby={each.shard: each.standby_state in ("warm", "cold") for each in self.shards()},
            shard_takeovers=self._table.takeovers,
        )

    def shards(self) -> tuple[ShardHealth, ...]:
        """Return owner and standby of each shard, as far as known."""
        known = self._known()
        return tuple(
            _shard_health(shard, row, known)
            for shard, row in sorted(self._table.rows.items())
            if known and shard != LEAD
        )

    def feed_states(self) -> tuple[Mode, dict[str, FeedState]]:
        """Return the mode and the state of its feeds; a feed is connecting while one of its shards has no owner."""
        known = self.last_state.exchanges
        return self._mode, {exchange: known.get(exchange, FeedState.CONNECTING) for exchange in self.exchanges}

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()
        await self._commands.aclose()

    async def switch(self, mode: Mode) -> Mode:
        """Switch the mode and return the previous one, once owners and API processes have adopted it.

        Raises:
            Unavailable: there is no ingest process, or Redis did not answer.
            ModeUnconfirmed: some did not confirm it in time; they adopt it when they can.
        """
        runs = [*self._known()]
        if not runs:
            raise Unavailable("no ingest process is running")
        async with self._commands.pipeline(transaction=True) as pipe:
            pipe.set(keys.MODE_KEY, mode.value, px=round(KEPT_SECONDS * 1000), get=True)
            for run in runs:  # an id without content makes it call the table at once
                pipe.rpush(keys.commands_key(run), "")
                pipe.pexpire(keys.commands_key(run), COMMAND_MS)
            answers = await _answer(pipe.execute(), ANSWER_SECONDS)
        previous = mode_of(answers[0]) or self._mode
        try:
            async with timeout(REPLY_SECONDS):
                while self._unconfirmed(mode):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise ModeUnconfirmed(self._unconfirmed(mode)) from None
        self._mode = mode
        if not await self._is_adopted(mode):
            logger.warning("mode switch not adopted by all API processes mode={}", mode)
        return previous

    async def _is_adopted(self, mode: Mode) -> bool:
        """Wait until all other API processes answer about a mode; return whether they do in time."""
        try:
            async with timeout(REPLY_SECONDS):
                while True:
                    with suppress(Unavailable):  # a master of a Redis Cluster may be replaced right now
                        if not await self._others_mode() - {mode}:
                            return True
                    await asyncio.sleep(ADOPTED_SECONDS)
        except TimeoutError:  # a process that cannot poll adopts it when it can
            return False

    async def _others_mode(self) -> set[Mode]:
        """Return the modes that the other API processes answer about.

        Raises:
            Unavailable: Redis did not answer.
        """
        followers = cast("Awaitable[dict[bytes, bytes]]", self._commands.hgetall(keys.FOLLOWERS_KEY))
        others = {each.decode() for each in await _answer(followers, ANSWER_SECONDS)} - {self._id}
        async with self._commands.pipeline(transaction=False) as pipe:
            for each in others:
                pipe.get(keys.follower_key(each))
            modes = await _answer(pipe.execute(), ANSWER_SECONDS)
        if ended := [each for each, mode in zip(others, modes, strict=True) if mode is None]:
            await _answer(self._commands.hdel(keys.FOLLOWERS_KEY, *ended), ANSWER_SECONDS)
        return {mode for each in modes if (mode := mode_of(each)) is not None}

    async def reload(self) -> Changes:
        """Have all ingest processes read their settings again; return what has changed.

        Raises:
            SettingsError: they are wrong in some process; those with right ones have changed.
            Unavailable: there is no ingest process, or one did not reply in time.
        """
        runs = [*self._known()]
        replies = await self._command(runs, RELOAD, ReloadReply)
        changes = [reply.changes for reply in replies if reply.changes is not None]
        for run, reply in zip(runs, replies, strict=True):
            if reply.changes is None:
                raise SettingsError((f"{_process(run)}, unlike others: " if changes else "") + reply.problem)
        return changes[0].with_restart([key for each in changes for key in each.needs_restart])

    async def feeds(self, query: FeedsQuery) -> FeedsReport:
        """Return the report of the feeds, at most a second old: many clients cost each owner one command.

        Raises:
            Unavailable: there is no ingest process, or one did not reply in time.
        """
        return await self._reports.get(query, lambda: self._report(query))

    async def _report(self, query: FeedsQuery) -> FeedsReport:
        # One owner of each shard: two processes that ingest everything would count it twice.
        by_shard = owner_by_shard(self._table, self._known()).items()
        owners = sorted({each.run for shard, each in by_shard if each is not None and shard in each.owned})
        content = encode(page_of_each(query, len(owners)))
        return merged_report(query, await self._command(owners, content, FeedsReport), self.exchanges)

    async def change_rule(self, change: RuleChange) -> RuleChanged:
        """Change an alert rule, in the process that evaluates them.

        Raises:
            Unavailable: there is no such process, or it did not reply in time; the rule may have been changed.
        """
        row = self._table.rows.get(LEAD)
        leads = [run for run in self._known() if row is not None and run == row.owner]
        return (await self._command(leads, encode(change), RuleChanged))[0]

    async def _command(self, runs: Sequence[str], content: str | bytes, kind: type[_T]) -> list[_T]:
        """Send a command to processes, and return the reply of each."""
        if not runs:
            raise Unavailable("no ingest process is running")
        commands = [uuid4().hex for _ in runs]
        async with self._commands.pipeline(transaction=True) as pipe:
            for run, command in zip(runs, commands, strict=True):
                pipe.set(keys.command_key(command), content, px=COMMAND_MS)
                pipe.rpush(keys.commands_key(run), command)
                pipe.pexpire(keys.commands_key(run), COMMAND_MS)
            await _answer(pipe.execute(), ANSWER_SECONDS)
        return list(await asyncio.gather(*(self._reply(command, kind) for command in commands)))

    async def _reply(self, command: str, kind: type[_T]) -> _T:
        waiting = self._commands.blpop([keys.reply_key(command)], timeout=REPLY_SECONDS)
        answer = await _answer(cast("Awaitable[Any]", waiting), REPLY_SECONDS + ANSWER_SECONDS)
        reply = decode(answer and answer[1], kind)
        if reply is None:
            raise Unavailable("an ingest process did not reply in time")
        return reply

    # States

    async def poll(self) -> None:
        """Poll the table and the states once.

        Raises:
            Unavailable: Redis did not answer.
        """
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.get(keys.SHARDS_KEY)
            pipe.hgetall(keys.STATES_KEY)
            pipe.get(keys.MODE_KEY)
            pipe.set(keys.FOLLOWED_KEY, "", px=round(STATE_SECONDS * 1000))
            pipe.hset(keys.FOLLOWERS_KEY, self._id, "")
            pipe.pexpire(keys.FOLLOWERS_KEY, round(KEPT_SECONDS * 1000))
            pipe.set(keys.follower_key(self._id), self._mode.value, px=round(FOLLOWER_SECONDS * 1000))
            table, states, mode, *_ = await _answer(pipe.execute(), ANSWER_SECONDS)
        self._table, found = decode_cluster(table, states)
        # A later state of the same run may have been lost with a master.
        latest = {run: max(self._states.get(run, each), each, key=attrgetter("number")) for run, each in found.items()}
        reloads = {run: each.state.reloads for run, each in self._states.items()}
        # Also reloads before this process began: it may replace a worker that has died.
        if any(each.state.reloads != reloads.get(run, 0) for run, each in latest.items()):
            self.reloaded.set()
        self._states, self._polled_at = latest, time.monotonic()
        self._update_mode(mode_of(mode))

    def _known(self) -> dict[str, Published]:
        """Return the states by run; none once they are too old."""
        return self._states if time.monotonic() - self._polled_at <= STATE_SECONDS else {}

    def _unconfirmed(self, mode: Mode) -> list[str]:
        """Return the shards whose owner is not known to be in a mode."""
        known = self._known()
        confirmed = {run for run, published in known.items() if published.state.mode is mode}
        owners = {shard: row.owner for shard, row in self._table.rows.items() if shard != LEAD}
        return sorted(shard for shard in owners or self.exchanges if owners.get(shard) not in confirmed)

    async def follow(self) -> None:
        """Follow the states until cancelled."""
        while True:
            before = self._mode
            try:
                await self.poll()
                if self._mode is not before:
                    await self.poll()  # publishes the mode, for which the process that switches it waits
            except Unavailable as error:
                logger.debug("the ingest processes cannot be followed: {}", error)
            except Exception as error:  # noqa: BLE001 - else the API would answer about the wrong mode for ever
                raise_if_cancelled()
                self._limit.log_bug("following the ingest processes failed", error)
            raise_if_cancelled()
            await asyncio.sleep(POLL_SECONDS)

    def _update_mode(self, mode: Mode | None) -> None:
        """Take the mode of the owners; while they differ, `mode`, which they are to adopt, if it is given."""
        known = self._known()
        owners = [each for of in owners_of(self._table, known).values() for each in of]
        modes = {each.state.mode for each in owners or known.values()}
        if len(modes) == 1:
            (self._mode,) = modes
        elif mode is not None:
            self._mode = mode
        self._changed.set()


def _shard_health(shard: str, row: Row, known: Mapping[str, Published]) -> ShardHealth:
    states = {run: published.shards[shard] for run, published in known.items() if shard in published.shards}
    owner, standby = states.get(row.owner or ""), states.get(row.standby or "")
    lag_ms = None
    if owner and standby and owner.newest_at is not None and standby.newest_at is not None:
        lag_ms = max(owner.newest_at - standby.newest_at, 0)
    state: StandbyState = "none" if row.standby is None else "connecting"
    if standby is not None and standby.state != "owner":
        state = standby.state
    return ShardHealth(shard, row.owner and _process(row.owner), row.standby and _process(row.standby), state, lag_ms)


def _process(run: str) -> str:
    """Return host and process id of a run."""
    return run.rpartition("/")[0]


def _client(keywords: Mapping[str, Any], max_connections: int) -> "redis.asyncio.Redis":
    # Each call has a limit of its own.
    return async_client(keywords, max_connections, ANSWER_SECONDS, answer_seconds=REPLY_SECONDS + ANSWER_SECONDS)


async def _answer(call: Awaitable[Any], seconds: float) -> Any:
    try:
        async with timeout(seconds):
            return await call
    except (redis.RedisError, TimeoutError, RuntimeError) as error:
        # A RuntimeError is uvloop's, for writing to a connection that was reset.
        raise Unavailable(f"Redis cannot be used: {error}") from error
