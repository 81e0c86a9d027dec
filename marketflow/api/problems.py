"""Everything that goes wrong, as RFC 9457 problem details with a `code` for programs.

What a client can cause is a `Problem`, raised where it is noticed. What only a bug can cause is answered without a word
about it, and raised again by Starlette for the application to log.
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
from starlette.types import ExceptionHandler

from marketflow.api.rendering import JSONAnswer
from marketflow.errors import MarketFlowError, QuotaExceeded, Unavailable

RETRY_AFTER_SECONDS = 1

PROBLEM_JSON = "application/problem+json"


class ProblemDetails(msgspec.Struct, frozen=True):
    """What went wrong, as RFC 9457 has it. Programs tell problems apart by `code`."""

    type: Annotated[
        Literal["about:blank"], Meta(description="Says that `title` is the name of the status, and nothing more.")
    ]
    title: Annotated[str, Meta(description="The name of the status.")]
    status: Annotated[int, Meta(ge=400, le=599, description="The status once more.")]
    detail: Annotated[str, Meta(description="What is wrong, for people; its wording may change.")]
    code: Annotated[str, Meta(description="What is wrong, for programs.")]


class Problem(MarketFlowError):
    """A request that cannot be answered as asked; the text is the `detail` the client reads.

    The first line of a subclass's docstring is what the description of the API says about it.
    """

    status: ClassVar[HTTPStatus]
    code: ClassVar[str]
    headers: ClassVar[Mapping[str, str]] = {}
    varying_headers: ClassVar[tuple[str, ...]] = ()
    """Names of those whose values depend on the request."""


class UnknownExchange(Problem):
    """No configured exchange has this name."""

    status = HTTPStatus.NOT_FOUND
    code = "unknown_exchange"


class UnknownSymbol(Problem):
    """No configured symbol has this name."""

    status = HTTPStatus.NOT_FOUND
    code = "unknown_symbol"


class NoData(Problem):
    """Exchange and symbol are known, but there is no tick to answer with."""

    status = HTTPStatus.NOT_FOUND
    code = "no_data"


class UnknownParameter(Problem):
    """The query has a parameter that this path does not take; `detail` says what was meant."""

    status = HTTPStatus.BAD_REQUEST
    code = "unknown_parameter"


class Unauthorized(Problem):
    """The bearer token is missing or wrong."""

    status = HTTPStatus.UNAUTHORIZED
    code = "unauthorized"
    headers: ClassVar[Mapping[str, str]] = {"WWW-Authenticate": "Bearer"}


class ServiceUnavailable(Problem):
    """It cannot be done at the moment, but may be soon."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "unavailable"
    headers: ClassVar[Mapping[str, str]] = {"Retry-After": str(RETRY_AFTER_SECONDS)}


class TooManyRequests(Problem):
    """This client has asked for too much of what is costly; `Retry-After` says when there is more."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "too_many_requests"
    varying_headers = ("Retry-After",)


class NotFound(Problem):
    """There is nothing at this path."""

    status = HTTPStatus.NOT_FOUND
    code = "not_found"


class MethodNotAllowed(Problem):
    """The path answers other methods than this one; `Allow` says which."""

    status = HTTPStatus.METHOD_NOT_ALLOWED
    code = "method_not_allowed"
    varying_headers = ("Allow",)


class InternalError(Problem):
    """An error of MarketFlow's own; its log has the cause."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    code = "internal_error"


def problem_handlers() -> dict[type[Exception], ExceptionHandler]:
    """Starlette's exception handlers by the class they handle."""
    return {
        HTTPException: _on_http_exception,
        Problem: _on_problem,
        Unavailable: _on_unavailable,
        QuotaExceeded: _on_too_much,
        Exception: _on_unexpected,
    }


def answer_to(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """The response that tells a client of a problem. `about:blank` says that `title` is the name of the status."""
    status = problem.status
    details = ProblemDetails("about:blank", status.phrase, int(status), str(problem), problem.code)
    return JSONAnswer(details, status, {**problem.headers, **(headers or {}), "content-type": PROBLEM_JSON})


def too_many_requests(seconds: float, detail: str = "This client has asked for too much at once.") -> Response:
    """429: try again after so many seconds."""
    return answer_to(TooManyRequests(detail), {"Retry-After": str(max(1, ceil(seconds)))})


# Handlers are async for speed alone: Starlette would run plain functions in a thread.
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


async def _on_http_exception(_: Request, error: Exception) -> Response:
    """The two that Starlette raises itself; whatever else would be a bug."""
    assert isinstance(error, HTTPException)
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        # Starlette joins a set, whose order changes from run to run.
        allowed = ", ".join(sorted((error.headers or {})["Allow"].split(", ")))
        return answer_to(MethodNotAllowed(f"This path answers {allowed}."), {"Allow": allowed})
    if error.status_code != HTTPStatus.NOT_FOUND:
        raise error
    return answer_to(NotFound("There is nothing at this path."))
