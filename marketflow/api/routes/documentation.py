"""/openapi.json and /docs: the description of the API."""

from collections.abc import Sequence
from functools import lru_cache

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from marketflow.api.context import Context, context_of
from marketflow.api.openapi.description import MESSAGE_SCHEMA, describe
from marketflow.api.openapi.message_schema import describe_messages
from marketflow.api.openapi.operation import Content, Operation, Tag
from marketflow.api.rendering import JSONAnswer
from marketflow.api.routes.static_files import PAGE, page

_ABOUT = Tag("about", "Description of the API.")


def with_documentation(operations: Sequence[Operation]) -> list[Operation]:
    """Return the operations, with those that describe them."""
    described = list(operations)

    @lru_cache(maxsize=1)  # an application has one context
    def document(context: Context) -> msgspec.Raw:
        asks_for_token = bool(context.token)
        return msgspec.Raw(msgspec.json.encode(describe(described, context.exchanges, context.symbols, asks_for_token)))

    @lru_cache(maxsize=1)
    def messages(context: Context) -> msgspec.Raw:
        return msgspec.Raw(msgspec.json.encode(describe_messages(context.exchanges, context.symbols)))

    async def message_schema(request: Request) -> Response:
        return JSONAnswer(messages(context_of(request)))

    async def openapi(request: Request) -> Response:
        return JSONAnswer(document(context_of(request)))

    described += [
        Operation(
            id="openapi",
            path="/openapi.json",
            endpoint=openapi,
            tag=_ABOUT,
            summary="This description",
            answer=Content(
                ("application/json",), "An OpenAPI 3.1 document.", {"type": "object", "required": ["openapi"]}
            ),
        ),
        Operation(
            id="messageSchema",
            path=f"/{MESSAGE_SCHEMA}",
            endpoint=message_schema,
            tag=_ABOUT,
            summary="Schema of the messages of /ws",
            description="JSON Schema of what the WebSocket sends (`ServerMessage`) and takes (`ClientMessage`).",
            answer=Content(
                ("application/json",), "A JSON Schema of 2020-12.", {"type": "object", "required": ["$schema", "$defs"]}
            ),
        ),
        Operation(
            id="docs",
            path="/docs",
            endpoint=page("docs/index.html"),
            tag=_ABOUT,
            summary="Page to read the description and try requests",
            description="It works without internet access.",
            answer=PAGE,
        ),
    ]
    return described
