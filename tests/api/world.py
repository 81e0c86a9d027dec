"""A market in memory: stores as the pipeline would have filled them, and a client of the API.

The stores hold exactly what their ports promise: slices within their retention, minutes once they are closed.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import httpx
import msgspec
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from marketflow.alerts.alert_model import (
    AlertEvent,
    AlertRule,
    Origin,
    RuleState,
    StoredRule,
    receiver_of,
    without_webhook,
)
from marketflow.api.alerting.alert_access import AlertAccess
from marketflow.api.alerting.event_feed import EventFeed
from marketflow.api.app import create_app
from marketflow.api.context import Context
from marketflow.api.queries.prices import PriceQueries
from marketflow.api.streaming.broadcaster import Broadcaster
from marketflow.clock import NANOSECONDS_PER_MS
from marketflow.cluster.messages import FeedsQuery, FeedsReport, RuleChange, RuleChanged
from marketflow.counters import IngestCounters
from marketflow.errors import Unavailable
from marketflow.feeds.reachability import Reachability
from marketflow.health import Health, StoreState
from marketflow.model import (
    MINUTE_MS,
    Candle,
    Candles,
    FeedState,
    Hole,
    Mode,
    Series,
    Slot,
    Tick,
    candle_of,
    merge,
    merge_into,
    minute_start,
    slice_start,
)
from marketflow.settings import HttpSettings
from marketflow.settings.reloading import Changes, Names
from marketflow.stores.cache_limits import RECENT_MS
from marketflow.stores.candle_window import CandleWindow, merged
from marketflow.stores.ports import CandleRange, HoleQuery, ListedRule, NumberedEvent, SlotListener, TickListener

# httpx looks for this module at each request to an application, in all folders of sys.path, where it is missing.
sys.modules.setdefault("sniffio", None)  # type: ignore[arg-type]

NOW = 1_763_690_430_500
"""30.5 seconds into a minute: 2025-11-21T02:00:30.500Z."""

EXCHANGES = ("exchange1", "Exchange2", "exchange3")
SYMBOLS = ("BTCUSDT", "ETHUSDT")
NOTHING = Names((), (), ())


def series(exchange: str = "exchange1", symbol: str = "BTCUSDT", mode: Mode = Mode.TEST) -> Series:
    return Series(mode, exchange, symbol)


class MemoryCache:
    """A `CacheReader` in memory; `away` makes it unavailable, `on_ask` runs at each query.

    `in_memory` is whether the process that asks has a copy.
    """

    def __init__(self) -> None:
        self.newest_ticks: dict[Series, Tick] = {}
        self.slices: Candles = {}
        self.minutes: Candles = {}
        self.away = False
        self.in_memory = True
        self.on_ask: Callable[[], None] = lambda: None

    async def newest(self, series: Sequence[Series]) -> list[Tick | None]:
        await self._asked()
        return [self.newest_ticks.get(one) for one in series]

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        await self._asked()
        return self._summary(series, since, until)

    def _summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        return [
            CandleWindow(_of_series(self.slices, one), _of_series(self.minutes, one)).covered(
                since, until, self.newest_ticks.get(one)
            )
            for one in series
        ]

    async def by_minute(self, series: Sequence[Series], since: int, until: int) -> list[dict[int, Candle]]:
        await self._asked()
        return [
            CandleWindow(_of_series(self.slices, one), _of_series(self.minutes, one)).by_minute(
                since, until, self.newest_ticks.get(one)
            )
            for one in series
        ]

    def newest_in_memory(self, series: Sequence[Series]) -> list[Tick | None] | None:
        return [self.newest_ticks.get(one) for one in series] if self.in_memory and not self.away else None

    def summary_in_memory(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None] | None:
        return self._summary(series, since, until) if self.in_memory and not self.away else None

    async def _asked(self) -> None:
        self.on_ask()
        await asyncio.sleep(0)
        if self.away:
            raise Unavailable("redis://secret")


class MemoryArchive:
    """An `ArchiveReader` in memory that counts its queries; `away` makes it unavailable."""

    def __init__(self) -> None:
        self.minutes: Candles = {}
        self.away = False
        self.queries = 0

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        await self._asked()
        return [
            merged(
                candle for slot, candle in self.minutes.items() if slot.series == one and since <= slot.start < until
            )
            for one in series
        ]

    async def candles(self, series: Sequence[Series], walk: CandleRange) -> list[dict[int, Candle]]:
        await self._asked()
        return [self._walked(one, walk) for one in series]

    def _walked(self, one: Series, walk: CandleRange) -> dict[int, Candle]:
        candles: dict[int, Candle] = {}
        for slot, candle in self.minutes.items():
            if slot.series == one and walk.since <= slot.start < walk.until:
                start = minute_start(slot.start, walk.length_ms)
                candles[start] = merge(candles[start], candle) if start in candles else candle
        chosen = sorted(candles)[-walk.limit :] if walk.newest else sorted(candles)[: walk.limit]
        return {start: candles[start] for start in chosen}

    async def last(self, series: Sequence[Series]) -> list[Tick | None]:
        await self._asked()
        return [
            max(
                (candle.newest for slot, candle in self.minutes.items() if slot.series == one), default=None, key=_order
            )
            for one in series
        ]

    async def _asked(self) -> None:
        self.queries += 1
        await asyncio.sleep(0)
        if self.away:
            raise Unavailable("postgresql://secret")


class MemoryMode:
    """A `ModeSwitch` that keeps the mode in memory."""

    def __init__(self) -> None:
        self.current = Mode.TEST

    async def switch(self, mode: Mode) -> Mode:
        previous, self.current = self.current, mode
        return previous


class MemoryAnnouncements:
    """`Announcements` that a test makes; `live` from the start."""

    def __init__(self) -> None:
        self.live = True
        self.times_live = 1
        self.takers: list[TickListener] = []
        self.slot_takers: list[SlotListener] = []

    @property
    def slots(self) -> Self:
        return self

    @contextmanager
    def announcing_slots(self, take: SlotListener) -> Iterator[None]:
        self.slot_takers.append(take)
        try:
            yield
        finally:
            self.slot_takers.remove(take)

    def announce_slots(self, slots: Mapping[Slot, Candle | None]) -> None:
        for take in self.slot_takers:
            take([*slots.items()])

    @contextmanager
    def announcing(self, take: TickListener) -> Iterator[None]:
        self.takers.append(take)
        try:
            yield
        finally:
            self.takers.remove(take)

    def announce(self, *ticks: tuple[Series, Tick]) -> None:
        for take in self.takers:
            take(ticks)


class MemoryAlerts:
    """An `AlertReader` in memory, and changes of its rules; `away` makes it unavailable."""

    def __init__(self) -> None:
        self.rules: dict[str, ListedRule] = {}
        self.stored: list[AlertEvent] = []
        self.away = False
        self.refusal = ""
        self.changes: list[RuleChange] = []

    def add(self, id: str, rule: AlertRule, origin: Origin = "api", state: RuleState = RuleState()) -> None:  # noqa: B008
        stored = StoredRule(id, origin, without_webhook(rule), state)
        self.rules[id] = ListedRule(len(self.rules) + 1, stored, receiver_of(rule))

    def _ask(self) -> None:
        if self.away:
            raise Unavailable("postgresql://secret")

    async def alert_rules(self, after: int, limit: int) -> list[ListedRule]:
        self._ask()
        return [each for each in self.rules.values() if each.number > after][:limit]

    async def alert_rule(self, id: str) -> ListedRule | None:
        self._ask()
        return self.rules.get(id)

    async def alert_events(self, after: int, limit: int) -> list[NumberedEvent]:
        self._ask()
        return self._events()[after:][:limit]

    async def newest_alert_events(self, limit: int) -> list[NumberedEvent]:
        self._ask()
        return self._events()[-limit:]

    async def newest_alert_event(self) -> int:
        self._ask()
        return len(self.stored)

    def _events(self) -> list[NumberedEvent]:
        return [NumberedEvent(n, msgspec.json.encode(each).decode()) for n, each in enumerate(self.stored, 1)]

    async def change(self, change: RuleChange) -> RuleChanged:
        self.changes.append(change)
        self._ask()
        if self.refusal:
            return RuleChanged(change.id, self.refusal)
        if change.operation != "create" and change.id not in self.rules:
            return RuleChanged(change.id, "unknown_rule")
        if change.operation != "create" and self.rules[change.id].rule.origin == "settings":
            return RuleChanged(change.id, "configured_rule")
        id = change.id or "made"
        if change.rule is not None:
            self.add(id, change.rule)
        else:
            del self.rules[id]
        return RuleChanged(id)


class ShortFeed(EventFeed):
    """Ends streams after what they begin with."""

    def _announce(self) -> None:
        self._ended = True
        super()._announce()


class ShortAlerts(AlertAccess, frozen=True):
    """Alerts whose streams end at once."""

    @cached_property
    def events(self) -> EventFeed:
        return ShortFeed(self.reader, self.newest_event)


class ShortBroadcaster(Broadcaster):
    """Ends a stream after what it begins with: these clients read an answer as a whole."""

    def wake(self) -> None:
        super().wake()
        if self.is_ready:
            self.end()


@dataclass
class World:
    """Stores, mode, clock and settings of one test."""

    cache: MemoryCache = field(default_factory=MemoryCache)
    archive: MemoryArchive = field(default_factory=MemoryArchive)
    mode: MemoryMode = field(default_factory=MemoryMode)
    now: int = NOW
    token: str = field(default="", repr=False)
    ready: bool = True
    counters: IngestCounters | None = None
    announcements: MemoryAnnouncements = field(default_factory=MemoryAnnouncements)
    streams: int = 10
    redis: StoreState = "ok"
    feed: FeedState = FeedState.GENERATED
    feeds: FeedsReport = field(default_factory=lambda: FeedsReport(Mode.TEST, (), (), 0))
    feed_queries: list[FeedsQuery] = field(default_factory=list)
    reachable: list[Reachability] = field(default_factory=list)
    reloaded: Changes | Exception = field(
        default_factory=lambda: Changes(NOTHING, NOTHING, NOTHING, Names(EXCHANGES, SYMBOLS, ()), ())
    )
    missing: list[Hole] = field(default_factory=list)
    hole_queries: list[HoleQuery] = field(default_factory=list)
    alerts: MemoryAlerts = field(default_factory=MemoryAlerts)

    def trade(self, price: float, age_ms: int, one: Series | None = None) -> None:
        """Add a tick of `age_ms` ago as the pipeline would have stored it."""
        one = one or series()
        tick = Tick(price, self.now - age_ms, (self.now - age_ms) * NANOSECONDS_PER_MS)
        minute = {Slot(one, minute_start(tick.at)): candle_of(tick)}
        if minute_start(tick.at) + MINUTE_MS <= self.now:
            merge_into(self.cache.minutes, minute)
            merge_into(self.archive.minutes, minute)
        if age_ms <= RECENT_MS:
            merge_into(self.cache.slices, {Slot(one, slice_start(tick.at)): candle_of(tick)})
            self.cache.newest_ticks[one] = max(self.cache.newest_ticks.get(one, tick), tick, key=_order)

    async def report(self, query: FeedsQuery) -> FeedsReport:
        self.feed_queries.append(query)
        await self.cache._asked()
        return self.feeds

    async def reachability(self) -> list[Reachability]:
        return self.reachable

    async def holes(self, wanted: HoleQuery) -> list[Hole]:
        self.hole_queries.append(wanted)
        await self.archive._asked()
        return self.missing

    async def reload(self) -> Changes:
        if isinstance(self.reloaded, Exception):
            raise self.reloaded
        return self.reloaded

    def context(self) -> Context:
        prices = PriceQueries(self.cache, self.archive, lambda: self.now * NANOSECONDS_PER_MS)
        return Context(
            exchanges=EXCHANGES,
            symbols=SYMBOLS,
            token=self.token,
            mode=self.mode,
            prices=prices,
            health=self.health,
            counters=lambda: self.counters,
            feeds=self.report,
            alerts=ShortAlerts(self.alerts.change, self.alerts),
            reachability=self.reachability,
            holes=self,
            reload=self.reload,
            ready=lambda: self.ready,
            broadcaster=ShortBroadcaster(
                EXCHANGES, SYMBOLS, self.mode, prices, self.health, self.announcements, self.streams
            ),
        )

    def health(self) -> Health:
        return Health("ok", self.mode.current, 12.5, "ok", self.redis, {"exchange1": self.feed})

    def ask(
        self, path: str, method: str = "GET", headers: Mapping[str, str | bytes] | None = None, content: bytes = b""
    ) -> httpx.Response:
        """Send one request to a new application."""

        async def respond() -> httpx.Response:
            async with client_of(self.context()) as client:
                return await client.request(method, path, headers=_raw(headers or {}), content=content or None)

        return asyncio.run(respond())


def application_of(context: Context, http: HttpSettings = HttpSettings()) -> Starlette:  # noqa: B008 - frozen
    """Return an application whose lifespan yields this context."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[Mapping[str, Any]]:
        yield {"context": context}

    return create_app(lifespan, http)


@asynccontextmanager
async def client_of(context: Context) -> AsyncIterator[httpx.AsyncClient]:
    """Return a client of an application whose lifespan runs, as under a real server."""
    app = application_of(context)
    async with app.router.lifespan_context(app) as state:
        transport = httpx.ASGITransport(_with_state(app, dict(state or {})))
        async with httpx.AsyncClient(transport=transport, base_url="http://marketflow") as client:
            yield client


def _with_state(app: Starlette, state: dict[str, Any]) -> ASGIApp:
    async def served(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": dict(state)}, receive, send)

    return served


def _raw(headers: Mapping[str, str | bytes]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode() if isinstance(value, str) else value) for name, value in headers.items()]


def _of_series(candles: Candles, one: Series) -> dict[int, Candle]:
    return {slot.start: candle for slot, candle in candles.items() if slot.series == one}


def _order(tick: Tick) -> tuple[int, int]:
    return tick.order
