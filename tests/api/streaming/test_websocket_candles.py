"""Candles and alerts over /ws: beside prices, or from the start; what does not ask sees nothing new."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from msgspec.structs import replace
from starlette.datastructures import QueryParams
from starlette.types import Message, Scope

from marketflow.api.alerting.alert_access import AlertAccess
from marketflow.api.problems import UnknownParameter
from marketflow.api.streaming import websocket_route
from marketflow.api.streaming.broadcaster import Broadcaster
from tests.api.streaming.test_broadcaster import tick
from tests.api.test_alerts import events
from tests.api.world import MemoryAlerts, World, application_of, series


class Connection:
    """A WebSocket client of an application in this process."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        self._received: asyncio.Queue[Any] = asyncio.Queue()

    async def put(self, message: Message) -> None:
        if message["type"] == "websocket.send":
            self._received.put_nowait(json.loads(message["text"]))

    async def get(self) -> Message:
        return await self._incoming.get()

    def send(self, **message: Any) -> None:
        self._incoming.put_nowait({"type": "websocket.receive", "text": json.dumps(message)})

    async def next(self, *names: str) -> Any:
        """The data of the next event with one of these names."""
        async with asyncio.timeout(5):
            while (message := await self._received.get())["event"] not in names:
                pass
        return message["data"]

    def tick(self, price: float) -> None:
        self.world.trade(price, 50)
        self.world.announcements.announce((series(), tick(price, 50)))


def converse(query: str, test: Callable[[Connection], Awaitable[None]]) -> None:
    async def running() -> None:
        world = World(alerts=WatchedAlerts())
        world.trade(9.0, 90_000)
        world.trade(10.0, 500)
        context = world.context()
        names = context.exchanges, context.symbols
        broadcaster = Broadcaster(*names, world.mode, context.prices, world.health, world.announcements, 9)
        store = world.alerts
        alerts = AlertAccess(store.change, store, lambda: len(store.stored))
        context = replace(context, broadcaster=broadcaster, alerts=alerts)
        connection = Connection(world)
        scope: Scope = {
            "type": "websocket", "path": websocket_route.PATH, "query_string": query.encode(),
            "headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 1), "state": {"context": context},
        }  # fmt: skip
        connection._incoming.put_nowait({"type": "websocket.connect"})
        serving = asyncio.create_task(application_of(context)(scope, connection.get, connection.put))
        await test(connection)
        broadcaster.end()
        async with asyncio.timeout(5):
            await serving
        await broadcaster.close()
        await alerts.events.close()

    asyncio.run(running())


def test_candles_are_subscribed_beside_prices() -> None:
    async def test(client: Connection) -> None:
        snapshot = await client.next("snapshot")
        assert "candles" not in snapshot
        client.send(op="subscribe", intervals=["1m"], symbols=["btcusdt"], exchanges=["exchange1", "reference"])
        reply = await client.next("subscribed")
        assert reply["candles"] == [["exchange1", "BTCUSDT", "1m"], ["reference", "BTCUSDT", "1m"]]
        assert len(reply["series"]) == 6
        snapshot = await client.next("snapshot")
        assert [(each["exchange"], each["close"], each["closed"]) for each in snapshot["candles"]] == [
            ("exchange1", 9.0, True), ("exchange1", 10.0, False), ("reference", 9.0, True), ("reference", 10.0, False),
        ]  # fmt: skip
        assert [each["price"] for each in snapshot["prices"]] == [10.0]
        client.tick(12.0)
        assert [each["price"] for each in (await client.next("prices"))["prices"]] == [12.0]
        assert {each["close"] for each in (await client.next("candles"))["candles"]} == {12.0}
        client.send(op="unsubscribe", intervals=["1m"], exchanges=["exchange1", "reference"])
        assert "candles" not in await client.next("subscribed")
        assert "candles" not in await client.next("snapshot")

    converse("", test)


def test_connection_with_intervals_begins_with_candles() -> None:
    async def test(client: Connection) -> None:
        snapshot = await client.next("snapshot")
        assert snapshot["prices"] == []
        assert [(each["exchange"], each["interval"]) for each in snapshot["candles"]] == [(None, "1h")] * 2
        client.tick(12.0)
        [candle] = (await client.next("candles", "prices"))["candles"]
        assert (candle["close"], candle["closed"], candle["exchange"]) == (12.0, False, None)

    converse("intervals=1h&symbols=BTCUSDT", test)


def test_unsubscribing_all_prices_ends_the_reference_too() -> None:
    async def test(client: Connection) -> None:
        assert (await client.next("snapshot"))["exchanges"] == ["reference"]
        client.send(op="unsubscribe")
        assert (await client.next("subscribed"))["series"] == []

    converse("exchanges=reference", test)


@pytest.mark.parametrize(
    ("wanted", "code"),
    [({"intervals": ["2m"]}, "invalid_interval"), ({"intervals": ["1m"], "symbols": ["X"]}, "unknown_symbol")],
)
def test_wrong_command_changes_nothing(wanted: dict[str, Any], code: str) -> None:
    async def test(client: Connection) -> None:
        await client.next("snapshot")
        client.send(op="subscribe", **wanted)
        assert (await client.next("error", "subscribed"))["code"] == code
        client.tick(12.0)
        assert [each["price"] for each in (await client.next("prices"))["prices"]] == [12.0]

    converse("exchanges=exchange1", test)


class WatchedAlerts(MemoryAlerts):
    """Says whether anybody follows the events."""

    def __init__(self) -> None:
        super().__init__()
        self.followed = asyncio.Event()

    async def newest_alert_event(self) -> int:
        self.followed.set()
        return await super().newest_alert_event()


def test_alerts_come_beside_prices_and_replies() -> None:
    async def test(client: Connection) -> None:
        store = client.world.alerts
        assert isinstance(store, WatchedAlerts)
        await client.next("snapshot")
        async with asyncio.timeout(5):
            await store.followed.wait()
        store.stored = events(3)
        client.send(op="subscribe")
        assert [(await client.next("alert"))["number"] for _ in range(3)] == [1, 2, 3]
        client.tick(12.0)
        assert [each["price"] for each in (await client.next("prices"))["prices"]] == [12.0]
        store.stored = events(4)
        alert = await client.next("alert")
        assert (alert["number"], alert["event"]["kind"], alert["event"]["symbol"]) == (4, "price", "BTCUSDT")

    converse("alerts=true", test)


@pytest.mark.parametrize("query", ["", "alerts=false"])
def test_alerts_come_only_to_those_who_ask(query: str) -> None:
    async def test(client: Connection) -> None:
        await client.next("snapshot")
        client.tick(12.0)
        await client.next("prices")
        assert isinstance(client.world.alerts, WatchedAlerts)
        assert not client.world.alerts.followed.is_set()

    converse(query, test)


def test_unknown_value_of_alerts_is_refused() -> None:
    with pytest.raises(UnknownParameter):
        websocket_route._wants_alerts(QueryParams("alerts=perhaps"))
