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


class Sink(Protocol):
    """Takes the bytes of a connection, as a transport does."""

    def is_closing(self) -> bool:
        """Whether it is closed, or about to be."""
        ...

    def write(self, data: bytes, /) -> object:
        """Write framed bytes."""
        ...


Writes = list[tuple[Sink, bytes]]
"""What is to be written, and where."""


class Output(Protocol):
    """A connection to which the broadcaster itself writes, as the ASGI extension of the server offers it."""

    on_change: Callable[[], None] | None
    """Called when its write buffer is no longer empty, when it is empty again, and when it is closed."""

    def sink(self) -> Sink | None:
        """Return what takes framed bytes; None while its write buffer is not empty.

        Raises:
            ConnectionError: it is closed.
        """
        ...


class Subscriber:
    """A connection that receives the next batch whenever it can send one.

    Under a server that offers an output, the broadcaster writes to it: a task that is woken for each batch and client,
    and the layers through which its messages pass, cost twenty times as much as the write. Under any other server the
    connection pulls batches.

    What a write needs is in one small object: with a thousand connections nothing of them is in the caches of the CPU,
    and each further object that a write looks at costs a tenth of it.

    Args:
        subscription: the series of which it receives events.
        position: the position after the last event that it has received.
        wake: called when it waits for a batch.
        pause_seconds: least time between two batches; 0 is none.
    """

    __slots__ = (
        "_ended",
        "_framed",
        "_next",
        "_output",
        "_pause_seconds",
        "_paused",
        "_reply",
        "_reply_sent",
        "_sink",
        "_wake",
        "position",
        "sent",
        "stamp",
        "subscription",
    )

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
        self._sink: Sink | None = None  # of the output, while it can be written to
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
        output.on_change = self._find_sink
        self._find_sink()
        try:
            await self._ended
        finally:
            output.on_change = self._sink = None

    def _find_sink(self) -> None:
        assert self._output is not None, "it writes"
        assert self._ended is not None, "it writes"
        if self._ended.done():
            return
        try:
            self._sink = self._output.sink()
        except ConnectionError:
            self._end()
        if self._sink is not None:
            self._wake()

    def _end(self) -> None:
        assert self._ended is not None, "it writes"
        self._sink = None
        if not self._ended.done():
            self._ended.set_result(None)

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
        return self._sink is not None or (self._next is not None and not self._next.done())

    def deliver(self, batch: Batch | None, writes: Writes) -> int:
        """Hand over the pending reply and the batch, or add them to the writes that are to be made at once.

        It must be due.

        Returns:
            number of events to be written.
        """
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
        sink = self._sink
        if sink is None or self._framed is None:
            assert self._next is not None, "it waits"
            self._next.set_result(batch)
            return 0
        if sink.is_closing():
            self._end()
            return 0
        writes.append((sink, self._framed(batch)))
        if batch.is_last:
            self._end()
        return len(batch.messages)
