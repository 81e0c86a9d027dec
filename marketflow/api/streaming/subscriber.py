"""One subscriber of the broadcaster: its subscription, and the position up to which it has received events."""

import asyncio
from collections.abc import Callable

import msgspec

from marketflow.api.streaming.encoding import Batch, Message, encode
from marketflow.api.streaming.subscription import Subscription
from marketflow.api.streaming.versioned_state import Position


class Subscriber:
    """A connection that pulls the next batch whenever it can send one.

    Args:
        subscription: the series of which it receives events.
        position: the position after the last event that it has received.
        wake: called when it waits for a batch.
    """

    def __init__(self, subscription: Subscription, position: Position, wake: Callable[[], None]) -> None:
        self.subscription = subscription
        self.position = position
        self.stamp = -1
        """Stamp of the state that was last compared with the position."""
        self._wake = wake
        self._next: asyncio.Future[Batch] | None = None
        self._reply: Message | None = None
        self._reply_sent: asyncio.Future[None] | None = None

    async def next(self) -> Batch:
        """Return all events since the last batch, as soon as there are any."""
        self._next = asyncio.get_running_loop().create_future()
        self._wake()
        return await self._next

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

    # For the broadcaster

    def is_due(self, stamp: int) -> bool:
        """Whether it waits for a batch and may have events pending."""
        waits = self._next is not None and not self._next.done()
        return waits and (self.stamp != stamp or self._reply is not None)

    def deliver(self, batch: Batch | None) -> bool:
        """Hand over the pending reply and the batch, and return whether there was either. It must be due."""
        assert self._next is not None, "it waits"
        if self._reply is not None and self._reply_sent is not None:
            batch = Batch([self._reply, *(batch.messages if batch else ())])
            if not self._reply_sent.done():
                self._reply_sent.set_result(None)
            self._reply = None
        if batch is not None:
            self._next.set_result(batch)
        return batch is not None
