"""Makes the candles of the stream, equal to what /candles answers at the same moment.

Of each series of the cache that a candle series consists of, the rows of the archive are kept, which are the same for a
whole minute; the last minutes are read from the cache whenever it may have changed. So a candle costs no query of the
archive, and one that is over is sent as closed when the clock says so. A minute that is older than those of the cache
was corrected when the writer publishes it: its candles are read anew once the archive has it.

Idle while no candle series has a subscriber.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec
from msgspec import field, structs

from marketflow.api.queries.boundaries import INTERVALS, Grid, horizon, oldest_kept_minute, split_between
from marketflow.api.queries.candles import CandleRequest, CandleRows, Combine, folded
from marketflow.api.queries.known_holes import KnownHoles, Span, touched
from marketflow.api.queries.prices import PriceQueries
from marketflow.api.queries.reference import reference_candles
from marketflow.api.routes.charting.candle_objects import candle_objects, with_vwap_of_all
from marketflow.api.streaming.candle_stream.candle_series import CandleSeries, CandleSlot
from marketflow.api.streaming.events import StreamCandle
from marketflow.api.streaming.versioned_state import VersionedState
from marketflow.clock import milliseconds
from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS, REFERENCE, Candle, Series, Slot, Tick, merge_all
from marketflow.stores.ports import ArchiveReader, CandleRange, SlotAnnouncements
from marketflow.tasks import raise_if_cancelled

LAST_CANDLES = 4
"""Candles of a series of which the archive's rows are kept: where the clock of an exchange is ahead, the last one may
be the third after the last closed one."""

PASS_SECONDS = 0.1
"""Shortest interval between two versions of a candle."""

REST = 1.25
"""Pause after a pass as a multiple of the CPU time that it took."""

POLL_SECONDS = 0.5
"""Interval at which all candles are made anew while announcements are unreliable."""

ROWS_AGAIN_SECONDS = 5.0
"""Interval at which the archive is asked again while it is unavailable."""

HOLES_SECONDS = 2.0
"""Interval at which known holes are read."""

SERIES_A_STEP = 20
"""Candle series that are made before the event loop runs other tasks. 440 on 320 series, all changed, take 80 ms."""

SERIES_A_QUERY = 40
"""Series whose rows one query of the archive reads."""

MOST_CORRECTIONS = 5_000
"""Corrected minutes that wait until the archive has them; beyond that the oldest are dropped."""

CORRECTION_SECONDS = 0.5
"""Pause before the archive is asked for a corrected minute again; doubled each time, to LONGEST_CORRECTION_SECONDS."""

LONGEST_CORRECTION_SECONDS = 10.0

VERSIONS_KNOWN = 32
"""Candles of a series whose versions are remembered, so that each is sent once."""


class _Sent(NamedTuple):
    """What was sent of a candle."""

    candle: Candle
    is_closed: bool
    is_incomplete: bool


class _Rows(NamedTuple):
    """The candles of a series of the cache until `split` (Unix ms), from the archive.

    Where it is unavailable they are from the cache, and those that open before `known_from` may be incomplete.
    """

    candles: dict[int, Candle]
    split: int
    known_from: int = 0
    of_archive: bool = True


class _Followed(msgspec.Struct, dict=True, eq=False):
    """A candle series with subscribers."""

    key: CandleSeries
    series: tuple[Series, ...]
    subscribers: int = 0
    sent: dict[int, _Sent] = field(default_factory=dict)  # by start
    sent_from: int | None = None
    """Start of the last candle that was closed when the first version was made; None before."""
    made_from: int = 0
    """Start of the oldest candle that the last pass has made."""
    closes_at: int = 0
    """When the next candle closes (Unix ms)."""

    def __post_init__(self) -> None:
        self.grid: Grid = INTERVALS[self.key.interval]
        self.combine: Combine = reference_candles if self.key.exchange == REFERENCE else merge_all


class _Correction(msgspec.Struct):
    """A corrected minute that the archive may not have yet."""

    candle: Candle
    pause: float = CORRECTION_SECONDS
    due_at: float = 0.0


class LiveCandles:
    """Makes the candles that have subscribers; for one event loop.

    Args:
        exchanges: all configured exchanges.
        prices: reads the cache, and the clock.
        archive: has the rows, uncached.
        state: where the candles are put.
        announced: changes of the cache.
        holes: says which candles are incomplete.
    """

    def __init__(
        self,
        exchanges: Sequence[str],
        prices: PriceQueries,
        archive: ArchiveReader,
        state: VersionedState,
        announced: SlotAnnouncements,
        holes: KnownHoles | None = None,
    ) -> None:
        self._exchanges = exchanges
        self._prices = structs.replace(prices, archive=archive)
        self._state = state
        self._announced = announced
        self._holes = holes
        self._followed: dict[CandleSeries, _Followed] = {}
        self._by_series: defaultdict[Series, list[_Followed]] = defaultdict(list)
        self._wanted = asyncio.Event()
        self._due: dict[_Followed, None] = {}
        self._has_due = asyncio.Event()
        self._archive_due = asyncio.Event()
        self._rows: dict[tuple[Series, str], _Rows] = {}  # by series and interval
        self._outdated: set[tuple[Series, str]] = set()
        self._corrections: dict[Slot, _Correction] = {}
        self._spans: dict[Series, list[Span]] = {}
        self._reliable: object = None
        self._closes_at = 0
        self._poll_at = self._rows_at = self._holes_at = self._corrections_at = 0.0
        self._rows_until = 0  # where the last reading of rows ended (Unix ms)
        self._rows_due = False
        self._cache_failed = False

    # Subscribers

    def follow(self, chosen: Iterable[CandleSeries], subscribers: int) -> None:
        """Count subscribers to candle series; a negative number has left."""
        for key in chosen:
            if (followed := self._followed.get(key)) is None:
                followed = self._followed[key] = self._begin(key)
            followed.subscribers += subscribers
            if not followed.subscribers:
                self._end(followed)
        if self._followed:
            self._wanted.set()
        else:
            self._wanted.clear()
        self._has_due.set()

    def _begin(self, key: CandleSeries) -> _Followed:
        exchanges = self._exchanges if key.exchange in (None, REFERENCE) else (key.exchange,)
        series = tuple(Series(self._state.mode, exchange, key.symbol) for exchange in exchanges if exchange)
        followed = _Followed(key, series)
        for each in series:
            self._by_series[each].append(followed)
        self._due[followed] = None
        self._expect_rows()
        return followed

    def _expect_rows(self) -> None:
        """Read rows that are missing, at once."""
        self._rows_due, self._rows_at = True, 0.0
        self._archive_due.set()

    def _end(self, followed: _Followed) -> None:
        del self._followed[followed.key]
        self._due.pop(followed, None)
        self._state.end_candles(followed.key)
        for each in followed.series:
            self._by_series[each].remove(followed)
            if not any(other.key.interval == followed.key.interval for other in self._by_series[each]):
                self._rows.pop((each, followed.key.interval), None)
                self._outdated.discard((each, followed.key.interval))
            if not self._by_series[each]:
                del self._by_series[each]

    def reset(self) -> None:
        """Begin again: the mode was switched."""
        counts = {key: followed.subscribers for key, followed in self._followed.items()}
        self._followed.clear()
        self._by_series.clear()
        self._due.clear()
        self._rows.clear()
        self._outdated.clear()
        self._corrections.clear()
        self._spans.clear()
        self._holes_at = 0.0
        for key, subscribers in counts.items():
            self.follow([key], subscribers)

    def take_exchanges(self, exchanges: Sequence[str]) -> None:
        """Replace the configured exchanges; nobody follows candles of others any more."""
        self._exchanges = exchanges
        self.reset()

    # Changes

    def take(self, announced: Iterable[tuple[Series, Tick]]) -> None:
        """Take newest ticks: their candles have changed."""
        if self._by_series:
            for series, _ in announced:
                self._mark(self._by_series.get(series, ()))

    def _take_slots(self, slots: Sequence[tuple[Slot, Candle | None]]) -> None:
        split = split_between(self._now())
        for slot, candle in slots:
            if (affected := self._by_series.get(slot.series)) is None:
                continue
            self._mark(affected)
            if candle is not None and slot.start < split:
                self._correct(slot, candle, affected)

    def _correct(self, slot: Slot, candle: Candle, affected: Sequence[_Followed]) -> None:
        """Read an old minute from the archive, unless nobody was sent a candle of it and it is no correction."""
        since = min((each.sent_from for each in affected if each.sent_from is not None), default=0)
        if candle.version == 1 and slot.start + MINUTE_MS <= since:
            return
        self._corrections.pop(slot, None)
        self._corrections[slot] = _Correction(candle)
        if len(self._corrections) > MOST_CORRECTIONS:
            del self._corrections[next(iter(self._corrections))]
        self._corrections_at = 0.0

    def _mark(self, affected: Iterable[_Followed]) -> None:
        for each in affected:
            self._due[each] = None
        self._has_due.set()

    def _mark_all(self) -> None:
        self._mark(self._followed.values())

    def check(self, reliable: object) -> None:
        """Mark what changes without an announcement.

        Args:
            reliable: id of the period in which no change of the cache is missed; None outside of such a period.
        """
        if not self._followed:
            return
        now = time.monotonic()
        is_reliable = self._announced.live and reliable is not None and not self._cache_failed
        period = (reliable, self._announced.times_live) if is_reliable else None
        if period != self._reliable or (period is None and now >= self._poll_at):
            self._poll_at = now + POLL_SECONDS
            self._reliable = period
            self._mark_all()
        if self._now() >= self._closes_at:
            self._mark([each for each in self._followed.values() if self._now() >= each.closes_at])
            self._closes_at = min(each.closes_at for each in self._followed.values())
        if self._lacks_rows(now) or now >= self._holes_at or (self._corrections and now >= self._corrections_at):
            self._archive_due.set()

    def _now(self) -> int:
        return milliseconds(self._prices.clock())

    # Tasks

    async def make(self) -> None:
        """Make all candles that have changed, again and again while there are subscribers."""
        while True:
            await self._wanted.wait()
            with self._announced.announcing_slots(self._take_slots):
                self._mark_all()
                while self._followed:
                    await self._has_due.wait()
                    self._has_due.clear()
                    began = time.thread_time()
                    await self._make_due()
                    await asyncio.sleep(max(PASS_SECONDS, (time.thread_time() - began) * REST))

    async def read_archive(self) -> None:
        """Read from the archive what is kept of it, again and again while there are subscribers."""
        while True:
            await self._archive_due.wait()
            self._archive_due.clear()
            epoch = self._state.epoch
            if time.monotonic() >= self._holes_at:
                await self._read_holes(epoch)
            if epoch == self._state.epoch and self._corrections and time.monotonic() >= self._corrections_at:
                await self._read_corrections(epoch)
            if epoch == self._state.epoch and self._lacks_rows(time.monotonic()):
                await self._read_rows(epoch)

    # Candles

    async def _make_due(self) -> None:
        due = sorted((each for each in self._due if self._has_rows(each)), key=lambda each: each.key.symbol)
        self._due.clear()
        for begin in range(0, len(due), SERIES_A_STEP):
            await self._make([each for each in due[begin : begin + SERIES_A_STEP] if self._has_rows(each)])
            await asyncio.sleep(0)

    async def _make(self, due: Sequence[_Followed]) -> None:
        if not due:
            return
        now, epoch = self._now(), self._state.epoch
        wanted = [*dict.fromkeys(series for each in due for series in each.series)]
        intervals = {(series, each.key.interval): each.grid for each in due for series in each.series}
        since = min(self._rows[each].split for each in intervals)
        try:
            found = await self._prices.cache.by_minute(wanted, since, horizon(now, self._prices.ahead_ms))
        except Unavailable:
            raise_if_cancelled()
            self._cache_failed = True
            await self._make_first([each for each in due if each.sent_from is None], epoch)
            return
        self._cache_failed = False
        if epoch != self._state.epoch:
            return
        cached = dict(zip(wanted, found, strict=True))
        whole = {
            (series, interval): _whole(self._rows[series, interval], cached[series], grid)
            for (series, interval), grid in intervals.items()
            if (series, interval) in self._rows
        }
        changed: list[tuple[CandleSlot, StreamCandle]] = []
        for each in due:
            parts = [(series, each.key.interval) for series in each.series]
            if self._followed.get(each.key) is each and all(part in whole for part in parts):
                changed += self._changes(each, self._candles(each, [whole[part] for part in parts], parts, now))
        if changed:
            self._state.put_candles(changed)

    def _candles(
        self,
        each: _Followed,
        parts: Sequence[Mapping[int, Candle]],
        rows_of: Sequence[tuple[Series, str]],
        now: int,
    ) -> CandleRows:
        candles = each.combine(parts)
        rows = [self._rows[part] for part in rows_of]
        recent = max(part.split for part in rows)
        starts = sorted(candles)
        chosen = [*(start for start in starts[:-LAST_CANDLES] if start >= recent), *starts[-LAST_CANDLES:]]
        closed_until, known_from = now - self._prices.closed_after_ms, max(part.known_from for part in rows)
        return CandleRows(each.grid, {start: candles[start] for start in chosen}, closed_until, known_from, False)

    async def _make_first(self, new: Sequence[_Followed], epoch: int) -> None:
        """Make the first versions while the cache is unavailable, as a query is answered then."""
        for each in new:
            try:
                rows = await self._prices.candles(
                    each.series, CandleRequest(each.grid, None, None, LAST_CANDLES), each.combine
                )
            except Unavailable:
                raise_if_cancelled()
                rows = CandleRows(each.grid, {}, 0, 0, settled=False)
            if epoch == self._state.epoch and self._followed.get(each.key) is each:
                self._changes(each, rows)

    def _changes(self, each: _Followed, rows: CandleRows) -> list[tuple[CandleSlot, StreamCandle]]:
        """Return what has changed of the candles of a series; without a first version, put that."""
        incomplete = touched(self._spans_of(each), [*rows.candles], each.grid.end_of)
        each.made_from = min(rows.candles, default=0)
        ends = [each.grid.end_of(start) for start in rows.candles]
        now_ends = each.grid.end_of(each.grid.start_of(self._now()))
        ahead = min((end for end in ends if end > rows.closed_until), default=now_ends)
        each.closes_at = ahead + self._prices.closed_after_ms
        self._closes_at = min(self._closes_at, each.closes_at)
        if each.sent_from is None:
            closed = [start for start in rows.candles if rows.closed(start)]
            each.sent_from = max(closed, default=min(rows.candles, default=0))
            for start in rows.candles:
                self._note(each, rows, start, incomplete)
            first = [start for start in rows.candles if start >= each.sent_from]
            self._state.begin_candles(each.key, self._streamed(each, rows, first))
            return []
        changed = [start for start in rows.candles if self._is_news(each, rows, start, incomplete)]
        for start in changed:
            self._note(each, rows, start, incomplete)
        return [(CandleSlot(each.key, start), candle) for start, candle in self._streamed(each, rows, changed)]

    def _is_news(self, each: _Followed, rows: CandleRows, start: int, incomplete: set[int]) -> bool:
        """Return whether a candle is to be sent: of a closed one only a correction is, which may open it again."""
        candle, is_closed = rows.candles[start], rows.closed(start)
        if (sent := each.sent.get(start)) is None:
            return candle.version > 1 or start >= (each.sent_from or 0)
        if sent.is_closed:
            return start >= rows.known_from and (
                candle.version > sent.candle.version or candle.completeness > sent.candle.completeness
            )
        return is_closed or candle != sent.candle or (start in incomplete) != sent.is_incomplete

    def _note(self, each: _Followed, rows: CandleRows, start: int, incomplete: set[int]) -> None:
        each.sent.pop(start, None)
        each.sent[start] = _Sent(rows.candles[start], rows.closed(start), start in incomplete)
        if len(each.sent) > VERSIONS_KNOWN:
            for old in [old for old in each.sent if old < each.made_from][:1]:
                del each.sent[old]

    def _streamed(self, each: _Followed, rows: CandleRows, starts: Sequence[int]) -> list[tuple[int, StreamCandle]]:
        exchange, symbol, interval = each.key
        chosen = rows._replace(candles={start: rows.candles[start] for start in starts})
        objects = candle_objects(chosen, self._spans_of(each))
        if exchange == REFERENCE:
            objects = [*map(with_vwap_of_all, objects)]
        return [
            (start, StreamCandle(**structs.asdict(candle), symbol=symbol, exchange=exchange, interval=interval))
            for start, candle in zip(starts, objects, strict=True)
        ]

    # What is kept of the archive

    def _has_rows(self, each: _Followed) -> bool:
        return all((series, each.key.interval) in self._rows for series in each.series)

    def _needed_rows(self) -> dict[tuple[Series, str], Grid]:
        return {
            (series, each.key.interval): each.grid for series, followed in self._by_series.items() for each in followed
        }

    def _lacks_rows(self, now: float) -> bool:
        return now >= self._rows_at and (self._rows_due or split_between(self._now()) != self._rows_until)

    async def _read_rows(self, epoch: int) -> None:
        """Read the rows that are missing, or end before the minutes of the cache begin."""
        split = self._rows_until = split_between(self._now())
        self._rows_due = False
        lacking: defaultdict[str, list[Series]] = defaultdict(list)
        for (series, interval), _ in self._needed_rows().items():
            rows, part = self._rows.get((series, interval)), (series, interval)
            if rows is None or rows.split != split or not rows.of_archive or part in self._outdated:
                lacking[interval].append(series)
        for interval, all_series in lacking.items():
            for begin in range(0, len(all_series), SERIES_A_QUERY):
                some = all_series[begin : begin + SERIES_A_QUERY]
                self._outdated -= {(series, interval) for series in some}
                read = await self._rows_of(some, interval, split)
                if epoch != self._state.epoch:
                    return
                for series, rows in read.items():
                    if series in self._by_series:
                        self._rows[series, interval] = rows
                        self._mark(each for each in self._by_series[series] if each.key.interval == interval)

    async def _rows_of(self, series: Sequence[Series], interval: str, split: int) -> dict[Series, _Rows]:
        """Return the rows of series until a time; while the archive is unavailable, what is known otherwise."""
        grid = INTERVALS[interval]
        wanted = CandleRange(grid.part_ms, grid.at_or_after(0), split, LAST_CANDLES * grid.parts, newest=True)
        try:
            found = await self._prices.archive.candles(series, wanted)
        except Unavailable:
            raise_if_cancelled()
            self._rows_due, self._rows_at = True, time.monotonic() + ROWS_AGAIN_SECONDS
            return {each: await self._rows_of_cache(each, interval, split) for each in series}
        found = found if grid.parts == 1 else folded(found, grid)
        return {
            each: _Rows({start: candles[start] for start in sorted(candles)[-LAST_CANDLES:]}, split)
            for each, candles in zip(series, found, strict=True)
        }

    async def _rows_of_cache(self, series: Series, interval: str, split: int) -> _Rows:
        """Return what the cache adds to the rows that are kept, or all that it has."""
        grid, kept = INTERVALS[interval], self._rows.get((series, interval))
        since = grid.at_or_after(oldest_kept_minute(self._now())) if kept is None else kept.split
        if kept is not None and split <= kept.split:
            return kept  # the clock was set back
        try:
            [minutes] = await self._prices.cache.by_minute([series], since, split)
        except Unavailable:
            raise_if_cancelled()
            return kept or _Rows({}, split, split, of_archive=False)
        candles = folded([minutes], grid)[0]
        if kept is None:
            return _Rows(candles, split, min(minutes, default=0), of_archive=False)
        return _Rows(merge_all([kept.candles, candles]), split, kept.known_from, of_archive=False)

    async def _read_corrections(self, epoch: int) -> None:
        """Send the candles of corrected minutes that the archive has by now."""
        now = time.monotonic()
        for slot, correction in [each for each in self._corrections.items() if each[1].due_at <= now]:
            arrived = await self._has_arrived(slot, correction.candle)
            if epoch != self._state.epoch:
                return
            if self._corrections.get(slot) is not correction:
                continue  # corrected again
            if not arrived and slot.series in self._by_series:
                correction.due_at = time.monotonic() + correction.pause
                correction.pause = min(2 * correction.pause, LONGEST_CORRECTION_SECONDS)
                continue
            del self._corrections[slot]
            for each in list(self._by_series.get(slot.series, ())):
                self._outdated.add((slot.series, each.key.interval))
                self._rows_due = True
                await self._send_old(each, each.grid.start_of(slot.start), epoch)
        waiting = (each.due_at for each in self._corrections.values())
        self._corrections_at = min(waiting, default=0.0)

    async def _has_arrived(self, slot: Slot, candle: Candle) -> bool:
        wanted = CandleRange(MINUTE_MS, slot.start, slot.start + MINUTE_MS, 1, newest=False)
        try:
            [found] = await self._prices.archive.candles([slot.series], wanted)
        except Unavailable:
            raise_if_cancelled()
            return False
        row = found.get(slot.start)
        return row is not None and row.version >= candle.version and row.completeness >= candle.completeness

    async def _send_old(self, each: _Followed, start: int, epoch: int) -> None:
        """Send a corrected candle that is older than those that are made all the time."""
        if each.sent_from is None or start >= each.made_from:
            return
        wanted = CandleRequest(each.grid, start, each.grid.end_of(start), 1)
        try:
            rows = await self._prices.candles(each.series, wanted, each.combine)
        except Unavailable:
            raise_if_cancelled()
            return
        if epoch != self._state.epoch or self._followed.get(each.key) is not each or start not in rows.candles:
            return
        incomplete = touched(self._spans_of(each), [start], each.grid.end_of)
        if rows.closed(start) and self._is_news(each, rows, start, incomplete):
            self._note(each, rows, start, incomplete)
            [(_, candle)] = self._streamed(each, rows, [start])
            self._state.put_candles([(CandleSlot(each.key, start), candle)])

    async def _read_holes(self, epoch: int) -> None:
        self._holes_at = time.monotonic() + HOLES_SECONDS
        if self._holes is None:
            return
        for series in list(self._by_series):
            spans = await self._holes.spans([series])
            if epoch != self._state.epoch:
                return
            if spans != self._spans.get(series, []):
                self._spans[series] = spans
                self._mark(self._by_series.get(series, ()))

    def _spans_of(self, each: _Followed) -> list[Span]:
        return [span for series in each.series for span in self._spans.get(series, ())] if self._spans else []


def _whole(rows: _Rows, minutes: Mapping[int, Candle], grid: Grid) -> dict[int, Candle]:
    """Return the candles of rows, and of the minutes after them."""
    after = {start: candle for start, candle in minutes.items() if start >= rows.split}
    return merge_all([rows.candles, folded([after], grid)[0]])
