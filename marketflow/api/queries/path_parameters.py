"""Path parameters: a symbol on one exchange or on all of them, in the current mode."""

from functools import lru_cache
from typing import NamedTuple

from starlette.requests import Request

from marketflow.api.context import Context
from marketflow.model import Mode, Series


class PathParameters(NamedTuple):
    """The series of a request, in configured spelling; `exchange` is None for all."""

    exchange: str | None
    symbol: str
    series: tuple[Series, ...]


def path_parameters_of(request: Request, context: Context) -> PathParameters:
    """Return the path parameters of a request.

    Raises:
        UnknownExchange: it is not configured.
        UnknownSymbol: it is not configured.
    """
    given = request.path_params
    return path_parameters(context, context.mode.current, given.get("exchange"), given["symbol"])


@lru_cache(maxsize=4096)  # requests repeat a few of them
def path_parameters(context: Context, mode: Mode, exchange_name: str | None, symbol_name: str) -> PathParameters:
    """Return the path parameters of names as they were given.

    Raises:
        UnknownExchange: it is not configured.
        UnknownSymbol: it is not configured.
    """
    exchange = None if exchange_name is None else context.names.exchange(exchange_name)
    symbol = context.names.symbol(symbol_name)
    exchanges = context.exchanges if exchange is None else (exchange,)
    return PathParameters(exchange, symbol, tuple(Series(mode, one, symbol) for one in exchanges))
