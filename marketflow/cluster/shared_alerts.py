"""Alerts of several ingest processes: the leader evaluates what all of them write.

Slices are read from Redis some tenths of a second after their end, when all owners have written them, and are evaluated
in the order of their time: so the next leader finds the same events, with the same ids, in the same slices. It begins
where the previous leader's events are stored for certain; later events that are stored already are not stored again.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import Protocol

from marketflow.alerts.alert_model import AlertRule
from marketflow.alerts.alert_service import AlertService
from marketflow.alerts.slice_follower import LATEST, SliceFollower, SliceReader
from marketflow.alerts.stale_feeds import StaleFeeds
from marketflow.clock import Clock, milliseconds
from marketflow.cluster.messages import AlertMark
from marketflow.errors import Unavailable
from marketflow.model import SLICE_MS, FeedState, Hole, Mode, Series, Tick, slice_start

STEP_SECONDS = 0.2
"""Interval of the steps."""

PAUSE_FACTOR = 3
"""Pause after a step as a multiple of its duration: ten thousand series take half a second to read."""

SETTLED_MS = 300
"""Time from the end of a slice to its evaluation: its owner has written it by then."""

LATE_MS = 10_000
"""How much later than others a slice may be written, as by the standby of an owner that has died."""

REPLAYED_MS = 300_000
"""How far back a new leader evaluates slices: they are kept for little longer."""

CHUNK_MS = 10_000
"""Event time that one step evaluates of older slices."""

CHECK_MS = 500
"""Interval at which the mark is written, and feeds and holes are checked."""

MARK_SECONDS = 5.0
"""How long a new leader waits for a Redis that does not answer with the mark, as during a failover."""

JUST_STALE_MS = 30_000
"""Time since a feed became stale within which its event may not have been stored."""

WRITTEN_LATE_MS = 300_000
"""How long after they were found holes are read: they are stored once PostgreSQL can be used."""


class Owners(Protocol):
    """The states of the owners, and the store of the mark; see OwnerStates."""

    def feed_states(self, mode: Mode, exchanges: Iterable[str]) -> Mapping[str, FeedState]:
        """Return the states of the feeds of exchanges."""
        ...

    def mark(self) -> AlertMark | None:
        """Return the mark of the previous leader."""
        ...

    def put_mark(self, mark: AlertMark) -> None:
        """Store the mark."""
        ...


class SharedAlerts:
    """Evaluates the rules of all exchanges, step by step, in the leader.

    Args:
        alerts: evaluates rules and stores events.
        slices: those of all processes.
        owners: of the shards.
        holes_found: returns the holes that were found at a time or later (Unix ms); raises Unavailable.
        mode: returns the current mode.
        series: all configured ones.
        stale_after_ms: how long a feed may be without a connection before it is stale.
        clock: wall-clock time.
        monotonic: seconds, for pauses.
    """

    def __init__(
        self,
        alerts: AlertService,
        slices: SliceReader,
        owners: Owners,
        holes_found: Callable[[int], list[Hole]],
        mode: Callable[[], Mode],
        series: Iterable[Series],
        stale_after_ms: int,
        clock: Clock,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._alerts, self._owners, self._holes_found = alerts, owners, holes_found
        self._mode, self._clock, self._monotonic = mode, clock, monotonic
        self._lock = threading.Lock()
        self._follower = SliceFollower(slices)
        self._stale = StaleFeeds(stale_after_ms)
        self._known_holes: set[tuple[Series, int]] = set()
        self._begun = False
        self._begin_by = 0.0
        self._first_rule_at: int | None = None  # where there was none, and so no step, before
        self._evaluated_until = self._stored_until = self._holes_since = self._checked_at = 0
        self._complete_until = 0  # as `_evaluated_until`, of all series
        self._next_step = 0.0
        self._watched_as_of: tuple[Mode, int, object] | None = None
        self._watched: set[Series] = set()
        self.take_series(series)

    def take_series(self, series: Iterable[Series]) -> None:
        """Replace the configured series."""
        of_symbol: defaultdict[tuple[Mode, str], list[Series]] = defaultdict(list)
        for each in series:
            of_symbol[each.mode, each.symbol].append(each)
        self._of_symbol = dict(of_symbol)

    def begin(self) -> None:
        """Begin where the previous leader has ended: this process is the leader from now on."""
        with self._lock:
            self._begun, self._first_rule_at = False, None
            self._begin_by = self._monotonic() + MARK_SECONDS
            self._follower.begin(LATEST)
            self._alerts.begin_again()

    def newest(self, mode: Mode, symbol: str) -> dict[str, Tick]:
        """Return the newest tick of a symbol by exchange, as far as it was evaluated."""
        return {each.exchange: tick for each, tick in self._follower.newest(self._series_of(mode, symbol)).items()}

    def follow(self, rules: Collection[AlertRule]) -> None:
        """Read the current prices of the symbols of new rules, before these are evaluated."""
        if self._begun:
            symbols = {symbol for rule in rules if (symbol := getattr(rule, "symbol", None)) is not None}
            self._follower.follow(each for symbol in symbols for each in self._series_of(self._mode(), symbol))
        elif rules and self._first_rule_at is None:
            self._first_rule_at = milliseconds(self._clock())

    def step(self) -> None:
        """Evaluate new slices; to be called periodically."""
        with self._lock:
            began = self._monotonic()
            if not self._alerts.is_ready or began < self._next_step:
                return
            now_ms, evaluator = milliseconds(self._clock()), self._alerts.evaluator
            if not self._begun:
                try:
                    mark = self._owners.mark()
                except Unavailable:
                    if began < self._begin_by:
                        return
                    mark = None
                self._begin_at(mark, now_ms)
            if not 0 <= now_ms - self._checked_at < CHECK_MS:
                self._checked_at = now_ms
                if not self._alerts.pending:
                    self._stored_until = max(self._stored_until, self._complete_until - LATE_MS)
                    self._put_mark()
                if evaluator.watches_feeds:
                    self._check_feeds(now_ms)
                if evaluator.watches_holes:
                    self._check_holes(now_ms)
            self._evaluate(now_ms)
            self._next_step = (ended := self._monotonic()) + PAUSE_FACTOR * (ended - began)

    def _begin_at(self, mark: AlertMark | None, now_ms: int) -> None:
        mode, begin = self._mode(), LATEST
        if mark is None or mark.mode is not mode:
            mark = AlertMark(now_ms if self._first_rule_at is None else self._first_rule_at, mode)
            begin = LATEST if self._first_rule_at is None else self._first_rule_at
        else:
            # Earlier, as changes within a period are compared with its begin; earlier events are not admitted.
            begin = max(mark.until, now_ms - REPLAYED_MS) - self._alerts.evaluator.longest_period_ms(REPLAYED_MS)
        self._alerts.evaluator.admit_from(mark.until)
        self._follower.begin(begin)
        self._evaluated_until = self._complete_until = min(begin, now_ms)
        self._stored_until = self._holes_since = mark.until
        self._known_holes.clear()
        self._stale.begin(mode, mark.stale)
        for exchange, at in mark.stale.items():
            if at >= now_ms - JUST_STALE_MS:
                self._alerts.feeds_stale(mode, [exchange], at)
        self._begun = True

    def _put_mark(self) -> None:
        with suppress(Unavailable):  # the next leader begins earlier, and stores nothing twice
            self._owners.put_mark(AlertMark(self._stored_until, mode := self._mode(), self._stale.held(mode)))

    def _evaluate(self, now_ms: int) -> None:
        settled, until = slice_start(now_ms - SETTLED_MS), None
        while until != settled:
            until = min(settled, self._evaluated_until + CHUNK_MS)
            for start, candles in self._follower.news(self._watched_series(), until):
                self._alerts.evaluate_slice(candles, start + SLICE_MS)
            self._evaluated_until = until
            if not self._follower.is_behind:
                self._complete_until = until

    def _watched_series(self) -> set[Series]:
        """Return the series of the current mode that rules are about."""
        evaluator = self._alerts.evaluator
        as_of = self._mode(), evaluator.times_indexed, self._of_symbol
        if as_of != self._watched_as_of:
            self._watched_as_of, self._watched = as_of, evaluator.watched(self._series_of, as_of[0])
        return self._watched

    def _series_of(self, mode: Mode, symbol: str) -> list[Series]:
        return self._of_symbol.get((mode, symbol), [])

    def _check_feeds(self, now_ms: int) -> None:
        mode = self._mode()
        exchanges = {each.exchange for of in self._of_symbol.values() for each in of if each.mode is mode}
        new = self._stale.take(mode, self._owners.feed_states(mode, exchanges), now_ms)
        if new:
            self._put_mark()  # before the events: the next leader finds them with the same time
            self._alerts.feeds_stale(mode, new, now_ms)

    def _check_holes(self, now_ms: int) -> None:
        try:
            holes = self._holes_found(self._holes_since)
        except Unavailable:
            return
        found = {(hole.series, hole.after_id): hole for hole in holes}
        new = [key for key in found if key not in self._known_holes and key[0].mode is self._mode()]
        self._known_holes = (self._known_holes & found.keys()) | {*new}
        for key in new:
            self._alerts.hole_found(found[key])
        self._holes_since = now_ms - WRITTEN_LATE_MS
