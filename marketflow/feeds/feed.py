"""The protocol of a feed: the ticks of one exchange as a cold Observable of candle batches.

A new kind of feed implements it and passes the contract in tests/feeds/test_contract.py.
"""

from collections.abc import Sequence
from typing import Protocol

from reactivex import Observable

from marketflow.feeds.decoder import Decoder
from marketflow.model import Candles, FeedState


class Connection(Protocol):
    """A source of ticks that is lost, and connected again, as a whole."""

    @property
    def exchange(self) -> str:
        """Name of the exchange, as configured."""
        ...

    @property
    def place(self) -> str:
        """Where its ticks come from, for the log."""
        ...

    def batches(self) -> Observable[Candles]:
        """Connect once: emit batches, none of them empty, then an error when the connection is lost.

        Subscribing opens the connection; disposing closes it and ends its thread. Subscribe again to reconnect.
        """
        ...


class Feed(Connection, Protocol):
    """One exchange in one mode."""

    @property
    def connections(self) -> "Sequence[Connection]":
        """What it consists of, each to be reconnected on its own; most feeds are their only connection."""
        ...

    @property
    def decoder(self) -> Decoder:
        """Decodes and validates its ticks, and counts them."""
        ...

    @property
    def state(self) -> FeedState:
        """Its state now."""
        ...

    def stop(self) -> None:
        """Complete the current attempt, after it has emitted what was received, and all later ones. Does not block."""
        ...
