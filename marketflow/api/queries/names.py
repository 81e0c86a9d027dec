"""Finds configured names without regard to case."""

from collections.abc import Mapping, Sequence

from marketflow.api.problems import UnknownExchange, UnknownSymbol
from marketflow.model import REFERENCE

MOST_NAMED = 20
"""Names that a message lists at most; of thousands of symbols it would be 50 kB."""


class NameLookup:
    """The configured exchanges and symbols.

    Args:
        exchanges, symbols: the configured spellings.
    """

    def __init__(self, exchanges: Sequence[str], symbols: Sequence[str]) -> None:
        self.exchanges = exchanges
        self.symbols = symbols
        self._exchanges = {name.lower(): name for name in exchanges}
        self._symbols = {name.lower(): name for name in symbols}

    def exchange(self, name: str) -> str:
        """Return the configured spelling of an exchange.

        Raises:
            UnknownExchange: no exchange has this name.
        """
        if (found := _configured(name, self._exchanges)) is None:
            raise UnknownExchange(f"No such exchange; there are {_some_of(self.exchanges)}.")
        return found

    def exchange_or_reference(self, name: str) -> str:
        """Return the configured spelling of an exchange, or `reference`.

        Raises:
            UnknownExchange: no exchange has this name.
        """
        return REFERENCE if name.lower() == REFERENCE else self.exchange(name)

    def symbol(self, name: str) -> str:
        """Return the configured spelling of a symbol.

        Raises:
            UnknownSymbol: no symbol has this name.
        """
        if (found := _configured(name, self._symbols)) is None:
            raise UnknownSymbol(f"No such symbol; there are {_some_of(self.symbols)}.")
        return found


def _some_of(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MOST_NAMED])
    return shown if len(names) <= MOST_NAMED else f"{shown} and {len(names) - MOST_NAMED} more, see GET /market"


def _configured(name: str, names: Mapping[str, str]) -> str | None:
    # The lower case of some letters beyond ASCII is an ASCII letter.
    return names.get(name.lower()) if name.isascii() else None
