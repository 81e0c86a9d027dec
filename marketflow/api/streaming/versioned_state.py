"""Versioned state of the stream: newest prices, candles, mode and health, from which snapshots and deltas are made.

Every change increments the version. A subscriber's position holds the version that it has received, so one delta
serves all subscribers with the same subscription and position.
"""

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple
from uuid import uuid4

import msgspec
from msgspec import UNSET, UnsetType

from marketflow.api.rendering import rfc3339
from marketflow.api.streaming.candle_stream.candle_log import CandleLog
from marketflow.api.streaming.candle_stream.candle_series import CandleSeries, CandleSlot
from marketflow.api.streaming.encoding import Batch, Message, encode
from marketflow.api.streaming.events import (
    ChangedCandles,
    ChangedMode,
    ChangedPrices,
    End,
    Heartbeat,
    Snapshot,
    StreamCandle,
    StreamPrice,
)
from marketflow.api.streaming.subscription import Pair, Subscription
from marketflow.health import Health
from marketflow.model import REFERENCE, Mode, Series, Tick
from marketflow.reference_price import reference_price


class Position(NamedTuple):
    """What a subscriber has received.

    Args:
        epoch: number of mode switches before the last event; -1 before the first event.
        mode: the mode that was sent last.
        has_snapshot: whether the snapshot of that epoch was sent.
        version: the last change that was sent.
        heartbeat: number of the last heartbeat that was sent.
    """

    epoch: int
    mode: Mode | None
    has_snapshot: bool
    version: int
    heartbeat: int


START = Position(-1, None, False, 0, -1)
"""The position of a subscriber that has received nothing."""


class _VersionedTick(NamedTuple):
    tick: Tick
    version: int
    exchanges: int | UnsetType = UNSET
    """Number of exchanges that a reference price is made of."""


_Delta = tuple[Batch | None, Position]


class VersionedState:
    """The newest tick of each series in the current mode, candles, and the health; each with the version of its last
    change.

    Reference prices are made of the newest ticks, for as long as there are subscribers to them.

    Args:
        pairs: all series.
        mode: the current mode.
        on_change: called after each change.
        horizon: returns the latest event time (Unix ms) that a tick can have at present.
        now: returns the time (Unix ms) by which prices are fresh.
    """

    def __init__(
        self,
        pairs: frozenset[Pair],
        mode: Mode,
        on_change: Callable[[], None],
        horizon: Callable[[], int] = lambda: sys.maxsize,
        now: Callable[[], int] = lambda: 0,
    ) -> None:
        self._horizon = horizon
        self._now = now
        self._pairs = pairs
        self._on_change = on_change
        self._run = uuid4().hex[:12]
        self._newest: dict[Pair, _VersionedTick] = {}  # ordered by version
        self._exchanges = _exchanges_by_symbol(pairs)
        self._references: Counter[str] = Counter()  # subscribers by symbol
        self._candles = CandleLog()
        self._version = 0
        self._health: Health | None = None
        self._health_version = 0
        self._heartbeat = 0
        self._now_ms = 0
        self._ended = False
        self._deltas: dict[tuple[Subscription, Position], _Delta] = {}
        self._deltas_without_prices: dict[tuple[Subscription, Position], _Delta] = {}
        self._version_without_prices = 0
        self._stamp_without_prices = 0
        self.mode = mode
        self.epoch = 0
        """Number of mode switches."""
        self.complete = False
        """Whether the newest ticks of this mode were read from the cache."""
        self._stamp = 0

    @property
    def is_ready(self) -> bool:
        """Whether a snapshot can be made."""
        return self.complete and self._health is not None

    def stamp_for(self, subscription: Subscription) -> int:
        """Return the number of changes that concern a subscription, heartbeats included.

        Prices do not concern one without them: a thousand subscribers to candles are not visited at each tick.
        """
        return self._stamp if subscription.pairs else self._stamp_without_prices

    # Changes

    def switch(self, mode: Mode, health: Health) -> None:
        """Begin an epoch of another mode, without ticks."""
        self.mode = mode
        self.epoch += 1
        self._newest.clear()
        self._candles.clear()
        self.complete = False
        self._version += 1
        self.put_health(health)
        self._changed()

    def put(self, ticks: Sequence[tuple[Series, Tick]]) -> None:
        """Store the ticks that belong to the current mode and are newer than those stored."""
        version, horizon = self._version + 1, self._horizon()
        for (mode, exchange, symbol), tick in ticks:
            pair = exchange, symbol
            if mode is not self.mode or pair not in self._pairs:
                continue
            stored = self._newest.get(pair)
            # A tick beyond the horizon was stored before the clock was set back; kept, it would mask all later ones.
            if stored is None or stored.tick.order < tick.order or stored.tick.at > horizon:
                self._newest.pop(pair, None)
                self._newest[pair] = _VersionedTick(tick, version)
                self._version = version
        if self._version == version:
            if self._references:
                self._put_references({symbol for (_, _, symbol), _ in ticks} & self._references.keys(), version)
            self._changed(prices_alone=True)

    def follow_references(self, symbols: Iterable[str], subscribers: int) -> None:
        """Count subscribers to the reference prices of symbols; a negative number has left."""
        for symbol in symbols:
            self._references[symbol] += subscribers
            if not self._references[symbol]:
                del self._references[symbol]
                self._newest.pop((REFERENCE, symbol), None)
        self.refresh_references()

    def refresh_references(self) -> None:
        """Make the reference prices anew: without a tick they change when a price is fresh no longer."""
        version = self._version + 1
        if self._references and self._put_references(self._references, version):
            self._version = version
            self._changed(prices_alone=True)

    def _put_references(self, symbols: Iterable[str], version: int) -> bool:
        """Store the reference prices of symbols that have changed; return whether any has."""
        changed, now_ms = False, self._now()
        for symbol in symbols:
            pair = REFERENCE, symbol
            held = [self._newest.get((exchange, symbol)) for exchange in self._exchanges[symbol]]
            found = reference_price([each and each.tick for each in held], now_ms)
            stored = self._newest.get(pair)
            if found is not None:
                new = Tick(found.price, found.at, max(each.tick.sequence for each in held if each)), found.exchanges
            elif stored is not None:
                new = stored.tick, 0
            else:
                continue
            if stored is None or new != (stored.tick, stored.exchanges):
                self._newest.pop(pair, None)
                self._newest[pair] = _VersionedTick(new[0], version, new[1])
                changed = True
        return changed

    def begin_candles(self, series: CandleSeries, candles: Iterable[tuple[int, StreamCandle]]) -> None:
        """Stream a candle series from now on; its snapshot has these candles by start, the oldest first."""
        self._version += 1
        self._candles.begin(series, candles, self._version)
        self._changed()

    def end_candles(self, series: CandleSeries) -> None:
        """Stream a candle series no longer: it has no subscribers."""
        self._candles.end(series)

    def put_candles(self, changed: Iterable[tuple[CandleSlot, StreamCandle]]) -> None:
        """Store candles that have changed, of series that are streamed."""
        self._version += 1
        for slot, candle in changed:
            self._candles.put(slot, candle, self._version)
        self._candles.evict()
        self._changed()

    def take_pairs(self, pairs: frozenset[Pair]) -> None:
        """Replace the series."""
        self._pairs = pairs
        self._exchanges = _exchanges_by_symbol(pairs)
        known = pairs | {(REFERENCE, symbol) for symbol in self._exchanges}
        self._newest = {pair: newest for pair, newest in self._newest.items() if pair in known}
        self._changed()

    def put_health(self, health: Health) -> None:
        """Store the health; a change of the uptime alone is no change."""
        before, self._health = self._health, health  # the uptime is part of a snapshot
        if before is None or _without_uptime(health) != _without_uptime(before):
            self._version += 1
            self._health_version = self._version
            self._changed()

    def mark_complete(self) -> None:
        """Allow snapshots: the cache was read."""
        if not self.complete:
            self.complete = True
            self._changed()

    def beat(self, now_ms: int) -> None:
        """Issue a heartbeat; `now_ms` is the server's time (Unix ms)."""
        self._heartbeat += 1
        self._now_ms = now_ms
        self._changed()

    def end(self) -> None:
        """Issue the last event."""
        if not self._ended:
            self._ended = True
            self._changed()

    def _changed(self, prices_alone: bool = False) -> None:
        self._stamp += 1
        self._deltas.clear()
        if not prices_alone:
            self._stamp_without_prices += 1
            self._version_without_prices = self._version
            self._deltas_without_prices.clear()
        self._on_change()

    # Snapshots and deltas

    def position(self, subscription: Subscription, last_id: str) -> Position:
        """Return the position after the event with this id, or `START` where the id is of another process."""
        found = _ID.fullmatch(last_id)
        if found is None or found["run"] != self._run or found["subscription"] != subscription.digest:
            return START
        epoch, version = int(found["epoch"]), int(found["version"])
        if epoch > self.epoch or version > self._version:
            return START
        return Position(epoch, Mode(found["mode"]), True, version, -1)  # a heartbeat confirms the connection

    def delta(self, subscription: Subscription, after: Position) -> _Delta:
        """Return the events after a position, if there are any, and the position after them."""
        deltas = self._deltas if subscription.pairs else self._deltas_without_prices
        if (delta := deltas.get((subscription, after))) is None:
            delta = deltas[subscription, after] = self._make_delta(subscription, after)
        return delta

    def _make_delta(self, subscription: Subscription, after: Position) -> _Delta:
        has_snapshot = after.has_snapshot and after.epoch == self.epoch
        is_ready = self.is_ready and self._candles.has(subscription.candle_series)
        if has_snapshot and not is_ready and not self._ended:
            return None, after  # one that resumes receives all changes at once, when the cache was read
        if has_snapshot and is_ready and not self._candles.has_all_since(subscription.candle_series, after.version):
            has_snapshot = False
        events: list[msgspec.Struct] = []
        if after.mode is not None and after.mode is not self.mode:
            events.append(ChangedMode(self.mode, after.mode))
        if has_snapshot:
            events += self._changes(subscription, after.version)
        elif is_ready:
            has_snapshot = True
            events.append(self._snapshot(subscription))
        if has_snapshot and after.heartbeat != self._heartbeat and after != START:
            events.append(Heartbeat(rfc3339(self._now_ms)))
        if self._ended:
            events.append(End("shutdown"))
        version = self._version if subscription.pairs else self._version_without_prices
        now = Position(self.epoch, self.mode, has_snapshot, version, self._heartbeat)
        return (Batch(self._with_ids(subscription, events, after, now)) if events else None), now

    def _with_ids(
        self, subscription: Subscription, events: list[msgspec.Struct], before: Position, after: Position
    ) -> list[Message]:
        """Encode events; only the last state event carries the id of the position after the batch.

        The earlier ones carry the id from before it: a client that is cut off within a batch receives all of it again,
        and every event replaces what it repeats.
        """
        id_before, id_after = self._id(subscription, before), self._id(subscription, after)
        last = max((n for n, event in enumerate(events) if not isinstance(event, (Heartbeat, End))), default=0)
        return [encode(event, id_before if n < last else id_after) for n, event in enumerate(events)]

    def _snapshot(self, subscription: Subscription) -> Snapshot:
        assert self._health is not None, "it is ready"
        prices = self._prices([pair for pair in subscription.pairs if pair in self._newest])
        return Snapshot(
            self.mode,
            list(subscription.symbols),
            list(subscription.exchanges),
            prices,
            self._health,
            self._candles.snapshot(subscription.candle_series) if subscription.candles else UNSET,
        )

    def _changes(self, subscription: Subscription, version: int) -> Iterator[msgspec.Struct]:
        if self._health is not None and self._health_version > version:
            yield self._health
        changed: list[Pair] = []
        for pair in reversed(self._newest if subscription.pairs else ()):
            if self._newest[pair].version <= version:
                break
            if pair in subscription.chosen:
                changed.append(pair)
        if changed:
            yield ChangedPrices(self._prices(changed))
        if subscription.candles and (candles := self._candles.changes(subscription.candles, version)):
            yield ChangedCandles(candles)

    def _prices(self, pairs: list[Pair]) -> list[StreamPrice]:
        """Return prices in the order of event time; ticks of several exchanges at one time in that of arrival."""
        ticks = [(self._newest[pair], *pair) for pair in pairs]
        ticks.sort(key=lambda each: each[0].tick.order)
        return [
            StreamPrice(symbol, exchange, tick.price, rfc3339(tick.at), exchanges)
            for (tick, _, exchanges), exchange, symbol in ticks
        ]

    def _id(self, subscription: Subscription, position: Position) -> str:
        if not position.has_snapshot:
            return self._run
        return f"{self._run}-{position.mode}-{position.epoch}-{position.version}-{subscription.digest}"


_ID = re.compile(
    r"(?P<run>[0-9a-f]{12})-(?P<mode>test|live)-(?P<epoch>[0-9]{1,9})-(?P<version>[0-9]{1,18})"
    r"-(?P<subscription>[0-9a-f]+)"
)


def _without_uptime(health: Health) -> Health:
    return msgspec.structs.replace(health, uptime_seconds=0.0)


def _exchanges_by_symbol(pairs: Iterable[Pair]) -> defaultdict[str, list[str]]:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for exchange, symbol in pairs:
        found[symbol].append(exchange)
    return found
