"""Verification: closed minutes are compared with the venue's own candles.

A minute is compared once the venue has had some time to make its candle, several minutes of a symbol by one call. Where
they differ, the trades of the minute are fetched, once, and what is more complete is compared again with the candle as
the venue then has it, which may have been late itself. Minutes that the venue has and that never came are passed on as
the venue has them; which trades are missing is found by their ids (see repair).

The result is the minute itself, with `verified`, and the venue's values where they differ. A minute for which the venue
gives no candle stays unverified.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec

from marketflow.clock import Clock, milliseconds
from marketflow.feeds.backfill.comparison import difference_text, differences
from marketflow.feeds.backfill.minute_candle import minute_candle
from marketflow.feeds.backfill.minute_trades import NotFillable, trades_of_minute
from marketflow.feeds.backfill.rest_client import RestClient, RestClosed
from marketflow.feeds.backfill.steps import BUDGET_PAUSE_SECONDS, Step, has_spare_budget
from marketflow.feeds.backfill.venue_candles import RangeNotHonoured, candles_between, venue_minute
from marketflow.feeds.venues.limits import VenueRefusal
from marketflow.feeds.venues.venue import VenueCandle
from marketflow.logs import Outage, RateLimit
from marketflow.model import (
    MINUTE_MS,
    Candle,
    Candles,
    Mode,
    Series,
    Slot,
    TimeRange,
    VenueValues,
    minute_start,
    more_complete,
    put_more_complete,
)
from marketflow.tasks import Backoff

COMPARED_AFTER_MS = 75_000
"""How long after its end a minute is compared at the earliest."""

PASS_SECONDS = 60.0
"""Interval of the calls for a symbol at least: so much later a minute may be compared."""

SYMBOL_SECONDS = 1.0
"""Interval of the calls for all symbols together: with many of them a call compares several minutes."""

NEXT_SECONDS = 0.02
"""Pause between two symbols."""

IDLE_SECONDS = 1.0

FETCH_ATTEMPTS = 3
"""How often the trades of a minute that differs are asked for in vain."""

UNKNOWN_AFTER_MS = 15 * MINUTE_MS
"""How long the venue's candle of a minute is waited for."""

MOST_PENDING = 6 * 60
"""Minutes of a symbol that wait for the venue; beyond, the oldest stay unverified."""

SEAM_MS = 3 * MINUTE_MS
"""How far before the start of this run minutes may have had no candle yet when the history was fetched."""

KEPT_MARGIN_MS = 2 * MINUTE_MS
"""By how much candles are younger than the oldest the venue gives, when a call for them begins."""


@dataclass
class _Pending:
    """What is to be compared of a symbol, by the start of the minutes (Unix ms)."""

    asked_until: int
    """The first minute that was never asked for."""
    next_at: float
    minutes: dict[int, Candle] = field(default_factory=dict)
    came: set[int] = field(default_factory=set)
    """Minutes from `asked_until` on that have come, verified or not."""
    fetched: set[int] = field(default_factory=set)
    """Minutes whose trades have been fetched, and that are compared for the second time."""

    def drop(self, start: int) -> None:
        """Compare a minute no more."""
        self.minutes.pop(start, None)
        self.fetched.discard(start)


@dataclass
class _Difference:
    """A minute that differs, and whose trades are to be fetched."""

    slot: Slot
    values: VenueValues
    attempts: int = 0


class Verification:
    """The verification of one exchange, step by step: `step` is for one thread, the rest for any.

    Args:
        exchange: its name.
        client: asks its venue.
        rest_names: gives the venue's names of the symbols, as far as they are known.
        clock: wall-clock time.
        fills_seam: whether to pass on the last minutes before the start of this run as the venue has them.
        compared_after_ms: how long after its end a minute is compared at the earliest.
        monotonic: measures pauses, in seconds.
        on_unsent: called at each comparison with a symbol of which the venue has trades and sends none.
    """

    def __init__(
        self,
        exchange: str,
        client: RestClient,
        rest_names: Callable[[], Mapping[str, str]],
        clock: Clock,
        fills_seam: bool = True,
        compared_after_ms: int = COMPARED_AFTER_MS,
        monotonic: Callable[[], float] = time.monotonic,
        on_unsent: Callable[[str], None] = lambda symbol: None,
    ) -> None:
        self._on_unsent = on_unsent
        self._exchange, self._client, self._rest_names = exchange, client, rest_names
        self._clock, self._monotonic = clock, monotonic
        self._compared_after_ms = compared_after_ms
        self._begun = minute_start(milliseconds(clock()))
        self._first = self._begun - SEAM_MS if fills_seam else self._begun
        self._first_pass_at = monotonic() + compared_after_ms / 1000
        self._lock = threading.Lock()
        self._pending: dict[str, _Pending] = {}
        self._differing: deque[_Difference] = deque()
        self._backoff = Backoff(1.0, 60.0)
        self._failures = 0  # in a row
        self._not_before = 0.0
        self._outage = Outage(f"candles of {exchange} cannot be compared", f"candles of {exchange} are compared again")
        self._limit = RateLimit(60.0)
        self._unsent: dict[str, int] = {}  # the last minute with trades of which none came, by symbol
        self.results: Counter[str] = Counter()
        """How many minutes were verified, differ, had no candle of the venue, or were missing."""

    @property
    def unsent(self) -> frozenset[str]:
        """The symbols of which the venue has trades and sends none."""
        with self._lock:
            return frozenset(self._unsent).intersection(self._rest_names())

    def note(self, closed: Candles) -> None:
        """Take notice of minutes that the pipeline has closed: those of ticks that are not verified are compared."""
        with self._lock:
            for (series, start), candle in closed.items():
                if series.exchange != self._exchange or series.mode is not Mode.LIVE:
                    continue
                pending = self._of(series.symbol)
                if start >= pending.asked_until:
                    pending.came.add(start)
                if candle.source == "ticks" and start > self._unsent.get(series.symbol, start):
                    del self._unsent[series.symbol]
                if candle.source == "venue" or candle.verified is not None:
                    pending.drop(start)
                    continue
                put_more_complete(pending.minutes, start, candle)
                if len(pending.minutes) > MOST_PENDING:
                    pending.drop(min(pending.minutes))
                    self.results["no_candle"] += 1

    def step(self) -> Step:
        """Compare the minutes of one symbol that are due, or fetch the trades of one that differs."""
        now = self._monotonic()
        if now < self._not_before:
            return Step({}, min(self._not_before - now, IDLE_SECONDS))
        names = self._rest_names()
        symbol = self._next_symbol(names, now)
        if not self._differing and symbol is None:
            return Step({}, IDLE_SECONDS)
        if not has_spare_budget(self._client):
            return Step({}, BUDGET_PAUSE_SECONDS)
        try:
            minutes = self._make_again(names) if self._differing or symbol is None else self._compare(names, symbol)
        except OSError as error:
            return self._failed(error)
        self._failures = 0
        self._outage.over(self._exchange)
        return Step(minutes, NEXT_SECONDS)

    def _of(self, symbol: str) -> _Pending:
        return self._pending.setdefault(symbol, _Pending(self._first, self._first_pass_at))

    def _now_ms(self) -> int:
        return milliseconds(self._clock())

    def _due_until(self) -> int:
        """The first minute that is not due yet."""
        return minute_start(self._now_ms() - self._compared_after_ms)

    def _next_symbol(self, names: Mapping[str, str], now: float) -> str | None:
        """The symbol with minutes that are due that has waited longest."""
        due = self._due_until()
        with self._lock:
            waiting = {symbol: self._of(symbol) for symbol in names}
            ready = [
                symbol
                for symbol, pending in waiting.items()
                if now >= pending.next_at
                and (pending.asked_until < due or any(start < due for start in pending.minutes))
            ]
            return min(ready, key=lambda symbol: waiting[symbol].next_at, default=None)

    def _compare(self, names: Mapping[str, str], symbol: str) -> Candles:
        with self._lock:
            pending = self._pending[symbol]
            # Before the call: if it fails, the other symbols are not kept waiting.
            pending.next_at = self._monotonic() + max(PASS_SECONDS, SYMBOL_SECONDS * len(names))
            span = self._span(pending)
            ours = {start: candle for start, candle in pending.minutes.items() if start < span.until}
        theirs = self._candles(names[symbol], span)
        series = Series(Mode.LIVE, self._exchange, symbol)
        found: Candles = {}
        for start, candle in ours.items():
            slot = Slot(series, start)
            if (row := theirs.get(start)) is not None:
                found |= self._compared(slot, candle, row.values)
            elif start < self._now_ms() - UNKNOWN_AFTER_MS:
                self._done(slot, candle, "no_candle")
        with self._lock:
            lacking = [start for start in theirs if start >= pending.asked_until and start not in pending.came]
            if lacking and lacking[-1] >= self._begun and lacking[-1] > max(pending.came, default=0):
                self._unsent[symbol] = lacking[-1]
            pending.asked_until = max(pending.asked_until, span.until)
            pending.came = {start for start in pending.came if start >= pending.asked_until}
            if span.until < self._due_until():
                pending.next_at = 0.0
            is_unsent = symbol in self._unsent
        if is_unsent:
            self._on_unsent(symbol)
        missing = {Slot(series, start): venue_minute(theirs[start]) for start in lacking}
        self._log_missing(symbol, [start for start in lacking if start >= self._begun])
        return found | missing

    def _log_missing(self, symbol: str, starts: list[int]) -> None:
        if starts:
            self.results["missing"] += len(starts)
            text = f"no trades came of {len(starts)} minutes that have some, such as {symbol} {_utc(starts[0])}"
            self._limit.log("missing", "WARNING", f"{text}: the venue's candles are taken", exchange=self._exchange)

    def _span(self, pending: _Pending) -> TimeRange:
        """What one call asks for: from the oldest minute that is compared or was never asked for."""
        rest = self._client.venue.rest
        now_ms, due = self._now_ms(), self._due_until()
        since = min([pending.asked_until, *pending.minutes])
        if rest.candles_kept_ms is not None:
            since = max(since, minute_start(now_ms - rest.candles_kept_ms) + KEPT_MARGIN_MS)
        return TimeRange(since, min(due, since + rest.candles_a_call * MINUTE_MS))

    def _candles(self, rest_name: str, span: TimeRange) -> Mapping[int, VenueCandle]:
        if span.since >= span.until:
            return {}
        try:
            return candles_between(self._client, rest_name, *span, self._now_ms())
        except RangeNotHonoured as error:
            self._limit.log("range", "WARNING", f"candles are not compared: {error}", exchange=self._exchange)
            return {}

    def _compared(self, slot: Slot, candle: Candle, values: VenueValues) -> Candles:
        which = self._differences(candle, values)
        if not which:
            return self._verified(slot, candle, candle)
        if slot.start in self._pending[slot.series.symbol].fetched:
            return self._differs(slot, candle, values, which)
        if all(slot != each.slot for each in self._differing):
            self._differing.append(_Difference(slot, values))
        return {}

    def _verified(self, slot: Slot, compared: Candle, candle: Candle) -> Candles:
        self._done(slot, compared, "verified")
        return {slot: msgspec.structs.replace(candle, verified=True, venue=None)}

    def _differs(self, slot: Slot, candle: Candle, values: VenueValues, which: list[str]) -> Candles:
        self._done(slot, candle, "different")
        text = f"a candle differs from the venue's: {slot.series.symbol} {_utc(slot.start)}: "
        text += difference_text(candle, values, which)
        self._limit.log("differs", "WARNING", text, exchange=self._exchange)
        return {slot: msgspec.structs.replace(candle, verified=False, venue=values)}

    def _differences(self, candle: Candle, values: VenueValues) -> list[str]:
        return differences(candle, values, self._client.venue.rest.opens_at_last_close)

    def _make_again(self, names: Mapping[str, str]) -> Candles:
        """Fetch the trades of a minute that differs; compare it again at once, and at the next pass if it differs."""
        differing = self._differing.popleft()
        slot, symbol = differing.slot, differing.slot.series.symbol
        pending = self._pending[symbol]
        candle = pending.minutes.get(slot.start)
        if candle is None or symbol not in names:
            return {}
        try:
            trades = trades_of_minute(self._client, names[symbol], slot.start, None)
        except NotFillable:
            trades = []
        except OSError:
            differing.attempts += 1
            if differing.attempts < FETCH_ATTEMPTS:
                self._differing.append(differing)
            else:
                pending.fetched.add(slot.start)
            raise
        better = more_complete(candle, minute_candle(trades)) if trades else candle
        if not self._differences(better, differing.values):
            return self._verified(slot, candle, better)
        with self._lock:
            if pending.minutes.get(slot.start) is not candle:
                return {}  # it has changed meanwhile, and is compared as it is now
            pending.minutes[slot.start] = better
            pending.fetched.add(slot.start)
        return {} if better is candle else {slot: better}

    def _done(self, slot: Slot, compared: Candle, result: str) -> None:
        """Count a result; a version of the minute that came meanwhile is compared for itself."""
        self.results[result] += 1
        with self._lock:
            pending = self._pending[slot.series.symbol]
            if pending.minutes.get(slot.start) is compared:
                pending.drop(slot.start)

    def _failed(self, error: OSError) -> Step:
        if isinstance(error, RestClosed):
            return Step({}, IDLE_SECONDS)
        self._failures += 1
        asked = error.pause_seconds if isinstance(error, VenueRefusal) else 0.0
        self._not_before = self._monotonic() + max(self._backoff.pause(self._failures), asked)
        self._outage.failed(self._exchange, str(error))
        return Step({}, IDLE_SECONDS)


def _utc(at: int) -> str:
    return datetime.fromtimestamp(at / 1000, UTC).strftime("%Y-%m-%dT%H:%MZ")
