"""History: minutes that the archive lacks, from the venue's own candles, the newest first.

At each start the minutes of the configured time before it that are not stored are fetched, so after a downtime as well.
They are stored at once, each call's minutes in one write that is waited for; the pipeline is passed those of the last
day, which memory and cache hold. Memory does not grow with the length of the history.

Where a minute has no row, either it was never fetched or nothing was traded. The store therefore keeps for which times
a series is complete, apart from the minutes, and these are never asked for again; of the other times only those that
lack minutes are. So a restart asks for what came after the last history, and for minutes without trades once more.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from loguru import logger

from marketflow.clock import Clock, milliseconds
from marketflow.errors import Unavailable
from marketflow.feeds.backfill.rest_client import RestClient, RestClosed
from marketflow.feeds.backfill.steps import BUDGET_PAUSE_SECONDS, Step, has_spare_budget
from marketflow.feeds.backfill.venue_candles import RangeNotHonoured, candles_between, venue_minute
from marketflow.feeds.venues.limits import VenueRefusal
from marketflow.logs import Outage
from marketflow.model import MINUTE_MS, Candles, Mode, Series, Slot, TimeRange, minute_start
from marketflow.tasks import Backoff

IDLE_SECONDS = 5.0
"""Interval at which symbols are looked for that the venue did not have."""

BEGIN_PAUSE_SECONDS = 0.2
"""Interval at which the first names of symbols are looked for."""

STORE_PAUSE_SECONDS = 1.0
"""Pause while PostgreSQL is unavailable, which the pipeline logs."""

PROGRESS_SECONDS = 30.0

SETTLED_MS = 6 * MINUTE_MS
"""A minute without a candle may get one late: so long after it nothing was traded in it."""

KEPT_MARGIN_MS = 2 * MINUTE_MS
"""By how much candles are younger than the oldest the venue gives, when a call for them begins."""


class FetchedMinuteStore(Protocol):
    """Where minutes that are fetched from venues are kept for good."""

    def incomplete(self, series: Iterable[Series], since: int, until: int) -> dict[Series, list[TimeRange]]:
        """The parts of a time range for which minutes of a series may be missing, in ascending order.

        Raises:
            Unavailable: the archive cannot be queried now.
        """
        ...

    def missing(self, series: Series, since: int, until: int) -> Sequence[int]:
        """The starts of the minutes of a series within a range that have no row, in ascending order.

        Raises:
            Unavailable: the archive cannot be queried now.
        """
        ...

    def store(self, series: Series, minutes: Candles, complete: TimeRange | None) -> None:
        """Store minutes of a series, and then that a range of it is complete.

        Raises:
            Unavailable: not stored, or not confirmed; to be tried again.
        """
        ...


class History:
    """The history of one exchange, step by step; for one thread at a time.

    Args:
        exchange: its name.
        client: asks its venue.
        rest_names: gives the venue's names of the symbols, as far as they are known.
        span_ms: how far back minutes are fetched.
        store: where they are kept.
        cached_ms: how far back memory and cache hold minutes.
        clock: wall-clock time.
        monotonic: measures pauses and progress, in seconds.
    """

    def __init__(
        self,
        exchange: str,
        client: RestClient,
        rest_names: Callable[[], Mapping[str, str]],
        span_ms: int,
        store: FetchedMinuteStore,
        cached_ms: int,
        clock: Clock,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._exchange, self._client, self._rest_names = exchange, client, rest_names
        self._span_ms, self._store, self._cached_ms = span_ms, store, cached_ms
        self._clock, self._monotonic = clock, monotonic
        self._begun: set[str] = set()
        self._remaining: dict[Series, list[TimeRange]] = {}  # ascending, none of them empty
        self._backoff = Backoff(1.0, 60.0)
        self._failures: dict[Series | None, int] = {}  # in a row; None: of all calls
        self._not_before: dict[Series | None, float] = {}
        self._outage = Outage(f"history of {exchange} cannot be fetched", f"history of {exchange} is fetched again")
        self._limited: set[str] = set()  # reasons that have been logged
        self._progress = _Progress(exchange, monotonic)

    def note(self, closed: Candles) -> None:
        """Do nothing: what is closed now is no history."""

    def step(self) -> Step:
        """Fetch and store the newest minutes that are missing, of one series."""
        try:
            return self._step()
        except Unavailable:
            return Step({}, STORE_PAUSE_SECONDS if self._begun else BEGIN_PAUSE_SECONDS)

    def _step(self) -> Step:
        names = self._rest_names()
        if gone := self._begun - names.keys():
            self._end(gone)
        if new := names.keys() - self._begun:
            self._begin(new)
        if not self._remaining:
            self._progress.end()
            return Step({}, IDLE_SECONDS if self._begun else BEGIN_PAUSE_SECONDS)
        series = self._next_series()
        if series is None or not has_spare_budget(self._client):
            return Step({}, BUDGET_PAUSE_SECONDS)
        began = self._monotonic()
        minutes = self._fetch(series, names[series.symbol])
        self._progress.log(self._remaining)
        # As long as a step: PostgreSQL has other work.
        return Step(minutes, self._monotonic() - began)

    def _now_ms(self) -> int:
        return milliseconds(self._clock())

    def _begin(self, symbols: Iterable[str]) -> None:
        until = minute_start(self._now_ms())
        series = [Series(Mode.LIVE, self._exchange, symbol) for symbol in symbols]
        ranges = self._store.incomplete(series, max(until - self._span_ms, 0), until)
        self._remaining |= ranges
        self._begun |= {*symbols}
        self._progress.begin(self._span_ms, series, ranges)

    def _end(self, symbols: set[str]) -> None:
        """Fetch no more of symbols that the venue trades no more; they begin anew if it does again."""
        self._begun -= symbols
        self._remaining = {each: ranges for each, ranges in self._remaining.items() if each.symbol not in symbols}
        for symbol in symbols:
            self._outage.over(symbol)

    def _next_series(self) -> Series | None:
        """The series with the newest missing minutes, of those that need not wait."""
        now = self._monotonic()
        if now < self._not_before.get(None, now):
            return None
        ready = [each for each in self._remaining if now >= self._not_before.get(each, now)]
        return max(ready, key=lambda each: self._remaining[each][-1].until, default=None)

    def _fetch(self, series: Series, rest_name: str) -> Candles:
        rest = self._client.venue.rest
        since, until = self._remaining[series][-1]
        chunk = TimeRange(max(since, until - rest.candles_a_call * MINUTE_MS), until)
        if rest.candles_kept_ms is not None:
            oldest = minute_start(self._now_ms() - rest.candles_kept_ms) + KEPT_MARGIN_MS
            if chunk.since < oldest:
                self._log_limit(f"{rest.candles_kept_ms // 3_600_000} hours are the history that the venue gives")
                if chunk.until <= oldest:
                    del self._remaining[series]
                    return {}
                chunk = TimeRange(oldest, until)
        missing = self._store.missing(series, *chunk)
        if not missing:
            return self._stored(series, chunk, {})
        self._progress.on_missing()
        try:
            found = self._ask(series, rest_name, missing)
        except RangeNotHonoured as error:
            if rest.candles_kept_ms is not None:
                self._failed(series, error)
            else:
                self._log_limit(f"older minutes of {series.symbol} are not fetched: {error}")
                del self._remaining[series]
            return {}
        except OSError as error:
            self._failed(series, error)
            return {}
        self._succeeded(series)
        return self._stored(series, chunk, found)

    def _ask(self, series: Series, rest_name: str, missing: Sequence[int]) -> Candles:
        theirs = candles_between(self._client, rest_name, missing[0], missing[-1] + MINUTE_MS, self._now_ms())
        return {Slot(series, start): venue_minute(theirs[start]) for start in missing if start in theirs}

    def _stored(self, series: Series, chunk: TimeRange, minutes: Candles) -> Candles:
        """Store the minutes of a part; return those that memory and cache hold."""
        now_ms = self._now_ms()
        settled = min(chunk.until, minute_start(now_ms) - SETTLED_MS)
        self._store.store(series, minutes, TimeRange(chunk.since, settled) if settled > chunk.since else None)
        self._progress.rows += len(minutes)
        ranges = self._remaining[series]
        newest = ranges.pop()
        if newest.since < chunk.since:
            ranges.append(TimeRange(newest.since, chunk.since))
        if not ranges:
            del self._remaining[series]
        return {slot: candle for slot, candle in minutes.items() if slot.start >= now_ms - self._cached_ms}

    def _failed(self, series: Series, error: OSError) -> None:
        """Try again after a pause: this series, or all of them where the venue asks for the pause."""
        if isinstance(error, RestClosed):
            return
        asked = error.pause_seconds if isinstance(error, VenueRefusal) else 0.0
        who = None if asked else series
        failures = self._failures[who] = self._failures.get(who, 0) + 1
        self._not_before[who] = self._monotonic() + max(self._backoff.pause(failures), asked)
        self._outage.failed(series.symbol, f"at {series.symbol}: {error}")

    def _succeeded(self, series: Series) -> None:
        for who in (None, series):
            self._failures.pop(who, None)
            self._not_before.pop(who, None)
        self._outage.over(series.symbol)

    def _log_limit(self, text: str) -> None:
        if text not in self._limited:
            self._limited.add(text)
            logger.bind(exchange=self._exchange).warning("history is shorter than configured: {}", text)


class _Progress:
    """Logs how far the history of an exchange has come."""

    def __init__(self, exchange: str, monotonic: Callable[[], float]) -> None:
        self._exchange, self._monotonic = exchange, monotonic
        self._began_at: float | None = None
        self._logged_at = 0.0
        self._total_ms = 0
        self._beginning = ""  # what is logged once a minute is found to be missing
        self.rows = 0

    def begin(self, span_ms: int, series: list[Series], ranges: Mapping[Series, list[TimeRange]]) -> None:
        if self._began_at is None:
            self._began_at = self._logged_at = self._monotonic()
            self._total_ms = self.rows = 0
        self._total_ms += _length_ms(ranges)
        hours = span_ms / 3_600_000
        self._beginning = f"history begins: minutes of the last {hours:g} h that are missing symbols={len(series)}"

    def on_missing(self) -> None:
        """Take notice of minutes that are missing: there is something to fetch."""
        if self._beginning:
            logger.bind(exchange=self._exchange).info(self._beginning)
            self._beginning = ""

    def log(self, remaining: Mapping[Series, list[TimeRange]]) -> None:
        now = self._monotonic()
        if now - self._logged_at >= PROGRESS_SECONDS:
            self._logged_at = now
            done = 1 - _length_ms(remaining) / self._total_ms if self._total_ms else 1.0
            logger.bind(exchange=self._exchange).info("history goes on done={:.0%} minutes={}", done, self.rows)

    def end(self) -> None:
        if self._began_at is not None:
            seconds, self._began_at = self._monotonic() - self._began_at, None
            level = "DEBUG" if self._beginning else "INFO"  # that nothing was missing is no news
            text = "history is fetched minutes={} seconds={:.1f}"
            logger.bind(exchange=self._exchange).log(level, text, self.rows, seconds)


def _length_ms(ranges: Mapping[Series, list[TimeRange]]) -> int:
    return sum(each.until - each.since for parts in ranges.values() for each in parts)
