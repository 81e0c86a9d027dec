"""Evaluates rules on candles of new ticks: the work of a candle does not depend on the number of other series' rules.

Rules are indexed by what they watch, and there by their thresholds. Candles have each tick once, so a crossing is seen
once, also where it begins and ends within a candle. A reference price or a gap is of the newest prices after each
batch of candles, which is that of a slice.
"""

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import NamedTuple, TypeVar

from marketflow.alerts.alert_model import (
    KINDS,
    AlertEvent,
    ChangeRule,
    GapRule,
    HoleRule,
    PriceRule,
    RaisedAlert,
    StaleRule,
    event_id,
    receiver_of,
)
from marketflow.alerts.level_index import Crossing, LevelIndex, Point
from marketflow.alerts.price_watch import PriceWatch
from marketflow.alerts.watched_rule import WatchedRule
from marketflow.model import REFERENCE, Candle, Candles, Hole, Mode, Series, Slot, Tick, candle_of, merge
from marketflow.reference_price import FRESH_MS, reference_price
from marketflow.text import rfc3339

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

GAPS = ""
"""Stands for an exchange where the gap between all is meant; none has this name."""


class _Key(NamedTuple):
    """What rules watch: the price of an exchange, of `reference`, of all (None), or GAPS."""

    mode: Mode
    exchange: str | None
    symbol: str


class UnseededChange(NamedTuple):
    """A change within a period whose older prices are not known: what it is of, and in which buckets it is kept."""

    mode: Mode
    exchange: str | None
    symbol: str
    period_ms: int
    bucket_ms: int


class _Market:
    """The newest price of each exchange of a symbol, and what is watched of them together."""

    def __init__(self) -> None:
        self.newest: dict[str, Tick] = {}
        self.reference: PriceWatch | None = None
        self.gaps = LevelIndex()
        self._last_gap: Point | None = None
        self._reference_at = 0
        self._moves = 0

    def take(self, exchange: str, candle: Candle) -> None:
        tick, held = candle.newest, self.newest.get(exchange)
        if held is None or held.order < tick.order:
            self.newest[exchange] = tick

    def moved_reference(self, now_ms: int) -> list[Crossing]:
        found = reference_price(self.newest.values(), now_ms) if self.reference is not None else None
        if found is None or self.reference is None:
            return []
        # By event time, so that a crossing has the same time in each process. A tick that is late moves the price, too.
        self._reference_at, self._moves = max(self._reference_at, found.at), self._moves + 1
        return self.reference.take(candle_of(Tick(found.price, self._reference_at, self._moves)))

    def moved_gap(self, now_ms: int) -> list[Crossing]:
        fresh = [tick for tick in self.newest.values() if tick.at >= now_ms - FRESH_MS]
        if not len(self.gaps) or len(fresh) < 2:
            return []
        low, high = (choose(tick.price for tick in fresh) for choose in (min, max))
        gap = Point((high - low) / low * 10_000, max(tick.at for tick in fresh))
        begin, self._last_gap = self._last_gap or gap, gap
        return self.gaps.crossed([begin, gap])


def no_newest(mode: Mode, symbol: str) -> Mapping[str, Tick]:
    """Newest ticks where there are none."""
    return {}


class Evaluator:
    """Finds events of rules; thread-safe.

    Args:
        newest: returns the newest tick of a symbol by exchange. What is watched from now on begins with them: a level
            between them and the next tick is crossed.
    """

    def __init__(self, newest: Callable[[Mode, str], Mapping[str, Tick]] = no_newest) -> None:
        self._lock = threading.Lock()
        self._newest = newest
        self._rules: dict[str, WatchedRule] = {}
        self._of_key: dict[_Key, dict[str, WatchedRule]] = {}
        self._series: dict[Series, PriceWatch] = {}
        self._all: dict[tuple[Mode, str], PriceWatch] = {}
        self._markets: dict[tuple[Mode, str], _Market] = {}
        self._stale: dict[str, WatchedRule] = {}
        self._holes: dict[str, WatchedRule] = {}
        self._webhooks = 0
        self._seeds: Mapping[Series, Tick] = {}
        self._admit_from = 0
        self.times_indexed = 0
        """Grows when other prices are watched."""

    @property
    def has_rules(self) -> bool:
        """Whether there is any rule."""
        return bool(self._rules)

    @property
    def watches_holes(self) -> bool:
        """Whether any rule needs holes."""
        return bool(self._holes)

    @property
    def watches_candles(self) -> bool:
        """Whether any rule needs candles."""
        return bool(self._of_key)

    @property
    def watches_feeds(self) -> bool:
        """Whether any rule needs the states of feeds."""
        return bool(self._stale)

    @property
    def has_webhooks(self) -> bool:
        """Whether any rule has a webhook."""
        return self._webhooks > 0

    def rules(self) -> dict[str, WatchedRule]:
        """Return all rules by id."""
        with self._lock:
            return dict(self._rules)

    def set_rules(self, rules: Iterable[WatchedRule]) -> None:
        """Evaluate these rules from now on, in place of those before."""
        given = {watched.id: watched for watched in rules}
        with self._lock:
            old = [watched for id, watched in self._rules.items() if given.get(id) is not watched]
            self._change(old, [watched for id, watched in given.items() if self._rules.get(id) is not watched])

    def put(self, watched: WatchedRule) -> None:
        """Evaluate a rule from now on, in place of one with its id."""
        with self._lock:
            old = self._rules.get(watched.id)
            self._change([] if old is None else [old], [watched])

    def remove(self, id: str) -> None:
        """Evaluate a rule no more."""
        with self._lock:
            old = self._rules.get(id)
            self._change([] if old is None else [old], [])

    def begin_again(self) -> None:
        """Forget all prices: other ones follow."""
        with self._lock:
            self._series, self._all, self._markets = {}, {}, {}
            for key in [*self._of_key]:
                self._index(key)

    def admit_from(self, at: int) -> None:
        """Admit events from a time on (Unix ms): earlier candles are only what changes are compared with."""
        self._admit_from = at

    def watched(self, series_of: Callable[[Mode, str], Iterable[Series]], mode: Mode) -> set[Series]:
        """Return the series of a mode that rules are about.

        Args:
            series_of: returns all series of a mode and symbol.
            mode: which.
        """
        with self._lock:
            keys = [key for key in self._of_key if key.mode is mode]
        found = {each for symbol in {key.symbol for key in keys} for each in series_of(mode, symbol)}
        of_all = {key.symbol for key in keys if key.exchange in (None, REFERENCE, GAPS)}
        of_one = {(key.exchange, key.symbol) for key in keys}
        return {each for each in found if each.symbol in of_all or (each.exchange, each.symbol) in of_one}

    def longest_period_ms(self, limit_ms: int) -> int:
        """Return the longest period of changes that is not above a limit (ms); 0 without any."""
        with self._lock:
            rules = [watched.rule for of_key in self._of_key.values() for watched in of_key.values()]
        periods = [rule.period_ms for rule in rules if isinstance(rule, ChangeRule)]
        return max((period for period in periods if period <= limit_ms), default=0)

    def seed(self, newest: Mapping[Series, Tick]) -> None:
        """Take newest ticks of an earlier run: a level that is crossed since then is crossed.

        They count for prices that are watched now and from now on, until other ones, or none, are given.
        """
        with self._lock:
            self._seeds = newest
            for series, watch in self._series.items():
                self._seed(series, watch)

    def _seed(self, series: Series, watch: PriceWatch) -> None:
        if (tick := self._seeds.get(series)) is not None:
            watch.seed(tick.price, tick.at)

    def unseeded_changes(self) -> list[UnseededChange]:
        """Return the changes of which no older prices were given yet."""
        with self._lock:
            return [
                UnseededChange(*key, period, bucket)
                for key, watch in self._watches()
                for period, bucket in watch.unseeded().items()
            ]

    def seed_change(self, change: UnseededChange, closes: Iterable[tuple[int, float]]) -> None:
        """Give the older prices of a change: pairs of a time (Unix ms) and a price."""
        with self._lock:
            for key, watch in self._watches():
                if key == change[:3]:
                    watch.seed_changes(change.period_ms, closes)

    def _watches(self) -> Iterator[tuple[tuple[Mode, str | None, str], PriceWatch]]:
        for series, watch in self._series.items():
            yield (series.mode, series.exchange, series.symbol), watch
        for (mode, symbol), watch in self._all.items():
            yield (mode, None, symbol), watch
        for (mode, symbol), market in self._markets.items():
            if market.reference is not None:
                yield (mode, REFERENCE, symbol), market.reference

    def _change(self, old: Iterable[WatchedRule], new: Iterable[WatchedRule]) -> None:
        keys: set[_Key] = set()
        for watched in old:
            del self._rules[watched.id]
            self._webhooks -= watched.rule.webhook is not None
            keys |= self._forget(watched)
        for watched in new:
            self._rules[watched.id] = watched
            self._webhooks += watched.rule.webhook is not None
            if not watched.state.done:
                keys |= self._remember(watched)
        for key in keys:
            self._index(key)

    def _remember(self, watched: WatchedRule) -> set[_Key]:
        match watched.rule:
            case StaleRule():
                self._stale[watched.id] = watched
            case HoleRule():
                self._holes[watched.id] = watched
        keys = _keys_of(watched)
        for key in keys:
            self._of_key.setdefault(key, {})[watched.id] = watched
        return keys

    def _forget(self, watched: WatchedRule) -> set[_Key]:
        self._stale.pop(watched.id, None)
        self._holes.pop(watched.id, None)
        keys = {key for key in _keys_of(watched) if watched.id in self._of_key.get(key, ())}
        for key in keys:
            del self._of_key[key][watched.id]
        return keys

    def _index(self, key: _Key) -> None:
        """Index the rules of one price; what was seen of it is kept as long as there are any."""
        self.times_indexed += 1
        rules = list(self._of_key[key].values())
        if not rules:
            del self._of_key[key]
        of_symbol = key.mode, key.symbol
        newest = self._newest(*of_symbol) if rules else {}
        if key.exchange is None:
            watch = _index_watch(self._all, of_symbol, rules)
            if watch is not None and newest:
                tick = max(newest.values(), key=attrgetter("order"))
                watch.seed(tick.price, tick.at)
        elif key.exchange in (REFERENCE, GAPS):
            self._index_market(key, rules, newest)
        else:
            series = Series(key.mode, key.exchange, key.symbol)
            if (watch := _index_watch(self._series, series, rules)) is not None:
                self._seed(series, watch)
                if (present := newest.get(key.exchange)) is not None:
                    watch.seed(present.price, present.at)

    def _index_market(self, key: _Key, rules: list[WatchedRule], newest: Mapping[str, Tick]) -> None:
        of_symbol = key.mode, key.symbol
        market = self._markets.setdefault(of_symbol, _Market())
        market.newest = {**newest, **market.newest}
        if key.exchange == GAPS:
            pairs = [(watched.rule.basis_points, watched) for watched in rules if isinstance(watched.rule, GapRule)]
            market.gaps = LevelIndex(up=pairs)
        elif rules:
            market.reference = market.reference or PriceWatch()
            market.reference.set_rules(rules)
            if market.newest:
                latest = max(tick.at for tick in market.newest.values())
                if (present := reference_price(market.newest.values(), latest)) is not None:
                    market.reference.seed(present.price, present.at)
        else:
            market.reference = None
        if market.reference is None and not len(market.gaps):
            del self._markets[of_symbol]

    def evaluate(self, candles: Candles, now_ms: int) -> list[RaisedAlert]:
        """Return the events of candles of new ticks, each tick of which is in one of them alone.

        Args:
            candles: of slices.
            now_ms: processing time (Unix ms), by which prices are fresh.
        """
        with self._lock:
            found: list[RaisedAlert] = []
            series_watches, all_watches, markets = self._series, self._all, self._markets
            merged: dict[tuple[int, tuple[Mode, str]], Candle] = {}
            moved: dict[tuple[Mode, str], _Market] = {}
            for slot, candle in sorted(candles.items(), key=_start):
                series = slot.series
                if (watch := series_watches.get(series)) is not None:
                    for crossing in watch.take(candle):
                        self._raise(found, crossing, series.mode)
                if not (all_watches or markets):
                    continue
                of_symbol = series.mode, series.symbol
                if of_symbol in all_watches:
                    key = slot.start, of_symbol
                    merged[key] = merge(merged[key], candle) if key in merged else candle
                if (market := markets.get(of_symbol)) is not None:
                    market.take(series.exchange, candle)
                    moved[of_symbol] = market
            for (_, of_symbol), candle in merged.items():
                for crossing in all_watches[of_symbol].take(candle):
                    self._raise(found, crossing, of_symbol[0])
            for (mode, _), market in moved.items():
                for crossing in (*market.moved_reference(now_ms), *market.moved_gap(now_ms)):
                    self._raise(found, crossing, mode)
            return self._raised(found)

    def feeds_stale(self, mode: Mode, exchanges: Sequence[str], now_ms: int) -> list[RaisedAlert]:
        """Return the events of feeds that have become stale."""
        with self._lock:
            found: list[RaisedAlert] = []
            for exchange in exchanges:
                for watched in [*self._stale.values()]:
                    if isinstance(watched.rule, StaleRule) and watched.rule.exchange in (None, exchange):
                        self._note(found, watched, mode, now_ms, f"the feed of {exchange} is stale", exchange, None)
            return self._raised(found)

    def hole_found(self, hole: Hole) -> list[RaisedAlert]:
        """Return the events of a hole that was found."""
        detail = f"those after id {hole.after_id} and before {hole.before_id}"
        with self._lock:
            found: list[RaisedAlert] = []
            mode, exchange, symbol = hole.series
            for watched in [*self._holes.values()]:
                rule = watched.rule
                if isinstance(rule, HoleRule) and rule.exchange in (None, exchange) and rule.symbol in (None, symbol):
                    text = f"trades of {symbol} on {exchange} are missing: {detail}"
                    # By when it was found: those of several exchanges are not found in the order of their trades.
                    self._note(found, watched, mode, hole.found_at, text, exchange, symbol, hole=hole)
            return self._raised(found)

    # Events

    def _raise(self, found: list[RaisedAlert], crossing: Crossing, mode: Mode) -> None:
        watched, threshold, (value, at), direction = crossing
        match rule := watched.rule:
            case PriceRule():
                way = "at or above" if direction == "up" else "at or below"
                text = f"{rule.symbol}{_place(rule.exchange)} is {way} {threshold:.12g}: {value:.12g}"
                self._note(found, watched, mode, at, text, rule.exchange, rule.symbol, crossing)
            case ChangeRule():
                text = f"{rule.symbol}{_place(rule.exchange)} has changed by {value:+.2f} % in {rule.period}"
                self._note(found, watched, mode, at, text, rule.exchange, rule.symbol, crossing)
            case GapRule():
                text = f"the gap of {rule.symbol} between exchanges is {value:.1f} bp"
                self._note(found, watched, mode, at, text, None, rule.symbol, crossing)

    def _note(
        self,
        found: list[RaisedAlert],
        watched: WatchedRule,
        mode: Mode,
        at: int,
        text: str,
        exchange: str | None,
        symbol: str | None,
        crossing: Crossing | None = None,
        hole: Hole | None = None,
    ) -> None:
        """Add the event of a rule, unless the rule is done or cools down."""
        if at < self._admit_from or not watched.admits(at):
            return
        rule = watched.rule
        direction = crossing and crossing.direction
        subject = (exchange, symbol, direction) if hole is None else (exchange, symbol, str(hole.after_id))
        event = AlertEvent(
            id=event_id(watched.id, mode, subject, at),
            rule=watched.id,
            name=rule.name,
            kind=KINDS[type(rule)],
            mode=mode,
            symbol=symbol,
            exchange=exchange,
            direction=direction,
            threshold=crossing and crossing.threshold,
            value=crossing and crossing.point.value,
            timestamp=rfc3339(_EPOCH + timedelta(milliseconds=at if hole is None else hole.from_ms)),
            text=text,
        )
        raised = RaisedAlert(event, at, watched.cooldown_ms, rule.once, receiver_of(rule))
        watched.note(raised)
        found.append(raised)

    def _raised(self, found: list[RaisedAlert]) -> list[RaisedAlert]:
        done = [self._rules[raised.event.rule] for raised in found if raised.once]
        for key in {key for watched in done for key in self._forget(watched)}:
            self._index(key)
        return found


def _keys_of(watched: WatchedRule) -> set[_Key]:
    match watched.rule:
        case PriceRule(symbol=symbol, exchange=exchange) | ChangeRule(symbol=symbol, exchange=exchange):
            return {_Key(mode, exchange, symbol) for mode in Mode}
        case GapRule(symbol=symbol):
            return {_Key(mode, GAPS, symbol) for mode in Mode}
    return set()


_T = TypeVar("_T", bound=Hashable)


def _index_watch(watches: dict[_T, PriceWatch], key: _T, rules: Sequence[WatchedRule]) -> PriceWatch | None:
    if not rules:
        watches.pop(key, None)
        return None
    watch = watches.setdefault(key, PriceWatch())
    watch.set_rules(rules)
    return watch


def _start(item: tuple[Slot, Candle]) -> int:
    return item[0].start


def _place(exchange: str | None) -> str:
    return "" if exchange is None else " (reference price)" if exchange == REFERENCE else f" on {exchange}"
