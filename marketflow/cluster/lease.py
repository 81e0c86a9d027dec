"""The lease: of all processes that could take ticks from the exchanges into one Redis, one does.

A key that expires, renewed by its holder. It decides who begins, not who may write: a process that cannot ask Redis
goes on with what it does, for two writers do no harm (each row stays in its fuller version) and none is the worse
fault.

A key that has gone says little: the holder may be dead, or Redis was emptied or is back from an outage. So the one who
held it last takes it again at once, and others wait a moment. A holder that ends leaves the key empty, which is clear.
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
"""How long a holder may be silent."""

RENEW_SECONDS = 0.5
"""How often the holder is heard of."""

GRACE_SECONDS = 1.0
"""How long the key must have been gone before another takes it: twice what the holder needs to notice."""

RELEASED_SECONDS = 10
"""How long a lease that was given back is known to be."""

STATE_SECONDS = 3.0
"""How long a state counts."""

MODE_SECONDS = 24 * 60 * 60
"""How long the mode is remembered when nobody runs."""

ANSWER_SECONDS = 0.5
"""How long Redis may take to answer."""

_HOLD = """
local holder = redis.call('get', KEYS[1])
if holder == '' or (not holder and ARGV[3] == 'free') then holder = ARGV[1] end
if holder == ARGV[1] then
    redis.call('set', KEYS[1], holder, 'px', ARGV[2])
    if ARGV[4] ~= '' then
        redis.call('set', KEYS[2], ARGV[4], 'px', ARGV[5])
        redis.call('set', KEYS[3], ARGV[6], 'px', ARGV[7])
        redis.call('publish', ARGV[8], ARGV[4])
    end
end
return holder
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
def asking() -> Iterator[None]:
    """A call of Redis.

    Raises:
        Unavailable: in the place of any error of Redis.
    """
    try:
        yield
    except redis.RedisError as error:
        raise Unavailable(f"Redis cannot be used: {error}") from error


class Lease:
    """The lease as one process sees it. For one thread at a time.

    Args:
        client: asked, and left open.
        monotonic: the time in seconds.
    """

    def __init__(self, client: "redis.Redis", monotonic: Callable[[], float] = time.monotonic) -> None:
        self.run = f"{socket.gethostname()}/{os.getpid()}/{uuid4().hex[:12]}"
        self._client = client
        self._channel = keys.channel(keys.STATE_KEY, client.get_connection_kwargs().get("db", 0))
        self._monotonic = monotonic
        self._free_since: float | None = None
        self.holder: str | None = None
        """Who had it when it was last seen in somebody's hands; None where it never was."""
        self.held = False
        """Whether that is this process, by the last answer."""

    def hold(self, published: Published | None = None) -> bool:
        """Keep the lease, or take it if it is to be had; gives whether this process holds it.

        Where it does, the state is published with the same call: nobody else ever publishes one.

        Raises:
            Unavailable: Redis cannot be asked.
        """
        state = b"" if published is None else encode(published)
        mode = "" if published is None else published.state.mode.value
        free = "free" if self._may_take_what_is_gone() else ""
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
        with asking():
            # The keys have one hash tag: one script may use them on a cluster, too.
            answer = self._client.eval(_HOLD, 3, keys.LEASE_KEY, keys.STATE_KEY, keys.MODE_KEY, *arguments)
        self._learn(cast("bytes | None", answer))
        return self.held

    def release(self) -> None:
        """Give it back, if it is held: whoever stands by takes it at once.

        Raises:
            Unavailable: Redis cannot be asked; it expires by itself.
        """
        self.held = False
        with asking():
            arguments = (self.run, str(_ms(RELEASED_SECONDS)), self._channel)
            self._client.eval(_RELEASE, 2, keys.LEASE_KEY, keys.STATE_KEY, *arguments)

    def claim(self, command: str) -> bytes | None:
        """What a command asks for, once; None where it is too late for it or another process holds the lease.

        Raises:
            Unavailable: Redis cannot be asked.
        """
        with asking():
            answer = self._client.eval(_CLAIM, 2, keys.LEASE_KEY, keys.command_key(command), self.run)
        return cast("bytes | None", answer)

    def _may_take_what_is_gone(self) -> bool:
        if self.holder in (None, self.run):
            return True
        return self._free_since is not None and self._monotonic() - self._free_since >= GRACE_SECONDS

    def _learn(self, answer: bytes | None) -> None:
        if answer is None:
            self._free_since = self._monotonic() if self._free_since is None else self._free_since
        else:
            self._free_since = None
            self.holder = answer.decode(errors="replace")
        self.held = answer is not None and self.holder == self.run


def kept_mode(client: "redis.Redis") -> Mode | None:
    """The mode that ran last, None where nobody remembers.

    Raises:
        Unavailable: Redis cannot be asked.
    """
    with asking():
        return mode_of(cast("bytes | None", client.get(keys.MODE_KEY)))


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
