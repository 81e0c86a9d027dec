"""Subscriptions: the series of which a subscriber receives events."""

from collections.abc import Iterable, Sequence
from itertools import product
from zlib import crc32

from marketflow.api.queries.boundaries import INTERVALS
from marketflow.api.queries.names import NameLookup
from marketflow.api.streaming.candle_stream.candle_series import MOST_CANDLE_SERIES, CandleSeries
from marketflow.model import REFERENCE

Pair = tuple[str, str]
"""An exchange, or `reference`, and a symbol, as they are configured; the mode is always the one that runs."""


class Subscription:
    """A subset of the configured series. Subscribers to the same subset share one object, which compares by identity.

    Args:
        exchanges: all configured exchanges.
        symbols: all configured symbols.
        chosen: the series of which it has prices.
        candles: the candle series.
    """

    def __init__(
        self,
        exchanges: Sequence[str],
        symbols: Sequence[str],
        chosen: frozenset[Pair],
        candles: frozenset[CandleSeries] = frozenset(),
    ) -> None:
        self.chosen = chosen
        self.candles = candles
        names = (*exchanges, REFERENCE)
        self.pairs = tuple((exchange, symbol) for exchange in names for symbol in symbols)
        self.pairs = tuple(pair for pair in self.pairs if pair in chosen)
        places = [{name: n for n, name in enumerate(each)} for each in (symbols, (None, *names), INTERVALS)]
        self.candle_series = tuple(
            sorted(
                (each for each in candles if each.symbol in places[0] and each.exchange in places[1]),
                key=lambda each: (places[0][each.symbol], places[1][each.exchange], places[2][each.interval]),
            )
        )
        """The candle series in configured order, by symbol."""
        on_exchanges = {exchange for exchange, _ in self.pairs} | {each.exchange or "" for each in candles}
        self.exchanges = tuple(exchange for exchange in names if exchange in on_exchanges)
        of_symbols = {symbol for _, symbol in self.pairs} | {each.symbol for each in candles}
        self.symbols = tuple(symbol for symbol in symbols if symbol in of_symbols)
        self.references = frozenset(symbol for exchange, symbol in self.pairs if exchange == REFERENCE)
        """Symbols of which it has reference prices."""
        whole = (self.pairs, self.candle_series) if candles else self.pairs
        self.digest = f"{crc32(repr(whole).encode()):x}"
        """CRC-32 of the series, the same in every process."""

    def chosen_of(self, before: NameLookup, after: NameLookup) -> frozenset[Pair]:
        """Return of which series it has prices once other names are configured: of added ones if it had all.

        Args:
            before: the configured names of before.
            after: those of afterwards.
        """
        exchanges, symbols = {*before.exchanges}, {*before.symbols}
        wants_all = self.chosen.issuperset(product(exchanges, symbols))
        every_symbol = {each for each in (*exchanges, REFERENCE) if self.chosen.issuperset(product([each], symbols))}
        every_exchange = {each for each in symbols if self.chosen.issuperset(product(exchanges, [each]))}

        def is_wanted(exchange: str, symbol: str) -> bool:
            if exchange not in exchanges and exchange != REFERENCE:
                return symbol in every_exchange if symbol in symbols else wants_all
            return exchange in every_symbol if symbol not in symbols else (exchange, symbol) in self.chosen

        return frozenset(pair for pair in product((*after.exchanges, REFERENCE), after.symbols) if is_wanted(*pair))

    def candles_of(self, before: NameLookup, after: NameLookup) -> frozenset[CandleSeries]:
        """Return the candle series once other names are configured: of added symbols if it had all."""
        exchanges = {None, REFERENCE, *after.exchanges}
        kept = {each for each in self.candles if each.symbol in after.symbols and each.exchange in exchanges}
        of_all = {each for each in kept if all(each._replace(symbol=other) in self.candles for other in before.symbols)}
        added = {*after.symbols}.difference(before.symbols)
        wanted = kept | {each._replace(symbol=symbol) for each in of_all for symbol in added}
        return frozenset(wanted if len(wanted) <= MOST_CANDLE_SERIES else kept)


def series_of(names: NameLookup, exchanges: Iterable[str], symbols: Iterable[str]) -> frozenset[Pair]:
    """Return the series of these exchanges and symbols, in any case; an empty list stands for all configured ones.

    `reference` is an exchange here, but none of those that an empty list stands for.

    Raises:
        UnknownExchange: an exchange is not configured.
        UnknownSymbol: a symbol is not configured.
    """
    wanted_exchanges = {names.exchange_or_reference(name) for name in exchanges}
    wanted_symbols = {names.symbol(name) for name in symbols}
    return frozenset(
        (exchange, symbol)
        for exchange in wanted_exchanges or names.exchanges
        for symbol in wanted_symbols or names.symbols
    )
