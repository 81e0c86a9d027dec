"""Somebody who is told what changes: a selection, and a position up to which it has been told."""

import asyncio
from collections.abc import Callable

import msgspec

from marketflow.api.streaming.events import Batch, Message, message
from marketflow.api.streaming.known_state import Position
from marketflow.api.streaming.selection import Selection


class Client:
    """One client of a hub.

    Args:
        selection: of what it is told.
        position: what it has seen.
        ask: called when it waits.
    """

    def __init__(self, selection: Selection, position: Position, ask: Callable[[], None]) -> None:
        self.selection = selection
        self.position = position
        self.stamp = -1
        """Of what was known when it was last looked whether there is anything new to this client."""
        self._ask = ask
        self._turn: asyncio.Future[Batch] | None = None
        self._answer: Message | None = None
        self._answered: asyncio.Future[None] | None = None

    async def next(self) -> Batch:
        """What has changed, as soon as there is anything and it is this client's turn."""
        self._turn = asyncio.get_running_loop().create_future()
        self._ask()
        return await self._turn

    def select(self, selection: Selection) -> None:
        """Be told of other series, beginning with a snapshot of them."""
        self.selection = selection
        self.position = self.position._replace(whole=False)
        self.stamp = -1

    async def tell(self, answer: msgspec.Struct) -> None:
        """Tell it something that is for no other client, before anything else; returns when it is being sent."""
        self._answer = message(answer)
        self._answered = asyncio.get_running_loop().create_future()
        self._ask()
        await self._answered

    # Of the hub

    def is_due(self, stamp: int) -> bool:
        """Whether it waits, and there may be something for it."""
        waits = self._turn is not None and not self._turn.done()
        return waits and (self.stamp != stamp or self._answer is not None)

    def give(self, batch: Batch | None) -> bool:
        """Tell it, while it waits, with an answer that it is owed before that; gives whether there was anything."""
        assert self._turn is not None, "it waits"
        if self._answer is not None and self._answered is not None:
            batch = Batch([self._answer, *(batch.messages if batch else ())])
            if not self._answered.done():
                self._answered.set_result(None)
            self._answer = None
        if batch is not None:
            self._turn.set_result(batch)
        return batch is not None
