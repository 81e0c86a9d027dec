"""Recovery of what memory lacks after a restart, and of what the cache lacks after an outage."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import reactivex as rx
from reactivex import Observable, abc, compose
from reactivex import operators as ops

from marketflow.clock import Clock, milliseconds
from marketflow.model import Candles, Mode, Series, Slot, merge_all, minute_start, slice_start
from marketflow.pipeline.branches import Branch, Refills
from marketflow.pipeline.instrumentation import Instrumentation
from marketflow.pipeline.operators import Operator, conflate_through, keep_newer, retry_with_backoff
from marketflow.pipeline.schedulers import GridScheduler
from marketflow.pipeline.shard_ownership import Ownership
from marketflow.stores.ports import CacheWriter, RecoveredCandles, Wanted, every_series
from marketflow.tasks import Backoff

PROBE_SECONDS = 0.5
"""Interval of the probes of the cache, while ticks arrive or it lacks something: a refill begins this soon after an
outage.
"""

MOST_PAUSED_PROBES = 20
"""Longest pause before a refill that follows failed ones: ten seconds."""

MISSED_PROBES = 3
"""Unanswered probes in a row after which the cache is down, and not only slow."""

READ_AGAIN_SECONDS = 0.5
"""How long after the first minute of a run the slices of another process are read: all are written by then."""

READ_AGAIN_FROM_MS = 10_000
"""From how long before the start of this run they are read: the other process may have been suspended."""

_T = TypeVar("_T")

ReadAgain = Callable[[int, int, int, Wanted], RecoveredCandles]
"""Returns what the cache has of some series between two times; these and the length of a minute in ms."""

Begun = Callable[[], Mapping[tuple[Mode, str], int]]
"""Returns the first event time of this run (Unix ms), by mode and exchange."""


class Recovery:
    """Reads what earlier runs and other owners left in the cache, and repeats that until the cache answers.

    Early or late makes no difference: candles merge.

    Args:
        cache: where earlier runs wrote.
        minute_ms: length of a minute.
        loop: scheduler of pauses.
        pool: scheduler of blocking calls.
        ended: its first item ends all attempts.
        clock: wall-clock time.
        log: logs failures.
        ownership: what is read at the start, and the shards of all series.
        read_again: reads the first minute once more when that is over: another process may have written to it after
            this one began, so only the cache has all of it. None where there is no other process.
        begun: when this run began, up to which another process's candles are read apart from the later ones.
    """

    def __init__(
        self,
        cache: CacheWriter,
        minute_ms: int,
        loop: abc.SchedulerBase,
        pool: abc.SchedulerBase,
        ended: Observable[Any],
        clock: Clock,
        log: Instrumentation,
        ownership: Ownership,
        read_again: ReadAgain | None = None,
        begun: Begun = dict,
    ) -> None:
        self._begun = begun
        self._cache, self._minute_ms, self._clock, self._log = cache, minute_ms, clock, log
        self._loop, self._pool, self._ended = loop, pool, ended
        self._ownership, self._initial = ownership, ownership.at_start
        self.read_again = read_again
        self.on_recovered: Callable[[frozenset[str], RecoveredCandles], None] = lambda shards, recovered: None
        """Called with what was read of shards, on the thread that has read it."""
        self.on_attempted: Callable[[frozenset[str]], None] = lambda shards: None
        """Called after the first attempt to read what another owner left of shards, whether it succeeded or not."""
        self._read_initial = self._reads(self._initial)

    def first_attempt(self) -> Observable[RecoveredCandles | None]:
        """Emit the candles that earlier runs left, None if the cache is unavailable."""
        return self._attempt(self._read_initial)

    def candles(self, recovered: RecoveredCandles | None) -> Observable[RecoveredCandles]:
        """Emit the candles of earlier runs: those of the first attempt, or of later ones if it failed."""
        return self._candles(recovered, self._initial, self._read_initial)

    def taken_over(self, shards: frozenset[str]) -> Observable[RecoveredCandles]:
        """Emit the candles that the previous owner left of shards."""
        read = self._reads(shards)

        def candles(recovered: RecoveredCandles | None) -> Observable[RecoveredCandles]:
            self.on_attempted(shards)
            return self._candles(recovered, shards, read)

        return self._attempt(read).pipe(ops.flat_map(candles))

    def unarchived(self, shards: frozenset[str]) -> Observable[Candles]:
        """Emit the closed minutes of shards that an earlier run or another owner may not have archived."""
        return self._repeated(lambda: self._cache.unarchived(shards, self._ownership.shards.of))

    def _attempt(self, read: Callable[[], RecoveredCandles]) -> Observable[RecoveredCandles | None]:
        def unavailable(error: Exception, _: Observable[Any]) -> Observable[None]:
            self._log.recovery_failed(error)
            return rx.just(None)

        attempt: Observable[RecoveredCandles | None] = rx.from_callable(read, scheduler=self._pool)
        return attempt.pipe(ops.catch(unavailable))

    def _candles(
        self, recovered: RecoveredCandles | None, shards: frozenset[str], read: Callable[[], RecoveredCandles]
    ) -> Observable[RecoveredCandles]:
        earlier = self._repeated(read) if recovered is None else rx.just(recovered)
        return rx.merge(earlier, self._first_minute_again(self._wanted(shards), is_first=recovered is None))

    def _reads(self, shards: frozenset[str]) -> Callable[[], RecoveredCandles]:
        """Return a function that reads what was left of shards, for one thread at a time."""
        wanted = self._wanted(shards)
        read = self._kept(lambda: self._cache.recover(self._minute_ms, wanted), wanted)

        def recover() -> RecoveredCandles:
            recovered = read()
            self.on_recovered(shards, recovered)
            return recovered

        return recover

    def _kept(self, read: Callable[[], RecoveredCandles], wanted: Wanted) -> Callable[[], RecoveredCandles]:
        """Return a function that reads, and adds what came before; where only that fails, the former is kept.

        On a busy machine the former took 7 s, and was lost by a timeout of the latter.
        """
        found: list[RecoveredCandles] = []

        def read_both() -> RecoveredCandles:
            if not found:
                found.append(read())
            recovered = self._with_before(found[0], wanted)
            found.clear()
            return recovered

        return read_both

    def _with_before(self, recovered: RecoveredCandles, wanted: Wanted) -> RecoveredCandles:
        """Add what came before the first tick of this run in its minute, where slices were folded into minutes.

        Of a folded minute, ticks that the other process could not write cannot be found; but all since then are here.
        """
        if (read_again := self.read_again) is None:
            return recovered
        starts = {slot.start for slot in recovered.minutes}
        before: Candles = {}
        for exchange, begun_at in self._begun().items():
            since = minute_start(begun_at, self._minute_ms)
            if since in starts:
                found = read_again(since, slice_start(begun_at), self._minute_ms, _of_exchange(exchange, wanted))
                folded = ({Slot(slot.series, since): candle} for slot, candle in found.slices.items())
                before |= merge_all([found.minutes, *folded])
        return recovered._replace(before=before)

    def _wanted(self, shards: Collection[str]) -> Wanted:
        if self._ownership.everything:
            return every_series

        def wanted(series: Series) -> bool:
            return self._ownership.shards.of(series) in shards

        return wanted

    def _first_minute_again(self, wanted: Wanted, is_first: bool) -> Observable[RecoveredCandles]:
        """Emit what the cache has of the current minute, when that is over or the pipeline ends.

        Args:
            wanted: which series.
            is_first: whether nothing has been read of them before.
        """
        if (read_again := self.read_again) is None:
            return rx.empty()
        began = milliseconds(self._clock())
        end = minute_start(began, self._minute_ms) + self._minute_ms
        seconds = (end - began) / 1000 + READ_AGAIN_SECONDS

        def read() -> RecoveredCandles:
            since = minute_start(began - READ_AGAIN_FROM_MS, self._minute_ms)
            return read_again(since, end, self._minute_ms, wanted)

        read_all = self._kept(read, wanted) if is_first else read

        return rx.timer(seconds, scheduler=self._loop).pipe(
            ops.take_until(self._ended),
            ops.default_if_empty(0),
            ops.flat_map(lambda _: self._repeated(read_all)),
        )

    def _repeated(self, read: Callable[[], _T]) -> Observable[_T]:
        return rx.from_callable(read, scheduler=self._pool).pipe(
            # At short intervals, as the circuit breaker answers for a cache that is down.
            retry_with_backoff(
                Backoff(0.1, 0.2), self._loop, self._ended, lambda error, _: self._log.recovery_failed(error)
            ),
        )


def _of_exchange(exchange: tuple[Mode, str], wanted: Wanted) -> Wanted:
    return lambda series: series[:2] == exchange and wanted(series)


class RefillPauses:
    """Pauses between refills that fail again and again, in numbers of probes; for one thread at a time.

    On a machine short of CPU a refill of all slices may fail because of the load it causes, and would fail again if it
    were repeated at once. So the pause grows with each failure by as long as a refill takes. A refill that ends before
    the next probe is followed by no pause: the cache is full soon after its return, however often it failed before.
    """

    def __init__(self) -> None:
        self._refills = 0  # in a row, without the cache having been complete between them
        self._under_way = False
        self._took = 0
        self._remaining = 0
        self._missed = 0

    def over(self, refill_ended: bool) -> bool:
        """Return whether to probe the cache now: no refill is under way, and the pause after the last one is over."""
        if not refill_ended:
            self._took += 1
            return False
        if self._under_way:
            self._under_way = False
            self._remaining = min((self._refills - 1) * self._took, MOST_PAUSED_PROBES)
        if self._remaining:
            self._remaining -= 1
            return False
        return True

    def probed(self, refill_needed: bool, complete: bool) -> None:
        """Note the result of a probe: whether a refill follows, and if not, whether the cache has everything."""
        self._missed = 0 if refill_needed or complete else self._missed + 1
        if refill_needed:
            self._refills += 1
            self._under_way, self._took = True, 0
        elif complete or self._missed >= MISSED_PROBES:
            self._refills = 0


def cache_losses(
    cache: CacheWriter,
    refills: Refills,
    branch: Callable[[], Branch],
    loop: abc.SchedulerBase,
    pool: abc.SchedulerBase,
    ended: Observable[Any],
    log: Instrumentation,
    grid: GridScheduler | None = None,
) -> Observable[Any]:
    """Probe the cache; emit, on the loop, each time it lacks what was written to it. Shared by all branches.

    Args:
        cache: answers probes.
        refills: follows each refill until the cache has confirmed it.
        branch: creates the branch of the probes.
        loop: scheduler of the probes and of the result.
        pool: scheduler of blocking calls.
        ended: its first item completes the result.
        log: counts and logs failed probes.
        grid: scheduler of the probes, where they are fewer while nothing arrives and the cache is complete.
    """
    pauses = RefillPauses()

    def probe_soon() -> None:
        if grid is not None:
            grid.wake()

    def needs_refill() -> bool:
        if not pauses.over(refills.confirmed):
            probe_soon()
            return False
        needed = cache.needs_refill()
        pauses.probed(needed, complete := cache.complete)
        if needed or not complete:
            probe_soon()
        if needed:
            refills.due()
        return needed

    def probe(_: int) -> bool:
        try:
            return needs_refill()
        except Exception as error:  # noqa: BLE001 - the next probe is made all the same
            log.cache_failed(error)
            return False

    def follow(_: bool) -> None:
        # Runs after this action of the loop, in which all branches are passed what the cache lacks.
        loop.schedule(lambda *_: refills.passed())

    # One subscription for all probes: one for each was a tenth of the CPU of an idle process.
    probed: Operator[int, bool] = conflate_through(compose(ops.observe_on(pool), ops.map(probe)), keep_newer, branch)
    probes = rx.interval(PROBE_SECONDS, scheduler=grid or loop).pipe(ops.take_until(ended), probed)
    return probes.pipe(
        ops.filter(bool),
        ops.observe_on(loop),  # as every emission of slices: of two versions, the later one is then more complete
        ops.do_action(follow),
        ops.share(),
    )
