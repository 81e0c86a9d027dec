"""What comes by REST beside the live trades of venues: repairs, and the rows of holes, on threads of their own."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from reactivex import abc

from marketflow.clock import Clock, milliseconds
from marketflow.feeds.corrections import Corrections, NoCorrections
from marketflow.feeds.feed import Feed
from marketflow.model import MINUTE_MS, Candles, Hole, Series
from marketflow.pipeline.schedulers import NamedPool

if TYPE_CHECKING:
    from marketflow.feeds.backfill.hole_book import HoleStore
    from marketflow.feeds.backfill.repair import CompletenessMarks, Repairs
    from marketflow.feeds.backfill.steps import SteppedWork
    from marketflow.feeds.venues.websocket_feed import VenueFeed


class VenueBackfill:
    """The work on the records of all venues that there are.

    Args:
        feeds: those of live mode.
        holes: where holes are kept.
        marks: where is kept until when everything is complete.
        loop: scheduler of pauses.
        clock: wall-clock time.
        is_live: whether live mode runs.
        minute_ms: length of a minute; of another one than theirs, venues have no records.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        holes: "HoleStore",
        marks: "CompletenessMarks",
        loop: abc.SchedulerBase,
        clock: Clock,
        is_live: Callable[[], bool],
        minute_ms: int,
    ) -> None:
        self._clock = clock
        self._venues = _venues(feeds)
        self._repairs: Sequence[Repairs] = ()
        self._pool: NamedPool | None = None
        self.corrections: Corrections = NoCorrections()
        """For the pipeline."""
        self.count_after({}, {})
        if not self._venues or minute_ms != MINUTE_MS:
            return
        from marketflow.feeds.backfill import repair
        from marketflow.feeds.backfill.hole_book import HoleBook
        from marketflow.feeds.backfill.steps import SteppedCorrections

        book = HoleBook(holes, self._take_over)
        self._repairs = [repair.Repairs(feed, book, marks, clock) for feed in self._venues]
        work: list[SteppedWork] = [book, *self._repairs]
        self._pool = NamedPool("rest", len(work))
        self.corrections = SteppedCorrections(work, loop, self._pool, is_live)

    def count_after(self, *recovered: Candles) -> None:
        """Count only trades that are newer than those that were recovered."""
        if not self._venues:
            return
        from marketflow.feeds.backfill.repair import count_after_earlier_run

        newest_at: dict[Series, int] = {}
        for candles in recovered:
            for slot, candle in candles.items():
                newest_at[slot.series] = max(candle.last_at, newest_at.get(slot.series, 0))
        count_after_earlier_run(self._venues, newest_at, milliseconds(self._clock()))

    def close(self) -> None:
        """Reject further work; calls under way end with the feeds, whose clients are closed."""
        if self._pool is not None:
            self._pool.close()

    def _take_over(self, holes: list[Hole]) -> None:
        for repairs in self._repairs:
            repairs.take_over(holes)


def _venues(feeds: Sequence[Feed]) -> "list[VenueFeed]":
    # Lazily: a start without venues needs no client of any.
    if all(feed.doubles_by_symbol() is None for feed in feeds):
        return []
    from marketflow.feeds.venues.websocket_feed import VenueFeed

    return [feed for feed in feeds if isinstance(feed, VenueFeed)]
