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

from typing import Any

import reactivex as rx
from reactivex import Observable
from reactivex import operators as ops

from marketflow.model import SLICE_MS, merge_all
from marketflow.pipeline.assembly import Parts
from marketflow.pipeline.fan_in import fan_in
from marketflow.pipeline.operators import conflate_map, connect, keep_newer, tumbling_event_time
from marketflow.stores.ports import RecoveredCandles


class Pipeline(Parts):
    """The parts, connected."""

    def observable(self) -> Observable[Any]:
        """The whole pipeline, to be subscribed to once: the work is done in its operators, its items mean nothing.

        The feeds begin after one attempt to read what an earlier run left in the cache, so that the first query finds
        it. If the cache is down, the attempts go on beside the feeds.
        """
        return self.recovery.first_attempt().pipe(ops.flat_map(self._graph))

    def _graph(self, recovered: RecoveredCandles | None) -> Observable[Any]:
        self.begun.set()
        state, on_pool, on_loop = self.state, ops.observe_on(self.pool), ops.observe_on(self.loop)

        ticks = fan_in(self.modes, self.feeds, self.reconnect, self.loop, self.counters, self.clock).pipe(ops.publish())

        # One branch for all series: a write costs as much as dozens of ticks in it, so few and large ones are better.
        newest = ticks.pipe(self.step(self.observe))
        latest_written = rx.merge(newest, self.refill(lambda: dict.fromkeys(state.all_newest()))).pipe(
            ops.filter(bool), self.conflated("newest", on_pool, self.written(self.write_latest))
        )

        # At each buffer, minutes that are due close, so there is an empty one each second as well.
        merged = ticks.pipe(
            ops.do_action(self.wake_timers),
            ops.buffer_with_time(SLICE_MS / 1000, scheduler=self.grid),
            ops.map(merge_all),
            ops.publish(),
        )
        received = merged.pipe(self.step(self.absorb))
        # On the loop, as is all that emits slices: of two versions, the later one is then the more complete.
        restored = self.recovery.candles(recovered).pipe(on_loop, self.step(state.restore))
        slices = rx.merge(received, restored).pipe(ops.publish())
        slices_written = rx.merge(slices, self.refill(state.all_slices)).pipe(
            ops.filter(bool), self.conflated_partitions("slices", on_pool, self.written(self.cache.put_slices))
        )

        # By event time, not buffer_with_time(60): that would count from the subscription instead of the full minute,
        # and put a tick that is late, or recovered, into the minute in which it arrives.
        minutes = slices.pipe(tumbling_event_time(self.step(self.close_minutes), state.take_all), ops.publish())
        corrected = self.corrected(minutes)
        # Pending minutes may be older than the window state, and a restart finds them in the cache alone.
        closed = rx.merge(minutes, corrected, self.refill(lambda: self.backlog.rows() | state.all_closed()))
        minutes_written = closed.pipe(self.conflated("minutes", on_pool, self.written(self.cache.put_minutes)))

        to_backlog = ops.do_action(self.add_to_backlog)
        unarchived = self.recovery.unarchived().pipe(to_backlog, ops.do_action(self.archive_sink.backlog_recovered))
        # Without rows it connects to the archive at the start, not when the first minute ends.
        rows_written = rx.merge(rx.merge(minutes, corrected).pipe(to_backlog), unarchived, rx.just({})).pipe(
            conflate_map(
                # All that is pending at the time of an attempt: later minutes replace those of the item.
                lambda _: rx.from_callable(self.archive_sink.upsert_rows, scheduler=self.pool).pipe(self.retried()),
                keep_newer,
                self.branch("archive"),
            ),
            ops.publish(),
        )

        alerted = rx.empty() if self.alerts is None else self.alerts(self, merged, rows_written, recovered)
        written = rx.merge(latest_written, slices_written, minutes_written, rows_written, alerted)
        return rx.merge(
            connect(written, rows_written, minutes, slices, merged, ticks),
            self.days_rolled_up(),
            self.clocks_measured(),
        )
