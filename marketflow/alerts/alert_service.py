"""The alerts of a process that ingests: rules of the settings and of the API, and events on their way to the store.

Evaluation needs no store: while that is down, events wait in memory, bounded and counted. An event is delivered, and
seen in the stream, once it is stored.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol
from uuid import uuid4

from marketflow.alerts.alert_model import (
    MOST_RULES,
    AlertRule,
    RaisedAlert,
    RuleState,
    StoredRule,
    configured_id,
)
from marketflow.alerts.evaluator import Evaluator, no_newest
from marketflow.alerts.watched_rule import WatchedRule
from marketflow.clock import Clock, milliseconds
from marketflow.errors import MarketFlowError
from marketflow.logs import RateLimit
from marketflow.model import MINUTE_MS, REFERENCE, Candles, Hole, HoleState, Mode, Tick
from marketflow.reference_price import median_of

MOST_PENDING = 10_000
"""Events that wait for the store; beyond, the oldest are dropped."""

EVENTS_AT_ONCE = 2_000
"""Events that one transaction stores at most."""

KEPT_MS = 90 * 86_400_000
"""How long events are kept."""

EXPIRE_MS = 600_000
"""How often old events are deleted."""


class RuleRefused(MarketFlowError):
    """A change of a rule is refused; `code` says why: `unknown_rule`, `configured_rule` or `too_many_rules`."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class RuleStore(Protocol):
    """Where rules and events are kept for good; every call raises Unavailable while it cannot be reached."""

    def rules(self) -> list[StoredRule]:
        """All rules, and what they have done."""
        ...

    def configure(self, rules: Sequence[StoredRule]) -> None:
        """Store the rules of the settings in place of those before."""
        ...

    def put(self, stored: StoredRule) -> None:
        """Store a rule, as one that has done nothing."""
        ...

    def delete(self, id: str) -> None:
        """Delete a rule."""
        ...

    def store(self, raised: Sequence[RaisedAlert]) -> tuple[list[RaisedAlert], int]:
        """Store events; return those that were not yet, and the number of the newest event."""
        ...

    def closes(
        self, mode: Mode, exchanges: Sequence[str], symbol: str, since_ms: int, bucket_ms: int
    ) -> list[tuple[str, int, float]]:
        """The last closes of minutes in each bucket from a time on (Unix ms): exchange, time and price."""
        ...

    def expire(self, before_ms: int) -> None:
        """Delete some of the events that were stored before a time (Unix ms)."""
        ...


class AlertService:
    """Evaluates rules and stores their events; thread-safe.

    Args:
        store: where rules and events are kept.
        configured: the rules of the settings.
        clock: wall-clock time.
        most_pending: events that wait for the store at most.
        exchanges: returns the names of all exchanges.
        newest: returns the newest tick of a symbol by exchange.
    """

    def __init__(
        self,
        store: RuleStore,
        configured: Iterable[AlertRule],
        clock: Clock,
        most_pending: int = MOST_PENDING,
        exchanges: Callable[[], Sequence[str]] = tuple,
        newest: Callable[[Mode, str], Mapping[str, Tick]] = no_newest,
    ) -> None:
        self._exchanges = exchanges
        self.evaluator = Evaluator(newest)
        self._store = store
        self._clock = clock
        self._most_pending = most_pending
        self._rules_lock = threading.Lock()
        self._pending_lock = threading.Lock()
        self._pending: dict[str, RaisedAlert] = {}
        self._configured: dict[str, StoredRule] = {}
        self.store_usable = False
        """Whether the store was reached and has its schema: nothing is asked of it before."""
        self._unread = True
        self._unwritten = True
        self._unseeded = True
        self._expired_at = 0
        self._limit = RateLimit(60.0)
        self.dropped = 0
        """Events that were dropped because too many waited."""
        self.stored: Counter[str] = Counter()
        """Events that were stored, by kind."""
        self.newest_event = 0
        """Number of the newest stored event that this process knows of."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when there is something to store, or other things are to be watched; from any thread."""
        self.on_stored: Callable[[], None] = lambda: None
        """Called when `newest_event` has grown; from any thread."""
        self.configure(configured)

    # Rules

    def configure(self, rules: Iterable[AlertRule]) -> None:
        """Evaluate these rules of the settings in place of those before; equal ones go on as they are. At once.

        They are stored soon after.
        """
        with self._rules_lock:
            found = [StoredRule(configured_id(rule), "settings", rule) for rule in rules]
            self._configured = {stored.id: stored for stored in found}
            self._unwritten = self._unseeded = True
            held = self.evaluator.rules()
            others = [watched for watched in held.values() if watched.origin == "api"]
            self.evaluator.set_rules([*(_kept(held.get(stored.id), stored) for stored in found), *others])
        self.on_change()

    def create(self, rule: AlertRule) -> StoredRule:
        """Store a new rule of the API, and evaluate it from now on.

        Raises:
            RuleRefused: there are too many.
            Unavailable: it is not stored.
        """
        with self._rules_lock:
            if len(self.evaluator.rules()) >= MOST_RULES:
                raise RuleRefused("too_many_rules")
            return self._put(StoredRule(uuid4().hex, "api", rule))

    def replace(self, id: str, rule: AlertRule) -> StoredRule:
        """Store a rule of the API in place of another one; what that one has done does not count.

        Raises:
            RuleRefused: there is none with this id, or it is one of the settings.
            Unavailable: it is not stored.
        """
        with self._rules_lock:
            self._check_own(id)
            return self._put(StoredRule(id, "api", rule))

    def delete(self, id: str) -> None:
        """Delete a rule of the API.

        Raises:
            RuleRefused: there is none with this id, or it is one of the settings.
            Unavailable: it is not deleted.
        """
        with self._rules_lock:
            self._check_own(id)
            self._store.delete(id)
            self.evaluator.remove(id)
        self.on_change()

    def _put(self, stored: StoredRule) -> StoredRule:
        self._store.put(stored)
        if not self.is_ready:  # what happened until now may be evaluated once it is
            stored = stored._replace(made_at=self._now_ms())
        self.evaluator.put(WatchedRule(stored))
        self._unseeded = True
        self.on_change()
        return stored

    def _check_own(self, id: str) -> None:
        if self._unread:
            self._read()  # else it could be unknown because none was read yet
        watched = self.evaluator.rules().get(id)
        if watched is None:
            raise RuleRefused("unknown_rule")
        if watched.origin == "settings":
            raise RuleRefused("configured_rule")

    def _read(self) -> None:
        """Read the rules of the API, and what all have done."""
        held = self.evaluator.rules()
        stored = {each.id: each for each in self._store.rules() if each.origin == "api" or each.id in held}
        for each in self._configured.values():
            if (known := stored.get(each.id)) is not None:
                each = each._replace(state=known.state, made_at=known.made_at)
            stored[each.id] = each
        self.evaluator.set_rules([_kept(held.get(each.id), each) for each in stored.values()])
        self._unread = False

    def _seed_changes(self) -> None:
        """Read the prices of the periods that begin before this run, or before their rule was made: minutes' closes."""
        for change in self.evaluator.unseeded_changes():
            since = self._now_ms() - change.period_ms - max(change.bucket_ms, MINUTE_MS)
            wanted = self._exchanges() if change.exchange in (None, REFERENCE) else [change.exchange or ""]
            closes = self._store.closes(change.mode, wanted, change.symbol, since, change.bucket_ms)
            if change.exchange == REFERENCE:
                self.evaluator.seed_change(change, _medians(closes, change.bucket_ms))
            else:
                self.evaluator.seed_change(change, [(at, price) for _, at, price in closes])
        self._unseeded = False

    def begin_again(self) -> None:
        """Read the rules of the API and older prices anew: another process has evaluated them until now."""
        with self._rules_lock:
            self.evaluator.begin_again()
            self._unread = self._unseeded = True
            with self._pending_lock:
                self._pending.clear()
        self.on_change()

    @property
    def is_ready(self) -> bool:
        """Whether all rules, what they have done, and older prices have been read."""
        return not (self._unread or self._unseeded)

    # Events

    def evaluate(self, candles: Candles) -> None:
        """Evaluate candles of new ticks; their events wait for the store."""
        self._add(self.evaluator.evaluate(candles, self._now_ms()))

    def evaluate_slice(self, candles: Candles, end: int) -> None:
        """Evaluate candles of a slice that ends at a time (Unix ms), by which prices are fresh."""
        self._add(self.evaluator.evaluate(candles, end))

    def feeds_stale(self, mode: Mode, exchanges: Sequence[str], at: int | None = None) -> None:
        """Note that feeds have become stale, now or at a time (Unix ms)."""
        self._add(self.evaluator.feeds_stale(mode, exchanges, self._now_ms() if at is None else at))

    def hole_changed(self, hole: Hole) -> None:
        """Note that a hole was found, or has changed; raises nothing, as holes are kept all the same."""
        if hole.state is not HoleState.OPEN or hole.changed_at != hole.found_at:
            return
        try:
            if self.hole_found(hole):
                self.on_change()
        except Exception as error:  # noqa: BLE001 - logged
            self._limit.log("hole", "ERROR", f"a hole cannot be evaluated, which is a bug: {error!r}")

    def hole_found(self, hole: Hole) -> bool:
        """Note a hole that was found; return whether it is an event of any rule."""
        found = self.evaluator.hole_found(hole)
        self._add(found)
        return bool(found)

    def _add(self, raised: Sequence[RaisedAlert]) -> None:
        if not raised:
            return
        with self._pending_lock:
            for each in raised:
                self._pending[each.event.id] = each
            while len(self._pending) > self._most_pending:
                self._pending.pop(next(iter(self._pending)))
                self.dropped += 1
                text = "events of alerts are dropped: more wait for PostgreSQL than memory may hold"
                self._limit.log("dropped", "ERROR", text)

    @property
    def pending(self) -> int:
        """Number of events that wait for the store."""
        return len(self._pending)

    def store_is_usable(self) -> None:
        """Note that the store was reached and has its schema."""
        self.store_usable = True

    @property
    def has_work(self) -> bool:
        """Whether anything is to be read from the store or written to it."""
        return self.store_usable and bool(self._unread or self._unwritten or self._unseeded or self._pending)

    def persist(self) -> None:
        """Read and write what is to be read and written.

        Raises:
            Unavailable: the store cannot be reached; to be repeated.
        """
        with self._rules_lock:
            changed = self._unread
            if self._unwritten:
                self._store.configure(list(self._configured.values()))
                self._unwritten = False
            if self._unread:
                self._read()
                self.evaluator.seed({})  # prices of the earlier run say nothing on rules that are made later
            self._seed_changes()
        if changed:
            self.on_change()
        while pending := self._first_pending():
            added, newest = self._store.store(pending)
            with self._pending_lock:
                for each in pending:
                    self._pending.pop(each.event.id, None)
            self.stored.update(each.event.kind for each in added)
            if newest > self.newest_event:
                self.newest_event = newest
                self.on_stored()
        self._expire()

    def _first_pending(self) -> list[RaisedAlert]:
        with self._pending_lock:
            return [each for _, each in zip(range(EVENTS_AT_ONCE), self._pending.values(), strict=False)]

    def _expire(self) -> None:
        now_ms = self._now_ms()
        if now_ms - self._expired_at >= EXPIRE_MS:
            self._expired_at = now_ms
            self._store.expire(now_ms - KEPT_MS)

    def _now_ms(self) -> int:
        return milliseconds(self._clock())


def _kept(held: WatchedRule | None, stored: StoredRule) -> WatchedRule:
    """Return the rule as it is evaluated: the one that is, if it is the same, with what is known of both."""
    if held is None or held.rule != stored.rule:
        watched = WatchedRule(stored)
        if held is not None and held.origin == stored.origin == "settings":
            watched.state = _merged(held.state, stored.state)  # its webhook has changed
        return watched
    state = _merged(held.state, stored.state)
    if state.done != held.state.done:
        return WatchedRule(stored._replace(state=state))
    held.know(state, stored.made_at)
    return held


def _merged(a: RuleState, b: RuleState) -> RuleState:
    times = [each.last_event_at for each in (a, b) if each.last_event_at is not None]
    return RuleState(max(times, default=None), a.done or b.done)


def _medians(closes: Iterable[tuple[str, int, float]], bucket_ms: int) -> list[tuple[int, float]]:
    """Return the median over exchanges in each bucket, at the time of the newest of its prices."""
    buckets: dict[int, list[tuple[int, float]]] = {}
    for _, at, price in closes:
        buckets.setdefault(at // bucket_ms, []).append((at, price))
    return [(max(at for at, _ in each), median_of([price for _, price in each])) for each in buckets.values()]
