"""How long a connection may be without trades, and whether that is over."""

from collections.abc import Callable
from math import inf

LONGEST_SECONDS = 600.0


class DataSilence:
    """The silence of trades on one connection and those that follow it; any thread may ask.

    It is apart from that of frames: pings are answered by servers that have stopped sending data. A connection that
    has ended for it is followed by one with twice the limit, since its symbols may trade that rarely.

    Args:
        stale_after_seconds: the limit, while trades come.
        monotonic: the time in seconds.
    """

    def __init__(self, stale_after_seconds: float, monotonic: Callable[[], float]) -> None:
        self._stale_after_seconds = stale_after_seconds
        self._monotonic = monotonic
        self._limit_seconds = stale_after_seconds
        self._proven_at = self._began = monotonic()
        self.is_halted = False
        """Whether the venue has said that it does not trade: then silence is no fault."""
        self.is_unbroken = False
        """Whether silence has ended a connection, and no trade has come since."""

    @property
    def is_fresh(self) -> bool:
        """Whether a trade has come lately, or a proof that there was none."""
        return self._monotonic() - self._proven_at <= self._stale_after_seconds

    @property
    def ends_at(self) -> float:
        """When the limit is reached."""
        if self.is_halted:
            return inf
        return max(self._proven_at, self._began) + self._limit_seconds

    def begin(self) -> None:
        """A connection begins; the venue says anew whether it trades."""
        self.is_halted = False
        self._began = self._monotonic()

    def on_trade(self) -> None:
        """A trade has come."""
        self.on_proof()
        self.is_unbroken = False
        self._limit_seconds = self._stale_after_seconds

    def on_status(self, is_halted: bool) -> None:
        """The venue says whether it trades at all."""
        if self.is_halted and not is_halted:
            self.on_proof()
        self.is_halted = is_halted

    def on_proof(self) -> None:
        """The venue says that nothing was traded."""
        self._proven_at = self._monotonic()

    def on_end(self) -> float:
        """A connection ends for its silence; return the limit, which is another one for the next."""
        silence = self._limit_seconds
        self._limit_seconds = min(2 * silence, max(LONGEST_SECONDS, silence))
        self.is_unbroken = True
        return silence
