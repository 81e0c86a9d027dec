"""The schema of /ws is valid for all that the server sends, and for all that it accepts."""

import asyncio
import json
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator, FormatChecker
from msgspec.structs import replace
from starlette.types import Message, Scope

from marketflow.api.alerting.event_answer import event_answer
from marketflow.api.streaming import websocket_route
from marketflow.api.streaming.broadcaster import Broadcaster
from marketflow.api.streaming.encoding import Batch, encode
from marketflow.api.streaming.events import EVENT_NAMES
from marketflow.api.streaming.versioned_state import START
from marketflow.stores.ports import NumberedEvent
from tests.api.streaming.test_broadcaster import tick
from tests.api.streaming.test_versioned_state import ALL, changes, state, switched
from tests.api.test_alerts import events
from tests.api.world import EXCHANGES, SYMBOLS, World, application_of, series

__all__ = ["state"]

ACCEPTED: tuple[Any, ...] = (
    {"op": "subscribe"},
    {"op": "unsubscribe", "symbols": ["BTCUSDT"]},
    {"op": "subscribe", "symbols": ["btcusdt"], "exchanges": ["exchange1"]},
    {"op": "subscribe", "symbols": [], "exchanges": None},
    {"op": "subscribe", "exchanges": ["reference"]},
    {"op": "subscribe", "intervals": ["1m", "1M"], "exchanges": ["reference"], "symbols": ["BTCUSDT"]},
    {"op": "unsubscribe", "intervals": ["1M"], "exchanges": ["reference"]},
    {"op": "subscribe", "intervals": []},
)
REJECTED: tuple[Any, ...] = (
    {},
    {"op": "listen"},
    {"op": "subscribe", "symbols": "BTCUSDT"},
    {"op": "subscribe", "symbols": [1]},
    {"op": "subscribe", "intervals": "1m"},
    {"op": "subscribe", "intervals": ["7m"]},
    [],
)


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    document: dict[str, Any] = World().ask("/ws/schema.json").json()
    Draft202012Validator.check_schema(document)
    return document


def errors(schema: dict[str, Any], definition: str, message: Any) -> list[str]:
    whole = {"$ref": f"#/$defs/{definition}", "$defs": schema["$defs"]}
    return [each.message for each in Draft202012Validator(whole, format_checker=FormatChecker()).iter_errors(message)]


def conversation(sent: list[Any]) -> list[dict[str, Any]]:
    """Return what the server answers to messages, and at its end, over the application."""
    received: list[dict[str, Any]] = []

    async def running() -> None:
        world = World()
        world.trade(10.0, 500)
        context = world.context()
        names = context.exchanges, context.symbols
        broadcaster = Broadcaster(*names, world.mode, context.prices, world.health, world.announcements, 9)
        context = replace(context, broadcaster=broadcaster)
        incoming: asyncio.Queue[Message] = asyncio.Queue()
        arrived = asyncio.Condition()

        async def send(message: Message) -> None:
            if message["type"] == "websocket.send":
                async with arrived:
                    received.append(json.loads(message["text"]))
                    arrived.notify_all()

        async def until(event: str, count: int) -> None:
            async with arrived:
                await arrived.wait_for(lambda: [each["event"] for each in received].count(event) >= count)

        scope: Scope = {
            "type": "websocket",
            "path": websocket_route.PATH,
            "query_string": b"",
            "headers": [(b"host", b"localhost")],
            "client": ("127.0.0.1", 1),
            "state": {"context": context},
        }
        incoming.put_nowait({"type": "websocket.connect"})
        serving = asyncio.create_task(application_of(context)(scope, incoming.get, send))
        async with asyncio.timeout(5):
            await until("snapshot", 1)
            for number, message in enumerate(sent, 1):
                incoming.put_nowait({"type": "websocket.receive", "text": json.dumps(message)})
                async with arrived:
                    await arrived.wait_for(lambda number=number: len(replies(received)) >= number)  # type: ignore[misc]
            async with arrived:
                await arrived.wait_for(lambda: has_snapshot_after_replies(received))
            world.trade(11.0, 100)
            world.announcements.announce((series(), tick(11.0)))
            await until("prices", 1)
            await until("candles", 1)
            broadcaster.end()
            await serving
        await broadcaster.close()

    asyncio.run(running())
    return received


def has_snapshot_after_replies(received: list[dict[str, Any]]) -> bool:
    events = [each["event"] for each in received if each["event"] != "error"]
    return "snapshot" in events[len(events) - events[::-1].index("subscribed") :]


def replies(received: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in received if each["event"] in ("subscribed", "error")]


def test_schema_is_valid_for_all_that_the_server_sends(schema: dict[str, Any], state: Any) -> None:
    messages = conversation([*ACCEPTED, *REJECTED, {"op": "subscribe", "symbols": ["NOTHING"]}])
    for change in (changes, switched):
        _, seen = state.delta(ALL, START)
        change(state, seen)
        state.beat(1_795_262_400_000)
        batch, _ = state.delta(ALL, seen)
        assert isinstance(batch, Batch)
        messages += [json.loads(text) for text in batch.texts]
    stored = NumberedEvent(7, msgspec.json.encode(events(1)[0]).decode())
    messages += [json.loads(text) for text in Batch([encode(event_answer(stored))]).texts]
    assert {each["event"] for each in messages} == {*EVENT_NAMES.values()}
    for message in messages:
        assert not errors(schema, "ServerMessage", message), message


def test_schema_is_valid_for_what_the_server_accepts_alone(schema: dict[str, Any]) -> None:
    accepted = replies(conversation([*ACCEPTED, *REJECTED]))
    for message, reply in zip([*ACCEPTED, *REJECTED], accepted, strict=True):
        assert (reply["event"] == "subscribed") is (errors(schema, "ClientMessage", message) == []), message


@pytest.mark.parametrize("name", EVENT_NAMES.values())
def test_event_with_a_wrong_or_missing_field_is_invalid(schema: dict[str, Any], name: str) -> None:
    assert errors(schema, "ServerMessage", {"event": name, "data": None})
    assert errors(schema, "ServerMessage", {"event": f"{name}s", "data": {}})
    assert errors(schema, "ServerMessage", {"event": name})


def test_message_schema_is_linked_from_the_description(schema: dict[str, Any]) -> None:
    described = World().ask("/openapi.json").json()
    assert described["externalDocs"]["url"] == "ws/schema.json"
    assert schema["$defs"]["Symbol"]["examples"] == [*SYMBOLS]
    assert schema["$defs"]["Exchange"]["examples"] == [*EXCHANGES]


def test_every_reference_of_the_message_schema_resolves(schema: dict[str, Any]) -> None:
    def references(thing: Any) -> set[str]:
        if isinstance(thing, dict):
            own = {thing["$ref"]} if "$ref" in thing else set()
            return own.union(*map(references, thing.values()))
        return set().union(*map(references, thing)) if isinstance(thing, list) else set()

    assert references(schema) == {f"#/$defs/{name}" for name in schema["$defs"]}
