"""/prices: the latest, highest, lowest and average price of a symbol, on one exchange or over all of them."""

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import msgspec
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from marketflow.api.answers import Quote, Summary
from marketflow.api.context import Context, context_of
from marketflow.api.period import parse_period
from marketflow.api.problems import UnknownExchange, UnknownSymbol
from marketflow.api.rendering import JSONAnswer, rfc3339
from marketflow.model import Mode, Series

ALL = "all"
"""What `period` says where none was asked for: everything on record."""


class LatestPrice(msgspec.Struct, frozen=True):
    """The answer of /prices/latest. Times are RFC 3339, here and below."""

    symbol: str
    exchange: str
    price: float
    timestamp: str


class ExtremePrice(msgspec.Struct, frozen=True, rename={"since": "from", "until": "to"}):
    """The answer of /prices/highest and /prices/lowest."""

    symbol: str
    exchange: str
    price: float
    timestamp: str
    period: str
    since: str
    until: str


class AveragePrice(msgspec.Struct, frozen=True, rename={"since": "from", "until": "to"}):
    """The answer of /prices/average; `exchange` is null over all of them."""

    symbol: str
    exchange: str | None
    price: float
    ticks: int
    period: str
    since: str
    until: str


class _Subject(NamedTuple):
    """What a request is about, in canonical spelling; `exchange` is None for all. The mode is part of each series."""

    exchange: str | None
    symbol: str
    series: tuple[Series, ...]


def price_routes() -> list[Route]:
    """Each question in both forms."""
    questions = {"latest": _latest, "highest": _highest, "lowest": _lowest, "average": _average}
    return [
        Route(f"/prices/{question}/{form}", endpoint)
        for question, endpoint in questions.items()
        for form in ("{symbol}", "{exchange}/{symbol}")
    ]


async def _latest(request: Request) -> Response:
    context = context_of(request)
    subject = _asked_about(request, context)
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


def _extreme(subject: _Subject, period: str, summary: Summary, quote: Quote) -> Response:
    since, until = rfc3339(summary.since), rfc3339(summary.until)
    exchange, at = quote.series.exchange, rfc3339(quote.at)
    return JSONAnswer(ExtremePrice(subject.symbol, exchange, quote.price, at, period, since, until))


async def _summarised(request: Request) -> tuple[_Subject, str, Summary]:
    """What is asked about, the period as it was given, and the summary."""
    context = context_of(request)
    subject = _asked_about(request, context)
    text, period = _period_in(request.scope["query_string"])
    return subject, text, await context.prices.summary(subject.series, period)


@lru_cache(maxsize=256)  # the same few periods with every request
def _period_in(query: bytes) -> tuple[str, int | None]:
    """The period of a query as it was given, and in ms, None for everything."""
    # The last one counts where `period` is repeated.
    text = QueryParams(query).get("period")
    return (ALL, None) if text is None else (text, parse_period(text))


def _asked_about(request: Request, context: Context) -> _Subject:
    asked = request.path_params
    return _subject(context, context.mode.current, asked.get("exchange"), asked["symbol"])


@lru_cache(maxsize=4096)  # the same few with every request
def _subject(context: Context, mode: Mode, exchange_asked: str | None, symbol_asked: str) -> _Subject:
    exchange, exchanges = None, context.exchanges
    if exchange_asked is not None:
        exchange = _canonical(exchange_asked, context.exchange_named)
        if exchange is None:
            raise UnknownExchange(f"No such exchange; there are {', '.join(context.exchanges)}.")
        exchanges = (exchange,)
    symbol = _canonical(symbol_asked, context.symbol_named)
    if symbol is None:
        raise UnknownSymbol(f"No such symbol; there are {', '.join(context.symbols)}.")
    return _Subject(exchange, symbol, tuple(Series(mode, one, symbol) for one in exchanges))


def _canonical(asked: str, names: Mapping[str, str]) -> str | None:
    """The configured spelling of a name, None for one that is not configured."""
    # Some letters beyond ASCII have one of ASCII for a lower case.
    return names.get(asked.lower()) if asked.isascii() else None
