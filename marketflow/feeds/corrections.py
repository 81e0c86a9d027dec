"""What replaces closed minutes: those that are made again from a venue's records."""

from typing import Any, Protocol

import reactivex as rx
from reactivex import Observable

from marketflow.model import Candles


class Corrections(Protocol):
    """A source of authoritative minutes: whole ones, which replace what the pipeline has of them.

    They never make anything poorer, since the more complete version of a minute stays in every store. So one that was
    emitted twice, or that a restart makes again, changes nothing.
    """

    def minutes(self, closed: Observable[Candles], ended: Observable[Any]) -> Observable[Candles]:
        """Emit authoritative minutes, from any thread, until `ended` emits.

        Args:
            closed: the minutes that the pipeline closes, and closes again once they have changed.
            ended: its first item is the end of the pipeline.
        """
        ...


class NoCorrections:
    """Of feeds that have no records to make minutes from."""

    def minutes(self, closed: Observable[Candles], ended: Observable[Any]) -> Observable[Candles]:
        """Emit nothing."""
        return rx.empty()
