"""The side of a process that only answers requests: what it knows of the feeds in another one, and how it asks them.

What is published comes by subscription, within milliseconds, and is asked for twice a second as well: a subscription
that has fallen silent cannot be told from one where nothing happens.
"""

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, cast
from uuid import uuid4

import redis
import redis.asyncio
from loguru import logger

from marketflow.cluster.lease import ANSWER_SECONDS, STATE_SECONDS
from marketflow.cluster.messages import IngestState, Published, Reply, decode, mode_of
from marketflow.counters import IngestCounters
from marketflow.errors import Unavailable
from marketflow.model import FeedState, Mode
from marketflow.stores.redis import keys
from marketflow.stores.redis.connection import async_client
from marketflow.tasks import timeout

POLL_SECONDS = 0.5
"""How often the state is asked for; one that is published is taken at once."""

COMMAND_MS = 1500
"""How long after it was given a command may be taken up: nobody waits for it later."""

REPLY_SECONDS = 2.0
"""How long a reply is waited for."""


STATE_CONNECTIONS = 3
"""One that listens, and one for each that asks at the same time: the listener, and the start."""

COMMAND_CONNECTIONS = 32
"""As many commands wait for their replies; others wait for one of these connections, for ANSWER_SECONDS."""


class RemoteIngest:
    """The feeds of another process; for one event loop.

    Args:
        keywords: of a Redis client.
        exchanges: those that there should be.
        mode: what to go by until another one is heard of.
    """

    def __init__(self, keywords: Mapping[str, Any], exchanges: Sequence[str], mode: Mode) -> None:
        # Two pools: what the feeds do is heard however many commands wait for their replies.
        self._client = _client(keywords, STATE_CONNECTIONS)
        self._commands = _client(keywords, COMMAND_CONNECTIONS)
        self._channel = keys.channel(keys.STATE_KEY, keywords.get("db", 0))
        self._exchanges = exchanges
        self._mode = mode
        self._published: Published | None = None
        self._heard_at = 0.0

    @property
    def current(self) -> Mode:
        """The mode that runs, or the last one that was heard of."""
        return self._mode

    @property
    def state(self) -> IngestState | None:
        """How the feeds do; None where no process runs them, or none can be heard."""
        if self._published is None or time.monotonic() - self._heard_at > STATE_SECONDS:
            return None
        return self._published.state

    @property
    def counters(self) -> IngestCounters | None:
        """What the process that takes ticks has counted, None where there is none or it cannot be heard."""
        return None if self.state is None or self._published is None else self._published.counters

    @property
    def stalled(self) -> tuple[str, ...]:
        """The branches of the flow that have work and finish none, as far as is known."""
        state = self.state
        return () if state is None else state.stalled

    def clock_offsets_ms(self) -> dict[str, int]:
        """How far the clocks of exchanges that are wrong are ahead of the machine's that takes ticks, by exchange."""
        state = self.state
        return {} if state is None else state.clock_offsets_ms

    def feed_states(self) -> tuple[Mode, dict[str, FeedState]]:
        """The mode, and how its feeds do: without a process that runs them they are all yet to be connected."""
        state = self.state
        known = {} if state is None else state.exchanges
        return self._mode, {exchange: known.get(exchange, FeedState.CONNECTING) for exchange in self._exchanges}

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()
        await self._commands.aclose()

    async def switch(self, mode: Mode) -> Mode:
        """Have another mode run and return the one before.

        Raises:
            Unavailable: no process runs the feeds, or it did not reply in time.
        """
        if self.state is None:
            raise Unavailable("no process takes ticks")
        command = uuid4().hex
        async with self._commands.pipeline(transaction=True) as pipe:
            pipe.set(keys.command_key(command), mode.value, px=COMMAND_MS)
            pipe.rpush(keys.COMMANDS_KEY, command)
            pipe.pexpire(keys.COMMANDS_KEY, COMMAND_MS)
            await _answer(pipe.execute(), ANSWER_SECONDS)
        waiting = self._commands.blpop([keys.reply_key(command)], timeout=REPLY_SECONDS)
        answer = await _answer(cast("Awaitable[Any]", waiting), REPLY_SECONDS + ANSWER_SECONDS)
        reply = decode(answer and answer[1], Reply)
        if reply is None:
            raise Unavailable("the process that takes ticks did not reply")
        self._take(reply.published)
        return reply.previous

    # What is heard

    async def ask(self) -> None:
        """Ask once how the feeds do.

        Raises:
            Unavailable: Redis cannot be asked.
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
        """Listen, until cancelled."""
        while True:
            try:
                async with self._client.pubsub(ignore_subscribe_messages=True) as channel:
                    await _answer(channel.subscribe(self._channel), ANSWER_SECONDS)
                    await self._listen(channel)
            except Unavailable as error:
                logger.debug("the feeds cannot be heard: {}", error)
            except Exception as error:  # noqa: BLE001 - whoever stopped listening would answer about the wrong mode
                logger.opt(exception=error).error("listening to the feeds failed, which is a bug")
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
                    break  # it has given the lease back
                self._take(published)

    def _take(self, published: Published) -> None:
        """Believe it, unless a later one of the same run has come by another way."""
        known = self._published
        if known is not None and known.run == published.run and known.number > published.number:
            return
        self._published = published
        self._heard_at = time.monotonic()
        self._mode = published.state.mode


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
