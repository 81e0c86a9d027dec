"""One subscriber of the broadcaster: its subscription, and the position up to which it has received events."""

import asyncio
from collections.abc import Callable
from typing import Protocol

import msgspec

from marketflow.api.streaming.encoding import Batch, Message, encode
from marketflow.api.streaming.subscription import Subscription
from marketflow.api.streaming.versioned_state import Position

CountSent = Callable[[int], None]
"""Adds a number of sent events."""


class Output(Protocol):
    """A connection to which the broadcaster itself writes, as the ASGI extension of the server offers it."""

    on_writable: Callable[[], None] | None
    """Called when it is writable again."""

    is_writable: bool
    """Whether its write buffer is empty, or it is closed."""

    def write(self, data: bytes) -> None:
        """Write framed bytes.

        Raises:
            ConnectionError: it is closed.
        """
        ...


class Subscriber:
    """A connection that receives the next batch whenever it can send one.

    Under a server that offers an output, the broadcaster writes to it: a task that is woken for each batch and client,
    and the layers through which its messages pass, cost twenty times as much as the write. Under any other server the
    connection pulls batches.

    Args:
        subscription: the series of which it receives events.
        position: the position after the last event that it has received.
        wake: called when it waits for a batch.
        pause_seconds: least time between two batches; 0 is none.
    """

    def __init__(
        self, subscription: Subscription, position: Position, wake: Callable[[], None], pause_seconds: float = 0.0
    ) -> None:
        self.subscription = subscription
        self._pause_seconds = pause_seconds
        self._paused = False
        self.position = position
        self.stamp = -1
        """Stamp of the state that was last compared with the position."""
        self._wake = wake
        self._next: asyncio.Future[Batch] | None = None
        self._reply: Message | None = None
        self._reply_sent: asyncio.Future[None] | None = None
        self._output: Output | None = None
        self._framed: Callable[[Batch], bytes] | None = None
        self._ended: asyncio.Future[None] | None = None
        self.sent: CountSent | None = None
        """Counts what the broadcaster has written, once for all subscribers that share it."""

    async def next(self) -> Batch:
        """Return all events since the last batch, as soon as there are any."""
        self._next = asyncio.get_running_loop().create_future()
        self._wake()
        return await self._next

    async def write_all(self, output: Output, framed: Callable[[Batch], bytes], sent: CountSent) -> None:
        """Let the broadcaster write all batches; return after the last one, or when the output is closed.

        Args:
            output: what they are written to.
            framed: returns the bytes of a batch.
            sent: counts the events.
        """
        self._output, self._framed, self.sent = output, framed, sent
        self._ended = asyncio.get_running_loop().create_future()
        output.on_writable = self._wake
        self._wake()
        try:
            await self._ended
        finally:
            output.on_writable = None

    def subscribe(self, subscription: Subscription) -> None:
        """Replace the subscription; its snapshot comes next."""
        self.subscription = subscription
        self.position = self.position._replace(has_snapshot=False)
        self.stamp = -1

    async def reply(self, event: msgspec.Struct) -> None:
        """Send an event to this subscriber alone, before any other; return once its batch is handed over."""
        self._reply = encode(event)
        self._reply_sent = asyncio.get_running_loop().create_future()
        self._wake()
        await self._reply_sent

    def _resume(self) -> None:
        self._paused = False
        self._wake()

    # For the broadcaster

    def is_due(self, stamp: int) -> bool:
        """Whether it waits for a batch and may have events pending."""
        if (self.stamp == stamp or self._paused) and self._reply is None:
            return False
        if self._output is not None and self._ended is not None:
            return self._output.is_writable and not self._ended.done()
        return self._next is not None and not self._next.done()

    def deliver(self, batch: Batch | None) -> int:
        """Write or hand over the pending reply and the batch; return the number of events written. It must be due."""
        if self._reply is not None and self._reply_sent is not None:
            batch = Batch([self._reply, *(batch.messages if batch else ())])
            if not self._reply_sent.done():
                self._reply_sent.set_result(None)
            self._reply = None
        if batch is None:
            return 0
        if self._pause_seconds and not self._paused:
            self._paused = True
            # On the clock's multiples of the pause: those with the same pause then share their batches.
            loop = asyncio.get_running_loop()
            loop.call_at((loop.time() // self._pause_seconds + 1) * self._pause_seconds, self._resume)
        if self._output is None or self._framed is None or self._ended is None:
            assert self._next is not None, "it waits"
            self._next.set_result(batch)
            return 0
        try:
            self._output.write(self._framed(batch))
        except ConnectionError:
            self._ended.set_result(None)
            return 0
        if batch.is_last:
            self._ended.set_result(None)
        return len(batch.messages)
