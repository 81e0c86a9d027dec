"""Which series this process writes. A standby has the ticks of a shard in memory and writes nothing of it.

Two writers of a series are harmless, since the more complete candle stays in every store: ownership saves work, and
no candle is wrong while two processes, or none, are the owner.
"""

import threading
from collections.abc import Collection, Mapping
from typing import NamedTuple, TypeVar

from reactivex import Observable
from reactivex import operators as ops
from reactivex.subject import BehaviorSubject

from marketflow.model import Series, Slot
from marketflow.settings.shards import LEAD, ShardMap
from marketflow.stores.ports import Wanted

_V = TypeVar("_V")


class Change(NamedTuple):
    """The shards that are owned after a change, and those that it has added and removed."""

    owned: frozenset[str]
    gained: frozenset[str]
    lost: frozenset[str]


class Ownership:
    """The shards that this process owns; for any thread.

    Args:
        shards: all shards that there are.
        owned: those that are owned at the start; None is all of them, for good.
    """

    def __init__(self, shards: ShardMap | None = None, owned: Collection[str] | None = None) -> None:
        self.shards = ShardMap({}) if shards is None else shards
        """All shards that there are."""
        self._lock = threading.Lock()
        self._owned = BehaviorSubject(None if owned is None else frozenset(owned))
        self.at_start = self.owned
        """The shards that were written here at the start."""

    @property
    def owned(self) -> frozenset[str]:
        """The shards that are written here, LEAD among them where this process leads."""
        owned = self._owned.value
        return frozenset((*self.shards.names, LEAD)) if owned is None else owned

    @property
    def everything(self) -> bool:
        """Whether all shards are owned here, for good."""
        return self._owned.value is None

    @property
    def leads(self) -> bool:
        """Whether this process is the leader, which does what one process does for all."""
        return LEAD in self.owned

    def take(self, owned: Collection[str], shards: ShardMap | None = None) -> None:
        """Own these shards from now on.

        Args:
            owned: their names.
            shards: all shards that there are, if they have changed.
        """
        with self._lock:
            if shards is not None:
                self.shards = shards
            if (after := frozenset(owned)) != self._owned.value:
                self._owned.on_next(after)

    def changes(self) -> Observable[Change]:
        """Emit each change since the start; those before the subscription as one."""

        def change(before: Change, owned: frozenset[str] | None) -> Change:
            now = self.at_start if owned is None else owned
            return Change(now, now - before.owned, before.owned - now)

        initial = Change(self.at_start, frozenset(), frozenset())

        def differs(each: Change) -> bool:
            return bool(each.gained or each.lost)

        return self._owned.pipe(ops.scan(change, initial), ops.filter(differs))

    def within(self, shards: Collection[str]) -> Wanted:
        """Return a function that returns whether a series is in some shards."""
        shard_of = self.shards.of
        return lambda series: shard_of(series) in shards

    def series_in(self, shards: Collection[str], items: Mapping[Series, _V]) -> dict[Series, _V]:
        """Return the items whose series is in some shards."""
        shard_of = self.shards.of
        return {series: item for series, item in items.items() if shard_of(series) in shards}

    def slots_in(self, shards: Collection[str], candles: Mapping[Slot, _V]) -> dict[Slot, _V]:
        """Return the items whose slot is of a series in some shards."""
        shard_of = self.shards.of
        return {slot: item for slot, item in candles.items() if shard_of(slot.series) in shards}
