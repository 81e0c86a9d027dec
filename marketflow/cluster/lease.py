"""The lease of the leader: of all processes that could ingest into one Redis, one does.

A key that expires, renewed by its holder. It decides who starts to ingest, not who may write: a leader that cannot
reach Redis goes on, for two writers do no harm (each row stays in its more complete version) and no writer would.

A missing key is ambiguous: the holder has died, or Redis was emptied or is back from an outage. So the last holder
acquires it again at once, and others wait for GRACE_SECONDS. A holder that stops leaves the key empty, which is
unambiguous.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from uuid import uuid4

import redis

from marketflow.cluster.messages import Published, encode, mode_of
from marketflow.errors import Unavailable
from marketflow.model import Mode
from marketflow.stores.redis import keys
from marketflow.stores.redis.connection import sync_client

LEASE_SECONDS = 2.5
"""Expiry of the lease."""

RENEW_SECONDS = 0.5
"""How often the holder renews it."""

GRACE_SECONDS = 1.0
"""How long the key must be missing before another process acquires it: two renewals of the holder."""

RELEASED_SECONDS = 10
"""How long a released lease is known to be free."""

STATE_SECONDS = 3.0
"""Expiry of the published state."""

MODE_SECONDS = 24 * 60 * 60
"""How long the mode is kept without a leader."""

ANSWER_SECONDS = 0.5
"""Timeout of a call."""

_HOLD = """
local followers = 0
local holder = redis.call('get', KEYS[1])
if holder == '' or (not holder and ARGV[3] == 'free') then holder = ARGV[1] end
if holder == ARGV[1] then
    redis.call('set', KEYS[1], holder, 'px', ARGV[2])
    if ARGV[4] ~= '' then
        redis.call('set', KEYS[2], ARGV[4], 'px', ARGV[5])
        redis.call('set', KEYS[3], ARGV[6], 'px', ARGV[7])
        followers = redis.call('publish', ARGV[8], ARGV[4])
        if redis.call('type', KEYS[4]).ok ~= 'none' then followers = followers + 1 end
    end
end
return {holder, followers}
"""

_RELEASE = """
if redis.call('get', KEYS[1]) == ARGV[1] then
    redis.call('set', KEYS[1], '', 'px', ARGV[2])
    redis.call('del', KEYS[2])
    redis.call('publish', ARGV[3], '')
end
"""

_CLAIM = """
if redis.call('get', KEYS[1]) ~= ARGV[1] then return false end
local command = redis.call('get', KEYS[2])
redis.call('del', KEYS[2])
return command
"""


def connect(keywords: Mapping[str, Any]) -> "redis.Redis":
    """A client for what is in this package, which connects when first used and never waits long."""
    return sync_client(keywords, ANSWER_SECONDS)


@contextmanager
def redis_errors() -> Iterator[None]:
    """Turn errors of Redis into Unavailable."""
    try:
        yield
    except redis.RedisError as error:
        raise Unavailable(f"Redis cannot be used: {error}") from error


class Lease:
    """The lease as one process sees it. For one thread at a time.

    Args:
        client: of Redis; not closed here.
        monotonic: monotonic time in seconds.
    """

    def __init__(self, client: "redis.Redis", monotonic: Callable[[], float] = time.monotonic) -> None:
        self.run = f"{socket.gethostname()}/{os.getpid()}/{uuid4().hex[:12]}"
        self._client = client
        self._channel = keys.channel(keys.STATE_KEY, client.get_connection_kwargs().get("db", 0))
        self._monotonic = monotonic
        self._missing_since: float | None = None
        self.holder: str | None = None
        """The last known holder; None if there was none."""
        self.held = False
        """Whether this process holds it, by the last answer."""
        self.is_followed = False
        """Whether other processes have subscribed to its state, or commands wait for it, by the last answer."""

    def hold(self, published: Published | None = None) -> bool:
        """Renew the lease, or acquire it if it is free; return whether this process holds it.

        If it does, the state is published by the same script: no other process ever publishes one.

        Raises:
            Unavailable: Redis did not answer.
        """
        state = b"" if published is None else encode(published)
        mode = "" if published is None else published.state.mode.value
        free = "free" if self._may_acquire_missing() else ""
        arguments: list[str | bytes | int] = [
            self.run,
            _ms(LEASE_SECONDS),
            free,
            state,
            _ms(STATE_SECONDS),
            mode,
            _ms(MODE_SECONDS),
            self._channel,
        ]
        with redis_errors():
            # The keys share a hash tag, so that one script may use them on a cluster as well.
            names = (keys.LEASE_KEY, keys.STATE_KEY, keys.MODE_KEY, keys.COMMANDS_KEY)
            answer = self._client.eval(_HOLD, len(names), *names, *arguments)
        holder, followers = cast("tuple[bytes | None, int]", answer)
        self._record(holder)
        self.is_followed = followers > 0
        return self.held

    def release(self) -> None:
        """Release the lease, if it is held: a standby acquires it at once.

        Raises:
            Unavailable: Redis did not answer; the lease expires.
        """
        self.held = False
        with redis_errors():
            arguments = (self.run, str(_ms(RELEASED_SECONDS)), self._channel)
            self._client.eval(_RELEASE, 2, keys.LEASE_KEY, keys.STATE_KEY, *arguments)

    def claim(self, command: str) -> bytes | None:
        """Take a command and return its content; None if it has expired or another process holds the lease.

        Raises:
            Unavailable: Redis did not answer.
        """
        with redis_errors():
            answer = self._client.eval(_CLAIM, 2, keys.LEASE_KEY, keys.command_key(command), self.run)
        return cast("bytes | None", answer)

    def _may_acquire_missing(self) -> bool:
        if self.holder in (None, self.run):
            return True
        return self._missing_since is not None and self._monotonic() - self._missing_since >= GRACE_SECONDS

    def _record(self, answer: bytes | None) -> None:
        if answer is None:
            self._missing_since = self._monotonic() if self._missing_since is None else self._missing_since
        else:
            self._missing_since = None
            self.holder = answer.decode(errors="replace")
        self.held = answer is not None and self.holder == self.run


def kept_mode(client: "redis.Redis") -> Mode | None:
    """Return the mode of the last leader; None if it is not known.

    Raises:
        Unavailable: Redis did not answer.
    """
    with redis_errors():
        return mode_of(cast("bytes | None", client.get(keys.MODE_KEY)))


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
