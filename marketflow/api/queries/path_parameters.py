"""What a path is about: a symbol on one exchange or on all of them, in the mode that runs."""

from functools import lru_cache
from typing import NamedTuple

from starlette.requests import Request

from marketflow.api.context import Context
from marketflow.model import Mode, Series


class PathParameters(NamedTuple):
    """What a request is about, in canonical spelling; `exchange` is None for all. The mode is part of each series."""

    exchange: str | None
    symbol: str
    series: tuple[Series, ...]


def path_parameters_of(request: Request, context: Context) -> PathParameters:
    """What the path of a request names.

    Raises:
        UnknownExchange, UnknownSymbol: it is not configured.
    """
    asked = request.path_params
    return _subject(context, context.mode.current, asked.get("exchange"), asked["symbol"])


@lru_cache(maxsize=4096)  # the same few with every request
def _subject(context: Context, mode: Mode, exchange_asked: str | None, symbol_asked: str) -> PathParameters:
    exchange = None if exchange_asked is None else context.names.exchange(exchange_asked)
    symbol = context.names.symbol(symbol_asked)
    exchanges = context.exchanges if exchange is None else (exchange,)
    return PathParameters(exchange, symbol, tuple(Series(mode, one, symbol) for one in exchanges))
