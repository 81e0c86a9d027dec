"""Finds the venue's names of the configured symbols, by its own list of instruments.

Ours are base and quote together (BTCUSDT); BTC-USD and BTC-USDT therefore stay two series.
"""

from collections.abc import Collection, Mapping

import msgspec

from marketflow.feeds.backfill.rest_client import RestClient


class Names(msgspec.Struct, frozen=True):
    """The symbols of a venue.

    Args:
        native: the venue's name of each of our symbols that it trades.
        rest: its name in REST calls of each of them, and of those that are halted.
        absent: our symbols that it does not list.
        halted: those that it lists and does not trade at present, and its word for that.
    """

    native: Mapping[str, str]
    rest: Mapping[str, str]
    absent: frozenset[str]
    halted: Mapping[str, str] = {}


def look_up(client: RestClient, symbols: Collection[str], given: Mapping[str, str]) -> Names:
    """The venue's names of `symbols`; those in `given` are taken as they are.

    Raises:
        VenueRefusal: the venue refuses to answer.
        OSError: it cannot be asked, or its answer is none.
    """
    native = {symbol: given[symbol] for symbol in symbols if symbol in given}
    rest = {symbol: client.venue.rest_symbol(name) for symbol, name in native.items()}
    halted: dict[str, str] = {}
    if wanted := [symbol for symbol in symbols if symbol not in given]:
        # One that trades takes the place of others of the same base and quote.
        by_halt = sorted(client.instruments(), key=lambda each: not each.halt)
        listed = {f"{each.base}{each.quote}".upper(): each for each in by_halt}
        found = {symbol: listed[symbol.upper()] for symbol in wanted if symbol.upper() in listed}
        native |= {symbol: each.symbol for symbol, each in found.items() if not each.halt}
        rest |= {symbol: each.rest_symbol or each.symbol for symbol, each in found.items()}
        halted = {symbol: each.halt for symbol, each in found.items() if each.halt}
    return Names(native, rest, frozenset(symbols) - native.keys() - halted.keys(), halted)
