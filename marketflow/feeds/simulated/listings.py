"""What a simulated venue lists: its names of our symbols, with base and quote."""

from typing import NamedTuple

QUOTES = ("FDUSD", "USDT", "USDC", "USD", "EUR", "GBP", "TRY", "BTC", "ETH", "BNB")


class Listed(NamedTuple):
    """An instrument: the venue's name of it, base and quote in common letters."""

    native: str
    base: str
    quote: str


def split(symbol: str) -> tuple[str, str]:
    """Base and quote of a symbol such as BTCUSDT; the longest quote that fits, USDT where none does."""
    for quote in QUOTES:
        if symbol.endswith(quote) and len(symbol) > len(quote):
            return symbol.removesuffix(quote), quote
    return symbol, "USDT"


def listed(native: str, separator: str) -> Listed:
    """The instrument of a venue's own name, whose parts a separator may stand between."""
    base, found, quote = native.partition(separator) if separator else (native, "", "")
    return Listed(native, base, quote) if found else Listed(native, *split(native))
