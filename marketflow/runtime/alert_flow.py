"""The branch of the graph that evaluates alerts, stores their events and delivers them.

    raised    = new ticks | conflate | observe_on(pool) | evaluate
    stale     = feed states, twice a second while a rule needs them | evaluate
    shared    = in place of both where several processes ingest: five times a second | from_callable(step, pool)
    persisted = raised, stale, holes, changed rules | conflate | from_callable(persist, pool) | retry
    delivered = persisted, once a second while there are webhooks | due receivers | from_callable(serve, own pool)

Without rules no candle passes the first filter. Failures are counted and logged; prices and rows never wait for alerts.
"""

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import reactivex as rx
from reactivex import Observable, compose
from reactivex import operators as ops
from reactivex.subject import Subject

from marketflow.alerts.alert_service import AlertService
from marketflow.alerts.deliveries import Deliveries
from marketflow.alerts.stale_feeds import StaleFeeds
from marketflow.clock import Clock, milliseconds
from marketflow.counters import AlertCounters
from marketflow.errors import Unavailable
from marketflow.logs import Outage, RateLimit
from marketflow.model import Candles, FeedState, Mode, Series, Tick, merge_all
from marketflow.pipeline.assembly import Parts
from marketflow.pipeline.operators import (
    Operator,
    conflate_map,
    conflate_through,
    isolated,
    keep_newer,
    retry_with_backoff,
)
from marketflow.pipeline.schedulers import NamedPool
from marketflow.stores.ports import RecoveredCandles
from marketflow.tasks import Backoff

if TYPE_CHECKING:  # where several processes ingest
    from marketflow.cluster.shared_alerts import SharedAlerts

STATES_SECONDS = 0.5
"""Interval at which the states of feeds are checked."""

DELIVERY_SECONDS = 1.0
"""Interval at which due deliveries are looked for; new ones are posted at once."""

POSTS_AT_ONCE = 4
"""Receivers that are served at the same time."""

FeedStates = Callable[[], tuple[Mode, Mapping[str, FeedState]]]


class AlertFlow:
    """The alerts of a pipeline.

    Args:
        alerts: evaluates rules and stores events.
        deliveries: delivers what is stored.
        feed_states: returns the current mode and the states of its feeds.
        stale_after_seconds: how long a feed may be without a connection before it is stale.
        clock: wall-clock time.
        leads: returns whether this process is the leader, which evaluates alerts for all.
        shared: evaluates what all processes write; None where this one ingests everything.
    """

    def __init__(
        self,
        alerts: AlertService,
        deliveries: Deliveries,
        feed_states: FeedStates,
        stale_after_seconds: float,
        clock: Clock,
        leads: Callable[[], bool] = lambda: True,
        shared: "SharedAlerts | None" = None,
    ) -> None:
        self._leads = leads
        self._shared = shared
        self._alerts = alerts
        self._deliveries = deliveries
        self._feed_states = feed_states
        self._stale = StaleFeeds(round(1000 * stale_after_seconds))
        self._clock = clock
        self._changed: Subject[None] = Subject()
        self._lock = threading.Lock()
        self._pool: NamedPool | None = None
        self._outage = Outage("alerts cannot be stored", "alerts are stored again")
        self._limit = RateLimit(60.0)
        alerts.on_change = self._announce_change

    def counters(self) -> AlertCounters:
        """Return the counters since the start."""
        alerts, deliveries = self._alerts, self._deliveries
        return AlertCounters(
            events=dict(alerts.stored),
            events_pending=alerts.pending,
            events_dropped=alerts.dropped,
            deliveries=dict(deliveries.results),
            deliveries_pending=deliveries.pending,
        )

    def close(self) -> None:
        """Stop: no post begins any more."""
        self._deliveries.stop()
        with self._lock:
            if self._pool is not None:
                self._pool.close()

    def branch(
        self,
        parts: Parts,
        new_ticks: Observable[Candles],
        archived: Observable[Any],
        recovered: RecoveredCandles | None,
    ) -> Observable[Any]:
        """Return the branch, whose items have no meaning.

        Args:
            parts: of the pipeline.
            new_ticks: candles that have each tick once.
            archived: emits after each write to the archive.
            recovered: the candles that an earlier run left.
        """
        alerts, evaluator = self._alerts, self._alerts.evaluator
        changed: Observable[Any] = self._changed.pipe(ops.take_until(parts.ended), ops.start_with(None))
        if self._shared is not None:
            found = self._found_in_all(parts, changed, self._shared)
        else:
            found = self._found_here(parts, changed, new_ticks, recovered)
        usable = archived.pipe(ops.take(1), ops.do_action(lambda _: alerts.store_is_usable()))
        persisted: Observable[Any] = rx.merge(found, changed, usable).pipe(
            ops.filter(lambda _: alerts.has_work and self._leads()),
            conflate_map(lambda _: self._persisted(parts), keep_newer, parts.branch("alert events")),
        )
        ticking = self._while(changed, parts, lambda: evaluator.has_webhooks, DELIVERY_SECONDS).pipe(
            ops.filter(lambda _: self._deliveries.may_be_due)
        )

        def delivered(stored: Observable[Any]) -> Observable[Any]:
            return rx.merge(stored, ticking).pipe(
                ops.filter(lambda _: evaluator.has_webhooks and alerts.store_usable and self._leads()),
                ops.take_until(parts.ended),
                conflate_map(lambda _: self._due(parts), keep_newer),
                ops.flat_map(self._served),
                ops.take_until(parts.ended),
            )

        return persisted.pipe(
            ops.publish(lambda stored: rx.merge(stored, delivered(stored))),
            ops.catch(lambda error, _: self._failed(parts, error)),
        )

    def _found_here(
        self,
        parts: Parts,
        changed: Observable[Any],
        new_ticks: Observable[Candles],
        recovered: RecoveredCandles | None,
    ) -> Observable[Any]:
        """Evaluate the ticks and feeds of this process; emit afterwards."""
        alerts, evaluator = self._alerts, self._alerts.evaluator
        if recovered is not None:
            evaluator.seed(_newest_of(recovered))
        evaluate = isolated(alerts.evaluate, parts.log.step_failed)
        evaluated: Operator[Any, Any] = compose(ops.observe_on(parts.pool), ops.map(evaluate))

        def merged(older: Candles, newer: Candles) -> Candles:
            return merge_all([older, newer])

        raised: Observable[Any] = new_ticks.pipe(
            ops.filter(lambda candles: evaluator.watches_candles and bool(candles)),
            conflate_through(evaluated, merged, parts.branch("alerts")),
        )
        stale = self._while(changed, parts, lambda: evaluator.watches_feeds, STATES_SECONDS).pipe(
            ops.map(isolated(self._check_feeds, parts.log.step_failed))
        )
        return rx.merge(raised, stale)

    def _found_in_all(self, parts: Parts, changed: Observable[Any], shared: "SharedAlerts") -> Observable[Any]:
        """Evaluate what all processes write; emit afterwards."""
        from marketflow.cluster.shared_alerts import STEP_SECONDS

        step = isolated(lambda _: shared.step(), parts.log.step_failed)
        steps = self._while(changed, parts, lambda: self._alerts.evaluator.has_rules, STEP_SECONDS)
        return steps.pipe(
            ops.filter(lambda _: self._leads()),
            conflate_map(
                lambda _: rx.from_callable(lambda: step(None), scheduler=parts.pool),
                keep_newer,
                parts.branch("alerts"),
            ),
        )

    def _while(
        self, changed: Observable[Any], parts: Parts, is_needed: Callable[[], bool], seconds: float
    ) -> Observable[Any]:
        """Emit at an interval while a condition holds, which is checked when rules have changed."""

        def ticking(needed: bool) -> Observable[Any]:
            return rx.interval(seconds, scheduler=parts.loop) if needed else rx.never()

        needed: Observable[bool] = changed.pipe(
            ops.map(lambda _: is_needed() and self._leads()), ops.distinct_until_changed()
        )
        ticks: Observable[Observable[Any]] = needed.pipe(ops.map(ticking))
        return ticks.pipe(ops.switch_latest(), ops.take_until(parts.ended))

    def _announce_change(self) -> None:
        with self._lock:  # a Subject does not serialize
            self._changed.on_next(None)

    def _check_feeds(self, _: object) -> None:
        mode, states = self._feed_states()
        if exchanges := self._stale.take(mode, states, milliseconds(self._clock())):
            self._alerts.feeds_stale(mode, exchanges)

    def _persisted(self, parts: Parts) -> Observable[Any]:
        def failed(error: Exception, _: float) -> None:
            parts.branches.attempted("alert events")
            if isinstance(error, Unavailable):
                self._outage.failed("alerts", f"{self._alerts.pending} events wait: {error}")
            else:
                parts.log.step_failed(error)

        def succeeded() -> None:
            self._outage.over("alerts")

        return rx.from_callable(self._alerts.persist, scheduler=parts.pool).pipe(
            retry_with_backoff(Backoff(0.1, 2.0), parts.loop, parts.ended, failed, succeeded)
        )

    def _due(self, parts: Parts) -> Observable[list[str]]:
        def due() -> list[str]:
            try:
                return self._deliveries.due()
            except Unavailable:
                return []

        return rx.from_callable(due, scheduler=parts.pool)

    def _served(self, receivers: list[str]) -> Observable[Any]:
        if not receivers:
            return rx.empty()
        with self._lock:
            if self._pool is None:
                self._pool = NamedPool("webhook", POSTS_AT_ONCE)
            pool = self._pool
        return rx.merge(*(rx.from_callable(partial(self._serve, each), scheduler=pool) for each in receivers))

    def _serve(self, receiver: str) -> None:
        try:
            self._deliveries.serve(receiver)
        except Unavailable:
            pass  # the result of a post is recorded before the next one begins
        except Exception as error:  # noqa: BLE001 - other receivers must not suffer
            self._limit.log("serve", "ERROR", f"alerts cannot be delivered, which is a bug: {error!r}")

    def _failed(self, parts: Parts, error: Exception) -> Observable[Any]:
        parts.log.step_failed(error)
        return rx.empty()


def _newest_of(recovered: RecoveredCandles) -> dict[Series, Tick]:
    newest: dict[Series, Tick] = {}
    for candles in (recovered.slices, recovered.minutes):
        for slot, candle in candles.items():
            held = newest.get(slot.series)
            if held is None or held.order < candle.newest.order:
                newest[slot.series] = candle.newest
    return newest
