"""/prices: the latest, highest, lowest and average price of a symbol, on one exchange or over all of them."""

from dataclasses import replace
from functools import lru_cache
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta
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
from marketflow.stores.cache_limits import RECENT_MS

ALL = "all"
"""What `period` says where none was asked for: everything on record."""


Period = Annotated[
    str,
    Meta(
        pattern=f"^({ALL}|{PATTERN})$",
        description=f"The period that was asked for, as it was given; `{ALL}` where none was.",
        examples=["1m30s"],
    ),
]
Since = Annotated[
    Time,
    Meta(
        description="Where the period begins that was really covered: over six minutes back, the start of a minute.",
        examples=["2026-11-21T05:11:27.121Z"],
    ),
]
Until = Annotated[
    Time,
    Meta(description="Where it ends: now, or the end of what could be read.", examples=["2026-11-21T05:12:57.121Z"]),
]


class ExtremePrice(msgspec.Struct, frozen=True, rename={"since": "from", "until": "to"}):
    """The highest or lowest price of the period, which exchange had it first and when."""

    symbol: Symbol
    exchange: Annotated[Exchange, Meta(description="Where the price was paid.")]
    price: Price
    timestamp: Annotated[Time, Meta(description="When it was first paid, by the clock of the exchange.")]
    period: Period
    since: Since
    until: Until


class AveragePrice(msgspec.Struct, frozen=True, rename={"since": "from", "until": "to"}):
    """The mean of all ticks in the period, and how many they were."""

    symbol: Symbol
    exchange: Annotated[Exchange | None, Meta(description="Null over all exchanges.")]
    price: Price
    ticks: Annotated[int, Meta(ge=1, description="How many ticks it is the mean of.", examples=[5580])]
    period: Period
    since: Since
    until: Until


class _PriceOperation(NamedTuple):
    """What is asked about a series, in both forms of a path."""

    name: str
    endpoint: Endpoint
    answer: type[msgspec.Struct]
    query: tuple[Parameter, ...]
    problems: tuple[type[Problem], ...]


_PRICES = Tag("prices", "Prices of one exchange, or of all of them, in the mode that runs.")


def price_operations() -> list[Operation]:
    """Each question in both forms."""
    of_a_period: tuple[Any, ...] = (
        (PERIOD,),
        (InvalidPeriod, UnknownSymbol, NoData, ServiceUnavailable, TooManyRequests),
    )
    questions = (
        _PriceOperation("latest", _latest, LatestPrice, (), (UnknownSymbol, NoData, ServiceUnavailable)),
        _PriceOperation("highest", _highest, ExtremePrice, *of_a_period),
        _PriceOperation("lowest", _lowest, ExtremePrice, *of_a_period),
        _PriceOperation("average", _average, AveragePrice, *of_a_period),
    )
    return [asked(question) for question in questions for asked in (_over_all, _on_one)]


def _over_all(question: _PriceOperation) -> Operation:
    return Operation(
        id=f"{question.name}Price",
        path=f"/prices/{question.name}/{{symbol}}",
        endpoint=question.endpoint,
        tag=_PRICES,
        summary=f"The {question.name} price over all exchanges",
        answer=question.answer,
        query=question.query,
        problems=question.problems,
    )


def _on_one(question: _PriceOperation) -> Operation:
    return replace(
        _over_all(question),
        id=f"{question.name}PriceOnExchange",
        path=f"/prices/{question.name}/{{exchange}}/{{symbol}}",
        summary=f"The {question.name} price on one exchange",
        problems=(UnknownExchange, *question.problems),
    )


async def _latest(request: Request) -> Response:
    context = context_of(request)
    subject = path_parameters_of(request, context)
    quote = await context.prices.latest(subject.series)
    return JSONAnswer(LatestPrice(subject.symbol, quote.series.exchange, quote.price, rfc3339(quote.at)))


async def _highest(request: Request) -> Response:
    subject, period, summary = await _summarised(request)
    return _extreme(subject, period, summary, summary.highest())


async def _lowest(request: Request) -> Response:
    subject, period, summary = await _summarised(request)
    return _extreme(subject, period, summary, summary.lowest())


async def _average(request: Request) -> Response:
    subject, period, summary = await _summarised(request)
    whole = summary.whole()
    since, until = rfc3339(summary.since), rfc3339(summary.until)
    return JSONAnswer(AveragePrice(subject.symbol, subject.exchange, whole.average, whole.ticks, period, since, until))


def _extreme(subject: PathParameters, period: str, summary: PeriodSummary, quote: ObservedPrice) -> Response:
    since, until = rfc3339(summary.since), rfc3339(summary.until)
    exchange, at = quote.series.exchange, rfc3339(quote.at)
    return JSONAnswer(ExtremePrice(subject.symbol, exchange, quote.price, at, period, since, until))


async def _summarised(request: Request) -> tuple[PathParameters, str, PeriodSummary]:
    """What is asked about, the period as it was given, and the summary."""
    context = context_of(request)
    subject = path_parameters_of(request, context)
    text, period = _period_in(request.scope["query_string"])
    if period is None or period > RECENT_MS:
        context.clients.asks(request.scope)
    return subject, text, await context.prices.summary(subject.series, period)


@lru_cache(maxsize=256)  # the same few periods with every request
def _period_in(query: bytes) -> tuple[str, int | None]:
    """The period of a query as it was given, and in ms, None for everything."""
    # The last one counts where `period` is repeated.
    text = QueryParams(query).get("period")
    return (ALL, None) if text is None else (text, parse_period(text))
