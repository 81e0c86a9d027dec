"""Ends of WebSocket connections whose two tasks, one that receives and one that sends, end at the same moment."""

import asyncio
import gc
from collections.abc import Callable

import pytest
from msgspec.structs import replace
from starlette.types import Message, Scope

from marketflow.api.context import Context
from marketflow.api.streaming import websocket_route
from marketflow.api.streaming.broadcaster import Broadcaster
from marketflow.api.streaming.websocket_route import GOING_AWAY, POLICY_VIOLATION
from tests.api.streaming.test_broadcaster import tick
from tests.api.world import World, application_of, series

CONNECTIONS = 16
"""Repetitions: which of two tasks comes first out of a set differs from one to the next."""


class Client:
    """A client whose message of too many arrives at the moment of a send, once it has its snapshot.

    Args:
        is_lost: whether that send fails.
    """

    def __init__(self, is_lost: bool) -> None:
        self._is_lost = is_lost
        self._connects = True
        self._moment = asyncio.Event()
        self.waits = asyncio.Event()
        """Set once it waits for that moment."""
        self.closed_with: list[int] = []

    async def receive(self) -> Message:
        if self._connects:
            self._connects = False
            return {"type": "websocket.connect"}
        await self._moment.wait()
        return {"type": "websocket.receive", "text": "{}"}

    async def send(self, message: Message) -> None:
        if message["type"] == "websocket.close":
            self.closed_with.append(message["code"])
        if message["type"] != "websocket.send":
            return
        if not self.waits.is_set():
            self.waits.set()
            return
        self._moment.set()
        if self._is_lost:
            raise OSError("the client has disconnected")


def serve(
    monkeypatch: pytest.MonkeyPatch, is_lost: bool, send: Callable[[World, Context], None]
) -> tuple[list[Client], list[str]]:
    """Serve clients that may send no message until both tasks of each have ended.

    Return them, and the errors: of the application, and those of tasks that nobody retrieved.
    """
    monkeypatch.setattr(websocket_route, "MESSAGE_BURST", 0)
    monkeypatch.setattr(websocket_route, "MESSAGES_PER_SECOND", 0.0)
    errors: list[str] = []

    async def running() -> list[Client]:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(repr(context)))
        world = World()
        world.trade(10.0, 500)
        context = world.context()
        names = context.exchanges, context.symbols
        broadcaster = Broadcaster(*names, world.mode, context.prices, world.health, world.announcements, CONNECTIONS)
        context = replace(context, broadcaster=broadcaster)
        app = application_of(context)
        scope: Scope = {
            "type": "websocket",
            "path": websocket_route.PATH,
            "query_string": b"",
            "headers": [(b"host", b"localhost")],
            "client": ("127.0.0.1", 1),
            "state": {"context": context},
        }
        clients = [Client(is_lost) for _ in range(CONNECTIONS)]
        served = [asyncio.create_task(app(dict(scope), each.receive, each.send)) for each in clients]
        async with asyncio.timeout(5):
            for each in clients:
                await each.waits.wait()
            send(world, context)
            results = await asyncio.gather(*served, return_exceptions=True)
        errors.extend(repr(each) for each in results if each is not None)
        await context.broadcaster.close()
        served.clear()
        gc.collect()  # an exception that nobody has retrieved is reported when its task is freed
        return clients

    return asyncio.run(running()), errors


def announce(world: World, _: Context) -> None:
    world.announcements.announce((series(), tick(11.0)))


def end(_: World, context: Context) -> None:
    context.broadcaster.end()


def test_refused_client_that_has_disconnected_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    clients, errors = serve(monkeypatch, True, announce)
    assert not errors
    assert [each.closed_with for each in clients] == [[]] * CONNECTIONS


def test_client_refused_beside_its_last_event_is_closed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clients, errors = serve(monkeypatch, False, end)
    assert not errors
    assert {code for each in clients for code in each.closed_with} <= {GOING_AWAY, POLICY_VIOLATION}
    assert [len(each.closed_with) for each in clients] == [1] * CONNECTIONS
