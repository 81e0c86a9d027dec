"""Subscriptions: the series of which a subscriber receives events."""

from collections.abc import Iterable, Sequence
from zlib import crc32

from marketflow.api.queries.names import NameLookup

Pair = tuple[str, str]
"""An exchange and a symbol, as they are configured; the mode is always the one that runs."""


class Subscription:
    """A subset of the configured series. Subscribers to the same subset share one object, which compares by identity.

    Args:
        exchanges: all configured exchanges.
        symbols: all configured symbols.
        chosen: the series of the subscription.
    """

    def __init__(self, exchanges: Sequence[str], symbols: Sequence[str], chosen: frozenset[Pair]) -> None:
        self.chosen = chosen
        self.pairs = tuple((exchange, symbol) for exchange in exchanges for symbol in symbols)
        self.pairs = tuple(pair for pair in self.pairs if pair in chosen)
        self.exchanges = tuple(dict.fromkeys(exchange for exchange, _ in self.pairs))
        subscribed = {symbol for _, symbol in self.pairs}
        self.symbols = tuple(symbol for symbol in symbols if symbol in subscribed)
        self.digest = f"{crc32(repr(self.pairs).encode()):x}"
        """CRC-32 of the series, the same in every process."""


def series_of(names: NameLookup, exchanges: Iterable[str], symbols: Iterable[str]) -> frozenset[Pair]:
    """Return the series of these exchanges and symbols, in any case; an empty list stands for all configured ones.

    Raises:
        UnknownExchange: an exchange is not configured.
        UnknownSymbol: a symbol is not configured.
    """
    wanted_exchanges = {names.exchange(name) for name in exchanges}
    wanted_symbols = {names.symbol(name) for name in symbols}
    return frozenset(
        (exchange, symbol)
        for exchange in wanted_exchanges or names.exchanges
        for symbol in wanted_symbols or names.symbols
    )
