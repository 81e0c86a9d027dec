"""Builds the JSON Schema of the messages of /ws, from the structs that encode and decode them."""

from collections.abc import Sequence
from typing import Any

import msgspec

from marketflow import __version__
from marketflow.api.openapi.description import names_schema
from marketflow.api.streaming.events import EVENT_NAMES
from marketflow.api.streaming.websocket_route import Command

_COMPONENTS, _DEFINITIONS = "#/components/schemas/", "#/$defs/"


def describe_messages(exchanges: Sequence[str], symbols: Sequence[str]) -> dict[str, Any]:
    """Return the schema of these configured names: `ServerMessage` and `ClientMessage` among its definitions."""
    _, schemas = msgspec.json.schema_components([*EVENT_NAMES, Command], ref_template=_DEFINITIONS + "{name}")
    events = [_message(name, struct.__name__, struct.__doc__ or "") for struct, name in EVENT_NAMES.items()]
    definitions = {
        "ServerMessage": {"description": "An event from the server.", "oneOf": events},
        "ClientMessage": {"$ref": f"{_DEFINITIONS}{Command.__name__}"},
        **schemas,
        **names_schema("Exchange", exchanges),
        **names_schema("Symbol", symbols),
    }
    document: dict[str, Any] = _with_local_references(
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "Messages of /ws",
            "description": f"Both directions of the WebSocket at /ws of MarketFlow {__version__}.",
            "anyOf": [{"$ref": f"{_DEFINITIONS}{name}"} for name in ("ServerMessage", "ClientMessage")],
            "$defs": definitions,
        }
    )
    return document


def _message(name: str, struct: str, description: str) -> dict[str, Any]:
    return {
        "title": name,
        "description": description.partition("\n")[0],
        "type": "object",
        "properties": {
            "event": {"const": name},
            "id": {"type": "string", "description": "Where a stream of server-sent events resumes."},
            "data": {"$ref": f"{_DEFINITIONS}{struct}"},
        },
        "required": ["event", "data"],
    }


def _with_local_references(thing: Any) -> Any:
    """Return a schema whose references to components of the OpenAPI description are to its own definitions."""
    if isinstance(thing, dict):
        return {
            key: value.replace(_COMPONENTS, _DEFINITIONS) if key == "$ref" else _with_local_references(value)
            for key, value in thing.items()
        }
    return [_with_local_references(each) for each in thing] if isinstance(thing, list) else thing
