"""Versioned state of the stream: newest prices, mode and health, from which snapshots and deltas are made.

Every change increments the version. A subscriber's position holds the version that it has received, so one delta
serves all subscribers with the same subscription and position.
"""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from uuid import uuid4

import msgspec

from marketflow.api.rendering import rfc3339
from marketflow.api.routes.latest_price import LatestPrice
from marketflow.api.streaming.encoding import Batch, Message, encode
from marketflow.api.streaming.events import ChangedMode, ChangedPrices, End, Heartbeat, Snapshot
from marketflow.api.streaming.subscription import Pair, Subscription
from marketflow.health import Health
from marketflow.model import Mode, Series, Tick


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


class VersionedState:
    """The newest tick of each series in the current mode, and the health; each with the version of its last change.

    Args:
        pairs: all series.
        mode: the current mode.
        on_change: called after each change.
        horizon: returns the latest event time (Unix ms) that a tick can have at present.
    """

    def __init__(
        self,
        pairs: frozenset[Pair],
        mode: Mode,
        on_change: Callable[[], None],
        horizon: Callable[[], int] = lambda: sys.maxsize,
    ) -> None:
        self._horizon = horizon
        self._pairs = pairs
        self._on_change = on_change
        self._run = uuid4().hex[:12]
        self._newest: dict[Pair, _VersionedTick] = {}  # ordered by version
        self._version = 0
        self._health: Health | None = None
        self._health_version = 0
        self._heartbeat = 0
        self._now_ms = 0
        self._ended = False
        self._deltas: dict[tuple[Subscription, Position], tuple[Batch | None, Position]] = {}
        self.mode = mode
        self.epoch = 0
        """Number of mode switches."""
        self.complete = False
        """Whether the newest ticks of this mode were read from the cache."""
        self.stamp = 0
        """Number of changes, heartbeats included."""

    @property
    def is_ready(self) -> bool:
        """Whether a snapshot can be made."""
        return self.complete and self._health is not None

    # Changes

    def switch(self, mode: Mode, health: Health) -> None:
        """Begin an epoch of another mode, without ticks."""
        self.mode = mode
        self.epoch += 1
        self._newest.clear()
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

    def _changed(self) -> None:
        self.stamp += 1
        self._deltas.clear()
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

    def delta(self, subscription: Subscription, after: Position) -> tuple[Batch | None, Position]:
        """Return the events after a position, if there are any, and the position after them."""
        if (delta := self._deltas.get((subscription, after))) is None:
            delta = self._deltas[subscription, after] = self._make_delta(subscription, after)
        return delta

    def _make_delta(self, subscription: Subscription, after: Position) -> tuple[Batch | None, Position]:
        has_snapshot = after.has_snapshot and after.epoch == self.epoch
        if has_snapshot and not self.is_ready and not self._ended:
            return None, after  # one that resumes receives all changes at once, when the cache was read
        events: list[msgspec.Struct] = []
        if after.mode is not None and after.mode is not self.mode:
            events.append(ChangedMode(self.mode, after.mode))
        if has_snapshot:
            events += self._changes(subscription, after.version)
        elif self.is_ready:
            has_snapshot = True
            events.append(self._snapshot(subscription))
        if has_snapshot and after.heartbeat != self._heartbeat and after != START:
            events.append(Heartbeat(rfc3339(self._now_ms)))
        if self._ended:
            events.append(End("shutdown"))
        now = Position(self.epoch, self.mode, has_snapshot, self._version, self._heartbeat)
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
        return Snapshot(self.mode, list(subscription.symbols), list(subscription.exchanges), prices, self._health)

    def _changes(self, subscription: Subscription, version: int) -> Iterator[msgspec.Struct]:
        if self._health is not None and self._health_version > version:
            yield self._health
        changed = []
        for pair in reversed(self._newest):
            if self._newest[pair].version <= version:
                break
            if pair in subscription.chosen:
                changed.append(pair)
        if changed:
            yield ChangedPrices(self._prices(changed))

    def _prices(self, pairs: list[Pair]) -> list[LatestPrice]:
        """Return prices in the order of event time; ticks of several exchanges at one time in that of arrival."""
        ticks = [(self._newest[pair].tick, *pair) for pair in pairs]
        ticks.sort(key=lambda each: each[0].order)
        return [LatestPrice(symbol, exchange, tick.price, rfc3339(tick.at)) for tick, exchange, symbol in ticks]

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
