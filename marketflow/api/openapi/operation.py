"""Declarations of operations. Each is the only source of a route and of its OpenAPI description."""

from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from marketflow.api.problems import Problem, UnknownParameter

Endpoint = Callable[[Request], Awaitable[Response]]

Schema = Mapping[str, Any]
"""A JSON Schema."""


class Tag(NamedTuple):
    """A group of operations."""

    name: str
    description: str


class Parameter(NamedTuple):
    """A parameter of a path or a query; `examples` are valid values. In a path it is always required."""

    name: str
    description: str
    schema: Schema
    examples: tuple[str | int, ...] = ()
    required: bool = False


class Content(NamedTuple):
    """A response that is not a struct, in the first media type, or in another one by `Accept`.

    `headers` names those beside the headers of every response.
    """

    media_types: tuple[str, ...]
    description: str
    schema: Schema
    headers: tuple[str, ...] = ()


class Operation(msgspec.Struct, frozen=True, kw_only=True, eq=False):  # compared by identity
    """A method at a path.

    Args:
        id: its name for programs.
        path: in the form of Starlette; names in braces are `PATH_PARAMETERS`.
        endpoint: handler of requests.
        answer: body of a success: a struct, or a list of one.
        method: its method.
        status: status of a success.
        body: type of the body of a request, which msgspec decodes from JSON; None without one.
        query: known query parameters; any other is rejected, except on pages.
        aliases: names of query parameters that older clients send; known, but not described as parameters.
        problems: possible problems, beside those of any request.
        asks_for_token: whether it needs the token, if one is configured.
        may_be_kept: whether clients may cache some responses and revalidate them by ETag.
    """

    id: str
    path: str
    endpoint: Endpoint
    tag: Tag
    summary: str
    description: str = ""
    answer: type[msgspec.Struct] | type[list[Any]] | Content
    method: str = "GET"
    status: int = 200
    body: Any = None
    query: tuple[Parameter, ...] = ()
    aliases: tuple[str, ...] = ()
    problems: tuple[type[Problem], ...] = ()
    asks_for_token: bool = False
    may_be_kept: bool = False

    def route(self) -> Route:
        """The route, which knows no more than what it needs to answer."""
        endpoint = self.endpoint if self.is_page else _with_known_parameters(self.endpoint, self.query, self.aliases)
        return Route(self.path, endpoint, methods=[self.method], name=self.id)

    @property
    def is_page(self) -> bool:
        """Whether it answers people: links to pages are given parameters of all kinds on their way."""
        return isinstance(self.answer, Content) and self.answer.media_types[0] == "text/html"


def _with_known_parameters(endpoint: Endpoint, query: tuple[Parameter, ...], aliases: tuple[str, ...]) -> Endpoint:
    """The endpoint, once the names of a query are known to be those of its parameters."""
    known = (*(parameter.name for parameter in query), *aliases)

    async def checked(request: Request) -> Response:
        if given := request.scope["query_string"]:
            refuse_unknown_parameters(given, known)
        return await endpoint(request)

    return checked


@lru_cache(maxsize=512)  # requests repeat a few; errors are not cached
def refuse_unknown_parameters(query: bytes, known: tuple[str, ...]) -> None:
    """Check that all parameters of a query are known.

    Raises:
        UnknownParameter: one is not; the text suggests another.
    """
    for name in QueryParams(query):
        if name not in known:
            raise UnknownParameter(_what_is_meant(name, known))


_OTHER_NAMES = {
    "from": ("starttime", "start", "since", "begin", "after", "from_ts", "from_time", "fromtime"),
    "to": ("endtime", "end", "until", "before", "to_ts", "to_time", "totime"),
    "limit": ("count", "size", "n", "max", "pagesize", "per_page", "countback", "outputsize"),
    "interval": ("resolution", "timeframe", "tf", "granularity", "bar", "step", "period"),
    "period": ("window", "range", "last", "duration", "interval", "timeframe"),
    "format": ("fmt", "output", "as", "type"),
    "symbols": ("symbol", "pair", "pairs", "instrument", "instruments", "ticker", "tickers", "market"),
    "exchanges": ("exchange", "venue", "venues", "source"),
    "intervals": ("interval", "resolution", "resolutions", "timeframe", "timeframes"),
}
"""Names of our parameters in other services."""


def _what_is_meant(name: str, known: tuple[str, ...]) -> str:
    import difflib  # no request without a mistake needs it

    shown = ascii(name[:40])[1:-1]
    if not known:
        return f"There is no parameter `{shown}`; this path takes none."
    lower = name.lower()
    meant = [each for each in known if lower == each or lower in _OTHER_NAMES.get(each, ())]
    meant = meant or difflib.get_close_matches(lower[:40], known, n=1)
    hint = f"; did you mean `{meant[0]}`?" if meant else "."
    return f"There is no parameter `{shown}`{hint} There are {', '.join(f'`{each}`' for each in known)}."


# Names are configured, so their schemas are made with the settings.
EXCHANGE_SCHEMA = {"$ref": "#/components/schemas/Exchange"}
SYMBOL_SCHEMA = {"$ref": "#/components/schemas/Symbol"}

Exchange = Annotated[str, Meta(extra_json_schema=EXCHANGE_SCHEMA)]
Symbol = Annotated[str, Meta(extra_json_schema=SYMBOL_SCHEMA)]

PATH_PARAMETERS = {
    each.name: each
    for each in (
        Parameter("exchange", "Name of a configured exchange. Upper and lower case are the same.", EXCHANGE_SCHEMA),
        Parameter("symbol", "A configured symbol. Upper and lower case are the same.", SYMBOL_SCHEMA),
        Parameter("rule", "Id of an alert rule.", {"type": "string"}),
    )
}
