"""Data that is fetched from venues by REST, beside their live trades: repairs, history, verification."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from reactivex import abc

from marketflow.clock import Clock, milliseconds
from marketflow.feeds.backfill.steps import SteppedCorrections
from marketflow.feeds.corrections import Corrections, NoCorrections
from marketflow.feeds.feed import Feed
from marketflow.model import MINUTE_MS, Candles, Hole, Mode, Series, minute_start
from marketflow.pipeline.schedulers import NamedPool
from marketflow.stores.cache_limits import MINUTES_KEPT_MS

if TYPE_CHECKING:
    from marketflow.feeds.backfill.history import FetchedMinuteStore, History
    from marketflow.feeds.backfill.hole_book import HoleBook, HoleStore
    from marketflow.feeds.backfill.repair import CompletenessMarks, Repairs
    from marketflow.feeds.backfill.steps import SteppedWork
    from marketflow.feeds.backfill.verification import Verification
    from marketflow.feeds.venues.trade_ids import TradeIds
    from marketflow.feeds.venues.websocket_feed import VenueFeed

MOST_THREADS = 64
"""Upper limit of threads for steps; one is started where no other is idle."""

COMPARED_AFTER_CLOSED_MS = 15_000
"""How long after it is closed a minute is compared at the earliest: a trade that it lacks then is not late."""


class _Work(NamedTuple):
    """The work on the records of one venue."""

    repairs: "Repairs"
    verification: "Verification"
    history: "History | None"

    @property
    def steps(self) -> "list[SteppedWork]":
        return [each for each in self if each is not None]


class VenueBackfill:
    """The work on the records of all configured venues.

    Args:
        feeds: those of live mode; see `take_feeds`.
        holes: the store of holes.
        marks: the store of the times until which trades are complete.
        fetched: the store of minutes that are fetched from venues.
        history_ms: how far back they are fetched, by exchange.
        loop: scheduler of pauses.
        clock: wall-clock time.
        is_live: whether live mode runs.
        minute_ms: length of a minute; nothing is fetched unless it is MINUTE_MS, as venues have no other minutes.
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
        self._holes, self._marks, self._fetched = holes, marks, fetched
        self._on_hole = on_hole
        self._clock = clock
        self._closed_after_ms = closed_after_ms
        self._venues: Sequence[VenueFeed] = ()
        self._with_ids: dict[str, TradeIds] = {}
        self._work: dict[VenueFeed, _Work] = {}
        self._book: HoleBook | None = None
        self._pool = NamedPool("rest", MOST_THREADS)
        self._corrections = SteppedCorrections((), loop, self._pool, is_live) if minute_ms == MINUTE_MS else None
        self.corrections: Corrections = self._corrections or NoCorrections()
        """The corrections that the pipeline takes."""
        self._counted: dict[VenueFeed, frozenset[str]] = {}  # the symbols whose older trades do not count
        self.take_feeds(feeds, history_ms, {})

    def take_feeds(self, feeds: Sequence[Feed], history_ms: Mapping[str, int], newest_at: Mapping[Series, int]) -> None:
        """Work on the records of these feeds and their symbols; the work of previous ones goes on if they stay.

        Args:
            feeds: those of live mode.
            history_ms: how far back minutes are fetched, by exchange.
            newest_at: event times (Unix ms) of the newest trades that were counted.
        """
        self._with_ids = {feed.exchange: feed.decoder.ids for feed in feeds if feed.decoder.ids is not None}
        before, self._venues = self._venues, _venues(feeds)
        added = self._count_added_after(newest_at)
        if self._corrections is None or not (self._venues or before):
            return
        self._work = {
            feed: self._work.get(feed) or self._work_of(feed, history_ms[feed.exchange]) for feed in self._venues
        }
        steps = [step for work in self._work.values() for step in work.steps]
        if self._book is not None:
            self._book.take_over(added)
            self._corrections.take_work([self._book, *steps])

    def _count_added_after(self, newest_at: Mapping[Series, int]) -> set[Series]:
        """Have added series count only newer trades, since venues send their last one again; return these series."""
        before = minute_start(milliseconds(self._clock())) - 1
        found: set[Series] = set()
        for feed in self._venues:
            added = frozenset(feed.symbols) - self._counted.get(feed, frozenset())
            if added:
                series = {symbol: Series(Mode.LIVE, feed.exchange, symbol) for symbol in added}
                feed.ids.count_after({symbol: newest_at.get(of, before) for symbol, of in series.items()})
                found.update(series.values())
        self._counted = {feed: frozenset(feed.symbols) for feed in self._venues}
        return found

    def _work_of(self, feed: "VenueFeed", span_ms: int) -> _Work:
        from marketflow.feeds.backfill import history, repair, verification
        from marketflow.feeds.backfill.hole_book import HoleBook

        if self._book is None:
            self._book = HoleBook(self._holes, self._take_over, self._on_hole)
        names, clock = partial(getattr, feed, "rest_names"), self._clock
        compared_after_ms = max(verification.COMPARED_AFTER_MS, self._closed_after_ms + COMPARED_AFTER_CLOSED_MS)
        return _Work(
            repair.Repairs(feed, self._book, self._marks, clock),
            verification.Verification(
                feed.exchange, feed.rest, names, clock, span_ms > 0, compared_after_ms, on_unsent=feed.ask_again
            ),
            history.History(feed.exchange, feed.rest, names, span_ms, self._fetched, MINUTES_KEPT_MS, clock)
            if span_ms
            else None,
        )

    def count_after(self, *recovered: Candles) -> None:
        """Have feeds with trade ids count only trades that are newer than those that were recovered."""
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
        """Return how many minutes were compared with the venue's candles, by result."""
        verification = self._verification(exchange)
        return {} if verification is None else dict(verification.results)

    def unsent(self, exchange: str) -> frozenset[str]:
        """Return the symbols of which a venue has trades and sends none."""
        verification = self._verification(exchange)
        return frozenset() if verification is None else verification.unsent

    def close(self) -> None:
        """Reject further work; calls under way end with the feeds, whose clients are closed."""
        self._pool.close()

    def _verification(self, exchange: str) -> "Verification | None":
        return next((work.verification for feed, work in self._work.items() if feed.exchange == exchange), None)

    def _take_over(self, holes: list[Hole]) -> None:
        for work in self._work.values():
            work.repairs.take_over(holes)


def _venues(feeds: Sequence[Feed]) -> "list[VenueFeed]":
    # Imported where needed: a start without venues imports no client of them.
    if all(feed.doubles_by_symbol() is None for feed in feeds):
        return []
    from marketflow.feeds.venues.websocket_feed import VenueFeed

    return [feed for feed in feeds if isinstance(feed, VenueFeed)]
