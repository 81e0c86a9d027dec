"""Everything that goes wrong, as RFC 9457 problem details with a `code` for programs.

What a client can cause is a `Problem`, raised where it is noticed. What only a bug can cause is answered without a word
about it, and raised again by Starlette for the application to log.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import ClassVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ExceptionHandler

from marketflow.api.rendering import JSONAnswer
from marketflow.errors import MarketFlowError, Unavailable

RETRY_AFTER_SECONDS = 1


class Problem(MarketFlowError):
    """A request that cannot be answered as asked; the text is the `detail` the client reads."""

    status: ClassVar[HTTPStatus]
    code: ClassVar[str]
    headers: ClassVar[Mapping[str, str]] = {}


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


class Unauthorized(Problem):
    """The bearer token is missing or wrong."""

    status = HTTPStatus.UNAUTHORIZED
    code = "unauthorized"
    headers: ClassVar[Mapping[str, str]] = {"WWW-Authenticate": "Bearer"}


def problem_handlers() -> dict[type[Exception], ExceptionHandler]:
    """Starlette's exception handlers by the class they handle."""
    return {
        HTTPException: _on_http_exception,
        Problem: _on_problem,
        Unavailable: _on_unavailable,
        Exception: _on_unexpected,
    }


def problem(status: int, code: str, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """A response with problem details. `about:blank` says that `title` is the name of the status."""
    body = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": int(status),
        "detail": detail,
        "code": code,
    }
    return JSONAnswer(body, status, {**(headers or {}), "content-type": "application/problem+json"})


def unavailable(detail: str = "The data cannot be read at the moment.") -> Response:
    """503: try again soon."""
    retry_after = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return problem(HTTPStatus.SERVICE_UNAVAILABLE, "unavailable", detail, retry_after)


# Handlers are async for speed alone: Starlette would run plain functions in a thread.
async def _on_problem(_: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return problem(error.status, error.code, str(error), error.headers)


async def _on_unavailable(_: Request, __: Exception) -> Response:
    return unavailable()


async def _on_unexpected(_: Request, __: Exception) -> Response:
    return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", "The request failed because of an error here.")


async def _on_http_exception(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    match error.status_code:
        case HTTPStatus.NOT_FOUND:
            detail = "There is nothing at this path."
        case HTTPStatus.METHOD_NOT_ALLOWED:
            # Starlette joins a set, whose order changes from run to run.
            headers["Allow"] = ", ".join(sorted(headers["Allow"].split(", ")))
            detail = f"This path answers {headers['Allow']}."
        case _:
            detail = error.detail
    return problem(error.status_code, HTTPStatus(error.status_code).name.lower(), detail, headers)
