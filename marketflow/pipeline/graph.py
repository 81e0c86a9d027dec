"""The wiring of the pipeline, from the feeds of the current mode to the cache and the archive.

    ticks   = fan_in(feeds)
    latest  = ticks  | newest                           | conflate | observe_on(pool) | write_latest
    slices  = ticks  | buffer_with_time(0.1) | merge    | conflate | observe_on(pool) | write_slices
    minutes = slices | tumbling_event_time(60 s, ...)   | conflate | observe_on(pool) | write_minutes
                                                        | backlog  | from_callable(upsert_rows, pool)
    corrected = minutes | corrections | replace             (older ones join the minutes)
    alerted = merged ticks | alerts                         (runtime/alert_flow.py)

Items are batches of candles, never single ticks. Blocking calls run on the pool, each behind a conflation, since
`observe_on` alone is an unbounded queue. All else runs on the thread of a feed or of the timing loop and does
dictionary work only. Clock, schedulers and stores are passed in, so that the tests run all of it in virtual time.

Completing the modes ends it: the feeds complete, what is under way is written, the open minutes as well.
"""

from operator import attrgetter
from typing import Any

import reactivex as rx
from reactivex import ConnectableObservable, Observable, compose
from reactivex import operators as ops

from marketflow.model import SLICE_MS, Candles, merge_all
from marketflow.pipeline.assembly import Parts
from marketflow.pipeline.fan_in import fan_in
from marketflow.pipeline.operators import Operator, conflate_map, connect, keep_newer, tumbling_event_time
from marketflow.pipeline.shard_ownership import Change
from marketflow.stores.ports import RecoveredCandles


class Pipeline(Parts):
    """The parts, connected."""

    def observable(self) -> Observable[Any]:
        """Return the whole pipeline, for one subscription. Its operators do the work; its items have no meaning.

        The feeds begin after one attempt to read what an earlier run left in the cache, so that the first query finds
        it. If the cache is down, the attempts go on beside the feeds.
        """
        return self.recovery.first_attempt().pipe(ops.flat_map(self._graph))

    def _graph(self, recovered: RecoveredCandles | None) -> Observable[Any]:
        self.begun.set()
        state, on_pool, on_loop = self.state, ops.observe_on(self.pool), ops.observe_on(self.loop)

        # Replayed: what was assigned before this is emitted at once, and the branches of a merge subscribe later.
        changes: ConnectableObservable[Change] = self.ownership.changes().pipe(
            ops.take_until(self.ended), ops.replay(scheduler=self.loop)
        )
        not_empty: Operator[Any, Any] = ops.filter(bool)
        gained: Observable[frozenset[str]] = changes.pipe(ops.map(attrgetter("gained")), not_empty)
        to_lose: Operator[Any, Any] = compose(
            ops.do_action(self.archive_sink.backlog_lost), ops.do_action(self.note_lost)
        )
        lost: Observable[frozenset[str]] = changes.pipe(ops.map(attrgetter("lost")), not_empty, to_lose)
        owned_series, owned_slots = self.owned(self.ownership.series_in), self.owned(self.ownership.slots_in)

        ticks = fan_in(self.modes, self.feeds, self.reconnect, self.loop, self.counters, self.clock).pipe(ops.publish())

        # One branch for all series: a write costs as much as dozens of ticks in it, so few and large ones are better.
        newest = ticks.pipe(self.step(self.observe))
        latest_written = rx.merge(
            newest, self.refill(lambda _: dict.fromkeys(state.all_newest())), gained.pipe(self.step(self.newest_of))
        ).pipe(owned_series, not_empty, self.conflated("newest", on_pool, self.written(self.write_latest)))

        # At each buffer, minutes that are due close, so while any is open there is an empty one each second as well.
        merged = ticks.pipe(
            ops.do_action(self.wake_timers),
            ops.buffer_with_time(SLICE_MS / 1000, scheduler=self.grid),
            ops.map(merge_all),
            ops.publish(),
        )
        received = merged.pipe(self.step(self.absorb))
        # On the loop, as is all that emits slices: of two versions, the later one is then the more complete.
        restored = self.recovery.candles(recovered).pipe(on_loop, self.step(state.restore))
        taken_over: Observable[Candles] = gained.pipe(ops.flat_map(self.taken_over))
        # The timers run rarely while no minute is open, and these may be of open minutes.
        left = rx.merge(restored, taken_over).pipe(ops.do_action(self.wake_timers))
        slices = rx.merge(received, left).pipe(ops.publish())
        # A shard that is lost is written once more, since without Redis this process has gone on with it all the same;
        # and again when it has read what came before the new owner was connected: it may lag behind.
        # Slices that could not be written come first, so that refills that fail again and again write all of them in
        # turn; also those that were evicted, or whose shard was lost, since. The other refills bring newer versions.
        slices_written = rx.merge(
            self.refill(lambda _: self.cache.unwritten.all()),
            rx.merge(slices, self.refill(state.all_slices), gained.pipe(self.step(self.recent_slices_of))).pipe(
                owned_slots
            ),
            lost.pipe(ops.flat_map(self.now_and_soon), self.step(self.recent_slices_of)),
            self.refill(self.slices_of_lost),
        ).pipe(ops.filter(bool), self.conflated_partitions("slices", on_pool, self.written(self.cache.put_slices)))

        # By event time, not buffer_with_time(60): that would count from the subscription instead of the full minute,
        # and put a tick that is late, or recovered, into the minute in which it arrives.
        sink = self.archive_sink
        to_backlog: Operator[Any, Any] = ops.do_action(self.add_to_backlog)
        whole: Observable[Candles] = slices.pipe(tumbling_event_time(self.step(self.close_minutes), sink.end_windows))
        minutes: ConnectableObservable[Candles] = whole.pipe(owned_slots, not_empty, to_backlog, ops.publish())
        corrected: Observable[Candles] = self.corrected(minutes).pipe(to_backlog, ops.share())
        held = gained.pipe(self.step(self.closed_of), ops.filter(bool), to_backlog, ops.share())

        unarchived = rx.merge(self.unarchived(self.ownership.at_start), gained.pipe(ops.flat_map(self.unarchived)))
        # Without rows it connects to the archive at the start, not when the first minute ends.
        rows_written = rx.merge(minutes, corrected, held, unarchived, rx.just({})).pipe(
            # All that is pending at the time of an attempt: later minutes replace those of the item.
            conflate_map(lambda _: self.rows_archived(), keep_newer, self.branch("archive")),
            ops.publish(),
        )

        # Pending minutes may be older than the window state, and a restart finds them in the cache alone.
        refilled = self.refill(lambda lacks: self.backlog.rows() | state.all_closed(lacks)).pipe(
            owned_slots, ops.do_action(self.backlog.note_uncached)
        )
        closed = rx.merge(minutes, corrected, refilled, held)
        minutes_written = rx.concat(
            closed.pipe(self.conflated("minutes", on_pool, self.written(sink.cache_minutes))),
            self.minutes_cached(rows_written),
        )

        alerted = rx.empty() if self.alerts is None else self.alerts(self, merged, rows_written, recovered)
        written = rx.merge(latest_written, slices_written, minutes_written, rows_written, alerted)
        return rx.merge(
            connect(written, rows_written, minutes, slices, merged, ticks, changes),
            self.days_rolled_up(),
            self.clocks_measured(),
        )
