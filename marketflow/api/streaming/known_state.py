"""What is known at a moment, and what it means to a client that has seen so and so much of it.

Whatever changes gets a number, one greater than that of any change before it. What a client has seen is told by the
number of the last change, so that everything after it can be told, once for all clients at the same position.
"""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from uuid import uuid4

import msgspec

from marketflow.api.rendering import rfc3339
from marketflow.api.routes.latest_price import LatestPrice
from marketflow.api.streaming.events import (
    Batch,
    ChangedMode,
    ChangedPrices,
    End,
    Heartbeat,
    Message,
    Snapshot,
    message,
)
from marketflow.api.streaming.selection import Pair, Selection
from marketflow.health import Health
from marketflow.model import Mode, Series, Tick


class Position(NamedTuple):
    """What a client has seen.

    Args:
        epoch: of which mode, counted from the start; -1 of none.
        mode: the mode it was last told.
        whole: whether it has had a snapshot of that epoch.
        version: the last change that it has seen.
        beat: the last heartbeat.
    """

    epoch: int
    mode: Mode | None
    whole: bool
    version: int
    beat: int


NOTHING = Position(-1, None, False, 0, -1)


class _Newest(NamedTuple):
    tick: Tick
    version: int


class Known:
    """The newest price of each series of the mode that runs, and the health.

    Args:
        pairs: the series that there are.
        mode: the mode that runs.
        changed: called after each change.
        horizon: the latest event time (Unix ms) that a tick can have at present.
    """

    def __init__(
        self,
        pairs: frozenset[Pair],
        mode: Mode,
        changed: Callable[[], None],
        horizon: Callable[[], int] = lambda: sys.maxsize,
    ) -> None:
        self._horizon = horizon
        self._pairs = pairs
        self._announce = changed
        self._run = uuid4().hex[:12]
        self._newest: dict[Pair, _Newest] = {}  # the one that changed last is the last one
        self._version = 0
        self._health: Health | None = None
        self._health_version = 0
        self._beat = 0
        self._now_ms = 0
        self._ended = False
        self._steps: dict[tuple[Selection, Position], tuple[Batch | None, Position]] = {}
        self.mode = mode
        self.epoch = 0
        """How often it has been another one."""
        self.complete = False
        """Whether what the cache has of this mode is known."""
        self.stamp = 0
        """Another one after each change."""

    @property
    def is_ready(self) -> bool:
        """Whether a client can be told how things are."""
        return self.complete and self._health is not None

    # Changes

    def switch(self, mode: Mode, health: Health) -> None:
        """Another mode runs."""
        self.mode = mode
        self.epoch += 1
        self._newest.clear()
        self.complete = False
        self._version += 1
        self.put_health(health)
        self._changed()

    def put(self, ticks: Sequence[tuple[Series, Tick]]) -> None:
        """Take ticks, as far as they are of this mode and newer than what is known."""
        version, horizon = self._version + 1, self._horizon()
        for (mode, exchange, symbol), tick in ticks:
            pair = exchange, symbol
            if mode is not self.mode or pair not in self._pairs:
                continue
            known = self._newest.get(pair)
            # A tick beyond the horizon is from before the clock was set back; while it counts, no later one does.
            if known is None or known.tick.order < tick.order or known.tick.at > horizon:
                self._newest.pop(pair, None)
                self._newest[pair] = _Newest(tick, version)
                self._version = version
        if self._version == version:
            self._changed()

    def put_health(self, health: Health) -> None:
        """Take how the application does, if anything but the uptime is another."""
        before, self._health = self._health, health  # a snapshot tells the uptime as well
        if before is None or _state(health) != _state(before):
            self._version += 1
            self._health_version = self._version
            self._changed()

    def finish(self) -> None:
        """All that there is was put."""
        if not self.complete:
            self.complete = True
            self._changed()

    def beat(self, now_ms: int) -> None:
        """It is time for a sign of life; `now_ms` is the server's time (Unix ms)."""
        self._beat += 1
        self._now_ms = now_ms
        self._changed()

    def end(self) -> None:
        """Nothing more is to come."""
        if not self._ended:
            self._ended = True
            self._changed()

    def _changed(self) -> None:
        self.stamp += 1
        self._steps.clear()
        self._announce()

    # What a client is told

    def position(self, selection: Selection, last_id: str) -> Position:
        """Where a client goes on that has seen the event with this id last."""
        found = _ID.fullmatch(last_id)
        if found is None or found["run"] != self._run or found["selection"] != selection.digest:
            return NOTHING
        epoch, version = int(found["epoch"]), int(found["version"])
        if epoch > self.epoch or version > self._version:
            return NOTHING
        return Position(epoch, Mode(found["mode"]), True, version, -1)  # a heartbeat tells it that it is connected

    def step(self, selection: Selection, seen: Position) -> tuple[Batch | None, Position]:
        """What a client at this position is to be told, if anything, and where it is then."""
        if (step := self._steps.get((selection, seen))) is None:
            step = self._steps[selection, seen] = self._made(selection, seen)
        return step

    def _made(self, selection: Selection, seen: Position) -> tuple[Batch | None, Position]:
        whole = seen.whole and seen.epoch == self.epoch
        news: list[msgspec.Struct] = []
        if seen.mode is not None and seen.mode is not self.mode:
            news.append(ChangedMode(self.mode, seen.mode))
        if whole:
            news += self._changes(selection, seen.version)
        elif self.is_ready:
            whole = True
            news.append(self._snapshot(selection))
        if whole and seen.beat != self._beat and seen != NOTHING:
            news.append(Heartbeat(rfc3339(self._now_ms)))
        if self._ended:
            news.append(End("shutdown"))
        now = Position(self.epoch, self.mode, whole, self._version, self._beat)
        return (Batch(self._with_ids(selection, news, seen, now)) if news else None), now

    def _with_ids(
        self, selection: Selection, news: list[msgspec.Struct], seen: Position, now: Position
    ) -> list[Message]:
        """Events, each with the id after which a client lacks nothing but what follows it.

        A client cut off within a batch has seen no more than before it: what comes again replaces itself.
        """
        before, after = self._id(selection, seen), self._id(selection, now)
        last = max((n for n, each in enumerate(news) if not isinstance(each, (Heartbeat, End))), default=0)
        return [message(each, before if n < last else after) for n, each in enumerate(news)]

    def _snapshot(self, selection: Selection) -> Snapshot:
        assert self._health is not None, "it is ready"
        prices = self._prices([pair for pair in selection.pairs if pair in self._newest])
        return Snapshot(self.mode, list(selection.symbols), list(selection.exchanges), prices, self._health)

    def _changes(self, selection: Selection, version: int) -> Iterator[msgspec.Struct]:
        if self._health is not None and self._health_version > version:
            yield self._health
        changed = []
        for pair in reversed(self._newest):
            if self._newest[pair].version <= version:
                break
            if pair in selection.chosen:
                changed.append(pair)
        if changed:
            yield ChangedPrices(self._prices(changed))

    def _prices(self, pairs: list[Pair]) -> list[LatestPrice]:
        """The newest last: ticks of several exchanges may have the same time, and arrival has an order all the same."""
        ticks = [(self._newest[pair].tick, *pair) for pair in pairs]
        ticks.sort(key=lambda each: each[0].order)
        return [LatestPrice(symbol, exchange, tick.price, rfc3339(tick.at)) for tick, exchange, symbol in ticks]

    def _id(self, selection: Selection, position: Position) -> str:
        if not position.whole:
            return self._run
        return f"{self._run}-{position.mode}-{position.epoch}-{position.version}-{selection.digest}"


_ID = re.compile(
    r"(?P<run>[0-9a-f]{12})-(?P<mode>test|live)-(?P<epoch>[0-9]{1,9})-(?P<version>[0-9]{1,18})-(?P<selection>[0-9a-f]+)"
)


def _state(health: Health) -> Health:
    return msgspec.structs.replace(health, uptime_seconds=0.0)
