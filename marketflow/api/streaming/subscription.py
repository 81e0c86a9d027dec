"""Subscriptions: the series of which a subscriber receives events."""

from collections.abc import Iterable, Sequence
from zlib import crc32

from marketflow.api.queries.boundaries import INTERVALS
from marketflow.api.queries.names import NameLookup
from marketflow.api.streaming.candle_stream.candle_series import CandleSeries
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
                candles,
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
