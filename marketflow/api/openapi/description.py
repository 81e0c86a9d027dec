"""Builds the OpenAPI 3.1 description from the operations.

Schemas are those of the structs, problems those of the exception classes. Problems of any request stand in components
that each operation references.
"""

from collections.abc import Iterable, Sequence
from typing import Any, get_args

import msgspec

from marketflow import __version__
from marketflow.api.openapi.operation import PATH_PARAMETERS, Content, Operation, Parameter
from marketflow.api.problems import (
    PROBLEM_JSON,
    BodyTooLarge,
    CrossSite,
    HeadersTooLarge,
    InternalError,
    InvalidHost,
    MalformedRequest,
    MethodNotAllowed,
    NotFound,
    Problem,
    ProblemDetails,
    RequestTimeout,
    Unauthorized,
    UnknownParameter,
)
from marketflow.api.rendering import ALWAYS

_INFO = """\
- Times are RFC 3339, UTC, milliseconds. Names are matched without regard to case and answered as they are
configured.
- Every `GET` also takes `HEAD`. Only requests that make or
  replace an alert rule have a body.
- A query parameter that is not listed is a 400 `unknown_parameter`, except on pages. Of a repeated one the last counts,
  of `symbols` and `exchanges` all.
- A path is matched exactly after percent-decoding; a trailing slash makes another path.
- Errors are RFC 9457 problem details with a `code` for programs. An unknown path is a 404 `not_found`.
"""

_ANY_REQUEST: tuple[type[Problem], ...] = (
    MalformedRequest,
    InvalidHost,
    MethodNotAllowed,
    RequestTimeout,
    BodyTooLarge,
    HeadersTooLarge,
    InternalError,
)
"""Problems of any request."""

_HEADERS: dict[str, dict[str, Any]] = {
    "Cache-Control": {
        "description": "No cache may store the response.",
        "schema": {"type": "string", "const": "no-store"},
    },
    "Cache-Control-Kept": {
        "description": "How long the response may be cached, if at all.",
        "schema": {"type": "string", "pattern": "^(no-store|max-age=[0-9]+)$", "examples": ["max-age=60"]},
    },
    "ETag": {
        "description": "Version of the response, for `If-None-Match`.",
        "schema": {
            "type": "string",
            "pattern": '^W/"[0-9a-f]{32}"$',
            "examples": ['W/"0123456789abcdef0123456789abcdef"'],
        },
    },
    "X-Content-Type-Options": {
        "description": "Browsers must not guess another media type.",
        "schema": {"type": "string", "const": "nosniff"},
    },
    "Content-Security-Policy": {
        "description": "The page loads from this server only.",
        "schema": {"type": "string"},
    },
    "Referrer-Policy": {
        "description": "No other server learns the address of the page.",
        "schema": {"type": "string", "const": "no-referrer"},
    },
    "X-Accel-Buffering": {
        "description": "Proxies must not buffer the response.",
        "schema": {"type": "string", "const": "no"},
    },
    "Retry-After": {
        "description": "Seconds after which to try again.",
        "schema": {"type": "integer", "minimum": 1, "examples": [1]},
    },
    "WWW-Authenticate": {"description": "The authentication scheme.", "schema": {"type": "string", "const": "Bearer"}},
    "Allow": {
        "description": "Methods of the path.",
        "schema": {"type": "string", "pattern": "^[A-Z]+(, [A-Z]+)*$", "examples": ["GET, HEAD"]},
    },
    "Connection": {
        "description": "The connection is closed, because the request has not arrived completely.",
        "schema": {"type": "string", "const": "close"},
    },
}

_IF_NONE_MATCH = Parameter(
    "If-None-Match",
    "`ETag` of the cached response; if it is still current, the status is 304.",
    {"type": "string"},
)

MESSAGE_SCHEMA = "ws/schema.json"
"""Path of the schema of /ws, relative to that of this description."""

_STRUCT = "#/components/schemas/{name}"

_TOKEN = "bearerToken"  # noqa: S105 - the name of the scheme


def describe(
    operations: Sequence[Operation], exchanges: Sequence[str], symbols: Sequence[str], asks_for_token: bool
) -> dict[str, Any]:
    """Return the document for these operations, configured names, and a token if one is needed."""
    problems = {operation: _problems_of(operation) for operation in operations}
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        item = paths.setdefault(operation.path, {})
        item[operation.method.lower()] = _operation(operation, problems[operation], asks_for_token)
    return {
        "openapi": "3.1.1",
        "info": {
            "title": "MarketFlow",
            "version": __version__,
            "summary": "Prices of several exchanges: the newest, and the highest, lowest and average over a period.",
            "description": _INFO,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "externalDocs": {"url": MESSAGE_SCHEMA, "description": "JSON Schema of the messages of the WebSocket at /ws."},
        "servers": [{"url": "/", "description": "The server of this description."}],
        "tags": [tag._asdict() for tag in dict.fromkeys(operation.tag for operation in operations)],
        "paths": paths,
        "components": {
            "schemas": _schemas(operations, {NotFound, *(one for each in problems.values() for one in each)})
            | names_schema("Exchange", exchanges)
            | names_schema("Symbol", symbols),
            "responses": _refusals([(NotFound,), *(group for each in problems.values() for group in _by_status(each))]),
            "headers": {name: header | {"required": True} for name, header in _HEADERS.items()},
            "securitySchemes": {
                _TOKEN: {"type": "http", "scheme": "bearer", "description": "The setting `http.token`."}
            },
        },
    }


def _operation(operation: Operation, problems: Sequence[type[Problem]], asks_for_token: bool) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.id,
        "tags": [operation.tag.name],
        "summary": operation.summary,
        "parameters": [
            *(_parameter(PATH_PARAMETERS[name], "path") for name in operation.route().param_convertors),
            *(_parameter(each, "query") for each in operation.query),
            *([_parameter(_IF_NONE_MATCH, "header")] if operation.may_be_kept else []),
        ],
        "responses": _answers(operation)
        | {str(int(group[0].status)): _reference(group) for group in _by_status(problems)},
    }
    if operation.description:
        described["description"] = operation.description
    if operation.body is not None:
        (schema,), _ = msgspec.json.schema_components([operation.body], ref_template=_STRUCT)
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    # Without a configured token, requests with and without one are accepted.
    with_token: list[dict[str, list[str]]] = [{_TOKEN: []}] if asks_for_token else [{}, {_TOKEN: []}]
    described["security"] = with_token if operation.asks_for_token else []
    return described


def _parameter(parameter: Parameter, place: str) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": parameter.name,
        "in": place,
        "required": parameter.required or place == "path",
        "description": parameter.description,
        "schema": parameter.schema,
    }
    if parameter.examples:
        described["examples"] = {str(example): {"value": example} for example in parameter.examples}
    return described


# Responses


def _answers(operation: Operation) -> dict[str, Any]:
    """Return the responses by status, without problems."""
    if not operation.may_be_kept:
        return {str(int(operation.status)): _answer(operation.answer)}
    found = _answer(operation.answer)
    same = {name: header for name, header in found["headers"].items() if name != "Cache-Control"}
    kept = same | {"Cache-Control": {"$ref": "#/components/headers/Cache-Control-Kept"}}
    found["headers"] = kept | {"ETag": _HEADERS["ETag"] | {"required": False}}
    not_modified = {
        "description": "The cached response is still current.",
        "headers": kept | {"ETag": {"$ref": "#/components/headers/ETag"}},
    }
    return {"200": found, "304": not_modified}


def _answer(answer: type[msgspec.Struct] | type[list[Any]] | Content) -> dict[str, Any]:
    if isinstance(answer, Content):
        return _response(answer.description, answer.media_types, {"schema": answer.schema}, answer.headers)
    (schema,), _ = msgspec.json.schema_components([answer], ref_template=_STRUCT)
    return _response(_summary_of(answer), ("application/json",), {"schema": schema})


def _summary_of(answer: type[msgspec.Struct] | type[list[Any]]) -> str:
    """Return the docstring of a struct, or of that of a list."""
    return (get_args(answer) or (answer,))[0].__doc__ or ""


def _response(
    description: str, media_types: Iterable[str], content: dict[str, Any], headers: Iterable[str] = ()
) -> dict[str, Any]:
    names = [*(name.title() for name in ALWAYS), *headers]
    return {
        "description": description,
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names},
        "content": dict.fromkeys(media_types, content),
    }


def _schemas(operations: Sequence[Operation], problems: Iterable[type[Problem]]) -> dict[str, Any]:
    structs = [each.answer for each in operations if not isinstance(each.answer, Content)]
    structs += [each.body for each in operations if each.body is not None]
    _, schemas = msgspec.json.schema_components([*structs, ProblemDetails], ref_template=_STRUCT)
    schemas["ProblemDetails"]["properties"]["code"]["enum"] = sorted(problem.code for problem in problems)
    return schemas


def names_schema(name: str, configured: Sequence[str]) -> dict[str, Any]:
    """Return the schema of a configured name, by the name of the schema."""
    description = f"Name of a configured {name.lower()}; `/market` lists them."
    return {name: {"title": name, "description": description, "type": "string", "examples": [*configured]}}


# Problems


def _problems_of(operation: Operation) -> list[type[Problem]]:
    found = [*operation.problems, *_ANY_REQUEST]
    if operation.asks_for_token:
        found.append(Unauthorized)
    if not operation.is_page:
        found.append(UnknownParameter)
    if operation.method != "GET":
        found.append(CrossSite)
    return found


def _by_status(problems: Iterable[type[Problem]]) -> list[tuple[type[Problem], ...]]:
    """Group problems by status, in the given order."""
    ordered = sorted(problems, key=lambda problem: problem.status)
    statuses = dict.fromkeys(problem.status for problem in ordered)
    return [tuple(problem for problem in ordered if problem.status == status) for status in statuses]


def _name_of(group: Sequence[type[Problem]]) -> str:
    return ".".join(problem.code for problem in group)


def _reference(group: Sequence[type[Problem]]) -> dict[str, str]:
    return {"$ref": f"#/components/responses/{_name_of(group)}"}


def _refusals(groups: Iterable[Sequence[type[Problem]]]) -> dict[str, Any]:
    found = {_name_of(group): group for group in groups}
    return {name: _refusal(found[name]) for name in sorted(found)}


def _refusal(group: Sequence[type[Problem]]) -> dict[str, Any]:
    """Return the response of one status with the codes it may have."""
    status = group[0].status
    meanings = {problem.code: (problem.__doc__ or "").partition("\n")[0] for problem in group}
    schema = {
        "allOf": [{"$ref": "#/components/schemas/ProblemDetails"}],
        "properties": {
            "title": {"const": status.phrase},
            "status": {"const": int(status)},
            "code": {"enum": [*meanings]},
        },
    }
    examples = {
        code: {"value": ProblemDetails("about:blank", status.phrase, int(status), meaning, code)}
        for code, meaning in meanings.items()
    }
    content = {"schema": schema, "examples": examples}
    described = _response(
        "\n".join(f"- `{code}`: {meaning}" for code, meaning in meanings.items()), (PROBLEM_JSON,), content
    )
    described["headers"] |= _headers_of(group)
    return described


def _headers_of(group: Sequence[type[Problem]]) -> dict[str, Any]:
    """Return the headers of these problems; one that not all have is optional."""
    names = [{*problem.headers, *problem.varying_headers} for problem in group]
    always = set.intersection(*names)
    return {
        name: {"$ref": f"#/components/headers/{name}"} if name in always else _HEADERS[name] | {"required": False}
        for name in sorted(set.union(*names))
    }
