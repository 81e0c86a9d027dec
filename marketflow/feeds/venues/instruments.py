"""Finds the venue's names of the configured symbols, by its own list of instruments.

Ours are base and quote together (BTCUSDT); BTC-USD and BTC-USDT therefore stay two series.
"""

from collections.abc import Collection, Mapping

import msgspec

from marketflow.feeds.venues.limits import refusal_of
from marketflow.feeds.venues.venue import Venue

TIMEOUT_SECONDS = 5.0
MAX_BODY_BYTES = 32 * 2**20


class Names(msgspec.Struct, frozen=True):
    """The symbols of a venue.

    Args:
        native: the venue's name of each of our symbols that it trades.
        absent: our symbols that it does not list, or does not trade at present.
    """

    native: Mapping[str, str]
    absent: frozenset[str]


def look_up(venue: Venue, rest_url: str, symbols: Collection[str], given: Mapping[str, str]) -> Names:
    """The venue's names of `symbols`; those in `given` are taken as they are.

    Raises:
        VenueRefusal: the venue refuses to answer.
        OSError: it cannot be asked, or its answer is none.
    """
    wanted = [symbol for symbol in symbols if symbol not in given]
    native = {symbol: given[symbol] for symbol in symbols if symbol in given}
    if wanted:
        listed = {
            f"{each.base}{each.quote}".upper(): each.symbol
            for each in venue.instruments(_get(venue, rest_url))
            if each.trading
        }
        native |= {symbol: listed[symbol.upper()] for symbol in wanted if symbol.upper() in listed}
    return Names(native, frozenset(symbols) - native.keys())


def _get(venue: Venue, rest_url: str) -> bytes:
    import httpx  # lazily: most processes ask no venue

    try:
        answer = httpx.get(rest_url.rstrip("/") + venue.instruments_path, timeout=TIMEOUT_SECONDS)
    except httpx.HTTPError as error:
        raise OSError(
            f"the list of instruments of {venue.name} cannot be read: {error or type(error).__name__}"
        ) from None
    if answer.status_code != httpx.codes.OK:
        raise refusal_of(answer.status_code, answer.headers)
    return answer.content
