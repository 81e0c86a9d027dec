"""/prices: the reference, latest, highest, lowest and average price of a symbol."""

from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta
from msgspec.structs import replace
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response

from marketflow.api.context import context_of
from marketflow.api.openapi.operation import Endpoint, Exchange, Operation, Parameter, Symbol, Tag
from marketflow.api.problems import NoData, Problem, ServiceUnavailable, TooManyRequests, UnknownExchange, UnknownSymbol
from marketflow.api.queries.path_parameters import PathParameters, path_parameters_of
from marketflow.api.queries.period import PATTERN, PERIOD, InvalidPeriod, parse_period
from marketflow.api.queries.prices import ObservedPrice, PeriodSummary
from marketflow.api.rendering import JSONAnswer, Time, rfc3339
from marketflow.api.routes.latest_price import LatestPrice, Price
from marketflow.reference_price import FRESH_MS
from marketflow.stores.cache_limits import RECENT_MS

ALL = "all"
"""Value of `period` in an answer about everything on record."""


Period = Annotated[
    str,
    Meta(
        pattern=f"^({ALL}|{PATTERN})$",
        description=f"The requested period as it was given; `{ALL}` without one.",
        examples=["1m30s"],
    ),
]
Since = Annotated[
    Time,
    Meta(
        description="Beginning of the period that was covered: the start of a minute if it lies over six minutes back.",
        examples=["2026-11-21T05:11:27.121Z"],
    ),
]
Until = Annotated[
    Time,
    Meta(description="End of the period: now, or of what could be read.", examples=["2026-11-21T05:12:57.121Z"]),
]


class ExtremePrice(msgspec.Struct, frozen=True, rename={"since": "from", "until": "to"}):
    """The highest or lowest price of the period, with the exchange and the time of its first occurrence."""

    symbol: Symbol
    exchange: Annotated[Exchange, Meta(description="The exchange of the price.")]
    price: Price
    timestamp: Annotated[Time, Meta(description="Event time of its first occurrence, by the clock of the exchange.")]
    period: Period
    since: Since
    until: Until


class AveragePrice(msgspec.Struct, frozen=True, rename={"since": "from", "until": "to"}):
    """The mean of all ticks in the period, and their number."""

    symbol: Symbol
    exchange: Annotated[Exchange | None, Meta(description="Null over all exchanges.")]
    price: Price
    ticks: Annotated[int, Meta(ge=1, description="Number of ticks.", examples=[5580])]
    period: Period
    since: Since
    until: Until


class ReferencePriceAnswer(msgspec.Struct, frozen=True):
    """The median of the newest prices of the exchanges, as far as they are fresh."""

    symbol: Symbol
    price: Price
    exchanges: Annotated[int, Meta(ge=1, description="Number of exchanges whose price counts.", examples=[3])]
    timestamp: Annotated[Time, Meta(description="Event time of the newest of these prices.")]


SummaryResponse = Callable[[PathParameters, str, PeriodSummary], Response]
"""Makes a response of path parameters, the period as it was requested, and its summary."""


class _PriceOperation(NamedTuple):
    """A price operation, for both forms of its path."""

    name: str
    endpoint: Endpoint
    answer: type[msgspec.Struct]
    query: tuple[Parameter, ...]
    problems: tuple[type[Problem], ...]


_PRICES = Tag("prices", "Prices of one exchange, or of all of them, in the mode that runs.")


def price_operations() -> list[Operation]:
    """Return the price operations: the reference price, and each other over all exchanges and on one."""
    of_a_period: tuple[Any, ...] = (
        (PERIOD,),
        (InvalidPeriod, UnknownSymbol, NoData, ServiceUnavailable, TooManyRequests),
    )
    operations = (
        _PriceOperation("latest", _latest, LatestPrice, (), (UnknownSymbol, NoData, ServiceUnavailable)),
        _PriceOperation("highest", _summarizing(highest_response), ExtremePrice, *of_a_period),
        _PriceOperation("lowest", _summarizing(lowest_response), ExtremePrice, *of_a_period),
        _PriceOperation("average", _summarizing(average_response), AveragePrice, *of_a_period),
    )
    return [_REFERENCE, *(form(operation) for operation in operations for form in (_over_all, _on_one))]


async def _reference(request: Request) -> Response:
    context = context_of(request)
    parameters = path_parameters_of(request, context)
    price, exchanges, at = await context.prices.reference(parameters.series)
    return JSONAnswer(ReferencePriceAnswer(parameters.symbol, price, exchanges, rfc3339(at)))


_REFERENCE = Operation(
    id="referencePrice",
    path="/prices/reference/{symbol}",
    endpoint=_reference,
    tag=_PRICES,
    summary="The reference price: the median over all exchanges",
    description=(
        f"Of the newest price of each exchange, if it is at most {FRESH_MS // 1000} s old; of an even number, the mean "
        "of the two in the middle. It moves when the market does; the latest price jumps from exchange to exchange."
    ),
    answer=ReferencePriceAnswer,
    problems=(UnknownSymbol, NoData, ServiceUnavailable),
)


def _over_all(operation: _PriceOperation) -> Operation:
    return Operation(
        id=f"{operation.name}Price",
        path=f"/prices/{operation.name}/{{symbol}}",
        endpoint=operation.endpoint,
        tag=_PRICES,
        summary=f"The {operation.name} price over all exchanges",
        answer=operation.answer,
        query=operation.query,
        problems=operation.problems,
    )


def _on_one(operation: _PriceOperation) -> Operation:
    return replace(
        _over_all(operation),
        id=f"{operation.name}PriceOnExchange",
        path=f"/prices/{operation.name}/{{exchange}}/{{symbol}}",
        summary=f"The {operation.name} price on one exchange",
        problems=(UnknownExchange, *operation.problems),
    )


async def _latest(request: Request) -> Response:
    context = context_of(request)
    parameters = path_parameters_of(request, context)
    return latest_response(parameters, await context.prices.latest(parameters.series))


def _summarizing(respond: SummaryResponse) -> Endpoint:
    async def summarize(request: Request) -> Response:
        return respond(*await _summarize(request))

    return summarize


def latest_response(parameters: PathParameters, quote: ObservedPrice) -> Response:
    """Return the response with the newest tick."""
    return JSONAnswer(LatestPrice(parameters.symbol, quote.series.exchange, quote.price, rfc3339(quote.at)))


def highest_response(parameters: PathParameters, period: str, summary: PeriodSummary) -> Response:
    """Return the response with the highest price of a period, which is given as it was requested."""
    return _extreme(parameters, period, summary, summary.highest())


def lowest_response(parameters: PathParameters, period: str, summary: PeriodSummary) -> Response:
    """Return the response with the lowest price of a period."""
    return _extreme(parameters, period, summary, summary.lowest())


def average_response(parameters: PathParameters, period: str, summary: PeriodSummary) -> Response:
    """Return the response with the mean of all ticks of a period.

    Raises:
        NoData: the venue's candles have no mean.
    """
    whole = summary.whole()
    since, until = rfc3339(summary.since), rfc3339(summary.until)
    symbol, exchange = parameters.symbol, parameters.exchange
    if whole.average is None:
        raise NoData("The venue's own candles, which stand for this period, have no average of all trades.")
    return JSONAnswer(AveragePrice(symbol, exchange, whole.average, whole.ticks, period, since, until))


def _extreme(parameters: PathParameters, period: str, summary: PeriodSummary, quote: ObservedPrice) -> Response:
    since, until = rfc3339(summary.since), rfc3339(summary.until)
    exchange, at = quote.series.exchange, rfc3339(quote.at)
    return JSONAnswer(ExtremePrice(parameters.symbol, exchange, quote.price, at, period, since, until))


async def _summarize(request: Request) -> tuple[PathParameters, str, PeriodSummary]:
    """Return path parameters, the period as it was given, and its summary."""
    context = context_of(request)
    parameters = path_parameters_of(request, context)
    text, period = period_in(request.scope["query_string"])
    if period is None or period > RECENT_MS:
        context.clients.attribute_to(request.scope)
    return parameters, text, await context.prices.summary(parameters.series, period)


@lru_cache(maxsize=256)  # requests repeat a few periods
def period_in(query: bytes) -> tuple[str, int | None]:
    """Return the period of a query as it was given, and in ms; None for everything.

    Raises:
        InvalidPeriod: it is none.
    """
    # The last of several counts.
    text = QueryParams(query).get("period")
    return (ALL, None) if text is None else (text, parse_period(text))
