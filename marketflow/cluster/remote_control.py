"""The API process's side of the cluster: follows the state of the leader, and sends it commands.

The state comes by publish/subscribe within milliseconds, and is also polled twice a second: a subscription that has
silently failed looks like one where nothing happens.
"""

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, TypeVar, cast
from uuid import uuid4

import redis
import redis.asyncio
from loguru import logger

from marketflow.cluster.lease import ANSWER_SECONDS, STATE_SECONDS
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
from marketflow.health import FeedProblem
from marketflow.model import FeedState, Mode
from marketflow.settings.reloading import Changes
from marketflow.stores.postgres.request_coalescing import CoalescedAnswers
from marketflow.stores.redis import keys
from marketflow.stores.redis.connection import async_client
from marketflow.tasks import raise_if_cancelled, timeout

_T = TypeVar("_T")

POLL_SECONDS = 0.5
"""How often the state is polled; a published one is used at once."""

COMMAND_MS = 1500
"""Expiry of a command: its client has left by then."""

REPLY_SECONDS = 2.0
"""Timeout of a reply."""

REPORTS_KEPT = 100
"""How many reports of feeds are kept for a moment, each of one query."""

STATE_CONNECTIONS = 3
"""One for the subscription, and one each for its polls and the poll at the start."""

COMMAND_CONNECTIONS = 32
"""Commands that may await their replies at a time; further ones wait up to ANSWER_SECONDS for a connection."""


class RemoteIngest:
    """The ingest process as an API process sees it; for one event loop.

    Args:
        keywords: of a Redis client.
        exchanges: the configured ones.
        mode: assumed until the first state arrives.
    """

    def __init__(self, keywords: Mapping[str, Any], exchanges: Sequence[str], mode: Mode) -> None:
        # Two pools: the state arrives however many commands await their replies.
        self._client = _client(keywords, STATE_CONNECTIONS)
        self._commands = _client(keywords, COMMAND_CONNECTIONS)
        self._channel = keys.channel(keys.STATE_KEY, keywords.get("db", 0))
        self.exchanges = exchanges
        """The configured ones."""
        self.reloaded = asyncio.Event()
        """Set when the ingest process has read its settings again."""
        self._reloads: tuple[str, int] | None = None  # of which run, and how many
        self._mode = mode
        self._published: Published | None = None
        self._received_at = 0.0
        self._reports: CoalescedAnswers[FeedsReport] = CoalescedAnswers(REPORTS_KEPT, time.monotonic)

    @property
    def current(self) -> Mode:
        """The current mode, or the last known one."""
        return self._mode

    @property
    def state(self) -> IngestState | None:
        """The state of the leader; None if there is no leader or it is unreachable."""
        if self._published is None or time.monotonic() - self._received_at > STATE_SECONDS:
            return None
        return self._published.state

    @property
    def counters(self) -> IngestCounters | None:
        """The counters of the leader; None if there is no leader or it is unreachable."""
        return None if self.state is None or self._published is None else self._published.counters

    @property
    def stalled(self) -> tuple[str, ...]:
        """Branches of the pipeline that have work and finish none, as far as known."""
        state = self.state
        return () if state is None else state.stalled

    def clock_offsets_ms(self) -> dict[str, int]:
        """Return by how much each wrong exchange clock is ahead of that of the ingest machine, by exchange."""
        state = self.state
        return {} if state is None else state.clock_offsets_ms

    def feed_problems(self) -> dict[str, FeedProblem]:
        """Return what is wrong with feeds, by exchange, as far as known."""
        state = self.state
        return {} if state is None else state.feeds

    def feed_states(self) -> tuple[Mode, dict[str, FeedState]]:
        """Return the mode and the state of its feeds; all of them are connecting while there is no leader."""
        state = self.state
        known = {} if state is None else state.exchanges
        return self._mode, {exchange: known.get(exchange, FeedState.CONNECTING) for exchange in self.exchanges}

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()
        await self._commands.aclose()

    async def switch(self, mode: Mode) -> Mode:
        """Switch the mode and return the previous one.

        Raises:
            Unavailable: there is no leader, or it did not reply in time.
        """
        reply = await self._command(mode.value, Reply)
        self._take(reply.published)
        return reply.previous

    async def reload(self) -> Changes:
        """Have the ingest process read its settings again; return what has changed.

        Raises:
            SettingsError: they are wrong, and nothing has changed.
            Unavailable: there is no leader, or it did not reply in time.
        """
        reply = await self._command(RELOAD, ReloadReply)
        self._take(reply.published)
        if reply.changes is None:
            raise SettingsError(reply.problem)
        return reply.changes

    async def feeds(self, query: FeedsQuery) -> FeedsReport:
        """Return the report of the feeds, of a second ago at most: many clients cost the leader one command.

        Raises:
            Unavailable: there is no leader, or it did not reply in time.
        """
        return await self._reports.get(query, lambda: self._command(encode(query), FeedsReport))

    async def change_rule(self, change: RuleChange) -> RuleChanged:
        """Change an alert rule.

        Raises:
            Unavailable: there is no leader, or it did not reply in time; the rule may have been changed.
        """
        return await self._command(encode(change), RuleChanged)

    def newest_alert_event(self) -> int:
        """Return the number of the newest event of an alert that the leader has stored, 0 if that is not known."""
        state = self.state
        return 0 if state is None else state.newest_alert_event

    async def _command(self, content: str | bytes, kind: type[_T]) -> _T:
        if self.state is None:
            raise Unavailable("no process takes ticks")
        command = uuid4().hex
        async with self._commands.pipeline(transaction=True) as pipe:
            pipe.set(keys.command_key(command), content, px=COMMAND_MS)
            pipe.rpush(keys.COMMANDS_KEY, command)
            pipe.pexpire(keys.COMMANDS_KEY, COMMAND_MS)
            await _answer(pipe.execute(), ANSWER_SECONDS)
        waiting = self._commands.blpop([keys.reply_key(command)], timeout=REPLY_SECONDS)
        answer = await _answer(cast("Awaitable[Any]", waiting), REPLY_SECONDS + ANSWER_SECONDS)
        reply = decode(answer and answer[1], kind)
        if reply is None:
            raise Unavailable("the process that takes ticks did not reply in time")
        return reply

    # State

    async def ask(self) -> None:
        """Poll the state once.

        Raises:
            Unavailable: Redis did not answer.
        """
        asked = self._client.mget(keys.STATE_KEY, keys.MODE_KEY)
        state, mode = await _answer(cast("Awaitable[Any]", asked), ANSWER_SECONDS)
        published = decode(state, Published)
        if published is not None:
            self._take(published)
            return
        self._published = None
        self._mode = mode_of(mode) or self._mode

    async def follow(self) -> None:
        """Follow the state until cancelled."""
        while True:
            try:
                async with self._client.pubsub(ignore_subscribe_messages=True) as channel:
                    await _answer(channel.subscribe(self._channel), ANSWER_SECONDS)
                    await self._listen(channel)
            except Unavailable as error:
                logger.debug("the ingest process cannot be followed: {}", error)
            except Exception as error:  # noqa: BLE001 - else the API would answer about the wrong mode for ever
                raise_if_cancelled()
                logger.opt(exception=error).error("following the ingest process failed, which is a bug")
            raise_if_cancelled()
            await asyncio.sleep(POLL_SECONDS)

    async def _listen(self, channel: "redis.asyncio.client.PubSub") -> None:
        while True:
            await self.ask()
            poll_at = time.monotonic() + POLL_SECONDS
            while (seconds := poll_at - time.monotonic()) > 0:
                message = await _answer(channel.get_message(timeout=seconds), seconds + ANSWER_SECONDS)
                if message is None:
                    continue
                if (published := decode(message["data"], Published)) is None:
                    break  # the lease was released
                self._take(published)

    def _take(self, published: Published) -> None:
        """Use a state, unless a later one of the same run has arrived another way."""
        known = self._published
        if known is not None and known.run == published.run and known.number > published.number:
            return
        self._published = published
        self._received_at = time.monotonic()
        self._mode = published.state.mode
        reloads = published.run, published.state.reloads
        if reloads != self._reloads:
            if published.state.reloads:  # also before this process began: it may be a worker in another one's place
                self.reloaded.set()
            self._reloads = reloads


def _client(keywords: Mapping[str, Any], max_connections: int) -> "redis.asyncio.Redis":
    # Each call has a limit of its own.
    return async_client(keywords, max_connections, ANSWER_SECONDS, answer_seconds=REPLY_SECONDS + ANSWER_SECONDS)


async def _answer(asked: Awaitable[Any], seconds: float) -> Any:
    try:
        async with timeout(seconds):
            return await asked
    except (redis.RedisError, TimeoutError, RuntimeError) as error:
        # A RuntimeError is uvloop's, for writing to a connection that was reset.
        raise Unavailable(f"Redis cannot be used: {error}") from error
