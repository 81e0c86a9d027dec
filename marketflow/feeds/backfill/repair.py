"""Repairs: minutes that miss trades are made again, whole, from the venue's trades by REST.

A minute misses trades where ids were left out, where this process was down or not connected, and where it began. All
are mended in one way: when the minute is over, and REST has had a moment to catch up, all its trades are fetched and
folded. So nothing needs to know which of them were had, none counts twice, and a repair that is cut off is simply made
again. Live trades never wait.

The time until which everything of a series is complete is kept in the cache. A run begins there, up to MOST_MINUTES
back; what is older comes from the venue's own candles (see history). Without such a mark it begins with its own minute.

Where ids are only a hint, because the venue gives only its newest trades, its candles tell whether a minute misses any.
"""

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from marketflow.clock import Clock, milliseconds
from marketflow.errors import Unavailable
from marketflow.feeds.backfill.hole_book import HoleBook
from marketflow.feeds.backfill.minute_candle import minute_candle
from marketflow.feeds.backfill.minute_trades import BehindStream, NotFillable, trades_of_minute
from marketflow.feeds.backfill.rest_client import RestClient, RestClosed, RestFailed
from marketflow.feeds.backfill.steps import Step
from marketflow.feeds.backfill.venue_candles import candles_between
from marketflow.feeds.venues.limits import VenueRefusal
from marketflow.feeds.venues.trade_ids import MissingIds, TradeIds
from marketflow.feeds.venues.venue import Trade
from marketflow.logs import Outage
from marketflow.model import MINUTE_MS, Candle, Candles, Hole, HoleState, Mode, Series, Slot, minute_start
from marketflow.tasks import Backoff

MOST_MINUTES = 15
"""Minutes that are made again from trades at most, of one hole or one downtime."""

WALK_BACK_MS = 30 * MINUTE_MS
"""How far back minutes are made whose trades the venue gives from the newest one back only: the walk gets long."""

SETTLE_MS = 5_000
"""How long after its end a minute is made again: REST is behind the stream, and late trades have come by then."""

CANDLE_SETTLE_MS = 20_000
"""The same, where the venue's candle is compared."""

SUBSCRIBED_SECONDS = 10.0
"""How long after connecting the trades of a symbol are certain to come, though none has."""

GIVE_UP_SECONDS = 15 * 60.0
"""How long failing calls for a minute are repeated."""

STORED_AFTER_SECONDS = 10.0
"""How long after it was received or made everything is in a store, so that a killed process has lost none of it."""

MARKS_SECONDS = 5.0
"""Interval at which is kept until when everything is complete."""

MARKS_WAIT_SECONDS = 60.0
"""How long a start waits for the cache to say where the run before ended; then it is taken to be MOST_MINUTES ago."""

IDLE_SECONDS = 0.5

MOST_GAPS = 1_000
"""Gaps of ids that a hole is made of at most; of more, it is known only that they are within its minutes."""


class TradeFeed(Protocol):
    """The feed of a venue, as far as repairs need it."""

    @property
    def exchange(self) -> str:
        """Its name."""
        ...

    @property
    def rest(self) -> RestClient:
        """Asks the venue."""
        ...

    @property
    def rest_names(self) -> Mapping[str, str]:
        """The venue's name in REST calls of each of our symbols, as far as they are known."""
        ...

    @property
    def absent(self) -> Collection[str]:
        """Our symbols that the venue does not list, as far as that is known."""
        ...

    @property
    def ids(self) -> TradeIds:
        """Knows which trades have come."""
        ...

    @property
    def symbols(self) -> Collection[str]:
        """Ours, all that are configured."""
        ...

    def is_connected(self, symbol: str) -> bool:
        """Whether the connection for a symbol is made."""
        ...


class CompletenessMarks(Protocol):
    """Where is kept until when everything of a series is complete (Unix ms)."""

    def complete_until(self, exchange: str) -> Mapping[str, int]:
        """As an earlier run, or this one, left it, by symbol.

        Raises:
            Unavailable: it cannot be read now.
        """
        ...

    def put_complete_until(self, exchange: str, until: Mapping[str, int]) -> None:
        """Keep it.

        Raises:
            Unavailable: not kept, or something before that time may not be.
        """
        ...


def count_after_earlier_run(feeds: Sequence[TradeFeed], newest_at: Mapping[Series, int], now_ms: int) -> None:
    """Count only trades that are newer than those an earlier run has left, or than the minute before this one.

    Venues send their last trade again on connecting. What is dropped here by mistake comes with the repair of the
    minute, which is made in any case.

    Args:
        feeds: whose.
        newest_at: event time (Unix ms) of the newest trade that was recovered.
        now_ms: Unix ms.
    """
    for feed in feeds:
        before = minute_start(now_ms) - 1
        feed.ids.count_after(
            {symbol: newest_at.get(Series(Mode.LIVE, feed.exchange, symbol), before) for symbol in feed.symbols}
        )


@dataclass
class _Failing:
    """A minute that cannot be made at present; times by the monotonic clock."""

    since: float
    failures: int = 0
    not_before: float = 0.0


@dataclass
class _Job:
    """Minutes of a series to be made again, the newest first."""

    series: Series
    starts: list[int]
    """Ascending; of those that are over the last one is made first."""
    hole: Hole | None = None
    """Its row; None where it is no hole, but a start, or only a hint of one."""
    gaps: list[MissingIds] = field(default_factory=list)
    remaining: int = 0
    """Missing ids that have not been found."""
    total: int = 0
    is_hint: bool = False
    is_cut: bool = False
    """Whether there are more minutes than are made again."""
    first_id: int | None = None
    """Of the minute that was made last, where the one before it is next."""
    last_made: int = 0
    since: int = field(init=False)
    until: int = field(init=False)
    """The start of its first, and the end of its last minute."""
    is_touched: bool = False
    failing: dict[int, _Failing] = field(default_factory=dict)
    """Minutes that could not be made; each waits for itself."""
    differing: float = 0.0
    reason: str = ""
    """Why trades could not be fetched."""

    def __post_init__(self) -> None:
        self.since, self.until = self.starts[0], self.starts[-1] + MINUTE_MS

    def may_be_tried(self, start: int, now: float) -> bool:
        """Whether a minute need not wait after failures."""
        failing = self.failing.get(start)
        return failing is None or now >= failing.not_before

    def add(self, gap: MissingIds) -> None:
        """Have it cover another gap."""
        count = gap.before_id - gap.after_id - 1
        self.total += count
        self.remaining += count
        if len(self.gaps) < MOST_GAPS:
            self.gaps.append(gap)

    def found(self, trades: Sequence[Trade]) -> None:
        """Count the missing ids that are among trades, which ascend by id."""
        last_ids = [trade.id or 0 for trade in trades]
        for gap in self.gaps:
            for trade in trades[bisect_right(last_ids, gap.after_id) :]:
                last = trade.id or 0
                first = last - trade.count + 1
                if first >= gap.before_id:
                    break
                self.remaining -= min(last, gap.before_id - 1) - max(first, gap.after_id + 1) + 1


class Repairs:
    """The repairs of one feed, step by step; `note` and `take_over` may be called from other threads.

    Args:
        feed: whose.
        book: takes the holes.
        marks: where is kept until when everything is complete.
        clock: wall-clock time.
        monotonic: measures pauses, in seconds.
        backoff: pauses after failures.
    """

    def __init__(
        self,
        feed: TradeFeed,
        book: HoleBook,
        marks: CompletenessMarks,
        clock: Clock,
        monotonic: Callable[[], float] = time.monotonic,
        backoff: Backoff | None = None,
    ) -> None:
        self._feed, self._book, self._marks = feed, book, marks
        self._clock, self._monotonic = clock, monotonic
        self._series = frozenset(map(self._of, feed.symbols))
        self._backoff = backoff or Backoff(3.0, 120.0)
        exchange = feed.exchange
        self._outage = Outage(f"trades of {exchange} cannot be fetched", f"trades of {exchange} are fetched again")
        self._is_fillable = feed.rest.venue.rest.newest_trades is None
        self._walks_back = self._is_fillable and feed.rest.venue.rest.newest_first
        self._began_ms = self._now_ms()
        self._began = monotonic()
        self._beginning: dict[str, int] | None = None  # first minute of symbols that have not begun
        self._connected_at: dict[str, float] = {}
        self._jobs: list[_Job] = []
        self._made: dict[tuple[Series, int], float] = {}  # when minutes were made, until they are stored
        self._complete_until: dict[str, int] = {}
        self._kept: dict[str, int] = {}  # of those, what the cache has
        self._failures = 0  # of all calls, in a row
        self._not_before = 0.0
        self._repaired_until: dict[Series, int] = {}
        self._marks_at = 0.0
        self._lock = threading.Lock()
        self._left_open: list[Hole] = []
        self._closed: Candles = {}  # of the last minutes, where ids are only a hint

    def note(self, closed: Candles) -> None:
        """Keep the minutes with which the venue's are to be compared."""
        if self._is_fillable:
            return
        oldest = self._now_ms() - (MOST_MINUTES + 5) * MINUTE_MS
        with self._lock:
            own = {slot: candle for slot, candle in closed.items() if candle.source == "ticks"}
            self._closed |= {slot: candle for slot, candle in own.items() if slot.series in self._series}
            for slot in [slot for slot in self._closed if slot.start < oldest]:
                del self._closed[slot]

    def take_over(self, holes: Sequence[Hole]) -> None:
        """Fetch what an earlier run or another process left open."""
        with self._lock:  # symbols that were just added are followed at the next step
            series = {*map(self._of, self._feed.symbols)}
            self._left_open += [hole for hole in holes if hole.series in series]

    def step(self) -> Step:
        """Make the newest minute that is due again."""
        if self._beginning is None and not self._begin():
            return Step({}, IDLE_SECONDS)
        if self._series != frozenset(map(self._of, self._feed.symbols)):
            self._follow_symbols()
        self._find_jobs()
        self._keep_marks()
        if (due := self._next()) is None:
            return Step({}, IDLE_SECONDS)
        return Step(self._work(*due), 0.0)

    # What is to be done

    def _of(self, symbol: str) -> Series:
        return Series(Mode.LIVE, self._feed.exchange, symbol)

    def _now_ms(self) -> int:
        return milliseconds(self._clock())

    def _begin(self) -> bool:
        """Find out where the run before has ended."""
        own, farthest = minute_start(self._began_ms), minute_start(self._began_ms) - MOST_MINUTES * MINUTE_MS
        try:
            left = self._marks.complete_until(self._feed.exchange)
        except Unavailable:
            if self._monotonic() - self._began < MARKS_WAIT_SECONDS:
                return False
            left = dict.fromkeys(self._feed.symbols, farthest)
        self._beginning = {
            symbol: min(own, max(farthest, minute_start(left.get(symbol, own)))) for symbol in self._feed.symbols
        }
        self._complete_until = dict(self._beginning)
        return True

    def _follow_symbols(self) -> None:
        """Begin with symbols that were added, in their minute, and end with those that were removed."""
        assert self._beginning is not None
        series = frozenset(map(self._of, self._feed.symbols))
        began = minute_start(self._now_ms())
        for symbol in sorted(each.symbol for each in series - self._series):
            self._beginning[symbol] = self._complete_until[symbol] = began
        for each in self._series - series:
            self._beginning.pop(each.symbol, None)
            self._connected_at.pop(each.symbol, None)
        with self._lock:
            self._series = series
        for job in [job for job in self._jobs if job.series not in series]:
            self._give_up(job, "the symbol is not configured any more")

    def _find_jobs(self) -> None:
        for missing in self._feed.ids.missing():
            self._on_missing(missing)
        with self._lock:
            left_open, self._left_open = self._left_open, []
        for hole in left_open:
            gap = MissingIds(hole.series.symbol, hole.after_id, hole.before_id, hole.from_ms, hole.to_ms)
            self._add_job(gap, hole)
        for symbol in [*(self._beginning or ())]:
            self._begin_symbol(symbol)
        absent, oldest = self._feed.absent, self._now_ms() - GIVE_UP_SECONDS * 1000
        for job in [job for job in self._jobs if job.until < oldest and job.series.symbol in absent]:
            self._give_up(job, "the venue does not trade it any more")

    def _begin_symbol(self, symbol: str) -> None:
        """Make the minutes until the one in which the trades of a symbol began to come."""
        assert self._beginning is not None
        if (newest := self._feed.ids.newest(symbol)) is not None:
            until = newest[1]
        elif self._has_been_connected(symbol) and symbol in self._feed.rest_names:
            until = self._now_ms()
        else:
            return
        last = minute_start(until)
        since = min(last, max(self._beginning.pop(symbol), last - MOST_MINUTES * MINUTE_MS))
        starts = [*range(since, last + 1, MINUTE_MS)]
        self._jobs.append(_Job(self._of(symbol), starts, is_hint=not self._is_fillable))

    def _has_been_connected(self, symbol: str) -> bool:
        if not self._feed.is_connected(symbol):
            self._connected_at.pop(symbol, None)
            return False
        now = self._monotonic()
        return now - self._connected_at.setdefault(symbol, now) >= SUBSCRIBED_SECONDS

    def _on_missing(self, gap: MissingIds) -> None:
        first, last = minute_start(gap.from_ms), minute_start(gap.to_ms)
        for job in self._jobs:
            if job.series.symbol != gap.symbol or job.is_touched or job.is_cut or not job.gaps:
                continue
            if job.starts[0] <= first <= job.starts[-1] and last - job.starts[0] < MOST_MINUTES * MINUTE_MS:
                self._extend(job, gap, last)
                return
        self._add_job(gap, None)

    def _extend(self, job: _Job, gap: MissingIds, last: int) -> None:
        """One hole for all gaps of a minute: a venue that leaves ids out must not cost a row each."""
        job.add(gap)
        job.starts += range(job.starts[-1] + MINUTE_MS, last + 1, MINUTE_MS)
        job.until = job.starts[-1] + MINUTE_MS
        if job.hole is not None:
            job.hole = msgspec.structs.replace(
                job.hole,
                before_id=max(job.hole.before_id, gap.before_id),
                to_ms=max(job.hole.to_ms, gap.to_ms),
                changed_at=self._changed_at(job.hole),
            )

    def _add_job(self, gap: MissingIds, hole: Hole | None) -> None:
        starts = [*range(minute_start(gap.from_ms), minute_start(gap.to_ms) + 1, MINUTE_MS)]
        # The first and the last one have some of their trades; whole minutes between come as the venue's candles, too.
        is_cut = len(starts) > MOST_MINUTES
        starts = [starts[0], *starts[1 - MOST_MINUTES :]] if is_cut else starts
        near = [start for start in starts if start >= self._now_ms() - WALK_BACK_MS]
        is_too_old = self._walks_back and not near
        if self._walks_back and near:
            is_cut, starts = is_cut or len(near) < len(starts), near
        job = _Job(self._of(gap.symbol), starts, hole, is_hint=not self._is_fillable and hole is None, is_cut=is_cut)
        job.add(gap)
        self._jobs.append(job)
        if is_too_old:
            self._give_up(job, f"over {WALK_BACK_MS // MINUTE_MS} minutes old")
        elif hole is None and not job.is_hint:
            self._put(job, HoleState.OPEN)

    def _next(self) -> tuple[_Job, int] | None:
        """The newest minute that is over, of the jobs that need not wait; None if nothing is to be done now."""
        now, names = self._monotonic(), self._feed.rest_names
        if now < self._not_before:
            return None
        over_ms = self._now_ms() - MINUTE_MS
        found: tuple[_Job, int] | None = None
        for job in self._jobs:
            until = over_ms - (CANDLE_SETTLE_MS if job.is_hint else SETTLE_MS)
            if job.series.symbol not in names:
                continue
            over = job.starts[: bisect_right(job.starts, until)]
            start = next((start for start in reversed(over) if job.may_be_tried(start, now)), None)
            if start is not None and (found is None or start > found[1]):
                found = job, start
        return found

    # How it is done

    def _work(self, job: _Job, start: int) -> Candles:
        """Make a minute of a job again, and take it off."""
        job.is_touched = True
        name = self._feed.rest_names[job.series.symbol]
        try:
            made = self._compare(job, start, name) if job.is_hint else self._make(job, start, name)
        except NotFillable as error:
            self._give_up(job, str(error))
            return {}
        except OSError as error:
            self._failed(job, start, error)
            return {}
        self._failures = 0
        self._outage.over(job.series.symbol)
        self._take_off(job, start)
        return made

    def _take_off(self, job: _Job, start: int) -> None:
        """Take a minute that was made off a job."""
        job.failing.pop(start, None)
        job.starts.remove(start)
        if not job.is_hint and job.gaps and len(job.gaps) < MOST_GAPS and job.remaining <= 0:
            job.starts.clear()  # nothing is missing any more
        if not job.starts:
            self._done(job)

    def _make(self, job: _Job, start: int, name: str) -> Candles:
        newest = self._feed.ids.newest(job.series.symbol)
        newest_id = job.first_id if job.last_made == start + MINUTE_MS else newest and newest[0]
        trades = trades_of_minute(self._feed.rest, name, start, newest_id)
        self._made[job.series, start] = self._monotonic()
        if not trades:
            return {}
        self._share(job, start, trades)
        return {Slot(job.series, start): minute_candle(trades)}

    def _share(self, job: _Job, start: int, trades: Sequence[Trade]) -> None:
        """Take the trades of a minute for all jobs that it is to be made for: it is not fetched once for each."""
        for each in [each for each in self._jobs if each.series == job.series and start in each.starts]:
            each.found(trades)
            each.first_id, each.last_made, each.is_touched = trades[0].id, start, True
            if each is not job and not each.is_hint:
                self._take_off(each, start)

    def _compare(self, job: _Job, start: int, name: str) -> Candles:
        """Tell by the venue's candle whether a minute misses trades, and fetch them if it is quiet enough for that."""
        found = candles_between(self._feed.rest, name, start, start + MINUTE_MS, self._now_ms())
        with self._lock:
            ours = self._closed.get(Slot(job.series, start))
        theirs = found[start].values if start in found else None
        if theirs is None or theirs.volume is None:
            if ours is not None:
                raise RestFailed(f"{self._feed.rest.venue.name} has no candle of {job.series.symbol} yet")
            return {}
        if not (lacking := _lacking(ours, theirs.volume)):
            return {}
        made: Candles = {}
        reason = f"{self._feed.rest.venue.name} has no more trades"
        try:
            made = self._make(job, start, name)
            lacking = min(lacking, _lacking(made.get(Slot(job.series, start)), theirs.volume))
        except NotFillable as error:
            reason = str(error)
        if lacking:
            job.differing += lacking
            job.reason = reason
        return made

    def _failed(self, job: _Job, start: int, error: OSError) -> None:
        if isinstance(error, RestClosed):
            return
        now = self._monotonic()
        failing = job.failing.setdefault(start, _Failing(now))
        failing.failures += 1
        if now - failing.since >= GIVE_UP_SECONDS:
            self._give_up(job, f"in vain for {GIVE_UP_SECONDS / 60:g} minutes: {error}")
            return
        failing.not_before = now + self._backoff.pause(failing.failures)
        if not isinstance(error, BehindStream):  # the others would most likely fail as well
            self._failures += 1
            asked = error.pause_seconds if isinstance(error, VenueRefusal) else 0.0
            self._not_before = now + max(asked, self._backoff.pause(self._failures))
        self._outage.failed(job.series.symbol, f"at {job.series.symbol}: {error}")

    def _done(self, job: _Job) -> None:
        self._jobs.remove(job)
        if not job.gaps:
            self._repaired_until[job.series] = max(job.until, self._repaired_until.get(job.series, 0))
        if job.is_hint:
            if job.differing:
                text = f"{job.reason}; its candles have {job.differing:.8g} more volume"
                self._put(job, HoleState.GIVEN_UP, text)
            elif job.gaps and job.remaining < job.total:
                self._put(job, HoleState.FILLED)
        elif job.gaps and (job.remaining <= 0 or len(job.gaps) == MOST_GAPS):
            self._put(job, HoleState.FILLED)
        elif job.is_cut:
            self._put(job, HoleState.GIVEN_UP, f"longer than {MOST_MINUTES} minutes")
        elif job.gaps:
            self._put(job, HoleState.ABSENT, f"the venue has {job.total - job.remaining} of {job.total} trades")

    def _give_up(self, job: _Job, reason: str) -> None:
        self._jobs.remove(job)
        self._outage.over(job.series.symbol)
        self._put(job, HoleState.GIVEN_UP, reason)

    def _put(self, job: _Job, state: HoleState, reason: str = "") -> None:
        """Write the hole of a job; that of a start ends with the first trade that came."""
        now_ms = self._now_ms()
        if job.hole is None:
            if job.gaps:
                after_id, before_id = job.gaps[0].after_id, max(gap.before_id for gap in job.gaps)
                from_ms, to_ms = job.gaps[0].from_ms, max(gap.to_ms for gap in job.gaps)
            elif (newest := self._feed.ids.newest(job.series.symbol)) is not None:
                after_id, before_id = newest[0] - 1, newest[0]
                from_ms, to_ms = job.since, job.until - 1
            else:
                return
            job.hole = Hole(job.series, after_id, before_id, from_ms, to_ms, now_ms, now_ms)
        changed_at = self._changed_at(job.hole)
        job.hole = msgspec.structs.replace(job.hole, state=state, reason=reason, changed_at=changed_at)
        self._book.put(job.hole)

    def _changed_at(self, hole: Hole) -> int:
        """Now, but no earlier than the last change, though the clock was set back: the latest version is kept."""
        return max(hole.changed_at, self._now_ms())

    # Until when everything is complete

    def _keep_marks(self) -> None:
        now = self._monotonic()
        if now - self._marks_at < MARKS_SECONDS:
            return
        self._marks_at = now
        self._made = {key: at for key, at in self._made.items() if now - at < STORED_AFTER_SECONDS}
        bounds = self._bounds()
        for symbol in self._feed.symbols:
            if symbol not in (self._beginning or ()) and (until := self._until(self._of(symbol), bounds)):
                self._complete_until[symbol] = until
        if self._complete_until == self._kept:
            return
        try:
            self._marks.put_complete_until(self._feed.exchange, self._complete_until)
        except Unavailable:
            self._marks_at = now - MARKS_SECONDS + IDLE_SECONDS
        else:
            self._kept = dict(self._complete_until)

    def _bounds(self) -> dict[Series, int]:
        """The oldest minute of each series that is to be made again, or may not be stored yet."""
        farthest = self._now_ms() - MOST_MINUTES * MINUTE_MS
        starts = [*self._made, *((job.series, job.starts[0]) for job in self._jobs if job.starts[0] > farthest)]
        bounds: dict[Series, int] = {}
        for series, start in starts:
            bounds[series] = min(start, bounds.get(series, start))
        return bounds

    def _until(self, series: Series, bounds: Mapping[Series, int]) -> int:
        """The minute before which everything is complete or decided, and stored; 0 where that is unknown."""
        known = self._repaired_until.get(series, 0)
        if (newest := self._feed.ids.complete_until(series.symbol)) is not None:
            known = max(known, minute_start(newest - round(STORED_AFTER_SECONDS * 1000)))
        return min(known, bounds.get(series, known))


def _lacking(ours: Candle | None, volume: float) -> float:
    """By how much the venue's volume of a minute is more than ours."""
    own = 0.0 if ours is None or ours.amounts is None else ours.amounts.volume
    return volume - own if volume > own + 1e-9 * volume else 0.0
