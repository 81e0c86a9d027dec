"""What comes by REST beside the live trades of venues, on threads of its own: repairs, history, verification."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from reactivex import abc

from marketflow.clock import Clock, milliseconds
from marketflow.feeds.corrections import Corrections, NoCorrections
from marketflow.feeds.feed import Feed
from marketflow.model import MINUTE_MS, Candles, Hole, Mode, Series
from marketflow.pipeline.schedulers import NamedPool
from marketflow.stores.cache_limits import MINUTES_KEPT_MS

if TYPE_CHECKING:
    from marketflow.feeds.backfill.history import FetchedMinuteStore
    from marketflow.feeds.backfill.hole_book import HoleStore
    from marketflow.feeds.backfill.repair import CompletenessMarks, Repairs
    from marketflow.feeds.backfill.steps import SteppedWork
    from marketflow.feeds.backfill.verification import Verification
    from marketflow.feeds.venues.websocket_feed import VenueFeed

COMPARED_AFTER_CLOSED_MS = 15_000
"""How long after it is closed a minute is compared at the earliest: by then one that never came is no late one."""


class VenueBackfill:
    """The work on the records of all venues that there are.

    Args:
        feeds: those of live mode.
        holes: where holes are kept.
        marks: where is kept until when everything is complete.
        fetched: where minutes are kept that are fetched from venues.
        history_ms: how far back they are fetched, by exchange.
        loop: scheduler of pauses.
        clock: wall-clock time.
        is_live: whether live mode runs.
        minute_ms: length of a minute; of another one than theirs, venues have no records.
        closed_after_ms: how long after its end a minute is closed.
        on_hole: called with each hole that is found or changes, from any thread.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        holes: "HoleStore",
        marks: "CompletenessMarks",
        fetched: "FetchedMinuteStore",
        history_ms: Mapping[str, int],
        loop: abc.SchedulerBase,
        clock: Clock,
        is_live: Callable[[], bool],
        minute_ms: int,
        closed_after_ms: int,
        on_hole: Callable[[Hole], None] = lambda hole: None,
    ) -> None:
        self._clock = clock
        self._venues = _venues(feeds)
        self._with_ids = {feed.exchange: feed.decoder.ids for feed in feeds if feed.decoder.ids is not None}
        self._repairs: Sequence[Repairs] = ()
        self._verifications: dict[str, Verification] = {}
        self._pool: NamedPool | None = None
        self.corrections: Corrections = NoCorrections()
        """For the pipeline."""
        self.count_after({}, {})
        if not self._venues or minute_ms != MINUTE_MS:
            return
        from marketflow.feeds.backfill import history, repair, verification
        from marketflow.feeds.backfill.hole_book import HoleBook
        from marketflow.feeds.backfill.steps import SteppedCorrections

        book = HoleBook(holes, self._take_over, on_hole)
        self._repairs = [repair.Repairs(feed, book, marks, clock) for feed in self._venues]
        histories: list[history.History] = []
        compared_after_ms = max(verification.COMPARED_AFTER_MS, closed_after_ms + COMPARED_AFTER_CLOSED_MS)
        for feed in self._venues:
            names = partial(getattr, feed, "rest_names")
            span_ms = history_ms[feed.exchange]
            if span_ms:
                histories.append(
                    history.History(feed.exchange, feed.rest, names, span_ms, fetched, MINUTES_KEPT_MS, clock)
                )
            self._verifications[feed.exchange] = verification.Verification(
                feed.exchange, feed.rest, names, clock, span_ms > 0, compared_after_ms, on_unsent=feed.ask_again
            )
        work: list[SteppedWork] = [book, *self._repairs, *self._verifications.values(), *histories]
        self._pool = NamedPool("rest", len(work))
        self.corrections = SteppedCorrections(work, loop, self._pool, is_live)

    def count_after(self, *recovered: Candles) -> None:
        """Count only trades that are newer than those that were recovered, as far as they have ids."""
        newest_at: dict[Series, int] = {}
        for candles in recovered:
            for slot, candle in candles.items():
                newest_at[slot.series] = max(candle.last_at, newest_at.get(slot.series, 0))
        for series, at in newest_at.items():
            if series.mode is Mode.LIVE and (ids := self._with_ids.get(series.exchange)) is not None:
                ids.count_after({series.symbol: at})
        if not self._venues:
            return
        from marketflow.feeds.backfill.repair import count_after_earlier_run

        count_after_earlier_run(self._venues, newest_at, milliseconds(self._clock()))

    def verified(self, exchange: str) -> dict[str, int]:
        """How many minutes were compared with the venue's candles, by result."""
        verification = self._verifications.get(exchange)
        return {} if verification is None else dict(verification.results)

    def unsent(self, exchange: str) -> frozenset[str]:
        """The symbols of which a venue has trades and sends none."""
        verification = self._verifications.get(exchange)
        return frozenset() if verification is None else verification.unsent

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
