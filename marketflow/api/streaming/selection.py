"""Which series a client wants to be told of."""

from collections.abc import Iterable, Sequence
from zlib import crc32

from marketflow.api.queries.names import NameLookup

Pair = tuple[str, str]
"""An exchange and a symbol, as they are configured; the mode is always the one that runs."""


class Selection:
    """Some of the configured series. One that all clients have who want the same, so only ever equal to itself.

    Args:
        exchanges: all that are configured.
        symbols: all that are configured.
        chosen: those series that are wanted.
    """

    def __init__(self, exchanges: Sequence[str], symbols: Sequence[str], chosen: frozenset[Pair]) -> None:
        self.chosen = chosen
        self.pairs = tuple((exchange, symbol) for exchange in exchanges for symbol in symbols)
        self.pairs = tuple(pair for pair in self.pairs if pair in chosen)
        self.exchanges = tuple(dict.fromkeys(exchange for exchange, _ in self.pairs))
        wanted = {symbol for _, symbol in self.pairs}
        self.symbols = tuple(symbol for symbol in symbols if symbol in wanted)
        self.digest = f"{crc32(repr(self.pairs).encode()):x}"
        """Tells it from nearly all others, in any process."""


def named(names: NameLookup, exchanges: Iterable[str], symbols: Iterable[str]) -> frozenset[Pair]:
    """The series of these exchanges and symbols, in any spelling; all of a kind where none is named.

    Raises:
        UnknownExchange: there is no such exchange.
        UnknownSymbol: there is no such symbol.
    """
    wanted_exchanges = {names.exchange(name) for name in exchanges}
    wanted_symbols = {names.symbol(name) for name in symbols}
    return frozenset(
        (exchange, symbol)
        for exchange in wanted_exchanges or names.exchanges
        for symbol in wanted_symbols or names.symbols
    )
