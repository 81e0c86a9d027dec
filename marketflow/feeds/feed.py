"""What a feed is to the rest of MarketFlow: one exchange's ticks as a cold Observable of batches.

To add a venue, write a class with these members and let it pass the contract in tests/feeds/test_contract.py.
"""

from typing import Protocol

from reactivex import Observable

from marketflow.feeds.decoder import Decoder
from marketflow.model import Candles, FeedState


class Feed(Protocol):
    """One exchange in one mode."""

    @property
    def exchange(self) -> str:
        """Name of the exchange, as configured."""
        ...

    @property
    def place(self) -> str:
        """Where its ticks come from, for the log."""
        ...

    @property
    def decoder(self) -> Decoder:
        """The checks every tick passes, with their counts."""
        ...

    @property
    def state(self) -> FeedState:
        """How the feed does at this moment."""
        ...

    def batches(self) -> Observable[Candles]:
        """One attempt at receiving: never empty batches, then an error when the source is lost.

        Subscribing opens what is needed, disposing closes it and ends its thread. Subscribe again to try again.
        """
        ...

    def stop(self) -> None:
        """Let the running attempt complete after it has handed on what was received. Returns at once; for good."""
        ...
