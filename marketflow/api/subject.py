"""What a path is about: a symbol on one exchange or on all of them, in the mode that runs."""

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from starlette.requests import Request

from marketflow.api.context import Context
from marketflow.api.problems import UnknownExchange, UnknownSymbol
from marketflow.model import Mode, Series


class Subject(NamedTuple):
    """What a request is about, in canonical spelling; `exchange` is None for all. The mode is part of each series."""

    exchange: str | None
    symbol: str
    series: tuple[Series, ...]


def asked_about(request: Request, context: Context) -> Subject:
    """What the path of a request names.

    Raises:
        UnknownExchange, UnknownSymbol: it is not configured.
    """
    asked = request.path_params
    return _subject(context, context.mode.current, asked.get("exchange"), asked["symbol"])


@lru_cache(maxsize=4096)  # the same few with every request
def _subject(context: Context, mode: Mode, exchange_asked: str | None, symbol_asked: str) -> Subject:
    exchange, exchanges = None, context.exchanges
    if exchange_asked is not None:
        exchange = _canonical(exchange_asked, context.exchange_named)
        if exchange is None:
            raise UnknownExchange(f"No such exchange; there are {', '.join(context.exchanges)}.")
        exchanges = (exchange,)
    symbol = _canonical(symbol_asked, context.symbol_named)
    if symbol is None:
        raise UnknownSymbol(f"No such symbol; there are {', '.join(context.symbols)}.")
    return Subject(exchange, symbol, tuple(Series(mode, one, symbol) for one in exchanges))


def _canonical(asked: str, names: Mapping[str, str]) -> str | None:
    """The configured spelling of a name, None for one that is not configured."""
    # Some letters beyond ASCII have one of ASCII for a lower case.
    return names.get(asked.lower()) if asked.isascii() else None
