"""One declaration for each thing the API does, of which its route and its description are both made.

Neither can say what the other does not know: a path, a method, the shape of an answer or a problem stands here once.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from marketflow.api.problems import Problem

Endpoint = Callable[[Request], Awaitable[Response]]

Schema = Mapping[str, Any]
"""A JSON Schema."""


class Tag(NamedTuple):
    """A group of operations."""

    name: str
    description: str


class Parameter(NamedTuple):
    """A parameter of a path or a query; `examples` are valid values."""

    name: str
    description: str
    schema: Schema
    examples: tuple[str | int, ...] = ()


class Content(NamedTuple):
    """An answer that is no struct, in the first media type or in another one for a client that asks for it.

    `headers` names those that it has beside the ones of every answer.
    """

    media_types: tuple[str, ...]
    description: str
    schema: Schema
    headers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)  # each is one of its kind
class Operation:
    """A method at a path.

    Args:
        id: its name for programs.
        path: as Starlette has it; what stands in braces is one of `PATH_PARAMETERS`.
        endpoint: answers the requests.
        answer: what the answer with status 200 is made of: a struct, or a type that msgspec knows made of structs.
        query: the parameters that count; any other is ignored.
        problems: what may be answered instead, beside what may happen to any request.
        asks_for_token: whether it is for those who have the token, if one is configured.
        may_be_kept: whether some of its answers may be kept by the client, and asked for again by their ETag.
    """

    id: str
    path: str
    endpoint: Endpoint
    tag: Tag
    summary: str
    description: str = ""
    answer: type[msgspec.Struct] | UnionType | Content
    method: str = "GET"
    query: tuple[Parameter, ...] = ()
    problems: tuple[type[Problem], ...] = ()
    asks_for_token: bool = False
    may_be_kept: bool = False

    def route(self) -> Route:
        """The route, which knows no more than what it needs to answer."""
        return Route(self.path, self.endpoint, methods=[self.method], name=self.id)


# Names are configured, so that their schemas are only known to who knows the settings.
_EXCHANGE = {"$ref": "#/components/schemas/Exchange"}
_SYMBOL = {"$ref": "#/components/schemas/Symbol"}

Exchange = Annotated[str, Meta(extra_json_schema=_EXCHANGE)]
Symbol = Annotated[str, Meta(extra_json_schema=_SYMBOL)]

PATH_PARAMETERS = {
    each.name: each
    for each in (
        Parameter("exchange", "Name of a configured exchange. Upper and lower case are the same.", _EXCHANGE),
        Parameter("symbol", "A configured symbol. Upper and lower case are the same.", _SYMBOL),
    )
}
