"""Errors of the API as RFC 9457 problem details, each with a `code` for programs.

What a client can cause is a `Problem`, raised where it is detected. A bug is a 500 without details; Starlette raises
its exception again, and the application logs it.
"""

from collections.abc import Mapping
from http import HTTPStatus
from math import ceil
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ExceptionHandler

from marketflow.api.rendering import JSONAnswer
from marketflow.errors import MarketFlowError, QuotaExceeded, Unavailable

RETRY_AFTER_SECONDS = 1

PROBLEM_JSON = "application/problem+json"


class ProblemDetails(msgspec.Struct, frozen=True):
    """Problem details of RFC 9457. Programs distinguish problems by `code`."""

    type: Annotated[
        Literal["about:blank"], Meta(description="Says that `title` is the name of the status, and nothing more.")
    ]
    title: Annotated[str, Meta(description="The name of the status.")]
    status: Annotated[int, Meta(ge=400, le=599, description="The status once more.")]
    detail: Annotated[str, Meta(description="What is wrong, for people; its wording may change.")]
    code: Annotated[str, Meta(description="What is wrong, for programs.")]


class Problem(MarketFlowError):
    """A request that cannot be answered; its text is the `detail` of the response.

    The first line of a subclass's docstring stands in the OpenAPI description.
    """

    status: ClassVar[HTTPStatus]
    code: ClassVar[str]
    headers: ClassVar[Mapping[str, str]] = {}
    varying_headers: ClassVar[tuple[str, ...]] = ()
    """Names of headers whose values depend on the request."""


class UnknownExchange(Problem):
    """No configured exchange has this name."""

    status = HTTPStatus.NOT_FOUND
    code = "unknown_exchange"


class UnknownSymbol(Problem):
    """No configured symbol has this name."""

    status = HTTPStatus.NOT_FOUND
    code = "unknown_symbol"


class NoData(Problem):
    """Exchange and symbol are known, but there is no tick in the period."""

    status = HTTPStatus.NOT_FOUND
    code = "no_data"


class UnknownParameter(Problem):
    """The query has a parameter that this path does not take; `detail` says what was meant."""

    status = HTTPStatus.BAD_REQUEST
    code = "unknown_parameter"


class InvalidSettings(Problem):
    """The settings that were read again are wrong, and nothing was changed; `detail` has key, value and what may be."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_settings"


class Unauthorized(Problem):
    """The bearer token is missing or wrong."""

    status = HTTPStatus.UNAUTHORIZED
    code = "unauthorized"
    headers: ClassVar[Mapping[str, str]] = {"WWW-Authenticate": "Bearer"}


class ServiceUnavailable(Problem):
    """Temporarily unavailable; try again after `Retry-After` seconds."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "unavailable"
    headers: ClassVar[Mapping[str, str]] = {"Retry-After": str(RETRY_AFTER_SECONDS)}


class TooManyRequests(Problem):
    """This client has used up its share of costly queries; `Retry-After` says when to try again."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "too_many_requests"
    varying_headers = ("Retry-After",)


class NotFound(Problem):
    """Nothing exists at this path."""

    status = HTTPStatus.NOT_FOUND
    code = "not_found"


class MethodNotAllowed(Problem):
    """The path does not take this method; `Allow` lists those that it takes."""

    status = HTTPStatus.METHOD_NOT_ALLOWED
    code = "method_not_allowed"
    varying_headers = ("Allow",)


CLOSE = {"Connection": "close"}
"""Of a response that is sent before the request has arrived completely."""


class InvalidHost(Problem):
    """The Host header names none of the names by which this server may be addressed."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_host"


class CrossSite(Problem):
    """A browser sent it for a page of another site."""

    status = HTTPStatus.FORBIDDEN
    code = "cross_site"


class BodyTooLarge(Problem):
    """The body is over 64 KiB."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "body_too_large"
    headers: ClassVar[Mapping[str, str]] = CLOSE


class RequestTimeout(Problem):
    """The headers or the body took more than ten seconds to arrive."""

    status = HTTPStatus.REQUEST_TIMEOUT
    code = "request_timeout"
    headers: ClassVar[Mapping[str, str]] = CLOSE


class MalformedRequest(Problem):
    """The request is not valid HTTP."""

    status = HTTPStatus.BAD_REQUEST
    code = "malformed_request"
    headers: ClassVar[Mapping[str, str]] = CLOSE


class HeadersTooLarge(Problem):
    """The headers are over 64 KiB."""

    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    code = "headers_too_large"
    headers: ClassVar[Mapping[str, str]] = CLOSE


class InternalError(Problem):
    """An internal error of MarketFlow; its log has the cause."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    code = "internal_error"


def problem_handlers() -> dict[type[Exception], ExceptionHandler]:
    """Return Starlette's exception handlers by exception class."""
    return {
        HTTPException: _on_http_exception,
        Problem: _on_problem,
        Unavailable: _on_unavailable,
        QuotaExceeded: _on_too_much,
        Exception: _on_unexpected,
    }


def answer_to(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """Return the response of a problem."""
    status = problem.status
    details = ProblemDetails("about:blank", status.phrase, int(status), str(problem), problem.code)
    return JSONAnswer(details, status, {**problem.headers, **(headers or {}), "content-type": PROBLEM_JSON})


def too_many_requests(seconds: float, detail: str = "This client has used up its limit.") -> Response:
    """Return a 429 with `Retry-After`, at least one second."""
    return answer_to(TooManyRequests(detail), {"Retry-After": str(max(1, ceil(seconds)))})


def request_timeout() -> Response:
    """Return a 408."""
    return answer_to(RequestTimeout("The request took too long to arrive."))


# Async, because Starlette runs plain functions in a thread.
async def _on_problem(_: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return answer_to(error)


async def _on_unavailable(_: Request, __: Exception) -> Response:
    return answer_to(ServiceUnavailable("The data cannot be read at the moment."))


async def _on_too_much(_: Request, error: Exception) -> Response:
    assert isinstance(error, QuotaExceeded)
    return too_many_requests(error.seconds)


async def _on_unexpected(_: Request, __: Exception) -> Response:
    return answer_to(InternalError("The request failed because of an error here."))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Answer 404 and 405, which Starlette raises itself; any other status is a bug."""
    assert isinstance(error, HTTPException)
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        # Starlette knows one route of the path, and joins a set, whose order changes from run to run.
        routes = [route for route in request.app.routes if isinstance(route, Route)]
        matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
        allowed = ", ".join(sorted({method for route in matching for method in route.methods or ()}))
        return answer_to(MethodNotAllowed(f"This path answers {allowed}."), {"Allow": allowed})
    if error.status_code != HTTPStatus.NOT_FOUND:
        raise error
    return answer_to(NotFound("There is nothing at this path."))
